"""The record store: files of JSON lines, one for each block of a plan, one run a line.

A line with an "id" is a setting, what many records share:

    schema              2
    block, kind, base, base_source, suite, tasks, metrics, steps, batch; what else the kind has;
    the adapters' settings; where the data came from; machine, threads, workers and versions

Every other line is a run:

    setting             the id of its setting
    date, stage         "sweep" (for the choice of the learning rate) or "test"; in a study also
                        "search", "again" and "runner-up"
    method, learning_rate, seed
    tuned               settings in the place of the block's, {name: value}, where any were chosen
    validation | test   {metric: [value of each task, in the order of the setting's tasks]}:
                        validation data in the sweep, test data in the test, never both
    seconds, loss       of training, at 10 points (null where it was not finite)

and what its kind adds. Of the kind "compare", in the test alone:

    adapter_parameters, other_parameters
    kept_bytes          what autograd keeps for the backward of a training batch, beside parameters
    similarity          mean cosine of the heads, and of their change: {"heads", "change"}, or null
    looks               [[step, validation scores]] on the way, in the suite language
    rows                {metric: [each task's rows, 1 for right and 0 for wrong]}, in the suites
                        language and files
    entropy             of the routing in units of ln N, a mean over modules, by task: 1 is uniform;
                        null without a router

Of "skewed": looks [[step, validation scores]], stopped (the step of the look whose worst task is
best) and test_stopped (test scores of that look). Of "study": the settings; value (validation); of
a trial its number, state and the values seen on the way [[step, value]].
"""

import hashlib
import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LabError
from .choice import choice_of

if TYPE_CHECKING:
    from ..models.bases import Base  # with torch

SCHEMA = 2


# What numbers may depend on; the last is this project's own.
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "rlora-min")


def _versions() -> dict[str, str]:
    """Of those that are installed: a checkout on a path is none."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict:
    """Date, machine in general words (no names, no paths), and versions."""
    import torch  # reading records must not cost its seconds

    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_result(path: Path, result: dict) -> None:
    """Write a result as JSON, whole or not at all; each of its records on one line."""
    lines = ",\n  ".join(json.dumps(record) for record in result["records"])
    text = json.dumps(result | {"records": []}, indent=1) + "\n"
    write_whole(path, text.replace('"records": []', f'"records": [\n  {lines}\n ]'))


def write_measured(path: Path, command: str, base: "Base", records: list[dict], **about) -> None:
    """Write what was measured on a base, as `write_result` does: by which command and where, on
    which base and from where it came, `about`, and the records."""
    made = {"command": command} | environment() | {"base": base.name, "base_source": base.source}
    write_result(path, made | about | {"records": records})


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
                if entry["schema"] != SCHEMA:
                    raise LabError(
                        f"{path.name} has schema {entry['schema']}, this is for schema {SCHEMA}"
                    )
            else:
                key = (entry["stage"], entry["method"], choice_of(entry), entry["seed"])
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

    setting = {"schema": SCHEMA} | setting
    digest = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:8]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = path.read_text() if path.exists() else ""
        new = [{"setting": digest} | record]
        if f'{{"id":"{digest}"' not in text:
            new.insert(0, {"id": digest} | setting)
        text += "".join(json.dumps(e, separators=(",", ":"), allow_nan=False) + "\n" for e in new)
        write_whole(path, text)
    finally:
        os.close(lock)
