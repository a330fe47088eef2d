"""The `synthetic` suite: string tasks, and those that the `tiny` base was trained on.

An example is a row of 14 characters: the task's tag, six letters from a to h, "=", six letters.

    Bfadchb=bhcdaf          tag B is "reverse"

There are 8**6 = 262 144 questions. One whose number in base 8 leaves 0 modulo 11 belongs to the
test split, 1 to the validation split, the rest to training, so the splits are disjoint for every
task, seed and size.

Why these ten tasks: each should lie, after some hundred steps, between what the base does with it
untrained (below 55 % of the letters) and all right, so that methods can be told apart. A LoRA of
the size of R-LoRA (r 4, N 3, MLP projections) ends between 50 and 97 % on nine of them after 500
steps of 64 examples, about 15 s on one core. The three rotations are one operation with three
offsets: the closely related group, where heads that differ have nothing to specialise in. "cap",
"largest" and "repeat last" are easy, "sort down" and "mirror" hard. Tried and left out, because no
adapter of this size learned them in 500 steps: an alphabet of 16 letters, several new tables of
letters at once, sums of two letters. Tried and changed: a base trained for twice as long, or on
fewer tasks, is perfect at its own and adapts worse to these.
Exact match (6 of 6 letters) jumps between 0 and 1 from seed to seed: look at the letters right.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..errors import LabError
from ..models.bases import Base
from ..names import SUITES

LETTERS = "abcdefgh"
SIZE = len(LETTERS)
LENGTH = 6
SPLITS = ("train", "validation", "test")

Task = Callable[[Tensor], Tensor]
"""Questions to answers, both letters as numbers of shape (n, LENGTH)."""

# What the tiny base can do before any adapter: move letters, rank them, look them up in a table.
BASE_TASKS: dict[str, Task] = {
    "copy": lambda x: x,
    "reverse": lambda x: x.flip(1),
    "rotate": lambda x: x.roll(-1, 1),
    "swap pairs": lambda x: x.unflatten(1, (-1, 2)).flip(2).flatten(1),
    "interleave": lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1),
    "swap ends": lambda x: x[:, [5, 1, 2, 3, 4, 0]],
    "repeat first": lambda x: x[:, :1].expand_as(x),
    "repeat second": lambda x: x[:, 1:2].expand_as(x),
    "next": lambda x: (x + 1) % SIZE,
    "shift 4": lambda x: (x + 4) % SIZE,
    "shift 6": lambda x: (x + 6) % SIZE,
    "partner": lambda x: x ^ 1,
    "sort": lambda x: x.sort(1).values,
    "running max": lambda x: x.cummax(1).values,
}

# The first three are the closely related group.
SUITE_TASKS: dict[str, Task] = {
    "rotate back": lambda x: x.roll(1, 1),
    "rotate 2": lambda x: x.roll(-2, 1),
    "rotate 3": lambda x: x.roll(-3, 1),
    "repeat last": lambda x: x[:, -1:].expand_as(x),
    "first half twice": lambda x: x[:, : LENGTH // 2].repeat(1, 2),
    "largest": lambda x: x.amax(1, keepdim=True).expand_as(x),
    "running min": lambda x: x.cummin(1).values,
    "sort down": lambda x: x.sort(1, descending=True).values,
    "cap": lambda x: x.clamp(max=SIZE // 2),
    "mirror": lambda x: SIZE - 1 - x,
}
RELATED = ("rotate back", "rotate 2", "rotate 3")

# With the rotations of the suite, the symmetries of a ring of six places: eight tasks that are one
# operation. The base knows two such, "rotate" and "reverse".
RING_TASKS: dict[str, Task] = {
    "rotate 4": lambda x: x.roll(-4, 1),
    "reverse rotate 1": lambda x: x.flip(1).roll(-1, 1),
    "reverse rotate 2": lambda x: x.flip(1).roll(-2, 1),
    "reverse rotate 3": lambda x: x.flip(1).roll(-3, 1),
    "reverse rotate 4": lambda x: x.flip(1).roll(-4, 1),
}

_ALL = BASE_TASKS | SUITE_TASKS | RING_TASKS
TAGS = dict(zip(BASE_TASKS | SUITE_TASKS, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", strict=False))
# The ring's tags are those of the suite's last tasks: all as new to the base as one another.
TAGS |= dict(zip(RING_TASKS, list(TAGS.values())[-len(RING_TASKS) :], strict=True))
VOCABULARY = LETTERS + "=" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUESTION = 1 + LENGTH + 1  # characters before the answer: tag, letters, "="


def encode(text: str) -> Tensor:
    """Characters to numbers, shape (len(text),)."""
    return torch.tensor([VOCABULARY.index(c) for c in text])


def decode(row: Iterable[int]) -> str:
    """Numbers to characters."""
    return "".join(VOCABULARY[int(i)] for i in row)


def draw(n: int, generator: torch.Generator, split: str) -> Tensor:
    """`n` questions of a split, shape (n, LENGTH); in the test and validation splits none twice."""
    if split not in SPLITS:
        raise LabError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    place = SIZE ** torch.arange(LENGTH - 1, -1, -1)
    numbers = torch.arange(SIZE**LENGTH)
    if split == "train":
        numbers = numbers[numbers % 11 > 1]
        chosen = numbers[torch.randint(len(numbers), (n,), generator=generator)]
    else:
        numbers = numbers[numbers % 11 == ("test", "validation").index(split)]
        chosen = numbers[torch.randperm(len(numbers), generator=generator)[:n]]
    return chosen[:, None] // place % SIZE


class Synthetic:
    """String tasks for the `tiny` base.

    Args:
        tasks: names out of `SUITE_TASKS` (all of them by default), `BASE_TASKS` or `RING_TASKS`.

    `batch` makes examples, `training_set` makes them for a `Trainer`, `score` measures a model.
    """

    name = "synthetic"
    metrics = ("letters", "exact")
    default_lr, default_batch = SUITES["synthetic"]
    modules_to_save = None
    provenance: dict = {}  # all of it is computed here
    collate = None  # rows have one length: the Trainer's own collator stacks them

    def __init__(self, tasks: Iterable[str] = tuple(SUITE_TASKS)) -> None:
        self.tasks = tuple(tasks)
        for task in self.tasks:
            if task not in _ALL:
                raise LabError(f"unknown task {task!r}: one of {', '.join(_ALL)}")
        owners: dict[str, str] = {}
        for task in self.tasks:
            if (other := owners.setdefault(TAGS[task], task)) != task:
                raise LabError(f"tasks {other!r} and {task!r} have one tag: take one of the two")

    def model(self, base: Base) -> nn.Module:
        """What the adapter goes into: the base itself."""
        return base.model

    def rows(self, task: str, questions: Tensor) -> Tensor:
        """Questions (n, 6) to whole examples (n, 14)."""
        n = len(questions)
        tag, equals = (encode(c).expand(n, 1) for c in (TAGS[task], "="))
        return torch.cat([tag, questions, equals, _ALL[task](questions)], 1)

    def batch(self, size: int, seed: int, split: str = "train") -> dict[str, Tensor]:
        """`size` examples, each of a task drawn at random.

        Returns `input_ids` and `labels`, (size, 14); labels are -100 before the answer. The model
        shifts them itself.
        """
        generator = torch.Generator().manual_seed(seed)
        questions = draw(size, generator, split)
        which = torch.randint(len(self.tasks), (len(questions),), generator=generator)
        ids = torch.empty(len(questions), QUESTION + LENGTH, dtype=torch.long)
        for i, task in enumerate(self.tasks):
            ids[which == i] = self.rows(task, questions[which == i])
        labels = ids.clone()
        labels[:, :QUESTION] = -100
        return {"input_ids": ids, "labels": labels}

    def training_set(self, size: int, seed: int) -> list[dict[str, Tensor]]:
        """The same examples as `batch`, one by one."""
        batch = self.batch(size, seed)
        return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]

    def probe(self, task: str, size: int) -> dict[str, Tensor]:
        """A batch of `size` validation examples of a task, the same each time."""
        return Synthetic([task]).batch(size, 0, "validation")

    @torch.no_grad()
    def score(
        self, model: nn.Module, split: str = "test", size: int = 500
    ) -> dict[str, dict[str, float]]:
        """`{task: {"letters": share of letters right, "exact": share of answers right}}`.

        A letter counts as right given the right letters before it. An answer is exact when all of
        its letters are, which is when greedy decoding writes it. Every model sees the same `size`
        questions a task.
        """
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        questions = draw(size, torch.Generator().manual_seed(0), split)
        result = {}
        for task in self.tasks:
            ids = self.rows(task, questions).to(device)
            guess = model(input_ids=ids).logits[:, QUESTION - 1 : -1].argmax(-1)
            right = guess == ids[:, QUESTION:]
            result[task] = {
                "letters": right.double().mean().item(),
                "exact": right.all(1).double().mean().item(),
            }
        model.train(training)
        return result
