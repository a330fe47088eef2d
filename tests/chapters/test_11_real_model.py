"""Chapter 11: it runs on SmolLM2 and on the tiny base, its record is whole, and the hub's sets that
do not fit are refused."""

import re
from pathlib import Path

import pytest
from chapter_code import BOOK, printed_by, read
from datasets import Dataset
from lab_helpers import needs_language, needs_smollm2, stand_in, write_rows

from rlora_lab.errors import LabError
from rlora_lab.models.bases import smollm2_folder
from rlora_lab.report.loading import load_result
from rlora_lab.tasks import questions
from rlora_lab.tasks.files import read_files
from rlora_lab.tasks.questions import SOURCES, check, load_split, to_text, write_questions

CHAPTER = BOOK / "11_real_model.ipynb"

# A made-up row of each data set, with the columns of its card.
CHOICES = {"text": ["a fork", "a spoon", "a cup", "a pan"], "label": list("ABCD")}
NUMBERED = {"text": ["a fork", "a spoon", "a cup", "a pan"], "label": list("1234")}
ROWS = {
    "boolq": {"question": "is it wet", "answer": True, "passage": "It rains."},
    "piqa": {"goal": "Dry a plate.", "sol1": "With a towel.", "sol2": "With soap.", "label": 0},
    "siqa": {
        "context": "Ann fell.",
        "question": "How is Ann?",
        "answerA": "glad",
        "answerB": "hurt",
        "answerC": "rich",
        "label": "2",
    },
    "hellaswag": {
        "ind": 4,
        "activity_label": "Cooking",
        "ctx_a": "A man cuts bread.",
        "ctx_b": "he",
        "ctx": "A man cuts bread. he",
        "endings": ["eats it.", "flies.", "sings.", "sleeps."],
        "source_id": "x",
        "split": "train",
        "split_type": "indomain",
        "label": "0",
    },
    "winogrande": {
        "sentence": "The cup fell off the shelf because the _ was slippery.",
        "option1": "cup",
        "option2": "shelf",
        "answer": "2",
    },
    "obqa": {"id": "1", "question_stem": "You eat soup with", "choices": CHOICES, "answerKey": "B"},
    "arc-easy": {"id": "1", "question": "What boils soup?", "choices": CHOICES, "answerKey": "D"},
    "arc-challenge": {"id": "1", "question": "Which?", "choices": NUMBERED, "answerKey": "3"},
}
ANSWERS = {
    "boolq": "B",
    "piqa": "A",
    "siqa": "B",
    "hellaswag": "A",
    "winogrande": "B",
    "obqa": "B",
    "arc-easy": "D",
    "arc-challenge": "C",
}
HIDDEN = {"piqa": {"label": -1}, "hellaswag": {"label": ""}, "winogrande": {"answer": ""}}


def easy_rows(folder: Path) -> None:
    """The chapter's two tasks with one answer each."""
    for task, word in (("past_tense", "Today"), ("units", "Yesterday")):
        for first, split in enumerate(("train", "validation", "test")):
            options = ["yes", "no", "Today"] if task == "units" else None
            rows = [
                {"prompt": f"{word} {100 * first + n}", "answer": "yes", "options": options}
                for n in range(30)
            ]
            write_rows(folder / task / f"{split}.jsonl", rows)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_it_runs_on_a_language_model(scale: float, tmp_path: Path):
    """With logits that make a loss of about 20 too, where roundings are larger than 1e-5."""
    stand_in(tmp_path / "cache" / smollm2_folder().name, scale)
    easy_rows(tmp_path / "language")
    printed = printed_by(
        CHAPTER,
        RLORA_CACHE=str(tmp_path / "cache"),
        RLORA_LANGUAGE=str(tmp_path / "language"),
        HF_HUB_OFFLINE="1",
    )
    assert "What stands below was made with smollm2." in printed
    assert re.search(r"^units +20 +33%", printed, re.M)
    assert "off from the mean over answers" in printed


@needs_smollm2
@needs_language
def test_it_runs_on_smollm2():
    assert "What stands below was made with smollm2." in printed_by(CHAPTER)


def test_it_runs_on_the_tiny_base(tmp_path: Path):
    printed = printed_by(CHAPTER, RLORA_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    assert "What stands below was made with tiny." in printed
    assert re.search(r"^largest +100 +12%", printed, re.M)


def test_the_page_shows_what_every_machine_can_make():
    outputs = [out for cell in read(CHAPTER).cells for out in cell.get("outputs", [])]
    assert "made with tiny" in "".join(out.get("text", "") for out in outputs)


def test_the_record_is_of_smollm2_and_whole():
    found = load_result("practice-smollm2", say=False)
    assert found["base"] == "smollm2" and "--base smollm2 --data language" in found["command"]
    assert len(found["tasks"]) == 8 and found["settings"]["steps"] >= 200
    for own in found["tasks"].values():
        assert own["rows"]["test"] >= 60 and 0 <= own["chance"] < 1
        for when in ("before", "after", "exported"):
            assert 0 <= own[when]["exact"] <= 1
    assert found["reloaded_off"] < 0.1 and found["exported_off"]["relative"] > 0


def test_every_set_has_a_row_here():
    assert ROWS.keys() == SOURCES.keys() == ANSWERS.keys()


@pytest.mark.parametrize("task", ROWS)
def test_a_row_in_the_hubs_format_becomes_a_prompt_and_a_letter(task, tmp_path):
    write_rows(tmp_path / task / "train.jsonl", [ROWS[task]])
    (row,) = load_split(task, "train", tmp_path)
    text = to_text(task, row)
    assert text["answer"] == ANSWERS[task]
    letters = [line[0] for line in text["prompt"].splitlines() if line[1:3] == ". "]
    assert letters == text["options"] == list("ABCD"[: len(letters)])
    assert text["prompt"].endswith("\nAnswer:")
    for value in ROWS[task].values():  # what is asked stands in the prompt
        if isinstance(value, str) and len(value) > 8 and value != "indomain":
            assert value in text["prompt"]


@pytest.mark.parametrize("task", ROWS)
def test_a_renamed_column_is_named(task):
    for column in SOURCES[task].columns:
        row = dict(ROWS[task])
        row[f"{column}_new"] = row.pop(column)
        with pytest.raises(LabError) as error:
            check(task, Dataset.from_list([row]), "the file")
        message = str(error.value)
        assert message.startswith(f"{task}: the file lacks {column};")
        assert f"{column}_new" in message and SOURCES[task].hub_id in message


@pytest.mark.parametrize("task", ROWS)
def test_a_column_of_another_type_is_named_with_its_row(task):
    good = [ROWS[task]] * 2
    check(task, Dataset.from_list(good), "the file")
    for column in SOURCES[task].columns:
        rows = Dataset.from_list([*good, ROWS[task] | {column: None}])
        with pytest.raises(LabError, match=rf"{task}: in row 3 of the file {column} is NoneType"):
            check(task, rows, "the file")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_or_missing_set_is_named(content, tmp_path):
    with pytest.raises(LabError, match="siqa: siqa/train.jsonl is missing"):
        load_split("siqa", "train", tmp_path)
    write_rows(tmp_path / "siqa" / "train.jsonl", [])
    (tmp_path / "siqa" / "train.jsonl").write_text(content)
    with pytest.raises(LabError, match="siqa: siqa/train.jsonl is empty"):
        load_split("siqa", "train", tmp_path)


def test_a_file_that_is_no_json_is_named(tmp_path):
    write_rows(tmp_path / "siqa" / "train.jsonl", [ROWS["siqa"]])
    (tmp_path / "siqa" / "train.jsonl").write_text('{"context": "Ann')
    with pytest.raises(LabError, match="siqa: siqa/train.jsonl can't be read"):
        load_split("siqa", "train", tmp_path)


@pytest.mark.parametrize("task", HIDDEN)
def test_a_hidden_label_is_refused(task):
    with pytest.raises(LabError, match=f"{task}: no usable label in the row"):
        to_text(task, ROWS[task] | HIDDEN[task])


def test_an_answer_that_is_no_option_is_refused():
    for task, wrong in {"obqa": {"answerKey": "E"}, "siqa": {"label": "4"}}.items():
        with pytest.raises(LabError, match=f"{task}: no usable label"):
            to_text(task, ROWS[task] | wrong)


def test_more_than_eight_options_have_letters_too():
    choices = {"text": [f"thing {n}" for n in range(11)], "label": list("ABCDEFGHIJK")}
    row = to_text("obqa", ROWS["obqa"] | {"choices": choices, "answerKey": "K"})
    assert row["answer"] == "K" and row["options"] == list("ABCDEFGHIJK")
    assert "\nK. thing 10\n" in row["prompt"]


def test_a_set_that_nobody_knows_is_named():
    with pytest.raises(LabError, match="unknown set 'weather': allowed are boolq, piqa"):
        load_split("weather", "train")


def test_the_hub_is_asked_by_id_and_config_and_checked(monkeypatch):
    asked = []

    def from_hub(hub_id, config, split):
        asked.append((hub_id, config, split))
        return Dataset.from_list([{"question_stem": "?", "options": CHOICES, "answerKey": "A"}])

    monkeypatch.setattr(questions, "load_dataset", from_hub)
    with pytest.raises(LabError, match="split train of allenai/openbookqa lacks choices"):
        load_split("obqa", "train")
    assert asked == [("allenai/openbookqa", "main", "train")]


def test_without_a_hub_the_error_says_what_to_do():
    with pytest.raises(LabError, match="boolq: split train of google/boolq could not be loaded"):
        load_split("boolq", "train")


def test_sets_become_files_that_are_read(tmp_path):
    numbers = {
        "obqa": [ROWS["obqa"] | {"question_stem": f"You eat soup {n}"} for n in range(40)],
        "boolq": [ROWS["boolq"] | {"passage": f"It rains {n}."} for n in range(40)],
    }
    for task, rows in numbers.items():
        write_rows(tmp_path / "hub" / task / "train.jsonl", rows[:30])
        write_rows(tmp_path / "hub" / task / "validation.jsonl", rows[30:])
    settings = {"source": tmp_path / "hub", "train_rows": 20, "test_rows": 8}
    write_questions(tmp_path / "files", list(numbers), **settings)
    rows, _ = read_files(tmp_path / "files")
    for task, number in (("obqa", 4), ("boolq", 2)):
        assert [len(rows[task][split]) for split in ("train", "validation", "test")] == [18, 2, 8]
        assert len(rows[task]["test"][0]["options"]) == number
        assert {row["prompt"] for row in rows[task]["test"]} <= {
            to_text(task, row)["prompt"] for row in numbers[task][30:]
        }
