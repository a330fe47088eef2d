"""`make execute`: what makes a chapter stale, and that its file is written whole or not at all."""

import execute
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from notebooks import read

FILES = {
    "rlora_min/__init__.py": '"""The package."""\nfrom .rlora import layer\n',
    "rlora_min/rlora.py": "def layer():\n    '''A docstring.'''\n    return 1\n",
    "rlora_lab/__init__.py": "",
    "rlora_lab/results.py": "import json\n\ndef load_result(name):\n    return name\n",
    "rlora_lab/tasks.py": "import rlora_min\n",
    "rlora_lab/other.py": "unused = 1\n",
    "rlora_lab/results/run.json": "{}",
    "rlora_lab/results/other.json": "{}",
    "rlora_lab/results/evidence/many.jsonl": "{}",
    "rlora_lab/results/evidence/plan.toml": "[many]",
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
    "%matplotlib inline\nfrom rlora_lab.tasks import rlora_min",
    "from rlora_lab.results import load_result\nload_result('run')",
    "from rlora_lab import results\nresults.load_evidence('many')",
]


@pytest.mark.parametrize(
    ("file", "old", "new", "stale"),
    [
        ("rlora_min/rlora.py", "return 1", "return 2", True),
        ("rlora_min/rlora.py", "A docstring", "Another docstring", False),
        ("rlora_min/rlora.py", "return 1", "return 1  # a comment", False),
        ("rlora_min/__init__.py", "The package", "Our package", False),
        ("rlora_lab/tasks.py", "import rlora_min", "import rlora_min, os", True),
        ("rlora_lab/other.py", "1", "2", False),
        ("rlora_lab/results/run.json", "{}", "[]", True),
        ("rlora_lab/results/other.json", "{}", "[]", False),
        ("rlora_lab/results/evidence/many.jsonl", "{}", "[]", True),
        ("rlora_lab/results/evidence/plan.toml", "many", "few", True),
        ("rlora_lab/data/base.bin", "0", "1", True),
    ],
)
def test_what_makes_a_chapter_stale(project, file, old, new, stale):
    before = execute.notebook_hash(chapter(*SOURCES), project)
    path = project["rlora_lab"].parent / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert (execute.notebook_hash(chapter(*SOURCES), project) != before) is stale


def test_the_code_cells_count_and_neither_text_nor_where_to_install_from(project):
    nb = chapter("if missing:\n    %pip install git+https://here", *SOURCES)
    before = execute.notebook_hash(nb, project)
    nb.cells.append(nbformat.v4.new_markdown_cell("Text."))
    nb.cells[0].source = nb.cells[0].source.replace("here", "there")
    assert execute.notebook_hash(nb, project) == before
    nb.cells[0].source += "\n"
    assert execute.notebook_hash(nb, project) != before


def test_a_result_must_be_named_by_a_literal(project):
    nb = chapter("from rlora_lab.results import load_result\nload_result(name)")
    with pytest.raises(ValueError, match="literal"):
        execute.notebook_hash(nb, project)


def test_a_chapter_is_run_stamped_and_then_fresh(tmp_path, project):
    path = tmp_path / "01_chapter.ipynb"
    nbformat.write(chapter("print('one')", "1 + 1"), path)
    assert execute.is_stale(path, project)
    execute.execute(path, project)
    nb = read(path)
    assert [cell.execution_count for cell in nb.cells] == [1, 2]
    assert nb.cells[0].outputs[0].text == "one\n"
    assert nb.metadata[execute.STAMP]["seconds"] > 0
    assert not execute.is_stale(path, project)


def test_a_failing_chapter_is_left_as_it_was(tmp_path, project):
    path = tmp_path / "01_chapter.ipynb"
    nbformat.write(chapter("print('one')", "1 / 0"), path)
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute.execute(path, project)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.glob(".*")] == []
