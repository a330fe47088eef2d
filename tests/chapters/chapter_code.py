"""What a chapter defines, taken out of its notebook as a reader sees it."""

import ast
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import nbformat
from nbclient import NotebookClient

BOOK = Path(__file__).parents[2] / "book"
sys.path.insert(0, str(BOOK))  # here and not in pytest's settings, because processes use this too
import execute  # noqa: E402

CHAPTERS = execute.chapters()
ALWAYS = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _wanted(node: ast.stmt, names: tuple[str, ...]) -> bool:
    """An import, a definition, or the value of a NAME in capitals or of one asked for."""
    if isinstance(node, ALWAYS):
        return True
    targets = node.targets if isinstance(node, ast.Assign) else []
    found = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    return bool(found) and all(name in names or len(name) > 1 and name.isupper() for name in found)


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook with its outputs; each call gives a copy of its own."""
    return nbformat.read(path, as_version=4)


def run(
    notebook: nbformat.NotebookNode,
    folder: Path = BOOK,
    kernel: str = "python3",
    **environment: str,
) -> None:
    """Runs a notebook whole, in a kernel of its own; it then holds its outputs."""
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=600, kernel_name=kernel, resources=resources)
    client.execute(env=os.environ | execute.QUIET | environment)


def said_by(*cells: nbformat.NotebookNode) -> str:
    """What the outputs of cells print."""
    outputs = [out for cell in cells for out in cell.get("outputs", [])]
    return "".join(out.get("text", "") for out in outputs)


def printed_by(path: Path, **environment: str) -> str:
    """What a chapter prints when it is run."""
    notebook = read(path)
    run(notebook, **environment)
    return said_by(*notebook.cells)


def chapter_sources(notebook: str, solutions: bool = False) -> list[str]:
    """The code cells of a chapter, with or without its solutions."""
    code = execute.code_of(read(BOOK / f"{notebook}.ipynb"))
    return [source for source in code if solutions or not source.startswith("# @title Solution")]


def chapter_code(notebook: str, *names: str, **given) -> SimpleNamespace:
    """The functions, classes and constants of a chapter, of which nothing else was run.

    Without what it imports from files of its own, and without constants of what a run made. `names`
    are further variables to set as the chapter does, `given` are set before.
    """
    space = SimpleNamespace(**given, __name__=notebook)
    sources = chapter_sources(notebook)
    written = re.findall(r"%%writefile (?:-a )?(\w+)\.py", "\n".join(sources))
    for number, source in enumerate(sources):
        for node in execute.parse_cell(source).body:
            if _wanted(node, names) and getattr(node, "module", None) not in written:
                code = compile(ast.Module([node], []), f"{notebook}, cell {number}", "exec")
                with suppress(NameError):
                    exec(code, vars(space))
    return space


def write_files(notebook: str, folder: Path) -> None:
    """What the chapter's `%%writefile` cells write."""
    for source in chapter_sources(notebook):
        found = re.match(r"%%writefile (-a )?(\w+\.py)\n", source)
        if found:
            with (folder / found[2]).open("a" if found[1] else "w") as file:
                file.write(source[found.end() :] + "\n")
