"""Chapter 09 with a GPU's record and without: what it says, and the page that is built of it."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import nbformat
import numpy as np
import pytest
from chapter_code import BOOK, read, run, said_by

from rlora_lab.speed.bars import verdicts
from rlora_lab.speed.cases import Case, cases
from rlora_lab.speed.page import NONE_YET

NAME = "09_gpu_benchmark"
RECORD = BOOK / "rlora_lab" / "records" / "speed-cuda.json"
MADE_UP = "MADE UP FOR A TEST"
SPEED = {"base": 1.0, "lora": 1.5, "rlora": 1.4, "exported": 1.4, "published-rlora": 3.0}
KERNELS = [["nvjet_gemm", 400, 0.03], ["elementwise_kernel", 900, 0.01]]
# Records are read from there.
ELSEWHERE = """
from pathlib import Path
from rlora_lab.report import loading
loading.LAB = Path("{}")
"""


def made_up_record(case: Case, method: str, rng: np.random.Generator) -> dict:
    step = 0.05 * SPEED.get(method, 4.0) * rng.uniform(0.98, 1.02, case.rounds)
    seconds = {"forward": 0.4 * step, "backward": 0.5 * step, "optimizer": 0.1 * step}
    if case.generate:
        seconds = {"token": step}
    kept = None if case.generate or case.compiled or case.checkpointing else 10**9
    return asdict(case) | {
        "method": method,
        "trainable": 0 if method == "base" else 10**6,
        "rank": None,
        "skipped": None,
        "seconds": {phase: list(map(float, values)) for phase, values in seconds.items()},
        "kept_bytes": kept,
        "kept_own_bytes": kept,
        **dict.fromkeys(("flops", "bytes", "floor_s"), 1.0 if kept else None),
        "model_bytes": 10**9,
        "peak_bytes": int(2e9 * SPEED.get(method, 4.0)),
        "launches": 3000,
        "kernels": KERNELS if case.study == "bars" else None,
        "clock": "1000 MHz",
    }


def made_up() -> dict:
    """A record of a GPU that nobody has: it is marked, and stays in a test's own folder."""
    rng = np.random.default_rng(0)
    records = [
        made_up_record(case, method, rng)
        for case, methods in cases("cuda", quick=False).items()
        for method in methods
    ]
    result = {
        "command": "python -m rlora_lab speed --device cuda",
        "date": MADE_UP,
        "machine": MADE_UP,
        "threads": 1,
        "versions": {"torch": MADE_UP, "peft": MADE_UP},
        "config": {"device": "cuda", "quick": False, "rehearsal": False},
        "gpu": {"name": MADE_UP, "driver_version": "0"},
        "roof": {},
        "complete": True,
        "records": records,
    }
    return result | {"bars": verdicts(result)}


def gpu_cell(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    (cell,) = (cell for cell in nb.cells if "gpu" in cell.metadata.get("tags", []))
    return cell


@pytest.mark.parametrize("there", [True, False])
def test_the_page_in_both_states(there, tmp_path: Path):
    (tmp_path / "records").mkdir()
    if there:
        (tmp_path / "records" / "speed-cuda.json").write_text(json.dumps(made_up()))
    nb = read(BOOK / f"{NAME}.ipynb")
    cell = gpu_cell(nb)
    elsewhere = nbformat.v4.new_code_cell(ELSEWHERE.format(tmp_path))
    run(nbformat.v4.new_notebook(cells=[elsewhere, cell]))
    said = said_by(cell)
    assert (NONE_YET in said) != there
    for words in (MADE_UP, "32 heads", "as CUDA graphs", "nf4", "8 tokens generated", "claimed"):
        assert (words in said) == there, words
    assert len(cell.outputs) == 1 + there  # the picture
    source = tmp_path / "source"
    source.mkdir()
    (source / "_config.yml").write_text("title: a test\nexecute: {execute_notebooks: 'off'}\n")
    (source / "_toc.yml").write_text(f"format: jb-book\nroot: {NAME}\n")
    nbformat.write(nb, source / f"{NAME}.ipynb")
    command = [Path(sys.executable).parent / "jupyter-book", "build", source]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    page = (source / "_build" / "html" / f"{NAME}.html").read_text()
    first, rest = page.split("<h2>Motivation")
    first = first[first.index("<h2>What a GPU says") :]
    assert (NONE_YET in first) != there and (MADE_UP in first) == there
    assert (cell.metadata["mystnb"]["image"]["alt"][:40] in first) == there
    assert NONE_YET not in rest and MADE_UP not in rest


def test_the_book_says_that_there_is_no_record_exactly_when_there_is_none():
    nb = read(BOOK / f"{NAME}.ipynb")
    none = not RECORD.is_file()
    assert (NONE_YET in said_by(gpu_cell(nb))) == none
    # The chapter is called what it holds.
    title = nb.cells[1].source.splitlines()[0]
    assert title.startswith("# 09 · What a step costs") and (", on CPUs," in title) == none
    index = (BOOK.parent / "index.md").read_text()
    assert f"[{title.removeprefix('# ').replace(' ·', '')}](book/{NAME}.ipynb)" in index
    readme = " ".join((BOOK.parent / "README.md").read_text().split())
    assert ("GPU time and memory have not been measured yet" in readme) == none
    assert MADE_UP not in (RECORD.read_text() if not none else json.dumps(nb))
