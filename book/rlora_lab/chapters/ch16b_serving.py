"""The cells of 16b_serving.ipynb that others use.

Written by `make execute` from the cells tagged `export`: change them there.
"""

import hashlib


def place(request_id: str, salt: str) -> float:
    """A number in [0, 1) that looks random: always the same for an id and a salt."""
    digest = hashlib.sha256(f"{salt}:{request_id}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def choose(request_id: str, current: dict) -> str:
    """Who answers: the candidate for its share of the ids, else the stable one."""
    candidate = current["candidate"]
    if candidate and place(request_id, candidate) < current["share"]:
        return candidate
    return current["stable"]
