"""The one exception of the lab, and how commands say it."""

import sys
from collections.abc import Callable


class LabError(Exception):
    """Something the user asked for can't be done; the message says what is allowed instead."""


def exit_code(command: Callable[[], object]) -> int:
    """Run a command; what can't be done is said in a line, with exit code 2."""
    try:
        command()
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
