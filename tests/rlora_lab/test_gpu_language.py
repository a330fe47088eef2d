"""The language suite on a machine with a GPU and no network: what travels, and a rehearsal."""

import json
import sys
from pathlib import Path

import gpu_language
import pytest

from rlora_lab.report.loading import load_evidence
from rlora_lab.runs.plan import load_plan

TINY = """
[rehearsed]
why = "the path, not the answer"
methods = ["lora", "rlora"]
steps = 5
batch = 4
tasks = ["rotate 2"]
rates = [0.001, 0.004]
extend = 0
sweep_seeds = [4000]
seeds = [200]
"""


def test_the_plan_trains_every_block_on_the_seeds_of_the_other():
    (block,) = load_plan(gpu_language.PLAN).values()
    other = load_plan()["language"]
    assert block.blocks is None and other.blocks == 10
    for name in ("base", "suite", "steps", "batch", "tasks"):
        assert getattr(block, name) == getattr(other, name), name
    assert block.seeds == other.seeds
    assert set(block.sweep_seeds) <= set(other.sweep_seeds)


def test_a_file_travels_in_parts(tmp_path: Path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * 5 + b"odd")
    gpu_language.split(file, tmp_path / "parts")
    sizes = [(tmp_path / "parts" / n / "part").stat().st_size for n in "01"]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == 1283
    gpu_language.join(tmp_path / "parts", tmp_path / "there" / "weights")
    assert (tmp_path / "there" / "weights").read_bytes() == file.read_bytes()
    (tmp_path / "parts" / "1" / "part").unlink()
    with pytest.raises(FileNotFoundError):
        gpu_language.join(tmp_path / "parts", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_rehearsal_on_the_tiny_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    plan = tmp_path / "tiny.toml"
    plan.write_text(TINY)
    arguments = ["run", ".gpu", "--plan", str(plan), "--records", "records", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["gpu_language.py", *arguments])
    assert gpu_language.main() == 0
    result = load_evidence("rehearsed", say=False, plan=plan, records=tmp_path / "records")
    assert result["complete"] and result["methods"] == ["lora", "rlora"]
    lines = (tmp_path / "records" / "rehearsed.jsonl").read_text().splitlines()
    assert sum("stage" in json.loads(line) for line in lines) == 6
