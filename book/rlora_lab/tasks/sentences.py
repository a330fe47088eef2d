"""The `sentences` suite: five real classification tasks, one encoder, one adapter, a head a task.

| task | asks | classes | hub id |
| --- | --- | --- | --- |
| trec | what kind of answer a question wants | 6 | SetFit/TREC-QC |
| sst2 | sentiment of a film review | 2 | SetFit/sst2 |
| sst5 | the same in five steps | 5 | SetFit/sst5 |
| subj | subjective or objective | 2 | SetFit/subj |
| cr | sentiment of a product review | 2 | SetFit/CR |

The environment variable RLORA_DATA may name a folder to read instead of the hub: `labels.json`
(`{task: [names of its labels]}`), and for each task `train.jsonl`, `validation.jsonl` and
`test.jsonl` with a line `{"text": str, "label": int}` a sentence. Numbers from the hub's files and
from a folder's don't belong in one table: their splits differ. Ten of trec's 500 test questions are
among its training questions too; where a validation split is cut here, such are left out.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from datasets import DatasetDict, load_dataset
from torch import Tensor, nn

from ..errors import LabError
from ..models.bases import Base
from ..names import SUITES

datasets.disable_progress_bars()

# hub id, column, and what stands in it for each label, in the order of the labels
HUB = {
    "trec": (
        "SetFit/TREC-QC",
        "label_coarse_text",
        {
            "DESC": "description",
            "ENTY": "entity",
            "ABBR": "abbreviation",
            "HUM": "human",
            "LOC": "location",
            "NUM": "number",
        },
    ),
    "sst2": ("SetFit/sst2", "label", {0: "negative", 1: "positive"}),
    "sst5": (
        "SetFit/sst5",
        "label",
        {0: "very negative", 1: "negative", 2: "neutral", 3: "positive", 4: "very positive"},
    ),
    "subj": ("SetFit/subj", "label", {1: "subjective", 0: "objective"}),
    "cr": ("SetFit/CR", "label", {0: "negative", 1: "positive"}),
}
SPLITS = ("train", "validation", "test")
MAX_TOKENS = 64
GROUPS = 3  # of equal size, that a training batch is computed in
CUT_SEED, CUT_SHARE = 0, 0.1


def _from_hub(task: str) -> tuple[DatasetDict, list[str], str]:
    """The splits, the names of the labels, and what was done to the splits."""
    hub_id, column, names = HUB[task]
    try:
        found = load_dataset(hub_id)
    except (OSError, ValueError) as error:
        raise LabError(
            f"task {task!r}: {hub_id} could not be loaded from the hub, and RLORA_DATA is not set. "
            "Set RLORA_DATA to a folder with the sentences (labels.json, and train.jsonl, "
            "validation.jsonl and test.jsonl for each task), or run where the hub or its cache "
            f"(HF_HOME) can be read. datasets said: {str(error).strip().splitlines()[0]}"
        ) from error
    if strange := {value for split in found.values() for value in split[column]} - set(names):
        raise LabError(
            f"task {task!r}: {hub_id} has {sorted(map(str, strange))} in its column {column}; "
            f"known are {', '.join(map(str, names))}"
        )
    numbers = {value: i for i, value in enumerate(names)}
    found = found.map(
        lambda row: {"text": row["text"], "label": numbers[row[column]]},
        remove_columns=[c for c in found["train"].column_names if c not in ("text", "label")],
    )
    return *cut_validation(found), list(names.values())


def cut_validation(found: DatasetDict) -> tuple[DatasetDict, str]:
    """Cut a validation split off the training split, where there is none.

    Sentences that occur twice, or in the test split too, are left out of what is cut.
    """
    if "validation" in found:
        return found, "splits as on the hub"
    seen = set(found["test"]["text"])
    keep = []
    for i, text in enumerate(found["train"]["text"]):
        if text not in seen:
            seen.add(text)
            keep.append(i)
    parts = found["train"].select(keep).train_test_split(test_size=CUT_SHARE, seed=CUT_SEED)
    note = f"validation: {CUT_SHARE:.0%} of the training split, cut with seed {CUT_SEED}"
    return DatasetDict(train=parts["train"], validation=parts["test"], test=found["test"]), note


def _from_folder(folder: Path, task: str, classes: int) -> DatasetDict:
    files = {split: str(folder / task / f"{split}.jsonl") for split in SPLITS}
    for file in files.values():
        if not Path(file).is_file():
            raise LabError(f"RLORA_DATA: {Path(file).relative_to(folder)} is missing")
    for split, file in files.items():
        number = 0
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    good = isinstance(row["text"], str) and isinstance(row["label"], int)
                    good = good and 0 <= row["label"] < classes
                except (ValueError, KeyError, TypeError):
                    good = False
                if not good:
                    raise LabError(
                        f"RLORA_DATA: {task}/{split}.jsonl line {number} is not "
                        f'{{"text": str, "label": 0 to {classes - 1}}}: {line.strip()[:80]}'
                    )
        if number == 0:
            raise LabError(f"RLORA_DATA: {task}/{split}.jsonl is empty")
    return load_dataset("json", data_files=files)


class SentenceClassifier(nn.Module):
    """Mean-pooled last hidden states, and a linear classifier for each task.

    The classifiers are the rows of one linear map, `task_heads`: logits (n, all classes), where
    the classes of other tasks are masked out, so that each task has its own softmax.
    """

    def __init__(self, base: Base, classes: dict[str, int]) -> None:
        super().__init__()
        self.encoder = base.model.base_model
        self.task_heads = nn.Linear(self.encoder.config.hidden_size, sum(classes.values()))
        owner = torch.repeat_interleave(torch.tensor(list(classes.values())))
        self.register_buffer("owner", owner, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        task: Tensor,
        labels: Tensor | None = None,
        **kwargs,
    ) -> dict[str, Tensor]:
        """`task` (n,) numbers the tasks, `labels` (n,) the rows of `task_heads`."""
        if self.training:
            # Short sentences beside short ones: padded to the longest of the batch, more than half
            # of what is computed would be padding.
            order = attention_mask.sum(1).argsort()
            groups = [self._pool(input_ids[i], attention_mask[i]) for i in order.chunk(GROUPS)]
            pooled = torch.cat(groups)[order.argsort()]
        else:
            pooled = self._pool(input_ids, attention_mask)
        logits = self.task_heads(pooled)  # (n, all classes)
        logits = logits.masked_fill(self.owner != task.unsqueeze(1), -torch.inf)
        output = {"logits": logits}
        if labels is not None:
            output["loss"] = F.cross_entropy(logits, labels)
        return output

    def _pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean over each sentence's tokens, (n, hidden)."""
        used = attention_mask.any(0)
        mask = attention_mask[:, used]
        hidden = self.encoder(input_ids[:, used], attention_mask=mask).last_hidden_state
        mask = mask.unsqueeze(-1).to(hidden)
        return (hidden * mask).sum(1) / mask.sum(1)


class Sentences:
    """The five tasks (or those of the folder in RLORA_DATA), for a base with a tokenizer.

    Args:
        tasks: names of some of them; all by default.
    """

    name = "sentences"
    metrics = ("accuracy",)
    default_lr, default_batch = SUITES["sentences"]
    modules_to_save = ["task_heads"]

    def __init__(self, base: Base, tasks: Iterable[str] | None = None) -> None:
        self.tokenizer = base.tokenizer
        folder = os.environ.get("RLORA_DATA")
        found: dict[str, DatasetDict] = {}
        self.labels: dict[str, list[str]] = {}
        notes: dict[str, str] = {}
        if folder:
            try:
                self.labels = json.loads((Path(folder) / "labels.json").read_text())
            except (OSError, ValueError) as error:
                raise LabError(f"RLORA_DATA: {folder} has no readable labels.json") from error
        known = self.labels if folder else HUB
        chosen = tuple(known if tasks is None else tasks)
        if unknown := [task for task in chosen if task not in known]:
            raise LabError(f"unknown task {unknown[0]!r}: there are {', '.join(known)}")
        if folder:
            self.labels = {task: self.labels[task] for task in chosen}
            for task, names in self.labels.items():
                found[task] = _from_folder(Path(folder), task, len(names))
        else:
            for task in chosen:
                found[task], notes[task], self.labels[task] = _from_hub(task)
        self.tasks = tuple(self.labels)
        digest = hashlib.sha256()
        self._tokens: dict[tuple[str, str], list[dict]] = {}
        first = 0
        for number, task in enumerate(self.tasks):
            for split in SPLITS:
                texts, labels = found[task][split]["text"][:], found[task][split]["label"][:]
                digest.update(json.dumps([texts, labels]).encode())
                ids = self.tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
                self._tokens[task, split] = [
                    {"input_ids": i, "task": number, "labels": first + label}
                    for i, label in zip(ids, labels, strict=True)
                ]
            first += len(self.labels[task])
        self.provenance = {
            "data": "folder in RLORA_DATA" if folder else "hub",
            "data_sha256": digest.hexdigest()[:16],
            "data_notes": notes,
            "sentences": {t: {s: len(found[t][s]) for s in SPLITS} for t in self.tasks},
        }

    def model(self, base: Base) -> SentenceClassifier:
        """What the adapter goes into: the base under a fresh classifier for each task."""
        return SentenceClassifier(base, {task: len(names) for task, names in self.labels.items()})

    def training_set(self, size: int, seed: int) -> list[dict]:
        """`size` examples, each of a task drawn at random; a task's sentences in shuffled order,
        again from the start once they are used up."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.randint(len(self.tasks), (size,), generator=generator).tolist()
        orders = [self._orders(task, generator) for task in self.tasks]
        return [next(orders[number]) for number in which]

    def _orders(self, task: str, generator: torch.Generator):
        rows = self._tokens[task, "train"]
        while True:
            for i in torch.randperm(len(rows), generator=generator).tolist():
                yield rows[i]

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """A padded batch."""
        batch = self.tokenizer.pad(
            {"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt"
        )
        for key in ("task", "labels"):
            batch[key] = torch.tensor([row[key] for row in rows])
        return dict(batch)

    def probe(self, task: str, size: int) -> dict[str, Tensor]:
        """A batch of the first `size` validation sentences of a task, padded."""
        return self.collate(self._tokens[task, "validation"][:size])

    @torch.no_grad()
    def score(self, model: nn.Module, split: str = "test") -> dict[str, dict[str, float]]:
        """`{task: {"accuracy": share right}}` on the whole split."""
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        result = {}
        for task in self.tasks:
            rows = sorted(self._tokens[task, split], key=lambda row: len(row["input_ids"]))
            right = 0
            for start in range(0, len(rows), 128):
                batch = {
                    k: v.to(device) for k, v in self.collate(rows[start : start + 128]).items()
                }
                labels = batch.pop("labels")
                right += (model(**batch)["logits"].argmax(-1) == labels).sum().item()
            result[task] = {"accuracy": right / len(rows)}
        model.train(training)
        return result
