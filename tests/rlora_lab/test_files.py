"""A person's own files: where rows may stand, what is refused and how, and the splits."""

import json
from pathlib import Path

import pytest
from lab_helpers import write_rows
from transformers import AutoTokenizer

from rlora_lab.errors import LabError
from rlora_lab.models.bases import load_base
from rlora_lab.tasks.files import Files, lay_out, read_files
from rlora_lab.tasks.suite import load_suite

GOOD = {"prompt": "2 + 2", "answer": "4"}


def numbered(first: int, count: int, **more) -> list[dict]:
    return [
        {"prompt": f"{n} + 1", "answer": f"{n + 1}", **more} for n in range(first, first + count)
    ]


SPLITS = {"train": numbered(0, 6), "validation": numbered(10, 2), "test": numbered(20, 3)}
PLACES = {
    "a folder a task": "sums/{}.jsonl",
    "in a folder of folders": "all/mine/sums/{}.jsonl",
    "a file a split and task": "sums-{}.jsonl",
    "with other marks": "sums_{}.jsonl",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev"])
def test_a_files_name_says_task_and_split(place: str, validation: str, tmp_path: Path):
    for split, rows in SPLITS.items():
        name = {"validation": validation}.get(split, split)
        write_rows(tmp_path / PLACES[place].format(name), rows)
    rows, notes = read_files(tmp_path)
    assert list(rows) == ["sums"] and not notes
    for split, expected in SPLITS.items():
        assert [{k: r[k] for k in GOOD} for r in rows["sums"][split]] == expected
        assert rows["sums"][split][0]["from"].endswith(".jsonl, line 1")


def test_a_line_ends_where_json_lines_do(tmp_path: Path):
    odd = numbered(0, 29) + [{"prompt": "a\u2028b\u0085c", "answer": "d"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in odd]
    (tmp_path / "sums.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    rows, _ = read_files(tmp_path)
    prompts = [row["prompt"] for own in rows["sums"].values() for row in own]
    assert sorted(prompts) == sorted(row["prompt"] for row in odd)


def test_a_rows_own_task_comes_first(tmp_path: Path):
    for split, rows in SPLITS.items():
        own = [row | {"task": "sums"} for row in rows] + [row | {"task": "more"} for row in rows]
        write_rows(tmp_path / f"{split}.jsonl", own)
    rows, _ = read_files(tmp_path)
    assert {task: [len(own) for own in splits.values()] for task, splits in rows.items()} == {
        "more": [6, 2, 3],
        "sums": [6, 2, 3],
    }
    write_rows(tmp_path / "train.jsonl", SPLITS["train"])  # without one: the folder's name
    write_rows(tmp_path / "test.jsonl", SPLITS["test"])
    (tmp_path / "validation.jsonl").unlink()
    assert list(read_files(tmp_path)[0]) == [tmp_path.name]


def test_splits_are_cut_by_a_seed_and_share_no_prompt(tmp_path: Path):
    write_rows(tmp_path / "sums.jsonl", numbered(0, 60) + numbered(0, 30))  # half of them twice
    (rows, notes), (again, _), (other, _) = (read_files(tmp_path, seed) for seed in (0, 0, 1))
    assert rows == again != other
    prompts = {split: {row["prompt"] for row in own} for split, own in rows["sums"].items()}
    assert [len(prompts[split]) for split in ("train", "validation", "test")] == [43, 5, 12]
    assert sum(len(own) for own in rows["sums"].values()) == 90
    assert not prompts["train"] & prompts["test"] and not prompts["validation"] & prompts["test"]
    assert len(notes) == 2 and "cut for test, seed 0" in notes[0]
    alone, _ = read_files(tmp_path / "sums.jsonl")  # one file, for a folder of one
    assert alone == rows


def test_what_stands_in_the_test_is_not_trained_on(tmp_path: Path):
    write_rows(tmp_path / "sums" / "train.jsonl", numbered(0, 10))
    write_rows(tmp_path / "sums" / "validation.jsonl", numbered(8, 6))
    write_rows(tmp_path / "sums" / "test.jsonl", numbered(12, 4))
    rows, notes = read_files(tmp_path)
    assert [len(own) for own in rows["sums"].values()] == [8, 4, 4]
    assert notes == [
        "sums: 2 rows of validation left out, because their prompts stand in test",
        "sums: 2 rows of train left out, because their prompts stand in test or validation",
    ]


WRONG = {
    "no json": ("{'prompt': 1}", "line 2 is not one JSON object"),
    "a list": ("[1]", "line 2 is list, not a JSON object"),
    "another name": (
        '{"instruction": "2 + 2", "output": "4"}',
        "line 2 has no field 'prompt'; it has instruction, output",
    ),
    "no answer": ('{"prompt": "2 + 2"}', "line 2 has no field 'answer'"),
    "a number": ('{"prompt": "2 + 2", "answer": 4}', "line 2: answer must be a text, got int 4"),
    "nothing": ('{"prompt": " ", "answer": "4"}', "line 2: prompt is empty"),
    "no answer's text": ('{"prompt": "2", "answer": null}', "answer must be a text, got NoneType"),
    "a task's number": ('{"prompt": "2", "answer": "4", "task": 3}', "line 2: task must be a text"),
    "options as text": (json.dumps(GOOD | {"options": "4 5"}), "options must be null or a list"),
    "one option": (json.dumps(GOOD | {"options": ["4"]}), "options must be null or a list of two"),
    "twice": (json.dumps(GOOD | {"options": ["4", "4"]}), "line 2: an option stands twice"),
    "none of them": (
        json.dumps(GOOD | {"options": ["3", "5"]}),
        "line 2: answer '4' is none of the options",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_row_is_named(case: str, tmp_path: Path):
    line, message = WRONG[case]
    (tmp_path / "sums.jsonl").write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(LabError) as error:
        read_files(tmp_path)
    assert str(error.value).startswith("sums.jsonl, line 2") and message in str(error.value)


def test_wrong_folders_are_named(tmp_path: Path):
    with pytest.raises(LabError, match="holds no .jsonl file: put there train.jsonl"):
        read_files(tmp_path)
    (tmp_path / "sums.jsonl").write_text("\n")
    with pytest.raises(LabError, match="sums.jsonl is empty"):
        read_files(tmp_path)
    (tmp_path / "sums.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(LabError, match="sums.jsonl is no text in UTF-8"):
        read_files(tmp_path)
    write_rows(tmp_path / "sums.jsonl", numbered(0, 4))
    with pytest.raises(LabError, match="'sums' has 4 different prompts, too few to cut a test"):
        read_files(tmp_path)
    (tmp_path / "sums.jsonl").rename(tmp_path / "test.jsonl")
    with pytest.raises(LabError, match="has no rows to train on"):
        read_files(tmp_path)
    mixed = numbered(0, 30) + numbered(40, 30, options=[f"{n}" for n in range(99)])
    write_rows(tmp_path / "test.jsonl", [])
    (tmp_path / "test.jsonl").unlink()
    write_rows(tmp_path / "sums.jsonl", mixed)
    with pytest.raises(LabError, match="line .* has no options, other rows of task 'sums' have"):
        read_files(tmp_path)


def test_what_was_laid_out_is_what_is_read(tmp_path: Path):
    write_rows(tmp_path / "mine" / "sums.jsonl", numbered(0, 90))
    write_rows(
        tmp_path / "mine" / "more.jsonl", numbered(0, 90, options=[f"{n}" for n in range(99)])
    )
    rows, _ = lay_out(tmp_path / "mine", tmp_path / "out", train_rows=20, test_rows=6)
    assert [len(own) for own in rows["sums"].values()] == [20, 2, 6]
    assert read_files(tmp_path / "out") == (rows, [])
    again, _ = lay_out(tmp_path / "mine", tmp_path / "other", train_rows=20, test_rows=6)
    assert again == rows


TEMPLATE = "{% for m in messages %}user: {{ m['content'] }}{% endfor %} reply:"


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A small causal model whose tokenizer has an end, a start and a chat template."""
    folder = tmp_path / "base"
    load_base(str(llama_folder)).model.save_pretrained(folder)
    marks = {"eos_token": "[SEP]", "bos_token": "[CLS]", "chat_template": TEMPLATE}
    AutoTokenizer.from_pretrained(llama_folder, **marks).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_is_put_as_the_model_knows_it(chat: bool, folder: Path, tmp_path: Path):
    write_rows(tmp_path / "sums.jsonl", numbered(0, 30))
    lay_out(tmp_path / "sums.jsonl", tmp_path / "out", chat=chat)
    base = load_base(str(folder))
    suite = Files(base, bf16=False, folder=tmp_path / "out")
    row, own = suite.asked("sums", "test")[0], suite.files["sums"]["test"][0]
    prompt, answer = row["ids"][: row["answer"]], row["ids"][row["answer"] :]
    said = base.tokenizer.decode(prompt)
    assert said == (f"user : {own['prompt']} reply :" if chat else f"[CLS] {own['prompt']}")
    assert base.tokenizer.decode(answer) == f"{own['answer']} [SEP]"
    assert suite.provenance["chat"] == chat and suite.provenance["source"] == "sums.jsonl"


def test_a_base_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, monkeypatch):
    write_rows(tmp_path / "sums" / "train.jsonl", numbered(0, 30))
    lay_out(tmp_path / "sums", tmp_path / "out", chat=True)
    with pytest.raises(LabError, match=r"train.jsonl, line \d+: base 'tiny' does not know"):
        Files(load_base("tiny"), folder=tmp_path / "out")
    base = load_base(str(folder))
    base.tokenizer.chat_template = None
    with pytest.raises(LabError, match="'base' has no chat template: leave chat out"):
        Files(base, folder=tmp_path / "out")
    lay_out(tmp_path / "sums", tmp_path / "out")
    with pytest.raises(LabError, match="no task 'more' in the files: there are sums"):
        Files(base, ["more"], folder=tmp_path / "out")
    base.model.config.max_position_embeddings = 5
    with pytest.raises(LabError, match=r"line \d+: prompt and answer have \d+ tokens, and 'base'"):
        Files(base, folder=tmp_path / "out")
    monkeypatch.delenv("RLORA_FILES", raising=False)
    with pytest.raises(LabError, match="'files' reads the folder in .* RLORA_FILES"):
        load_suite("files", base)
