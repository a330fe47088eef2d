"""Chapter 11: its record is whole, and the hub's sets that do not fit are refused."""

import pytest
from datasets import Dataset
from lab_helpers import write_rows

from rlora_lab.errors import LabError
from rlora_lab.report.loading import load_result
from rlora_lab.tasks import questions
from rlora_lab.tasks.files import read_files
from rlora_lab.tasks.questions import SOURCES, check, load_split, to_text, write_questions

CHOICES = {"text": ["a fork", "a spoon", "a cup", "a pan"], "label": list("ABCD")}
NUMBERED = CHOICES | {"label": list("1234")}
ENDINGS = ["eats it.", "flies.", "sings.", "sleeps."]
SHELF = "The cup fell off the shelf because the _ was slippery."
OBQA = {"id": "1", "question_stem": "You eat soup with", "choices": CHOICES, "answerKey": "B"}
# A made-up row of each set, with the columns of its card that matter, and the letter of its answer.
ROWS = {
    "boolq": ({"question": "is it wet", "answer": True, "passage": "It rains."}, "B"),
    "piqa": ({"goal": "Dry a plate.", "sol1": "With cloth.", "sol2": "In sun.", "label": 0}, "A"),
    "siqa": (
        {"context": "Ann fell.", "question": "How is Ann?", "label": "2"}
        | {"answerA": "glad", "answerB": "hurt", "answerC": "rich"},
        "B",
    ),
    "hellaswag": ({"ctx": "A man cuts bread. he", "endings": ENDINGS, "label": "0"}, "A"),
    "winogrande": ({"sentence": SHELF, "option1": "cup", "option2": "shelf", "answer": "2"}, "B"),
    "obqa": (OBQA, "B"),
    "arc-easy": ({"question": "What boils soup?", "choices": CHOICES, "answerKey": "D"}, "D"),
    "arc-challenge": ({"question": "Which?", "choices": NUMBERED, "answerKey": "3"}, "C"),
}
SIZES = {"train": 18, "validation": 2, "test": 8}  # of 20 and 8 rows


def test_the_record_is_of_smollm2_and_whole():
    found = load_result("practice-smollm2", say=False)
    assert found["base"] == "smollm2" and "--base smollm2 --data language" in found["command"]
    assert len(found["tasks"]) == 8 and found["settings"]["steps"] >= 200
    assert min(own["rows"]["test"] for own in found["tasks"].values()) >= 60
    assert found["reloaded_off"] < 0.1 and found["exported_off"]["relative"] > 0


@pytest.mark.parametrize("task", SOURCES)
def test_a_row_in_the_hubs_format_becomes_a_prompt_and_a_letter(task, tmp_path):
    asked, answer = ROWS[task]
    write_rows(tmp_path / task / "train.jsonl", [asked])
    (row,) = load_split(task, "train", tmp_path)
    text = to_text(task, row)
    assert text["answer"] == answer
    letters = [line[0] for line in text["prompt"].splitlines() if line[1:3] == ". "]
    assert letters == text["options"] == list("ABCD"[: len(letters)])
    assert text["prompt"].endswith("\nAnswer:")
    for value in asked.values():  # what is asked stands in the prompt
        if isinstance(value, str) and len(value) > 8:
            assert value in text["prompt"]


@pytest.mark.parametrize("task", SOURCES)
def test_a_column_of_another_name_or_type_is_named(task):
    row, source = ROWS[task][0], SOURCES[task]
    for column in source.columns:
        renamed = {key + "_new" * (key == column): value for key, value in row.items()}
        with pytest.raises(LabError, match=f"^{task}: the file lacks {column};") as error:
            check(task, Dataset.from_list([renamed]), "the file")
        assert f"{column}_new" in str(error.value) and source.hub_id in str(error.value)
        rows = Dataset.from_list([row, row, row | {column: None}])
        with pytest.raises(LabError, match=f"{task}: in row 3 of the file {column} is NoneType"):
            check(task, rows, "the file")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "is missing"),
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"context": "Ann', "can't be read"),
    ],
)
def test_a_file_without_rows_is_named(content, fault, tmp_path):
    write_rows(tmp_path / "siqa" / "train.jsonl", [])
    if content is None:
        (tmp_path / "siqa" / "train.jsonl").unlink()
    else:
        (tmp_path / "siqa" / "train.jsonl").write_text(content)
    with pytest.raises(LabError, match=f"siqa: siqa/train.jsonl {fault}"):
        load_split("siqa", "train", tmp_path)


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("piqa", {"label": -1}),  # three hide it
        ("hellaswag", {"label": ""}),
        ("winogrande", {"answer": ""}),
        ("obqa", {"answerKey": "E"}),  # two have no such option
        ("siqa", {"label": "4"}),
    ],
)
def test_a_row_without_a_right_option_is_refused(task, change):
    with pytest.raises(LabError, match=f"{task}: no usable label in the row"):
        to_text(task, ROWS[task][0] | change)


def test_more_than_eight_options_have_letters_too():
    choices = {"text": [f"thing {n}" for n in range(11)], "label": list("ABCDEFGHIJK")}
    row = to_text("obqa", OBQA | {"choices": choices, "answerKey": "K"})
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
    sets = {
        "obqa": [OBQA | {"question_stem": f"You eat soup {n}"} for n in range(40)],
        "boolq": [ROWS["boolq"][0] | {"passage": f"It rains {n}."} for n in range(40)],
    }
    for task, rows in sets.items():
        write_rows(tmp_path / "hub" / task / "train.jsonl", rows[:30])
        write_rows(tmp_path / "hub" / task / "validation.jsonl", rows[30:])
    settings = {"source": tmp_path / "hub", "train_rows": 20, "test_rows": 8}
    write_questions(tmp_path / "files", list(sets), **settings)
    found, _ = read_files(tmp_path / "files")
    for task, rows in sets.items():
        assert {split: len(own) for split, own in found[task].items()} == SIZES
        allowed = [to_text(task, row) for row in rows[30:]]  # of the hub's validation split
        assert all({k: row[k] for k in allowed[0]} in allowed for row in found[task]["test"])
