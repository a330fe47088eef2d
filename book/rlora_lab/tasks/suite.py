"""What a suite of tasks is, and `load_suite(name, base)`."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import LabError
from ..models.bases import Base
from ..names import SUITES


class Suite(Protocol):
    """Tasks to train on and to measure: `strings.Synthetic`, `sentences.Sentences`,
    `language.Language` and `files.Files`."""

    name: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    """The first is the one to choose by."""
    default_lr: float
    default_batch: int
    modules_to_save: list[str] | None
    """Parts of the model beside the adapter that are trained, for PEFT."""
    provenance: dict
    """Where the data came from, for the record."""
    collate: Callable | None

    def model(self, base: Base) -> nn.Module:
        """What the adapter goes into."""

    def training_set(self, size: int, seed: int) -> Sequence[dict]:
        """Training examples, tasks mixed."""

    def probe(self, task: str, size: int) -> dict[str, Tensor]:
        """A batch of validation examples of a task, the same each time."""

    def score(self, model: nn.Module, split: str) -> dict[str, dict[str, float]]:
        """`{task: {metric: value}}` in evaluation mode; the first metric for each task."""


def mixed(rows: Sequence[Sequence[dict]], size: int, seed: int) -> list[dict]:
    """`size` examples, each of a task drawn at random; a task's rows in shuffled order, again from
    the start once they are used up. `rows` holds those of each task."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(len(rows), (size,), generator=generator).tolist()
    orders = [_shuffled(own, generator) for own in rows]
    return [next(orders[number]) for number in which]


def _shuffled(rows: Sequence[dict], generator: torch.Generator) -> Iterator[dict]:
    while True:
        for i in torch.randperm(len(rows), generator=generator).tolist():
            yield rows[i]


def text_lines(path: Path, name: str) -> list[str]:
    """The lines of a file of JSON lines. Not `splitlines`, which also splits at U+0085 and U+2028:
    they stand in people's texts.

    Raises:
        LabError: it is no text in UTF-8; `name` says which.
    """
    try:
        return path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise LabError(f"{name} is no text in UTF-8: {error}") from error


def load_suite(
    name: str, base: Base, tasks: Sequence[str] | None = None, blocks: int | None = None
) -> Suite:
    """The suite by name, for a base that fits it; of all its tasks, or of those named.

    `blocks` trains the upper so many blocks alone, in the suites language and files.
    """
    if name not in SUITES:
        raise LabError(f"unknown suite {name!r}: allowed are {', '.join(SUITES)}")
    if name == "files":
        from .files import Files

        return Files(base, tasks, blocks)
    if (name == "synthetic") != (base.name == "tiny"):
        raise LabError(
            f"suite {name!r} does not fit base {base.name!r}: synthetic needs the base tiny, which "
            "knows its characters; sentences needs a base with a tokenizer, such as minilm, and "
            "language a causal one, such as smollm2"
        )
    if blocks is not None and name != "language":
        raise LabError(f"blocks is for the suites language and files, not for {name}")
    if name == "language":
        from .language import Language

        return Language(base, tasks, blocks)
    if name == "sentences":
        from .sentences import Sentences  # needs datasets, which takes seconds to import

        return Sentences(base, tasks)
    from .strings import Synthetic

    return Synthetic() if tasks is None else Synthetic(tasks)
