"""The form of a chapter: its parts, outputs, stamp, pictures, addresses. And that this can fail."""

import itertools
import re
from pathlib import Path

import execute
import nbformat
import pytest
import reading
from chapter_code import CHAPTERS, read, said_by
from project import CONFIG, PROJECT, ROOT, URL

# The level-2 headings of a chapter, in this order. Each may go on after a colon, and others may
# stand between them.
PARTS = [
    "What you will be able to do",
    "Motivation",
    "Mathematics",
    "Code",
    "By hand",
    "Proof",
    "Experiment",
    "What goes wrong",
    "Symbols",
    "Exercises",
    "Further reading",
    "Next",
]
# Chapter 00 shows the whole in fifteen minutes; what it claims is derived in the others.
WAY_IN = "00_fifteen_minutes.ipynb"
WAY_IN_PARTS = [
    "What you will be able to do",
    "The picture",
    "The equation",
    "Five names",
    "The layer on one screen",
    "Two tasks, live",
    "What it costs",
    "Does it help?",
    "Where to read on",
    "Next",
]
# The set-up cell starts like this, so that a chapter alone in Colab has what it imports.
SET_UP = f"""# @title Set-up
from importlib.util import find_spec

if find_spec("rlora_lab") is None:  # in Colab
    %pip install -q "rlora-min[EXTRAS] @ git+{URL}@v{PROJECT["version"]}"
"""
EXTRAS = {"16b_serving.ipynb": "lab,serve"}  # of the other chapters, lab alone
OPEN = ("10", "16")  # chapters that fold what measures or serves too, and say so in other words
LONGEST_CELL = 25  # lines that are not blank
MOST_MINUTES = 25  # by the rule of reading.py
WIDEST_LINE = 85  # columns of code that a page shows without scrolling
MOST_SECONDS = 60
STAMPED = ["hash", "date", "python", "torch", "peft", "transformers", "machine", "seconds"]
WIDEST_OUTPUT = 88  # columns of a printed table
SMALLEST_TYPE = 9  # points, in the width of a page
TABLE_ROW = re.compile(r"\S {2,}\S.*\S {2,}\S")
# What no Markdown cell may hold.
WRONG_TEXT = {
    "holds a MyST directive or role, shown raw in Colab": re.compile(
        r"^\s*(```+|~~~+|:::+)\{|\{[\w:+.-]+\}`|^\([\w-]+\)=\s*$|^%\s", re.M
    ),
    "promises that another base will do": re.compile(
        r"(swap|exchange|replace)\W+`?load_base", re.I
    ),
    "has a head in bold; make it a heading or a sentence": re.compile(
        r"^\*\*[^*\n]+[.:?!]\*\* \S", re.M
    ),
    "has a formula in a heading": re.compile(r"^#+ .*\$", re.M),
}
NAMED = re.compile(r"https://github\.com/[\w.-]+/rlora-book")
HOME = re.compile(r"(/home|/root|/Users|/tmp|/work|/content)/|[A-Z]:\\\\")


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def images(cell) -> bool:
    outputs = cell.get("outputs", [])
    return any(kind.startswith("image/") for out in outputs for kind in out.get("data", {}))


def text_of(cell) -> str:
    """All that the outputs of a cell show as text."""
    shown = [data for out in cell.get("outputs", []) for data in out.get("data", {}).items()]
    return said_by(cell) + "".join(value for kind, value in shown if kind.startswith("text/"))


def is_solution(cell) -> bool:
    return (
        cell.cell_type == "code"
        and "hide-cell" in tags(cell)
        and cell.metadata.get("cellView") == "form"
        and cell.source.startswith("# @title Solution")
        and bool(cell.get("outputs"))
    )


def sections(cells: list) -> dict[str, list]:
    """The cells under each level-2 heading, the heading's own cell first."""
    found, name = {"": []}, ""
    for cell in cells:
        heading = re.match(r"## ([^\n:]+)", cell.source) if cell.cell_type == "markdown" else None
        name = heading[1].strip() if heading else name
        found.setdefault(name, []).append(cell)
    return found


def check_opening(nb, name: str) -> list[str]:
    badge, title = nb.cells[:2]
    address = URL.replace("https://github.com/", "https://colab.research.google.com/github/")
    address = f"{address}/blob/{CONFIG['repository']['branch']}/book/{name}"
    found = []
    if badge.cell_type != "markdown" or f"]({address})" not in badge.source:
        found.append(f"badge: the first cell does not point to {address}")
    if tags(badge) != ["remove-cell"]:
        found.append("badge: the first cell is not tagged remove-cell")
    if not re.fullmatch(r"# [^\n]+\n\n\*\*[^\n]+[.]\*\*", title.source.strip()):
        found.append("title: the second cell is not '# Title' and one claim in **bold**")
    return found


def check_setup(nb, name: str) -> list[str]:
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    setup = code[0]
    wanted = SET_UP.replace("EXTRAS", EXTRAS.get(name, "lab"))
    found = []
    if not setup.source.startswith(wanted):
        found.append(f"set-up: the first code cell does not start with\n{wanted}")
    if "hide-cell" not in tags(setup) or setup.metadata.get("cellView") != "form":
        found.append("set-up: not hidden (tag hide-cell and cellView: form)")
    if any("pip install" in cell.source for cell in code[1:]):
        found.append("set-up: another cell installs something")
    parts = sections(nb.cells)
    if setup not in parts.get(PARTS[0], []):
        found.append(f"set-up: not the end of '{PARTS[0]}'")
    return found


def check_headings(nb, expected: list[str]) -> list[str]:
    headings = list(sections(nb.cells))
    found = [f"parts: '## {part}' is missing" for part in expected if part not in headings]
    if [h for h in headings if h in expected] != [part for part in expected if part in headings]:
        found.append("parts: out of order")
    if headings[-1] != expected[-1]:
        found.append(f"parts: something stands after '{expected[-1]}'")
    if sum(bool(re.match(r"# ", c.source)) for c in nb.cells if c.cell_type == "markdown") != 1:
        found.append("parts: not exactly one title")
    return found


def check_parts(nb) -> list[str]:
    parts = sections(nb.cells)
    found = check_headings(nb, PARTS)
    for part in ("Motivation", "Experiment"):
        if not any(map(images, parts.get(part, []))):
            found.append(f"parts: no picture in '{part}'")
    for part in ("By hand", "Proof"):
        proofs = [c for c in parts.get(part, []) if c.cell_type == "code" and "assert" in c.source]
        if not any(re.search(r"\d", text_of(cell)) for cell in proofs):
            found.append(f"parts: no assert that prints its number in '{part}'")
    table = "".join(cell.source for cell in parts.get("Symbols", []))
    if not re.search(r"^\| *symbol[^|]*\|[^|]*code[^|]*\|[^|]*PEFT[^|]*\|", table, re.I | re.M):
        found.append("parts: 'Symbols' has no table | symbol | code | PEFT |")
    return found


def check_exercises(nb) -> list[str]:
    cells = sections(nb.cells).get("Exercises", [])
    starts = [i for i, cell in enumerate(cells) if cell.source.startswith("### Exercise")]
    found = [] if 3 <= len(starts) <= 5 else [f"exercises: {len(starts)}, not three to five"]
    for start, end in itertools.pairwise([*starts, len(cells)]):
        answers = cells[start + 1 : end]
        if not answers or not all(map(is_solution, answers)):
            title = cells[start].source.splitlines()[0]
            found.append(f"exercises: no hidden, executed solution under '{title}'")
    return found


def check_outputs(nb) -> list[str]:
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    found = []
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("outputs: the cells did not run once, in order")
    for number, cell in enumerate(code, 1):
        if any(out.output_type == "error" for out in cell.outputs):
            found.append(f"outputs: cell {number} ends in an error")
        if any(out.get("name") == "stderr" for out in cell.outputs):
            found.append(f"outputs: cell {number} writes to stderr (a warning, a progress bar)")
        if HOME.search(text_of(cell)):
            found.append(f"outputs: cell {number} shows a path of the machine")
        lines = sum(bool(line.strip()) for line in cell.source.splitlines())
        if lines > LONGEST_CELL and not {"hide-input", "hide-cell"} & set(tags(cell)):
            found.append(f"code: cell {number} has {lines} lines, more than {LONGEST_CELL}")
    return found


def check_folds(nb, name: str) -> list[str]:
    """What is folded says so in one way; what is open fits the page and the reader's time."""
    words, lines = reading.count(nb.cells)
    minutes = words / reading.WORDS + lines / reading.LINES
    found = [f"folds: takes {minutes:.0f} minutes"] if minutes > MOST_MINUTES else []
    for number, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        shown = cell.metadata.get("mystnb", {}).get("code_prompt_show")
        known = name[:2] in OPEN or shown in ("Show the drawing", "Show the check")
        if "hide-input" in tags(cell) and not known:
            found.append(f"folds: cell {number} is folded and says neither drawing nor check")
        wide = [line for line in cell.source.splitlines() if len(line) > WIDEST_LINE]
        if any("pip install" not in line for line in wide):
            found.append(f"folds: cell {number} has code wider than {WIDEST_LINE} columns")
        rows = [line for line in said_by(cell).splitlines() if TABLE_ROW.search(line)]
        if "remove-output" not in tags(cell) and any(len(row) > WIDEST_OUTPUT for row in rows):
            found.append(f"folds: cell {number} prints a table wider than {WIDEST_OUTPUT} columns")
    return found


def check_pictures(nb) -> list[str]:
    found = []
    for number, cell in enumerate(nb.cells):
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        if images(cell) and len(alt) < 20:
            found.append(f"pictures: cell {number} has no alt text in mystnb.image.alt")
        sizes = map(float, re.findall(r"fontsize\"?[=:] *([\d.]+)", cell.source))
        if any(size < SMALLEST_TYPE for size in sizes):
            found.append(f"pictures: cell {number} has type of less than {SMALLEST_TYPE} points")
        if cell.cell_type != "markdown":
            continue
        if cell.get("attachments") or re.search(r"!\[[^]]*\]\((?!https://)|<img", cell.source):
            found.append(f"pictures: cell {number} shows a file, which a chapter alone lacks")
        if re.search(r"!\[\s*\]\(", cell.source):
            found.append(f"pictures: cell {number} has no alt text")
    return found


def check_text(nb) -> list[str]:
    found = []
    for number, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            wrong = [what for what, pattern in WRONG_TEXT.items() if pattern.search(cell.source)]
            found += [f"text: cell {number} {what}" for what in wrong]
        for other in set(NAMED.findall(cell.source)) - {URL}:
            found.append(f"text: cell {number} names {other} instead of {URL}")
    return found


def check_stamp(nb, name: str) -> list[str]:
    stamp = nb.metadata.get(execute.STAMP, {})
    missing = [key for key in STAMPED if not stamp.get(key)]
    if missing:
        return [f"stamp: no {', '.join(missing)}"]
    found = []
    if stamp["hash"] != execute.notebook_hash(nb, Path(name).stem):
        found.append("stamp: stale; make execute runs the chapter again")
    if stamp["seconds"] > MOST_SECONDS:
        found.append(f"stamp: ran {stamp['seconds']} s, more than {MOST_SECONDS}")
    return found


def faults(nb, name: str) -> list[str]:
    """What is wrong with the form of a chapter."""
    found = check_opening(nb, name) + check_setup(nb, name) + check_outputs(nb)
    found += check_folds(nb, name) + check_pictures(nb) + check_text(nb) + check_stamp(nb, name)
    if name == WAY_IN:
        return found + check_headings(nb, WAY_IN_PARTS)
    return found + check_parts(nb) + check_exercises(nb)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.name)
def test_the_form_of_a_chapter(path):
    assert faults(read(path), path.name) == []


def test_the_guide_names_every_part_in_order():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    assert re.findall(r"`## ([^`]+)`", guide) == PARTS


def test_what_chapters_export_is_what_they_show():
    made = {}
    for path in CHAPTERS:
        text = execute.export_of(read(path), path.stem)
        if text is not None:
            made[f"ch{path.stem}.py"] = text
    folder = ROOT / "book" / "rlora_lab" / "chapters"
    there = {path.name: path.read_text("utf-8") for path in folder.glob("ch*.py")}
    assert len(made) >= 3 and there == made, "make execute writes them anew"


# Each check, seen to fail on a chapter that was broken on purpose.


def code_cell(nb, condition=lambda cell: True):
    return next(cell for cell in nb.cells if cell.cell_type == "code" and condition(cell))


def part(nb, name: str):
    return next(cell for cell in nb.cells if cell.source.startswith(f"## {name}"))


def output(kind: str, **fields) -> list:
    return [nbformat.v4.new_output(kind, **fields)]


ERROR = output("error", ename="ValueError", evalue="", traceback=[])
STDERR = output("stream", name="stderr", text="100%")
HOME_SHOWN = output("stream", name="stdout", text="/home/me/file")
BREAKS = {
    "badge": lambda nb: nb.cells[0].update(source="[badge](https://colab.research.google.com)"),
    "title": lambda nb: nb.cells[1].update(source="# Title alone"),
    "set-up: the first code": lambda nb: code_cell(nb).update(source="import torch"),
    "set-up: not hidden": lambda nb: code_cell(nb).metadata.pop("cellView"),
    "set-up: another": lambda nb: code_cell(nb, images).update(source="%pip install torch"),
    "parts: '## Proof' is missing": lambda nb: nb.cells.remove(part(nb, "Proof")),
    "parts: out of order": lambda nb: part(nb, "Code").update(source="## Experiment"),
    "parts: no picture in 'Motivation'": lambda nb: code_cell(nb, images).update(outputs=[]),
    "parts: 'Symbols' has no table": lambda nb: part(nb, "Symbols").update(source="## Symbols"),
    "exercises: no hidden": lambda nb: code_cell(nb, is_solution).metadata.pop("cellView"),
    "outputs: the cells did not run": lambda nb: code_cell(nb).update(execution_count=7),
    "outputs: cell 1 ends in an error": lambda nb: code_cell(nb).update(outputs=ERROR),
    "outputs: cell 1 writes to stderr": lambda nb: code_cell(nb).update(outputs=STDERR),
    "outputs: cell 1 shows a path": lambda nb: code_cell(nb).update(outputs=HOME_SHOWN),
    "code: cell": lambda nb: code_cell(nb, lambda c: not tags(c)).update(source="1\n" * 40),
    "folds: takes": lambda nb: part(nb, "Code").update(source="## Code\n" + "word " * 6000),
    "folds: cell": lambda nb: code_cell(nb, images).update(source="x" * 86),
    "says neither": lambda nb: code_cell(nb, lambda c: "hide-input" in tags(c)).metadata.pop(
        "mystnb"
    ),
    "pictures: cell": lambda nb: code_cell(nb, images).metadata["mystnb"]["image"].pop("alt"),
    "has type of less": lambda nb: code_cell(nb, images).update(source="ax.text('', fontsize=8)"),
    "prints a table": lambda nb: code_cell(nb).update(
        outputs=output("stream", text="lora  " + "1.0  " * 20)
    ),
    "shows a file": lambda nb: nb.cells[1].update(source="![a layer](layer.svg)"),
    "text: cell 1 holds": lambda nb: nb.cells[1].update(source="```{note}\nRaw.\n```"),
    "text: cell 2 holds": lambda nb: nb.cells[2].update(source="As {cite}`lora` says."),
    "text: cell 2 promises": lambda nb: nb.cells[2].update(source="Swap `load_base` for yours."),
    "text: cell 4 has a head": lambda nb: nb.cells[4].update(source="**Why.** Because."),
    "text: cell 4 has a formula": lambda nb: nb.cells[4].update(source="## With $N$ heads"),
    "text: cell 1 names": lambda nb: nb.cells[1].update(source="https://github.com/me/rlora-book"),
    "stamp: stale": lambda nb: code_cell(nb, is_solution).update(source="# @title Solution"),
    "stamp: ran": lambda nb: nb.metadata[execute.STAMP].update(seconds=61),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_a_broken_chapter_is_seen(fault):
    path = CHAPTERS[1]
    nb = read(path)
    BREAKS[fault](nb)
    assert any(fault in found for found in faults(nb, path.name))
