"""`python -m seqkern info`."""

import argparse

from .info import report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m seqkern", description="Fused recurrent kernels for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="build, instruction sets, threads, torch and CUDA versions, devices")
    parser.parse_args()
    print(report())


if __name__ == "__main__":
    main()
