"""`make execute`: what is exported, what makes a chapter stale, and that it is written whole."""

import execute
import nbformat
import pytest
from chapter_code import read
from nbclient.exceptions import CellExecutionError

NAME = "01_chapter"
FILES = {
    "rlora_min/__init__.py": '"""The package."""\nfrom .rlora import layer\n',
    "rlora_min/rlora.py": "def layer():\n    '''A docstring.'''\n    return 1\n",
    "rlora_lab/__init__.py": "",
    "rlora_lab/report/__init__.py": "",
    "rlora_lab/report/results.py": "import json\n\ndef load_result(name):\n    return name\n",
    "rlora_lab/tasks/strings.py": "import rlora_min\n",
    "rlora_lab/other.py": "unused = 1\n",
    "rlora_lab/chapters/ch00_before.py": "before = 1\n",
    "rlora_lab/chapters/ch01_chapter.py": "own = 1\n",
    "rlora_lab/serve.py": "from .chapters import ch00_before, ch01_chapter\n",
    "rlora_lab/records/run.json": "{}",
    "rlora_lab/records/other.json": "{}",
    "rlora_lab/records/evidence/many.jsonl": "{}",
    "rlora_lab/plans/evidence.toml": "[many]",
    "rlora_lab/data/base.bin": "0",
}


@pytest.fixture
def project(tmp_path):
    """A small project: its two packages, by name."""
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return {name: tmp_path / name for name in ("rlora_min", "rlora_lab")}


def chapter(*sources: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])


SOURCES = [
    "%matplotlib inline\nfrom rlora_lab.tasks.strings import rlora_min",
    "from rlora_lab.report.results import load_result\nload_result('run')",
    "from rlora_lab.report import results\nresults.load_evidence('many')",
    "import rlora_lab.serve",
]


@pytest.mark.parametrize(
    ("file", "old", "new", "stale"),
    [
        ("rlora_min/rlora.py", "return 1", "return 2", True),
        ("rlora_min/rlora.py", "A docstring", "Another docstring", False),
        ("rlora_min/rlora.py", "return 1", "return 1  # a comment", False),
        ("rlora_min/__init__.py", "The package", "Our package", False),
        ("rlora_lab/tasks/strings.py", "import rlora_min", "import rlora_min, os", True),
        ("rlora_lab/report/__init__.py", "", "import rlora_lab.other", True),
        ("rlora_lab/other.py", "1", "2", False),
        ("rlora_lab/chapters/ch00_before.py", "1", "2", True),
        ("rlora_lab/chapters/ch01_chapter.py", "1", "2", False),
        ("rlora_lab/records/run.json", "{}", "[]", True),
        ("rlora_lab/records/other.json", "{}", "[]", False),
        ("rlora_lab/records/evidence/many.jsonl", "{}", "[]", True),
        ("rlora_lab/plans/evidence.toml", "many", "few", True),
        ("rlora_lab/data/base.bin", "0", "1", True),
    ],
)
def test_what_makes_a_chapter_stale(project, file, old, new, stale):
    before = execute.notebook_hash(chapter(*SOURCES), NAME, project)
    path = project["rlora_lab"].parent / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert (execute.notebook_hash(chapter(*SOURCES), NAME, project) != before) is stale


def test_the_code_cells_count_and_neither_text_nor_where_to_install_from(project):
    nb = chapter("if missing:\n    %pip install git+https://here", *SOURCES)
    before = execute.notebook_hash(nb, NAME, project)
    nb.cells.append(nbformat.v4.new_markdown_cell("Text."))
    nb.cells[0].source = nb.cells[0].source.replace("here", "there")
    assert execute.notebook_hash(nb, NAME, project) == before
    nb.cells[0].source += "\n"
    assert execute.notebook_hash(nb, NAME, project) != before


def test_a_result_must_be_named_by_a_literal(project):
    nb = chapter("from rlora_lab.report.results import load_result\nload_result(name)")
    with pytest.raises(ValueError, match="literal"):
        execute.notebook_hash(nb, NAME, project)


def test_a_chapter_is_run_stamped_and_then_fresh(tmp_path, project):
    path = tmp_path / f"{NAME}.ipynb"
    nbformat.write(chapter("print('one')", "1 + 1"), path)
    assert execute.is_stale(path, project)
    execute.execute(path, project)
    nb = read(path)
    assert [cell.execution_count for cell in nb.cells] == [1, 2]
    assert nb.cells[0].outputs[0].text == "one\n"
    assert nb.metadata[execute.STAMP]["seconds"] > 0
    assert not execute.is_stale(path, project)


def test_a_failing_chapter_is_left_as_it_was(tmp_path, project):
    path = tmp_path / f"{NAME}.ipynb"
    nbformat.write(chapter("print('one')", "1 / 0"), path)
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute.execute(path, project)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.glob(".*")] == []


# Exports

SET_UP = """# @title Set-up
from importlib.util import find_spec

if find_spec("rlora_lab") is None:  # in Colab
    %pip install -q rlora-min

import os
import json

from rlora_min import layer
os.nice(0)"""
CELLS = [
    (SET_UP, []),
    ("def first():\n    return layer(json)", ["export"]),
    ("print(first())", []),
    ("def second(): return  first()  # why", ["hide-input", "export"]),
]
EXPORTED = '''"""The cells of 01_chapter.ipynb that others use.

Written by `make execute` from the cells tagged `export`: change them there.
"""

import json

from rlora_min import layer


def first():
    return layer(json)


def second():
    return first()  # why
'''


def tagged(cells=CELLS) -> nbformat.NotebookNode:
    nb = chapter(*(source for source, _ in cells))
    for cell, (_, tags) in zip(nb.cells, cells, strict=True):
        cell.metadata["tags"] = tags
    return nb


def test_the_tagged_cells_are_exported_with_the_imports_that_they_need():
    assert execute.export_of(tagged(), NAME) == EXPORTED
    assert execute.export_of(tagged(CELLS[::2]), NAME) is None


def test_a_cell_that_can_not_stand_alone_is_named():
    with pytest.raises(ValueError, match=r"01_chapter: .*export.*(?s:.)*`first`"):
        execute.export_of(tagged([CELLS[0], CELLS[3]]), NAME)


def test_an_export_is_written_where_it_changed_alone(tmp_path, project):
    path = tmp_path / f"{NAME}.ipynb"
    nbformat.write(tagged(), path)
    assert execute.export(path, project)
    assert not execute.export(path, project)
    place = project["rlora_lab"] / "chapters" / f"ch{NAME}.py"
    assert place.read_text() == EXPORTED
    place.write_text("own = 2\n")
    assert execute.export(path, project) and place.read_text() == EXPORTED
