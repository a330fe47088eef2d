"""The page of symbols, held to the chapters: they have the letters that it says, and no others."""

import re

import pytest
from chapter_code import BOOK, CHAPTERS, read

PAGE = (BOOK / "symbols.md").read_text("utf-8")
COMMON, OWN = PAGE.split("## Letters that a chapter needs for itself")
ROW = re.compile(r"^\| (\$.+?) \|.*\[(\d\d\w?)\]\((.*?)\.ipynb\) \|$", re.M)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.S)
NAMES = {path.stem[: path.stem.index("_")]: path for path in CHAPTERS}


def formulas(text: str) -> list[str]:
    return [display or inline for display, inline in FORMULA.findall(text)]


def letters(formula: str) -> set[str]:
    """The letters of a formula without their indices: W of W_r, sigma of \\sigma_i."""
    formula = re.sub(r"\\(text|mathrm|operatorname)\s*\{[^}]*\}", " ", formula)
    formula = re.sub(r"[_^](\{[^}]*\}|\\[a-zA-Z]+(\{\w*\})?|\w)", " ", formula)
    commands = set(re.findall(r"\\([a-zA-Z]+)", formula))
    greek = {name for name in commands if re.fullmatch(GREEK, name)}
    return greek | set(re.findall(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", " ", formula)))


GREEK = r"alpha|beta|gamma|delta|theta|kappa|pi|psi|rho|sigma|tau|varphi|phi|Delta|eta|mu"


def rows(part: str) -> list[tuple[str, str]]:
    """Each formula of a table's first column, with the chapter of its row."""
    found = []
    for symbols, number, stem in ROW.findall(part):
        assert NAMES[number].stem == stem
        found += [(symbol, number) for symbol in formulas(symbols)]
    return found


def text_of(path) -> str:
    return "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def test_a_letter_has_one_meaning():
    symbols = [symbol for symbol, _ in rows(COMMON)]
    assert len(symbols) > 20 and sorted(symbols) == sorted(set(symbols))


@pytest.mark.parametrize("number", NAMES)
def test_a_chapter_has_the_symbols_that_the_page_says(number):
    """Each as it is written there, or the letter with another index."""
    text = text_of(NAMES[number])
    shown = set().union(*map(letters, formulas(text)))
    for symbol, where in rows(PAGE):
        if where == number:
            plain = symbol.replace("_t", "").replace("_k", "").replace("_i", "")
            assert symbol in text or letters(plain) <= shown, symbol


@pytest.mark.parametrize("number", NAMES)
def test_the_page_has_the_symbols_of_a_chapters_table(number):
    known = {name for symbol, _ in rows(COMMON) for name in letters(symbol)}
    known |= {name for symbol, where in rows(OWN) if where == number for name in letters(symbol)}
    table = text_of(NAMES[number]).partition("## Symbols")[2].split("\n## ")[0]
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    used = {name for first in firsts for formula in formulas(first) for name in letters(formula)}
    assert used - known - COUNTERS == set(), "book/symbols.md lacks these"


COUNTERS = {"i", "j", "k", "t", "u"}  # they only count heads, tasks, seeds, steps
