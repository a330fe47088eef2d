"""How long a chapter takes to read, by a rule, how much of it is folded, how high its page is.

    python book/reading.py [--site _build/html] [--folded]

The rule: prose, tables and formulas at 225 words a minute, where a word is what stands between two
spaces of the Markdown, without the addresses of links; visible code at 30 lines a minute, blank
lines not counted. What is folded and the exercises are not counted, nor is what code prints. Cells
that only draw or check are folded, by the tag `hide-input`; their number is printed, and with
`--folded` each of them: what it does, its lines, and under which heading.

Heights are in pixels of a window 1280 wide, as the built page stands, and with all that is folded
open. They need chromium, and a site: `make book`.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

BOOK = Path(__file__).resolve().parent
WORDS, LINES = 225, 30  # a minute
FOLDED = {"hide-cell", "hide-input", "remove-cell", "remove-input"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 1280


def count(cells: list[dict]) -> tuple[int, int]:
    """The words and the lines of visible code in the cells of a notebook, exercises left out."""
    words = lines = 0
    part = ""
    for cell in cells:
        source = "".join(cell["source"])
        heading = re.match(r"## (\w+)", source)
        if cell["cell_type"] == "markdown" and heading:
            part = heading[1]
        if part == "Exercises" or FOLDED & set(cell["metadata"].get("tags", [])):
            continue
        if cell["cell_type"] == "markdown":
            words += len(re.sub(r"\]\([^)]*\)", "]", source).split())
        elif cell["cell_type"] == "code":
            lines += sum(bool(line.strip()) for line in source.splitlines())
    return words, lines


def read_minutes(path: Path) -> float:
    """How many minutes the notebook at `path` takes to read."""
    words, lines = count(json.loads(path.read_text("utf-8"))["cells"])
    return words / WORDS + lines / LINES


def heights(pages: list[Path]) -> list[tuple[int, int]]:
    """Of each built page, its height in pixels closed and with all that is folded open.

    Raises:
        FileNotFoundError: there is no chromium, or a page was not built.
    """
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None:
        raise FileNotFoundError("there is no chromium: make browser installs it")
    for page in pages:
        if not page.is_file():
            raise FileNotFoundError(f"{page} was not built: make book builds it")
    found = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": 900})
        for page in pages:
            tab.goto(page.absolute().as_uri())
            closed = tab.evaluate("document.querySelector('article').scrollHeight")
            tab.evaluate("for (const box of document.querySelectorAll('details')) box.open = true")
            found.append((closed, tab.evaluate("document.querySelector('article').scrollHeight")))
        browser.close()
    return found


def folded(cells: list[dict]) -> list[tuple[str, int, str]]:
    """Of each folded cell what it does ("drawing", "check", "solution"), how many lines it has, and
    the heading that it stands under."""
    found, under = [], ""
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            under = (re.findall(r"^##+ (.*)", source, re.M) or [under])[-1]
        elif {"hide-input", "hide-cell"} & set(cell["metadata"].get("tags", [])):
            prompt = cell["metadata"].get("mystnb", {}).get("code_prompt_show", "Show the code")
            lines = sum(bool(line.strip()) for line in source.splitlines())
            found.append((prompt.split()[-1], lines, under))
    return found


def main() -> int:
    """Print a line for each chapter; 1 if heights were asked for and can't be had."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", type=Path, help="a built site, for the heights of its pages")
    parser.add_argument("--folded", action="store_true", help="list the folded cells")
    arguments = parser.parse_args()
    site = arguments.site
    chapters = sorted(BOOK.glob("[0-9][0-9]*.ipynb"))
    sizes = [("", "")] * len(chapters)
    if site:
        try:
            sizes = heights([site / "book" / f"{path.stem}.html" for path in chapters])
        except FileNotFoundError as error:
            print(error, file=sys.stderr)
            return 1
    heads = ("words", "lines", "folded", "minutes", "closed", "open")
    print(f"{'chapter':30}", *(f"{head:>8}" for head in heads))
    for path, size in zip(chapters, sizes, strict=True):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        count_folded = sum("hide-input" in cell["metadata"].get("tags", []) for cell in cells)
        numbers = (*count(cells), count_folded, round(read_minutes(path)), *size)
        print(f"{path.stem:30}", *(f"{number:>8}" for number in numbers))
        if arguments.folded:
            for kind, lines, under in folded(cells):
                print(f"    {kind:10}{lines:>4} lines  {under}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
