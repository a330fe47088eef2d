"""Chapter 00: it is short, answers ten questions, and runs on SmolLM2 and on the tiny base."""

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from chapter_code import BOOK, read
from lab_helpers import make_tokenizer, needs_smollm2
from nbclient import NotebookClient
from transformers import LlamaConfig, LlamaForCausalLM

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


def run(**environment: str) -> str:
    """What the chapter prints, run whole in a kernel of its own."""
    notebook = read(CHAPTER)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(BOOK)}}
    )
    client.execute(env=os.environ | environment)
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return "".join(out.get("text", "") for out in outputs)


def stand_in(folder: Path) -> None:
    """A model of six small random blocks, in SmolLM2's place."""
    tokenizer = make_tokenizer(["Today Yesterday yes no"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        initializer_range=0.1,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def easy_rows(folder: Path) -> None:
    """The two tasks with one answer, and the same questions in every split."""
    for task, word in (("past_tense", "Today"), ("pronoun", "Yesterday")):
        rows = [{"prompt": f"{word} {n}", "answer": "yes", "options": None} for n in range(30)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / task).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            (folder / task / f"{split}.jsonl").write_text(text)


def test_it_runs_on_a_language_model(tmp_path: Path):
    stand_in(tmp_path / "cache" / smollm2_folder().name)
    easy_rows(tmp_path / "language")
    printed = run(
        RLORA_CACHE=str(tmp_path / "cache"),
        RLORA_LANGUAGE=str(tmp_path / "language"),
        HF_HUB_OFFLINE="1",
    )
    assert "made with smollm2" in printed
    assert re.search(r"past_tense +answered exactly: routed \d+%, exported \d+%", printed)


def test_a_short_trial_keeps_the_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in(tmp_path / "cache" / smollm2_folder().name)
    easy_rows(tmp_path / "language")
    monkeypatch.setenv("RLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RLORA_LANGUAGE", str(tmp_path / "language"))
    base = load_base("smollm2")
    suite = Language(base, ["pronoun"], most=5)
    assert len(suite.results(suite.model(base))["pronoun"]["exact"]) == 5
    assert {row["row"] for row in suite.training_set(60, seed=0)} == set(range(5))


@needs_smollm2
@pytest.mark.skipif(
    "RLORA_LANGUAGE" not in os.environ and find_spec("bigbench") is None,
    reason="the language tasks are not here: RLORA_LANGUAGE names their folder",
)
def test_it_runs_on_smollm2():
    assert "made with smollm2" in run()


def test_it_runs_on_the_tiny_base(tmp_path: Path):
    printed = run(RLORA_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    assert "made with tiny" in printed
    assert re.search(r"rotate 2 +answered exactly: routed \d+%, exported \d+%", printed)


def test_the_page_shows_what_every_machine_can_make():
    outputs = [out for cell in read(CHAPTER).cells for out in cell.get("outputs", [])]
    assert "made with tiny" in "".join(out.get("text", "") for out in outputs)
