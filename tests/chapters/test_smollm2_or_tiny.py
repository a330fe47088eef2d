"""Chapters 00 and 11: they run on SmolLM2 where it is, and on the tiny base where it is not.

The second is what nbval runs, and what their pages show.
"""

import re
from pathlib import Path

import pytest
from chapter_code import BOOK, printed_by, read, said_by
from lab_helpers import needs_language, needs_smollm2, stand_in, write_rows

from rlora_lab.models.bases import load_base, smollm2_folder
from rlora_lab.tasks.language import Language

# What each prints of its tasks on a language model, and on the tiny base.
PRINTED = {
    "00_fifteen_minutes": (
        r"past_tense +answered exactly: routed \d+%, exported \d+%",
        r"rotate 2 +answered exactly: routed \d+%, exported \d+%",
    ),
    "11_real_model": (r"\nunits +20 +33%", r"\nlargest +100 +12%"),
}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Where chapters look for SmolLM2 and its tasks: nothing is there yet."""
    return {"RLORA_CACHE": str(tmp_path / "cache"), "RLORA_LANGUAGE": str(tmp_path / "language")}


def put_there(places: dict[str, str], **model) -> None:
    """A small model in SmolLM2's place, and tasks with one answer each."""
    stand_in(Path(places["RLORA_CACHE"]) / smollm2_folder().name, **model)
    for task in ("past_tense", "pronoun", "units"):
        said = {"answer": "yes", "options": ["yes", "no", "so"] if task == "units" else None}
        for first, split in enumerate(("train", "validation", "test")):
            rows = [{"prompt": f"{task} {100 * first + n}"} | said for n in range(30)]
            write_rows(Path(places["RLORA_LANGUAGE"]) / task / f"{split}.jsonl", rows)


@pytest.mark.parametrize(
    ("chapter", "model"),
    [
        ("00_fifteen_minutes", {"tie_word_embeddings": True}),
        ("11_real_model", {"scale": 40.0}),  # a loss of about 20: roundings are larger than 1e-5
    ],
)
def test_on_a_language_model(chapter, model, places):
    put_there(places, **model)
    printed = printed_by(BOOK / f"{chapter}.ipynb", **places)
    assert "made with smollm2" in printed
    assert re.search(PRINTED[chapter][0], printed)


@needs_smollm2
@needs_language
@pytest.mark.parametrize("chapter", PRINTED)
def test_on_smollm2(chapter):
    assert "made with smollm2" in printed_by(BOOK / f"{chapter}.ipynb")


@pytest.mark.parametrize("chapter", PRINTED)
def test_the_page_shows_what_every_machine_can_make(chapter):
    shown = said_by(*read(BOOK / f"{chapter}.ipynb").cells)
    assert "made with tiny" in shown
    assert re.search(PRINTED[chapter][1], shown)


def test_a_short_trial_keeps_the_first_rows(places, monkeypatch: pytest.MonkeyPatch):
    put_there(places)
    for name, place in places.items():
        monkeypatch.setenv(name, place)
    base = load_base("smollm2")
    suite = Language(base, ["pronoun"], most=5)
    assert len(suite.results(suite.model(base))["pronoun"]["exact"]) == 5
    assert {row["row"] for row in suite.training_set(60, seed=0)} == set(range(5))
