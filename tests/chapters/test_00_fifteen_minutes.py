"""Chapter 00: it is short, and answers its ten questions."""

import json
import re
from pathlib import Path

import pytest
from chapter_code import BOOK, read

CELLS = read(BOOK / "00_fifteen_minutes.ipynb").cells
MARKDOWN = "\n\n".join(cell.source for cell in CELLS if cell.cell_type == "markdown")
QUESTIONS = json.loads(Path(__file__).with_name("questions_00.json").read_text())
MOST_WORDS = 1500


def test_its_prose_is_short():
    prose = re.sub(r"(?s)\$\$.*?\$\$", "", MARKDOWN)
    prose = re.sub(r"(?m)^\|.*$", "", prose)  # tables
    words = re.sub(r"\]\([^)]*\)", "]", prose).split()
    assert MOST_WORDS / 2 < len(words) <= MOST_WORDS


@pytest.mark.parametrize("question", QUESTIONS)
def test_each_question_has_its_sentence(question):
    assert [sentence for sentence in QUESTIONS[question] if sentence not in MARKDOWN] == []
