"""`python -m rlora_lab.speed`: the command where there is torch, peft and transformers alone.

A machine that is lent for minutes has no more than that; `python -m rlora_lab speed` is the same.
"""

import argparse
import sys
from pathlib import Path

from ..errors import LabError
from .command import speed


def main() -> int:
    """The command; what can't be done is said in a line, with exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m rlora_lab.speed", description=speed.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cpu", "cuda"))
    for switch in ("--quick", "--other-forms", "--record", "--rehearse", "--plan"):
        parser.add_argument(switch, action="store_true")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    try:
        speed(**vars(parser.parse_args()))
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
