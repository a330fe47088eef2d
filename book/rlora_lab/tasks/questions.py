"""Eight question-answering sets that the paper's code reads, turned into files for `train`.

`write_questions(folder)` loads them from the hub, checks them, and writes `TASK/train.jsonl` and
`TASK/test.jsonl` as `rlora_lab.tasks.files` reads them. A row's options get letters, and the answer
is a letter. Most test splits on the hub hide their labels, so the test here is a set's own
validation split, and nothing may be chosen by it.

Where each set is, and the columns that are used, was read off the sets' cards; they could not be
reached from where this was written. So every row is checked. Two names of the paper's code hold a
loading script, which `datasets` no longer runs: `baber/piqa` and `lighteval/siqa` hold the same
questions as files.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..errors import LabError
from ..runs.record import write_whole


@dataclass(frozen=True)
class Source:
    """Where a set is, and the columns of it that are used, with their types."""

    hub_id: str
    config: str | None
    columns: dict[str, type]


_ARC = {"question": str, "choices": dict, "answerKey": str}
_OBQA = {"question_stem": str, "choices": dict, "answerKey": str}
_SIQA = {"context": str, "question": str, "answerA": str, "answerB": str, "answerC": str}
_BLANK = {"sentence": str, "option1": str, "option2": str, "answer": str}
_PIQA = {"goal": str, "sol1": str, "sol2": str, "label": int}
SOURCES = {
    "boolq": Source("google/boolq", None, {"passage": str, "question": str, "answer": bool}),
    "piqa": Source("baber/piqa", None, _PIQA),
    "siqa": Source("lighteval/siqa", None, _SIQA | {"label": str}),
    "hellaswag": Source("Rowan/hellaswag", None, {"ctx": str, "endings": list, "label": str}),
    "winogrande": Source("allenai/winogrande", "winogrande_xl", _BLANK),
    "obqa": Source("allenai/openbookqa", "main", _OBQA),
    "arc-easy": Source("allenai/ai2_arc", "ARC-Easy", _ARC),
    "arc-challenge": Source("allenai/ai2_arc", "ARC-Challenge", _ARC),
}
LETTERS = ascii_uppercase
FILES = {"train": "train", "validation": "test"}  # the hub's split: the file's name


def _source(task: str) -> Source:
    if task not in SOURCES:
        raise LabError(f"unknown set {task!r}: allowed are {', '.join(SOURCES)}")
    return SOURCES[task]


def check(task: str, rows: Dataset, where: str) -> None:
    """LabError: what of the rows is not as written down in SOURCES."""
    source = _source(task)
    expected = f"Expected are the columns of {source.hub_id}: {', '.join(source.columns)}."
    if len(rows) == 0:
        raise LabError(f"{task}: {where} has no rows. {expected}")
    if missing := [column for column in source.columns if column not in rows.column_names]:
        found = ", ".join(rows.column_names)
        raise LabError(f"{task}: {where} lacks {', '.join(missing)}; it has {found}. {expected}")
    for column, kind in source.columns.items():
        for number, value in enumerate(rows[column], 1):
            if not isinstance(value, kind):
                found = f"{column} is {type(value).__name__} ({value!r:.40})"
                raise LabError(f"{task}: in row {number} of {where} {found}, not {kind.__name__}.")


def load_split(task: str, split: str, folder: Path | None = None) -> Dataset:
    """A split of a set: from the hub, or from `folder/task/split.jsonl` in its format.

    Raises:
        LabError: it is not to be had, or not as written down in SOURCES.
    """
    source = _source(task)
    if folder is None:
        where = f"split {split} of {source.hub_id}"
        try:
            rows = load_dataset(source.hub_id, source.config, split=split)
        except (OSError, ValueError) as error:
            raise LabError(
                f"{task}: {where} could not be loaded. Is there a network, and is the name still "
                "right? Files in the same format can stand in a folder. datasets said: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
    else:
        where = f"{task}/{split}.jsonl"
        file = Path(folder) / where
        if not file.is_file() or not file.read_text(encoding="utf-8").strip():
            raise LabError(f"{task}: {where} is {'empty' if file.is_file() else 'missing'}.")
        try:
            rows = load_dataset("json", data_files=str(file), split="train")
        except DatasetGenerationError as error:
            raise LabError(f"{task}: {where} can't be read as one JSON object a line.") from error
    check(task, rows, where)
    return rows


def _parts(task: str, row: dict) -> tuple[str, list[str], int]:
    """The question, its options, and the number of the right one."""
    if task == "boolq":
        return f"{row['passage']}\n{row['question']}?", ["no", "yes"], int(row["answer"])
    if task == "piqa":
        return row["goal"], [row["sol1"], row["sol2"]], row["label"]
    if task == "siqa":
        options = [row["answerA"], row["answerB"], row["answerC"]]
        return f"{row['context']} {row['question']}", options, int(row["label"]) - 1
    if task == "hellaswag":
        return row["ctx"], row["endings"], int(row["label"])
    if task == "winogrande":
        return row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1
    question = row["question_stem"] if task == "obqa" else row["question"]
    choices = row["choices"]
    return question, choices["text"], choices["label"].index(row["answerKey"])


def to_text(task: str, row: dict) -> dict:
    """A row as `{"prompt", "answer", "options"}`, letters all of them.

    Raises:
        LabError: the row has no label, or one that is no option.
    """
    try:
        question, texts, right = _parts(task, row)
        letters = list(LETTERS[: len(texts)])
        answer = letters[range(len(texts))[right]] if right >= 0 else None
    except (KeyError, TypeError, ValueError, IndexError):
        answer = None
    if answer is None:
        raise LabError(f"{task}: no usable label in the row {str(row)[:120]}")
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    prompt = "\n".join([question, *lines, "Answer:"])
    return {"prompt": prompt, "answer": answer, "options": letters}


def write_questions(
    folder: Path,
    tasks: Sequence[str] = tuple(SOURCES),
    *,
    train_rows: int = 1500,
    test_rows: int = 300,
    seed: int = 0,
    source: Path | None = None,
) -> None:
    """Write `folder/TASK/train.jsonl` and `test.jsonl`, rows drawn by a seed.

    Args:
        source: a folder of `TASK/train.jsonl` and `validation.jsonl` in the hub's format; None: the
            hub.

    Raises:
        LabError: a set that is not to be had, or not as written down.
    """
    most = {"train": train_rows, "validation": test_rows}
    for task in tasks:
        for split, name in FILES.items():
            rows = [to_text(task, row) for row in load_split(task, split, source)]
            rows = random.Random(f"{seed} {task} {split}").sample(rows, min(most[split], len(rows)))
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_whole(Path(folder) / task / f"{name}.jsonl", text)
