"""What a chapter defines, taken out of its notebook as a reader sees it."""

import ast
from pathlib import Path
from types import SimpleNamespace

import nbformat

BOOK = Path(__file__).parents[2] / "book"
DEFINITIONS = ast.FunctionDef | ast.ClassDef


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


def chapter_source(notebook: str) -> str:
    """The code of a chapter after its set-up, solutions included."""
    cells = nbformat.read(BOOK / f"{notebook}.ipynb", as_version=4).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    return "\n".join(source for source in sources if "%pip" not in source)


def definitions(source: str) -> dict[str, str]:
    """Functions, classes and constants at the top of a source, by name, as syntax trees."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, DEFINITIONS):
            found[node.name] = ast.dump(node)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper():
            found[ast.unparse(node.targets[0])] = ast.dump(node)
    return found


def chapter_functions(notebook: str, *names: str) -> dict:
    """Some functions out of a chapter, solutions included, after the imports of its set-up."""
    cells = nbformat.read(BOOK / f"{notebook}.ipynb", as_version=4).cells
    set_up = next(cell.source for cell in cells if cell.cell_type == "code")
    set_up = "\n".join(line for line in set_up.splitlines() if "%pip" not in line)
    set_up = set_up.replace('if find_spec("rlora_lab") is None:  # in Colab', "")
    imports = [n for n in ast.parse(set_up).body if isinstance(n, ast.Import | ast.ImportFrom)]
    body = ast.parse(chapter_source(notebook)).body
    body = [n for n in body if isinstance(n, DEFINITIONS) and n.name in names]
    assert {n.name for n in body} == set(names)
    found: dict = {}
    exec(compile(ast.Module(imports + body, []), notebook, "exec"), found)
    return found
