"""What a record of a run says about where and when it was made, and how it is written."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch


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
