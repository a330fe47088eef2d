"""The `language` suite: eleven tasks of BIG-bench with short text answers, for a causal model.

| task | asks for | different | related |
| --- | --- | --- | --- |
| past_tense | the past of a verb | x | x |
| plural | the plural of a noun | | x |
| negation | the negated sentence | x | x |
| question | the sentence as a question | | x |
| pronoun | a pronoun in place of a name | | x |
| units | which of three measures is the same | x | |
| counting | how many of a kind, as digits | x | |
| adjectives | which of two has the right order of adjectives | x | |
| colors | a colour, a number, or yes and no, about things that are listed | x | |
| sentiment | one of four opinions | x | |
| sports | plausible or implausible | x | |

A row is `{"prompt": str, "answer": str, "options": [str, ...] or None}`. The model reads the prompt
and a line break, and has to write the answer and its end token. No turn marks of a chat are put
around that: with them the untrained SmolLM2 answers no row exactly either (nor does it choose
better), and they are 13 to 30 tokens beside a prompt of 27.

Rows come from the folder in RLORA_LANGUAGE, else from the package `bigbench` where it is installed,
else from the hub. The folder holds `train.jsonl`, `validation.jsonl` and `test.jsonl` of each task,
or it is `benchmark_tasks` of BIG-bench. Numbers from different sources don't belong in one table:
their splits differ. BIG-bench's authors ask that it train no general models.
"""

import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LabError
from ..models.answers import (
    BATCH,
    AnswerModel,
    has_bf16,
    lower_outputs,
    pad,
    skip_blocks,
)
from ..models.bases import TARGETS, Base, cache_folder
from ..names import SUITES
from .suite import mixed, text_lines

SPLITS = ("train", "validation", "test")
MOST = {"train": 2000, "validation": 100, "test": 300}
SHARES = {"validation": 1 / 8, "test": 1 / 4}  # where there are fewer rows
CUT_SEED = 0
LONGEST_PROMPT, LONGEST_ANSWER = 240, 60  # characters
HUB = "tasksource/bigbench"


def load_dataset(name: str, config: str) -> Mapping:
    """As that of datasets, which takes seconds to import, and isn't needed for a folder."""
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(name, config)


@dataclass(frozen=True)
class Task:
    """Where a task's rows are found, and how they are put."""

    path: str
    """Folder in BIG-bench; its first part is the configuration on the hub."""
    prompt: str = "{input}"
    found: str | None = None
    """The input in the hub's text, which adds words and mixes subtasks; None: can't be told."""
    options: bool = False
    """Whether the row keeps what can be answered."""


TASKS = {
    "past_tense": Task(
        "linguistic_mappings/past_tense_json",
        "Today I {input}. Yesterday I",
        r"^Today I (\S+)\. Yesterday I",
    ),
    "plural": Task(
        "linguistic_mappings/plural_json",
        "This is a {input}. Now there is another one. There are two",
        r"^This is a (\S+)\. Now there is another one",
    ),
    "negation": Task(
        "linguistic_mappings/sentence_negation_json",
        "John thinks {input}, but",
        r"^John thinks (.+), but",
    ),
    "question": Task(
        "linguistic_mappings/question_formation_json",
        "John thinks {input}. So I ask:",
        r"^John thinks (.+), but",
    ),
    "pronoun": Task(
        "linguistic_mappings/pronoun_replacement_json",
        "If {input}, then",
        r"^If (.+), then",
    ),
    "units": Task(
        "unit_conversion/unit_identification",
        "{input} Options: {choices}",
        r"^(.+ is)$",
        options=True,
    ),
    "counting": Task("object_counting", found=r"(I have .+\?)"),
    "adjectives": Task("hyperbaton", found=r"(Which sentence .+\?)", options=True),
    "colors": Task("reasoning_about_colored_objects", found=r"(On the .+\?)"),
    "sentiment": Task(
        "multiemo/reviews_sentence_en",
        "Is this opinion positive, negative, neutral or ambivalent? {input}",
        options=True,
    ),
    "sports": Task(
        "sports_understanding",
        "Is this plausible or implausible? {input}",
        r"Statement: (.+?)\s*\n",
        options=True,
    ),
}
DIFFERENT = (
    "past_tense",
    "negation",
    "units",
    "counting",
    "adjectives",
    "colors",
    "sentiment",
    "sports",
)
RELATED = ("past_tense", "plural", "negation", "question", "pronoun")


def _row(task: str, text: str, answers: Sequence[str], choices: Sequence[str]) -> dict | None:
    """A row of a task; None where it is too long."""
    answer = answers[0]
    if task == "counting":  # answers are a word and digits
        answer = next(a for a in answers if a.isdigit())
    text = " ".join(text.split())
    prompt = TASKS[task].prompt.format(input=text, choices=" / ".join(choices))
    if len(prompt) > LONGEST_PROMPT or len(answer) > LONGEST_ANSWER:
        return None
    return {
        "prompt": prompt,
        "answer": answer,
        "options": list(choices) if TASKS[task].options else None,
    }


def _from_bigbench(folder: Path, task: str) -> list[dict]:
    """All rows of a task in BIG-bench's own files."""
    path = folder / TASKS[task].path / "task.json"
    try:
        examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
        rows = []
        for example in examples:
            if "target_scores" in example:
                scores = example["target_scores"]
                answers = [max(scores, key=scores.get)]
                rows.append(_row(task, example["input"], answers, list(scores)))
            else:
                target = example["target"]
                answers = [target] if isinstance(target, str) else target
                rows.append(_row(task, example["input"], answers, []))
    except (OSError, ValueError, KeyError, StopIteration) as error:
        where = path.relative_to(folder)
        raise LabError(
            f"task {task!r}: {where} is no file of BIG-bench with examples of an input and a "
            f"target or target_scores: {error!r}"
        ) from error
    return [row for row in rows if row]


HUB_COLUMNS = ("inputs", "targets", "multiple_choice_targets")


def _from_hub(task: str) -> list[dict]:
    """All rows of a task on the hub, of both its splits."""
    config, pattern = TASKS[task].path.split("/")[0], TASKS[task].found
    where = (
        "Set RLORA_LANGUAGE to a folder with train.jsonl, validation.jsonl and test.jsonl for each "
        "task, or to benchmark_tasks in the unpacked package bigbench (pip download --no-deps "
        "bigbench==1.0.0)"
    )
    if pattern is None:
        raise LabError(
            f"task {task!r} can't be told from other languages' rows on the hub. {where}"
        )
    try:
        found = load_dataset(HUB, config)
    except (OSError, ValueError) as error:
        raise LabError(
            f"task {task!r}: {HUB} could not be loaded, and RLORA_LANGUAGE is not set. {where}. "
            f"datasets said: {str(error).strip().splitlines()[0]}"
        ) from error
    rows = []
    for split in found.values():
        if missing := [name for name in HUB_COLUMNS if name not in split.column_names]:
            raise LabError(f"task {task!r}: {HUB}, {config} has no column {missing[0]}")
        for inputs, targets, choices in zip(*(split[name] for name in HUB_COLUMNS), strict=True):
            match = re.search(pattern, inputs, re.DOTALL)
            if match and targets and _fits(task, targets[0], choices):
                rows.append(_row(task, match[1], targets, choices))
    if not rows:
        raise LabError(f"task {task!r}: no row of {HUB}, {config} has the form that is known")
    return [row for row in rows if row]


def _fits(task: str, answer: str, choices: Sequence[str]) -> bool:
    """Whether a row of the hub is of this task, not of another with the same words."""
    if task == "negation":
        return " not " in f" {answer} "
    if task == "question":
        return " not " not in f" {answer} "
    return bool(choices) or task not in ("units", "sports", "adjectives")


def cut_splits(rows: list[dict]) -> dict[str, list[dict]]:
    """Splits with equal prompts once; of each at most `MOST`, or `SHARES` of what there is."""
    by_prompt = {row["prompt"]: row for row in rows}
    once = [by_prompt[prompt] for prompt in sorted(by_prompt)]
    random.Random(CUT_SEED).shuffle(once)
    parts = {}
    sizes = {split: int(share * len(once)) for split, share in SHARES.items()}
    for split, size in sizes.items():
        size = min(MOST[split], size)
        parts[split], once = once[:size], once[size:]
    parts["train"] = once[: MOST["train"]]
    return {split: parts[split] for split in SPLITS}


def _from_folder(folder: Path, task: str) -> dict[str, list[dict]]:
    """The splits of a task in files of lines."""
    splits = {}
    for split in SPLITS:
        path = folder / task / f"{split}.jsonl"
        if not path.is_file():
            raise LabError(f"RLORA_LANGUAGE: {path.relative_to(folder)} is missing")
        lines = text_lines(path, f"RLORA_LANGUAGE: {task}/{split}.jsonl")
        if lines == [""]:
            raise LabError(f"RLORA_LANGUAGE: {task}/{split}.jsonl is empty")
        splits[split] = []
        for number, line in enumerate(lines, 1):
            row = _checked(line)
            if row is None:
                raise LabError(
                    f"RLORA_LANGUAGE: {task}/{split}.jsonl line {number} is not "
                    '{"prompt": str, "answer": str, "options": null, or a list of str that the '
                    f"answer is one of}}: {line[:80]}"
                )
            splits[split].append(row)
    return splits


def _checked(line: str) -> dict | None:
    """The row in a line, None where it is none."""
    try:
        row = json.loads(line)
        prompt, answer, options = row["prompt"], row["answer"], row.get("options")
        texts = [prompt, answer] if options is None else [prompt, answer, *options]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not all(isinstance(text, str) and text for text in texts):
        return None
    if options is not None and answer not in options:
        return None
    return {"prompt": prompt, "answer": answer, "options": options}


def load_rows(task: str) -> tuple[dict[str, list[dict]], str]:
    """The splits of a task, and where they come from.

    Raises:
        LabError: the task is unknown, or its rows are nowhere or not what they should be; the
            message says where they can be had.
    """
    folder = os.environ.get("RLORA_LANGUAGE")
    if folder and (Path(folder) / task).is_dir():
        return _from_folder(Path(folder), task), "folder in RLORA_LANGUAGE"
    if task not in TASKS:
        raise LabError(
            f"unknown task {task!r}: there are {', '.join(TASKS)}, and folders in RLORA_LANGUAGE"
        )
    if folder:
        return cut_splits(_from_bigbench(Path(folder), task)), "BIG-bench in RLORA_LANGUAGE"
    package = find_spec("bigbench")
    if package is not None:
        folder = Path(package.submodule_search_locations[0]) / "benchmark_tasks"
        return cut_splits(_from_bigbench(folder, task)), "PyPI package bigbench"
    return cut_splits(_from_hub(task)), f"hub {HUB}"


class Language:
    """Tasks with short text answers, for a causal model with a tokenizer.

    Args:
        tasks: names out of `TASKS`, or of folders in RLORA_LANGUAGE; the different ones by default.
        blocks: train the upper so many blocks, over outputs of the lower ones that are computed
            once (for CPUs). None: all blocks.
        bf16: products in bf16; None: where this machine has units for it.
        most: keep at most so many rows of each split of a task, for a short trial. None: all.
    """

    name = "language"
    metrics = ("exact", "choice")
    default_lr, default_batch = SUITES["language"]
    modules_to_save = None

    def __init__(
        self,
        base: Base,
        tasks: Iterable[str] | None = None,
        blocks: int | None = None,
        bf16: bool | None = None,
        most: int | None = None,
    ) -> None:
        if base.tokenizer is None or base.model.get_output_embeddings() is None:
            raise LabError(
                f"suite {self.name!r} needs a causal model with a tokenizer: {base.name!r}"
            )
        if base.tokenizer.eos_token_id is None:
            raise LabError(f"suite {self.name!r}: the tokenizer of {base.name!r} has no end token")
        depth = base.model.config.num_hidden_layers
        if blocks is not None and not 0 < blocks < depth:
            raise LabError(f"blocks must be between 1 and {depth - 1} of {depth}, got {blocks}")
        self.tokenizer = base.tokenizer
        self.tasks = tuple(DIFFERENT if tasks is None else tasks)
        self.lower = 0 if blocks is None else depth - blocks
        self.bf16 = has_bf16() if bf16 is None else bf16
        self._rows: dict[tuple[str, str], list[dict]] = {}
        sources = {}
        digest = hashlib.sha256()
        for task in self.tasks:
            splits, sources[task] = self._load(task)
            for split, rows in splits.items():
                kept = rows[:most]
                digest.update(json.dumps(kept).encode())
                self._rows[task, split] = self._encode(kept, split, self.tasks.index(task))
        self.outputs = None
        if self.lower:
            rows = [row for split in self._rows.values() for row in split]
            end = 0
            for row in rows:
                row["first"], end = end, end + len(row["ids"])
            ids = [row["ids"] for row in rows]
            folder = cache_folder() / "lower"
            self.outputs = lower_outputs(base.model, self.lower, ids, folder, self.bf16)
        self.provenance = {
            "data": ", ".join(sorted(set(sources.values()))),
            "data_sha256": digest.hexdigest()[:16],
            "trained_blocks": f"{self.lower} to {depth - 1} of {depth}",
            "bf16": self.bf16,
        }

    def _load(self, task: str) -> tuple[dict[str, list[dict]], str]:
        return load_rows(task)

    def _prompt(self, text: str) -> list[int]:
        return self._ids(text + "\n")

    def _encode(self, rows: list[dict], split: str, task: int) -> list[dict]:
        """Tokens, one entry for each option where the row has any and is not for training."""
        encoded = []
        for number, row in enumerate(rows):
            options = [row["answer"]]
            if split != "train" and row["options"]:
                options = row["options"]
            prompt = self._prompt(row["prompt"])
            for option in options:
                answer = self._ids(option) + [self.tokenizer.eos_token_id]
                encoded.append(
                    {
                        "ids": prompt + answer,
                        "answer": len(prompt),
                        "row": number,
                        "right": option == row["answer"],
                        "task": task,
                    }
                )
        return encoded

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def model(self, base: Base) -> AnswerModel:
        """What the adapter goes into: the base, asked for answers.

        Where only the upper blocks are trained, it takes the lower ones out of the base, and names
        the upper ones in its targets: a saved adapter then fits the whole model.
        """
        if self.lower:
            upper = range(self.lower, base.model.config.num_hidden_layers)
            skip_blocks(base.model, range(self.lower))
            numbers = "|".join(str(number) for number in upper)
            base.targets = TARGETS["gate_proj"].replace("mlp", rf"layers\.({numbers})\.mlp")
        return AnswerModel(base.model, self.bf16)

    def training_set(self, size: int, seed: int) -> list[dict]:
        """`size` examples, each of a task drawn at random; a task's rows in shuffled order, again
        from the start once they are used up."""
        return mixed([self._rows[task, "train"] for task in self.tasks], size, seed)

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """A padded batch, short rows first."""
        rows = sorted(rows, key=lambda row: len(row["ids"]))
        ids, mask = pad([row["ids"] for row in rows])
        starts = torch.tensor([[row["answer"]] for row in rows])
        places = torch.arange(ids.shape[1])
        asked = mask.bool() & (places >= starts)
        batch = {
            "attention_mask": mask,
            "labels": ids.masked_fill(~asked, -100),
            "tasks": torch.tensor([row["task"] for row in rows]),
        }
        if self.outputs is None:
            return batch | {"input_ids": ids}
        states = np.zeros((*ids.shape, self.outputs.shape[1]), np.float32)
        for state, row in zip(states, rows, strict=True):
            length = len(row["ids"])
            state[:length] = self.outputs[row["first"] : row["first"] + length]
        return batch | {"inputs_embeds": torch.from_numpy(states)}

    def probe(self, task: str, size: int) -> dict[str, Tensor]:
        """A batch of the first `size` validation rows of a task, padded."""
        rows = [row for row in self._rows[task, "validation"] if row["right"]]
        return self.collate(rows[:size])

    @torch.no_grad()
    def results(
        self, model: nn.Module, split: str = "test", tasks: Sequence[str] | None = None
    ) -> dict[str, dict[str, list[bool]]]:
        """`{task: {"exact": [...], "choice": [...]}}`, in the order of the rows; of all tasks, or
        those named.

        A row is exact where the model gives the answer's every token and the end token the highest
        probability, each after the right ones before it: that is when greedy decoding writes it.
        The choice is right where the answer, with its end token, is likelier than the other
        options; tasks without options have none.
        """
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        found = {}
        for task in self.tasks if tasks is None else tasks:
            # In the order that `collate` leaves as it is.
            entries = sorted(self._rows[task, split], key=lambda entry: len(entry["ids"]))
            exact: dict[int, bool] = {}
            likelihoods: dict[int, list[tuple[float, bool]]] = {}
            for first in range(0, len(entries), BATCH):
                part = entries[first : first + BATCH]
                batch = {name: value.to(device) for name, value in self.collate(part).items()}
                logits = model(**batch)["logits"]
                asked = batch["labels"] != -100
                tokens = batch["labels"][asked]
                sizes = asked.sum(1).tolist()
                hits = (logits.argmax(-1) == tokens).split(sizes)
                chosen = logits.log_softmax(-1).gather(1, tokens[:, None]).split(sizes)
                for entry, hit, logs in zip(part, hits, chosen, strict=True):
                    if entry["right"]:
                        exact[entry["row"]] = bool(hit.all())
                    options = likelihoods.setdefault(entry["row"], [])
                    options.append((float(logs.sum()), entry["right"]))
            rows = range(len(exact))
            found[task] = {"exact": [exact[row] for row in rows]}
            if len(likelihoods[0]) > 1:
                likeliest = [max(likelihoods[row], key=lambda option: option[0]) for row in rows]
                found[task]["choice"] = [right for _, right in likeliest]
        model.train(training)
        return found

    @staticmethod
    def shares(results: dict[str, dict[str, list[bool]]]) -> dict[str, dict[str, float]]:
        """`{task: {"exact": share, "choice": share}}`; tasks without options have no choice."""
        return {
            task: {metric: sum(rows) / len(rows) for metric, rows in own.items()}
            for task, own in results.items()
        }

    def score(self, model: nn.Module, split: str = "test") -> dict[str, dict[str, float]]:
        """The shares of right rows: see `results` and `shares`."""
        return self.shares(self.results(model, split))
