"""The `files` suite: a person's own prompts and answers, in files of JSON lines.

A line is `{"prompt": str, "answer": str}`, with two fields that may be left out: `task`, else the
file's name says it, and `options`, a list of all that can be answered. Other fields are passed
over. Where a row stands decides its split:

| file | task | split |
| --- | --- | --- |
| `units/train.jsonl`, `validation.jsonl`, `test.jsonl` | units | as named |
| `units-train.jsonl`, `units_test.jsonl` | units | as named |
| `train.jsonl`, `test.jsonl` | the row's own, else the folder's name | as named |
| `units.jsonl` | units | cut by a seed |

`valid`, `val` and `dev` are validation too. Where a task has no test or validation split, one is
cut from its training rows by a seed: a fifth of its prompts, then a tenth, and equal prompts go
together. A training row whose prompt stands in another split is left out, as is a validation row
whose prompt stands in the test.
"""

import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import LabError
from ..models.bases import Base
from ..names import SUITES
from ..runs.record import write_whole
from .characters import Characters
from .language import SPLITS, Language
from .strings import VOCABULARY
from .suite import text_lines

NAMES = {"train": "train", "test": "test"}
NAMES |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
CUT = {"test": 1 / 5, "validation": 1 / 10}  # of a task's prompts, where there is no such split
FEWEST = 2  # rows of a split
FORM = "form.json"
Rows = dict[str, dict[str, list[dict]]]
"""By task and split; a row is {"prompt", "answer", "options", "from"}."""


def read_files(data: Path, seed: int = 0) -> tuple[Rows, list[str]]:
    """The rows of a folder, or of one file, and what was done that a person should know.

    Raises:
        LabError: which file, which line and which field is wrong, and what is allowed.
    """
    if data.is_file():
        root, paths = data.parent, [data]
    else:
        root = data
        found = [path.relative_to(data) for path in sorted(data.rglob("*.jsonl"))]
        paths = [data / path for path in found if not any(p.startswith(".") for p in path.parts)]
    if not paths:
        raise LabError(
            f"{data} holds no .jsonl file: put there train.jsonl and test.jsonl, or TASK.jsonl, "
            'with lines {"prompt": "...", "answer": "...", "task": "..."}'
        )
    placed: dict[str, dict[str | None, list[dict]]] = {}
    for path in paths:
        task, split = _place(path.relative_to(root), root.resolve().name)
        for row in _read(path, str(path.relative_to(root))):
            own = placed.setdefault(row.pop("task") or task, {})
            own.setdefault(split, []).append(row)
    notes: list[str] = []
    return {task: _splits(task, placed[task], seed, notes) for task in sorted(placed)}, notes


def _place(path: Path, root: str) -> tuple[str, str | None]:
    """The task and the split that a file's name says."""
    found = re.fullmatch(rf"(?:(.+)[-_.])?({'|'.join(NAMES)})", path.stem, re.IGNORECASE)
    if found is None:
        return path.stem, None
    return found[1] or path.parent.name or root, NAMES[found[2].lower()]


def _read(path: Path, name: str) -> list[dict]:
    rows = []
    for number, line in enumerate(text_lines(path, name), 1):
        if line.strip():
            where = f"{name}, line {number}"
            rows.append(_row(line, where))
    if not rows:
        raise LabError(f"{name} is empty")
    return rows


def _row(line: str, where: str) -> dict:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise LabError(
            f"{where} is not one JSON object: {error}. A .jsonl file has one on each line"
        ) from error
    if not isinstance(found, dict):
        raise LabError(f"{where} is {type(found).__name__}, not a JSON object: {line[:60]}")
    for field in ("prompt", "answer"):
        if field not in found:
            raise LabError(f"{where} has no field {field!r}; it has {', '.join(found) or 'none'}")
        _check_text(found[field], field, where)
    task, options = found.get("task"), found.get("options")
    if task is not None:
        _check_text(task, "task", where)
    if options is not None:
        if not isinstance(options, list) or len(options) < 2:
            raise LabError(f"{where}: options must be null or a list of two texts or more")
        for option in options:
            _check_text(option, "an option", where)
        if len(set(options)) < len(options):
            raise LabError(f"{where}: an option stands twice in {options}")
        if found["answer"] not in options:
            raise LabError(f"{where}: answer {found['answer']!r} is none of the options {options}")
    row = {"task": task, "prompt": found["prompt"], "answer": found["answer"], "options": options}
    return row | {"from": found.get("from", where)}


def _check_text(value: object, field: str, where: str) -> None:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise LabError(f"{where}: {field} must be a text, got {kind} {value!r:.40}")
    if not value.strip():
        raise LabError(f"{where}: {field} is empty")


def _splits(task: str, placed: dict, seed: int, notes: list[str]) -> dict[str, list[dict]]:
    """The three splits of a task, none with a prompt of another."""
    rows = {split: placed.get(split, []) for split in SPLITS}
    rows["train"] = placed.get(None, []) + rows["train"]
    if not rows["train"]:
        raise LabError(f"task {task!r} has no rows to train on: its file should be train.jsonl")
    for split in ("test", "validation"):
        if not rows[split]:
            rows[split], rows["train"] = _cut(task, rows["train"], split, seed)
            notes.append(f"{task}: {len(rows[split])} rows cut for {split}, seed {seed}")
    for split, others in (("validation", ["test"]), ("train", ["test", "validation"])):
        seen = {row["prompt"] for other in others for row in rows[other]}
        kept = [row for row in rows[split] if row["prompt"] not in seen]
        if len(kept) < len(rows[split]):
            notes.append(
                f"{task}: {len(rows[split]) - len(kept)} rows of {split} left out, because their "
                f"prompts stand in {' or '.join(others)}"
            )
        rows[split] = kept
        if len(kept) < FEWEST:
            raise LabError(f"task {task!r} has {len(kept)} rows for {split}, not even {FEWEST}")
    every = [row for split in SPLITS for row in rows[split]]
    bare = [row for row in every if row["options"] is None]
    if 0 < len(bare) < len(every):
        raise LabError(f"{bare[0]['from']} has no options, other rows of task {task!r} have some")
    return rows


def _cut(task: str, rows: list[dict], split: str, seed: int) -> tuple[list[dict], list[dict]]:
    prompts = sorted({row["prompt"] for row in rows})
    size = max(FEWEST, round(CUT[split] * len(prompts)))
    if len(prompts) < 3 * size:
        raise LabError(
            f"task {task!r} has {len(prompts)} different prompts, too few to cut a {split} split "
            f"from: 10 are needed, or a file {split}.jsonl"
        )
    random.Random(f"{seed} {task} {split}").shuffle(prompts)
    taken = set(prompts[:size])
    return (
        [row for row in rows if row["prompt"] in taken],
        [row for row in rows if row["prompt"] not in taken],
    )


def lay_out(
    data: Path,
    folder: Path,
    *,
    seed: int = 0,
    chat: bool = False,
    train_rows: int | None = None,
    test_rows: int = 300,
) -> tuple[Rows, list[str]]:
    """Check a person's files and write the splits that were made of them into `folder`.

    Args:
        chat: whether prompts go into the base's chat template.
        train_rows: at most so many of a task, drawn by the seed; None: all.
        test_rows: at most so many of a task; of validation a third of that.

    Raises:
        LabError: as `read_files`.
    """
    rows, notes = read_files(data, seed)
    most = {"train": train_rows, "validation": max(FEWEST, test_rows // 3), "test": test_rows}
    for task, splits in rows.items():
        for split, size in most.items():
            if size is not None and len(splits[split]) > size:
                draw = random.Random(f"{seed} {task} {split} drawn")
                splits[split] = draw.sample(splits[split], size)
    for split in SPLITS:
        lines = [{"task": task} | row for task in rows for row in rows[task][split]]
        write_whole(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in lines))
    form = {"source": data.resolve().name, "split_seed": seed, "chat": chat, "notes": notes}
    write_whole(folder / FORM, json.dumps(form, indent=1) + "\n")
    return rows, notes


class Files(Language):
    """The rows that `lay_out` wrote into a folder, or into that in RLORA_FILES.

    The base `tiny`, which has no tokenizer, takes its own characters, with "=" for the end.

    Args:
        tasks: some of those in the folder; all by default.
        blocks, bf16, most: as for `Language`.
    """

    name = "files"
    default_lr, default_batch = SUITES["files"]

    def __init__(
        self,
        base: Base,
        tasks: Sequence[str] | None = None,
        blocks: int | None = None,
        bf16: bool | None = None,
        most: int | None = None,
        folder: Path | None = None,
    ) -> None:
        if folder is None and "RLORA_FILES" not in os.environ:
            raise LabError("suite 'files' reads the folder in the environment variable RLORA_FILES")
        folder = Path(folder or os.environ["RLORA_FILES"])
        self.files, _ = read_files(folder)
        form = {"source": folder.name, "split_seed": 0, "chat": False}
        if (folder / FORM).is_file():
            form = json.loads((folder / FORM).read_text())
        self.chat = form["chat"]
        if base.tokenizer is None:
            base = replace(base, tokenizer=Characters())
            self._check_characters(base.name)
        if self.chat and not base.tokenizer.chat_template:
            raise LabError(f"the tokenizer of {base.name!r} has no chat template: leave chat out")
        super().__init__(base, self.files if tasks is None else tasks, blocks, bf16, most)
        self.provenance |= {name: form[name] for name in ("source", "split_seed", "chat")}
        longest = getattr(base.model.config, "max_position_embeddings", None)
        for (task, split), rows in self._rows.items():
            for row in rows:
                if longest and len(row["ids"]) > longest:
                    where = self.files[task][split][row["row"]]["from"]
                    raise LabError(
                        f"{where}: prompt and answer have {len(row['ids'])} tokens, and "
                        f"{base.name!r} takes {longest}: shorten them"
                    )

    def _check_characters(self, name: str) -> None:
        for splits in self.files.values():
            for row in (row for rows in splits.values() for row in rows):
                strange = set("".join([row["prompt"], row["answer"]])) - set(VOCABULARY)
                if strange:
                    raise LabError(
                        f"{row['from']}: base {name!r} does not know {sorted(strange)}, only "
                        f"{VOCABULARY}. For text take smollm2, a folder or a hub id"
                    )

    def _load(self, task: str) -> tuple[dict[str, list[dict]], str]:
        if task not in self.files:
            raise LabError(f"no task {task!r} in the files: there are {', '.join(self.files)}")
        return self.files[task], "own files"

    def asked(self, task: str, split: str) -> list[dict]:
        """The rows of a split with their right answers: "ids", of which the answer's begin at
        "answer"."""
        return [row for row in self._rows[task, split] if row["right"]]

    def training_rows(self) -> list[dict]:
        """All of them, in the same form."""
        return [row for task in self.tasks for row in self.asked(task, "train")]

    def _prompt(self, text: str) -> list[int]:
        """A prompt as the model reads it: in its chat template; or before a line break, after the
        token that the tokenizer starts every text with, if it does."""
        if self.chat:
            turn = [{"role": "user", "content": text}]
            asked = {"tokenize": False, "add_generation_prompt": True}
            return self._ids(self.tokenizer.apply_chat_template(turn, **asked))
        if isinstance(self.tokenizer, Characters):
            return self._ids(text)
        start = self.tokenizer.bos_token_id
        starts = start is not None and self.tokenizer("a")["input_ids"][:1] == [start]
        return [start] * starts + self._ids(text + "\n")
