"""Export what chapters share, run the chapters whose stored outputs are stale, and stamp them.

    python book/execute.py [--force] [chapter.ipynb ...]

The cells of a chapter that are tagged `export` are written to `rlora_lab/chapters`, with those of
the chapter's imports that they need, so that others run what a reader sees. They may use nothing
that imports them.

A chapter runs top to bottom in a fresh kernel, and its file is replaced only when every cell ran.
The stamp, `rlora_book` in the notebook's metadata, records when and on what the outputs were made
and a hash of all that they depend on: the chapter's code cells (lines of %pip left out, as they say
from which address to install what is missing), the recorded results that it reads by
`load_result("name")` or `load_evidence("name")`, the syntax trees (docstrings left out) of the
modules of this project that it imports, followed through their own imports, and the lab's data
files. Its own export is left out, since its cells are in it already.
"""

import argparse
import ast
import hashlib
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

BOOK = Path(__file__).resolve().parent
PACKAGES = {"rlora_min": BOOK.parent / "rlora_min", "rlora_lab": BOOK / "rlora_lab"}
STAMP = "rlora_book"
EXPORT = "export"  # the tag
# What chapters read recorded numbers by, and the lab's files of a name.
READERS = {
    "load_result": ["records/{}.json"],
    "load_evidence": ["records/evidence/{}.jsonl", "plans/evidence.toml"],
}
ALL_EVIDENCE = "overview()"  # reads every block
# No part of a chapter's output: bars of files being read, and libraries' notes to themselves.
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found,ignore::FutureWarning",
}


HEADER = '''"""The cells of {name}.ipynb that others use.

Written by `make execute` from the cells tagged `export`: change them there.
"""
'''


def chapters() -> list[Path]:
    """The notebooks of the book, in order."""
    return sorted(BOOK.glob("[0-9][0-9]*_*.ipynb"))


def code_of(notebook: nbformat.NotebookNode, tag: str | None = None) -> list[str]:
    """The sources of the code cells in order: of all, or of those with a tag."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if tag is not None:
        code = [cell for cell in code if tag in cell.metadata.get("tags", [])]
    return [cell.source for cell in code]


def parse_cell(source: str) -> ast.Module:
    """The syntax tree of a cell; lines for the shell or for IPython (%, !) count as `pass`."""
    return ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source))


def export_module(name: str) -> str:
    """The module that the cells of chapter `name`, such as "01_low_rank", are exported to."""
    return f"rlora_lab.chapters.ch{name}"


def export_of(notebook: nbformat.NotebookNode, name: str) -> str | None:
    """The text of a chapter's export; None if no cell is tagged.

    Raises:
        ValueError: a tagged cell uses what neither the set-up imports nor a tagged cell defines.
    """
    exported = code_of(notebook, EXPORT)
    if not exported:
        return None
    imported, shown = [], []
    for source in code_of(notebook):
        body = parse_cell(source).body
        found = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        imported += [ast.unparse(node) for node in found]
        if source in exported:
            lines = source.splitlines()
            for node in reversed(found):
                del lines[node.lineno - 1 : node.end_lineno]
            shown.append("\n".join(lines).strip())
    imported = list(dict.fromkeys(imported))
    text = "\n".join([HEADER.format(name=name), *imported, "\n", "\n\n\n".join(shown), ""])
    ruff = [sys.executable, "-m", "ruff"]
    # F401 takes out the imports that only the rest of the chapter needs, F821 is an unknown name.
    rules = ["--select", "F401,F821,I", "--fix", "--no-cache", "--quiet"]
    checked = _piped([*ruff, "check", *rules, "--stdin-filename", f"{name}.py", "-"], text)
    if checked.returncode:
        raise ValueError(f"{name}: the cells tagged {EXPORT!r} can't stand alone\n{checked.stderr}")
    return _piped([*ruff, "format", "--quiet", "-"], checked.stdout).stdout


def _piped(command: list[str], text: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, cwd=BOOK.parent
    )


def export(path: Path, packages: dict[str, Path] = PACKAGES) -> bool:
    """Write a chapter's export; whether there was anything to change."""
    text = export_of(nbformat.read(path, as_version=4), path.stem)
    place = packages["rlora_lab"] / "chapters" / f"ch{path.stem}.py"
    if text is None or place.is_file() and place.read_text("utf-8") == text:
        return False
    write_whole(place, text)
    return True


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def canonical(node: object) -> str:
    """A syntax tree as text: without docstrings, positions and what differs between Pythons."""
    if isinstance(node, list):
        return "[" + ",".join(map(canonical, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            fields["body"] = node.body[isinstance(first.value.value, str) :]
    kept = (
        f"{name}={canonical(value)}" for name, value in fields.items() if value not in (None, [])
    )
    return f"{type(node).__name__}({','.join(kept)})"


def module_file(name: str, packages: dict[str, Path]) -> Path | None:
    """The file of a module of the project, None for any other name."""
    top, *rest = name.split(".")
    if top not in packages:
        return None
    path = packages[top].joinpath(*rest)
    return next((f for f in (path / "__init__.py", path.with_suffix(".py")) if f.is_file()), None)


def imports(tree: ast.AST, package: str = "") -> Iterator[str]:
    """Every dotted name that the code may import, relative ones made absolute by `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:  # importing a.b.c runs a and a.b too
            parts = name.split(".")
            yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def modules_of(trees: list[ast.Module], packages: dict[str, Path]) -> dict[str, ast.Module]:
    """The project's modules that the code imports, directly or not, and their syntax trees."""
    found: dict[str, ast.Module] = {}
    waiting = [name for tree in trees for name in imports(tree)]
    while waiting:
        name = waiting.pop()
        file = module_file(name, packages)
        if file is None or name in found:
            continue
        found[name] = ast.parse(file.read_text())
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        waiting += imports(found[name], package)
    return found


def results_of(trees: list[ast.Module]) -> list[str]:
    """The files, below the lab, of the recorded results that the cells read, or their pattern.

    Raises:
        ValueError: one of the readers, whose first argument is no literal string.
    """
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and ast.unparse(node) == ALL_EVIDENCE:
            names |= {form.format("*") for form in READERS["load_evidence"]}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(tuple(READERS)):
            name = node.args[0] if node.args else None
            if not (isinstance(name, ast.Constant) and isinstance(name.value, str)):
                raise ValueError(f"{ast.unparse(node)}: name the result by a literal string")
            (forms,) = (f for r, f in READERS.items() if ast.unparse(node.func).endswith(r))
            names |= {form.format(name.value) for form in forms}
    return sorted(names)


def notebook_hash(
    notebook: nbformat.NotebookNode, name: str, packages: dict[str, Path] = PACKAGES
) -> str:
    """The hash of all that the outputs of the chapter of this name depend on."""
    sources = code_of(notebook)
    trees = [parse_cell(source) for source in sources]
    modules = modules_of(trees, packages)
    modules.pop(export_module(name), None)
    parts = [("cell", re.sub(r"(?m)^\s*%pip .*$", "", source).encode()) for source in sources]
    parts += [(name, canonical(tree).encode()) for name, tree in sorted(modules.items())]
    if "rlora_lab" in modules:
        lab = packages["rlora_lab"]
        files = [path for name in results_of(trees) for path in sorted(lab.glob(name))]
        files += sorted(path for path in (lab / "data").rglob("*") if path.is_file())
        parts += [(path.relative_to(lab).as_posix(), path.read_bytes()) for path in files]
    digest = hashlib.sha256()
    for name, content in parts:
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def is_stale(path: Path, packages: dict[str, Path] = PACKAGES) -> bool:
    """Whether the stamp of a chapter is missing or no longer true."""
    notebook = nbformat.read(path, as_version=4)
    return notebook.metadata.get(STAMP, {}).get("hash") != notebook_hash(
        notebook, path.stem, packages
    )


def execute(path: Path, packages: dict[str, Path] = PACKAGES) -> float:
    """Run a chapter in a fresh kernel and write it with outputs and stamp; return the seconds.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the file is as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    stamp = {"hash": notebook_hash(notebook, path.stem, packages)}
    start = time.monotonic()
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute(env=os.environ | QUIET)
    seconds = time.monotonic() - start
    stamp |= {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "peft", "transformers")},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "seconds": round(seconds, 1),
    }
    notebook.metadata[STAMP] = stamp
    notebook.metadata["language_info"] = {"name": "python"}
    write_whole(path, nbformat.writes(notebook) + "\n")
    return seconds


def main() -> int:
    """Export all, then run what is stale, or all with --force; 1 if a chapter failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", type=Path, help="notebooks; all, if none is given")
    parser.add_argument("--force", action="store_true", help="run also what is not stale")
    arguments = parser.parse_args()
    for path in chapters():
        if export(path):
            print(f"{path.name}: exported")
    failed = False
    for path in arguments.chapters or chapters():
        if not arguments.force and not is_stale(path):
            print(f"{path.name}: up to date")
            continue
        print(f"{path.name}: running ...", flush=True)
        try:
            print(f"{path.name}: {execute(path):.1f} s")
        except CellExecutionError as error:
            failed = True
            print(f"{path.name}: left as it was, because a cell failed\n{error}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
