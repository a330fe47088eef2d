"""What a chapter defines, taken out of its notebook as a reader sees it."""

import ast
from pathlib import Path
from types import SimpleNamespace

import nbformat

BOOK = Path(__file__).parent.parent / "book"


def _wanted(node: ast.stmt, names: tuple[str, ...]) -> bool:
    """An import, a definition, or the value of a NAME in capitals or of one asked for."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef):
        return True
    targets = node.targets if isinstance(node, ast.Assign) else []
    found = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    return bool(found) and all(name in names or len(name) > 1 and name.isupper() for name in found)


def chapter_code(notebook: str, *names: str, **given) -> SimpleNamespace:
    """The functions, classes and constants of a chapter, of which nothing else was run.

    `names` are further variables to set as the chapter does, `given` are set before.
    """
    cells = nbformat.read(BOOK / f"{notebook}.ipynb", as_version=4).cells
    space = SimpleNamespace(**given)
    vars(space)["__name__"] = notebook
    for number, cell in enumerate(cell for cell in cells if cell.cell_type == "code"):
        lines = [line for line in cell.source.splitlines() if "%pip" not in line]
        lines = [line for line in lines if not line.startswith("if find_spec")]
        if cell.metadata.get("cellView") == "form" and number > 0:
            continue  # a solution
        body = [node for node in ast.parse("\n".join(lines)).body if _wanted(node, names)]
        exec(compile(ast.Module(body, []), f"{notebook}, cell {number}", "exec"), vars(space))
    return space
