"""The chapters, as every test reads them."""

from pathlib import Path

import nbformat

BOOK = Path(__file__).parent.parent / "book"
CHAPTERS = sorted(BOOK.glob("[0-9][0-9]_*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook, with its outputs; each call gives a copy of its own."""
    return nbformat.read(path, as_version=4)
