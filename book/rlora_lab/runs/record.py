"""What a record of a run says about where and when it was made, and how it is written."""

import hashlib
import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from ..errors import LabError


def environment() -> dict:
    """Date, machine in general words (no names, no paths), and versions."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "transformers", "peft", "accelerate", "datasets")},
            "rlora-min": version("rlora-min"),
        },
    }


def write_result(path: Path, result: dict) -> None:
    """Write a result as JSON, whole or not at all; each of its records on one line."""
    lines = ",\n  ".join(json.dumps(record) for record in result["records"])
    text = json.dumps(result | {"records": []}, indent=1) + "\n"
    text = text.replace('"records": []', f'"records": [\n  {lines}\n ]')
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_records(path: Path) -> tuple[dict[str, dict], list[dict]]:
    """The settings by id and the records of a JSON-lines file; of a run that stands there twice,
    as after a merge of two machines' files, the first.

    Raises:
        LabError: a line that is no record, by its number.
    """
    settings: dict[str, dict] = {}
    records: dict[tuple, dict] = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if "id" in entry:
                settings[entry.pop("id")] = entry
            else:
                key = (entry["stage"], entry["method"], entry["learning_rate"], entry["seed"])
                records.setdefault(key, entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LabError(f"{path.name}, line {number} is no record: {line[:60]!r}") from error
    for record in records.values():
        if record.get("setting") not in settings:
            raise LabError(f"{path.name}: no setting {record.get('setting')!r} for a record")
    return settings, list(records.values())


def add_record(path: Path, setting: dict, record: dict) -> None:
    """Add a record to a JSON-lines file, and its setting where that is new; whole or not at all.

    Safe with several processes that add to the same folder. A setting is what many records share.
    """
    import fcntl  # not on Windows, where records can still be read

    digest = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:8]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.parent, os.O_RDONLY)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = path.read_text() if path.exists() else ""
        new = [{"setting": digest} | record]
        if f'{{"id":"{digest}"' not in text:
            new.insert(0, {"id": digest} | setting)
        text += "".join(json.dumps(e, separators=(",", ":"), allow_nan=False) + "\n" for e in new)
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)
