"""What a suite of tasks is, and `load_suite(name, base)`."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from ..errors import LabError
from ..models.bases import Base
from ..names import SUITES


class Suite(Protocol):
    """Tasks to train on and to measure: `strings.Synthetic`, `sentences.Sentences`."""

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
        """`{task: {metric: value}}` in evaluation mode."""


def load_suite(name: str, base: Base, tasks: Sequence[str] | None = None) -> Suite:
    """The suite by name, for a base that fits it; of all its tasks, or of those named."""
    from .sentences import Sentences  # needs datasets, which takes seconds to import
    from .strings import Synthetic

    if name not in SUITES:
        raise LabError(f"unknown suite {name!r}: allowed are {', '.join(SUITES)}")
    if (name == "synthetic") != (base.name == "tiny"):
        raise LabError(
            f"suite {name!r} does not fit base {base.name!r}: synthetic needs the base tiny, which "
            "knows its characters; sentences needs a base with a tokenizer, such as minilm"
        )
    if name == "sentences":
        return Sentences(base, tasks)
    return Synthetic() if tasks is None else Synthetic(tasks)
