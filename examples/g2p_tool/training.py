"""One training: the model, its averaged weights, the optimiser, the schedule, and all of it as one state."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from g2p_tool.data import PAD, Batch, Pairs
from g2p_tool.model import build

TRAIN_SETTINGS = {
    "batch": 128,
    "epochs": 6.0,
    "steps": None,  # overrides epochs
    "lr": 2e-3,
    "warmup": 200,
    "decay": "linear",
    "clip": 1.0,
    "smoothing": 0.1,
    "ema": 0.999,
    "bf16": None,  # where the CPU computes in it
    "seed": 0,
}

SINCE = ("loss", "norm", "places", "steps", "words")


def learning_rate(step: int, settings: dict[str, Any], steps: int) -> float:
    """The rate of a step, numbered from 0. It rises linearly to `lr` over the warm-up and falls to 0 at the end.

    Only the number of the step decides, so that a resumed training goes on as if it had not stopped.
    """
    warmup = min(settings["warmup"], steps)
    if step < warmup:
        return settings["lr"] * (step + 1) / warmup
    left = (steps - step) / max(steps - warmup, 1)  # 1 after the warm-up, 1 / (steps - warmup) at the last step
    return settings["lr"] * (left if settings["decay"] == "linear" else (1 - math.cos(math.pi * left)) / 2)


def loss_of(model: nn.Module, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the real places of a batch (phonemes and END): padding has no part in it."""
    logits = model(batch.letters, batch.lengths, batch.given).float()
    wanted = batch.wanted.flatten()
    return cross_entropy(logits.flatten(0, 1), wanted, ignore_index=PAD, label_smoothing=smoothing)


class Training:
    """What changes from step to step. Its results depend on the settings, the data and the number of threads only.

    Args:
        settings: MODEL_SETTINGS and TRAIN_SETTINGS, filled in.
        pairs: what to train on.
    """

    def __init__(self, settings: dict[str, Any], pairs: Pairs) -> None:
        self.settings, self.pairs = settings, pairs
        self.per_epoch = math.ceil(len(pairs) / settings["batch"])
        self.steps = settings["steps"] or max(1, round(settings["epochs"] * self.per_epoch))
        torch.manual_seed(settings["seed"])
        self.model = build(settings)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings["lr"], betas=(0.9, 0.998), fused=True)
        self.step = 0  # steps made
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None  # the report with the lowest word error rate
        self.since: dict[str, float] = dict.fromkeys(SINCE, 0.0)  # the last report
        self._epoch, self._order = -1, []

    def next_batch(self) -> Batch:
        """The batch of the step to come. The seed and the step decide which: there is no other state to save."""
        epoch, place = divmod(self.step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.pairs.epoch(self.settings["batch"], self.settings["seed"], epoch)
        return self.pairs.batch(self._order[place])

    def advance(self) -> float:
        """One step; its loss. Raises FloatingPointError where the loss or the gradient is not finite."""
        batch = self.next_batch()
        rate = learning_rate(self.step, self.settings, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(self.settings["bf16"])):
            loss = loss_of(self.model, batch, self.settings["smoothing"])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["clip"])
        value, size = loss.item(), norm.item()
        if not math.isfinite(value + size):
            raise FloatingPointError(
                f"step {self.step + 1}: wanted a finite loss and gradient, got loss {value} and gradient norm {size}"
            )
        self.optimizer.step()
        self.step += 1
        self._follow()
        places = int((batch.wanted != PAD).sum())
        for name, x in zip(SINCE, (value * places, size, places, 1, len(batch.lengths)), strict=True):
            self.since[name] += x
        return value

    @torch.no_grad()
    def _follow(self) -> None:
        """The averaged weights go a little towards the model's: much at first, when these change fast."""
        share = 1 - min(self.settings["ema"], self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), share)

    def means(self) -> dict[str, float]:
        """Loss per place, and norm of the gradient, since the last call."""
        since, self.since = self.since, dict.fromkeys(SINCE, 0.0)
        means = {"loss": since["loss"] / max(since["places"], 1), "grad_norm": since["norm"] / max(since["steps"], 1)}
        return means

    def state(self) -> dict[str, Any]:
        """Everything that a training needs to go on bit for bit."""
        return {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "steps": self.steps,
            "pairs": len(self.pairs),
            "seconds": self.seconds,
            "best": self.best,
            "since": self.since,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state of the same settings. Raises ValueError if the data is not what it was."""
        if state["pairs"] != len(self.pairs):
            raise ValueError(
                f"the checkpoint was trained on {state['pairs']} pairs, the dictionary now has {len(self.pairs)}"
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.step, self.seconds, self.best, self.since = (state[x] for x in ("step", "seconds", "best", "since"))
