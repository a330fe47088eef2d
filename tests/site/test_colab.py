"""A chapter alone, where there is only what Colab has: its set-up cell installs the rest.

A fresh environment, an empty folder, and git told to take the repository's address for a copy of
this working tree; the notebook is run as it is. The quickest chapter runs by default, with the
wheels that `make` laid into .venv/wheels in place of an index; `make test-colab` runs all, by pip's
own index.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from chapter_code import CHAPTERS, read, run
from environments import copy_project, create
from project import PROJECT, URL

WHEELS = Path(sys.prefix) / "wheels"
QUICKEST = min(CHAPTERS, key=lambda path: read(path).metadata["rlora_book"]["seconds"])

# Of what Colab has, what chapters use. Its PEFT is left out: pip must bring one that is new enough.
COLAB = """accelerate datasets fastapi ipykernel ipython jinja2 matplotlib numpy pandas pip
pydantic requests rich scikit-learn scipy sqlalchemy statsmodels torch tqdm
transformers typer uvicorn""".split()
# Says what stands here before the set-up cell, and what the chapter has used after it.
BEFORE = """from importlib.util import find_spec
assert not any(map(find_spec, ["peft", "rlora_min", "rlora_lab"])), "not fresh"
"""
AFTER = """import sys, peft, rlora_min, rlora_lab
for module in (peft, rlora_min, rlora_lab):
    assert module.__file__.startswith(sys.prefix), module.__file__
"""


def repository(folder: Path) -> Path:
    """A repository that holds the working tree as its one commit, with the version's tag."""
    if copy_project(folder) is None:
        pytest.skip("no git repository to take the files from")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    commit = ["commit", "-q", "--no-verify", "-m", "copy"]
    for command in (["init", "-q"], ["add", "-A"], commit, ["tag", f"v{PROJECT['version']}"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


def run_alone(notebook: nbformat.NotebookNode, tmp_path: Path, environment: dict[str, str]) -> None:
    """Run a notebook in an environment of its own, in an empty folder."""
    python = create(tmp_path / "environment", COLAB)
    spec = {"argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    kernel = tmp_path / "jupyter" / "kernels" / "colab" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps(spec | {"display_name": "colab"}))
    alone = tmp_path / "alone"
    alone.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
        patch.delenv("PYTHONPATH", raising=False)
        run(notebook, alone, "colab", **environment)


def offline() -> dict[str, str]:
    """Settings by which pip reads no index, but the wheels that `make` put down."""
    if not list(WHEELS.glob("peft-*.whl")):
        pytest.skip(f"no wheels in {WHEELS.name}: run make test")
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(WHEELS)}


def chapter(path: Path):
    marks = [] if path == QUICKEST else [pytest.mark.colab]
    return pytest.param(path, marks=marks, id=path.name)


@pytest.mark.parametrize("path", [chapter(path) for path in CHAPTERS])
def test_a_chapter_runs_alone(path, tmp_path, request):
    address = f"file://{repository(tmp_path / 'copy')}"
    environment = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{address}.insteadOf",
        "GIT_CONFIG_VALUE_0": URL,
    }
    if request.config.option.markexpr:  # not all chapters: a part of `make test`
        environment |= offline()
    notebook = read(path)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(BEFORE))
    notebook.cells.append(nbformat.v4.new_code_cell(AFTER))
    run_alone(notebook, tmp_path, environment)


HARDWARE = re.compile(r"\*\*It runs\*\* [^.]*\b(CPU cores|GPU)\b[^.]*\bin Colab\b[^.]*\.")


def test_a_chapter_says_what_hardware_it_needs():
    for path in CHAPTERS:
        parts = [cell.source for cell in read(path).cells if "**It runs**" in cell.source]
        assert HARDWARE.search(parts[0]), path.name
