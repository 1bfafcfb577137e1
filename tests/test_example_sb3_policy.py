"""examples/sb3_policy.py: sb3-contrib's recurrent PPO in one call does what its loop does; and its benchmark."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from bench import policy as bench  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads that wait for each other at every step of the loop take minutes on a busy machine."""
    torch.set_num_threads(1)


def test_the_benchmark_says_what_is_missing(tmp_path):
    """In a process that cannot import sb3-contrib."""
    code = f"import sys; sys.modules['sb3_contrib'] = None; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "from bench import policy; raise SystemExit(policy.main(['--json', sys.argv[1]]))"
    path = tmp_path / "lines.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == bench.MISSING and "pip install sb3-contrib" in done.stderr and not path.exists()


@pytest.fixture(scope="module")
def sb3():
    pytest.importorskip("sb3_contrib")
    spec = importlib.util.spec_from_file_location("sb3_policy", ROOT / "examples" / "sb3_policy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("starts", [True, False])
def test_same_outputs_and_gradients_as_the_loop(sb3, starts):
    ours, theirs = bench.sequences(sb3, 5, starts)
    assert bool(ours.starts.any()) == starts
    bench.same(ours.results(), theirs.results())
    ours.starts = ours.starts.roll(1)
    if starts:  # the comparison sees a start in the wrong place
        with pytest.raises(AssertionError):
            bench.same(ours.results(), theirs.results())


def test_a_step_of_acting(sb3):
    """T = 1: a row that starts an episode forgets its state."""
    lstm, batch = torch.nn.LSTM(3, 8).eval(), 4
    x, h, c = torch.randn(batch, 3), torch.randn(1, batch, 8), torch.randn(1, batch, 8)
    starts = torch.tensor([0.0, 1.0, 0.0, 1.0])
    loop = sb3.RecurrentActorCriticPolicy._process_sequence
    with torch.no_grad():
        want = loop(x, (h, c), starts, lstm)
        got = sb3.OneCallPolicy._process_sequence(x, (h, c), starts, sb3.seqkern.accelerate(lstm))
    torch.testing.assert_close(got, want)


def test_same_losses_from_the_same_seed(sb3):
    settings = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "policy_kwargs": {"lstm_hidden_size": 16}}
    ours, theirs = (sb3.learn(p, 256, **settings) for p in (sb3.OneCallPolicy, "MlpLstmPolicy"))
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-4)
    assert ours != pytest.approx(sb3.learn(sb3.OneCallPolicy, 256, seed=1, **settings), rel=1e-4)


def test_the_policy_keeps_its_parameters_and_loads_a_checkpoint(sb3, tmp_path):
    settings = {"n_steps": 16, "policy_kwargs": {"lstm_hidden_size": 8}}
    theirs = sb3.RecurrentPPO("MlpLstmPolicy", "CartPole-v1", seed=0, **settings)
    ours = sb3.RecurrentPPO(sb3.OneCallPolicy, "CartPole-v1", seed=1, **settings)
    assert isinstance(ours.policy.lstm_actor, sb3.seqkern.LSTM)
    trained = {id(p) for group in ours.policy.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in ours.policy.parameters()}
    theirs.save(tmp_path / "policy")
    ours.set_parameters(tmp_path / "policy")
    for name, p in theirs.policy.state_dict().items():
        assert torch.equal(ours.policy.state_dict()[name], p), name


def test_the_benchmark_writes_checked_lines(sb3, tmp_path):
    path = tmp_path / "lines.jsonl"
    small = ["--steps", "256", "--rounds", "1", "--seconds", "0.1", "--threads", "1"]
    assert bench.main(["--json", str(path), *small]) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["case"] for line in lines] == ["sequence", "sequence-few-inputs", "sequence-no-start", "learn"]
    assert all(line["ratio"] > 0 and line["sb3_contrib"] for line in lines)
    assert lines[-1]["updates"] == 2 and lines[-1]["losses_apart"] < 1e-3
