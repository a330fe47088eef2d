"""Chapter 00: it is short, answers ten questions, and runs on SmolLM2 and on the tiny base."""

import json
import re
from pathlib import Path

import pytest
from chapter_code import BOOK, printed_by, read
from lab_helpers import needs_language, needs_smollm2, stand_in, write_rows

from rlora_lab.models.bases import load_base, smollm2_folder
from rlora_lab.tasks.language import Language

CHAPTER = BOOK / "00_fifteen_minutes.ipynb"
QUESTIONS = json.loads(Path(__file__).with_name("questions_00.json").read_text())
MOST_WORDS = 1500


def markdown() -> str:
    cells = [cell for cell in read(CHAPTER).cells if cell.cell_type == "markdown"]
    return "\n\n".join(cell.source for cell in cells)


def test_its_prose_is_short():
    prose = re.sub(r"\$\$.*?\$\$", "", markdown(), flags=re.DOTALL)
    prose = re.sub(r"^\|.*$", "", prose, flags=re.MULTILINE)  # tables
    words = re.sub(r"\]\([^)]*\)", "]", prose).split()
    assert MOST_WORDS / 2 < len(words) <= MOST_WORDS


@pytest.mark.parametrize("question", QUESTIONS)
def test_each_question_has_its_sentence(question):
    text = markdown()
    assert QUESTIONS[question], "no sentence answers it"
    for sentence in QUESTIONS[question]:
        assert sentence in text


def test_there_are_ten_questions():
    assert len(QUESTIONS) == 10


def easy_rows(folder: Path) -> None:
    """The two tasks with one answer, and the same questions in every split."""
    for task, word in (("past_tense", "Today"), ("pronoun", "Yesterday")):
        rows = [{"prompt": f"{word} {n}", "answer": "yes", "options": None} for n in range(30)]
        for split in ("train", "validation", "test"):
            write_rows(folder / task / f"{split}.jsonl", rows)


def test_it_runs_on_a_language_model(tmp_path: Path):
    stand_in(tmp_path / "cache" / smollm2_folder().name, tie_word_embeddings=True)
    easy_rows(tmp_path / "language")
    printed = printed_by(
        CHAPTER,
        300,
        RLORA_CACHE=str(tmp_path / "cache"),
        RLORA_LANGUAGE=str(tmp_path / "language"),
        HF_HUB_OFFLINE="1",
    )
    assert "made with smollm2" in printed
    assert re.search(r"past_tense +answered exactly: routed \d+%, exported \d+%", printed)


def test_a_short_trial_keeps_the_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in(tmp_path / "cache" / smollm2_folder().name, tie_word_embeddings=True)
    easy_rows(tmp_path / "language")
    monkeypatch.setenv("RLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RLORA_LANGUAGE", str(tmp_path / "language"))
    base = load_base("smollm2")
    suite = Language(base, ["pronoun"], most=5)
    assert len(suite.results(suite.model(base))["pronoun"]["exact"]) == 5
    assert {row["row"] for row in suite.training_set(60, seed=0)} == set(range(5))


@needs_smollm2
@needs_language
def test_it_runs_on_smollm2():
    assert "made with smollm2" in printed_by(CHAPTER, 300)


def test_it_runs_on_the_tiny_base(tmp_path: Path):
    printed = printed_by(CHAPTER, 300, RLORA_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    assert "made with tiny" in printed
    assert re.search(r"rotate 2 +answered exactly: routed \d+%, exported \d+%", printed)


def test_the_page_shows_what_every_machine_can_make():
    outputs = [out for cell in read(CHAPTER).cells for out in cell.get("outputs", [])]
    assert "made with tiny" in "".join(out.get("text", "") for out in outputs)
