"""The files of releases: the adapter's two, the seal, and who is served."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import LabError

FILES = "adapter_config.json", "adapter_model.safetensors"
RELEASE = "release.json"
CURRENT = "current.json"


def replace_json(path: Path, content: dict) -> None:
    """Write a file whole or not at all: who reads it meanwhile sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def names_of(folder: Path) -> list[str]:
    """The releases in a folder: one folder each, which holds a seal."""
    return sorted(path.parent.name for path in folder.glob(f"*/{RELEASE}"))


def write_current(
    folder: Path, stable: str, candidate: str | None = None, share: float = 0.0
) -> None:
    """Roll out, or back: one file, replaced whole."""
    replace_json(folder / CURRENT, {"stable": stable, "candidate": candidate, "share": share})


def read_current(folder: Path, adapters: Sequence[str]) -> dict:
    """Who is served. LabError: no such file, or it names something that is not there."""
    try:
        current = json.loads((folder / CURRENT).read_text())
        stable, candidate, share = (current[key] for key in ("stable", "candidate", "share"))
        right = stable in adapters and candidate in [*adapters, None] and 0 <= share <= 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabError(f"{CURRENT} can't be read: {error!r}") from error
    if not right:
        raise LabError(f"{CURRENT} says {current}; there are {[*adapters]}, a share is in [0, 1].")
    return current
