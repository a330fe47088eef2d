"""`python -m rlora_lab.speed`: the command where there is torch, peft and transformers alone.

A machine that is lent for minutes has no more than that; `python -m rlora_lab speed` is the same.
"""

import argparse
import sys
from pathlib import Path

from ..errors import exit_code
from .command import speed


def main() -> int:
    """The command, and its exit code."""
    parser = argparse.ArgumentParser(prog="python -m rlora_lab.speed", description=speed.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cpu", "cuda"))
    for switch in ("--quick", "--other-forms", "--record", "--rehearse", "--plan"):
        parser.add_argument(switch, action="store_true")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    arguments = vars(parser.parse_args())
    return exit_code(lambda: speed(**arguments))


if __name__ == "__main__":
    sys.exit(main())
