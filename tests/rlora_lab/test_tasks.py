"""The string tasks: what they ask, that they repeat, and that no split sees another."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rlora_lab.errors import LabError
from rlora_lab.tasks.strings import (
    BASE_TASKS,
    LENGTH,
    QUESTION,
    RELATED,
    RING_TASKS,
    SIZE,
    SPLITS,
    SUITE_TASKS,
    TAGS,
    VOCABULARY,
    Synthetic,
    decode,
    draw,
    encode,
)

# written by hand, from the names of the tasks
BY_HAND = {
    "copy": "fadchb",
    "reverse": "bhcdaf",
    "rotate": "adchbf",
    "swap pairs": "afcdbh",
    "interleave": "fcahdb",
    "swap ends": "badchf",
    "repeat first": "ffffff",
    "repeat second": "aaaaaa",
    "next": "gbedac",
    "shift 4": "behgdf",
    "shift 6": "dgbafh",
    "partner": "ebcdga",
    "sort": "abcdfh",
    "running max": "ffffhh",
    "rotate back": "bfadch",
    "rotate 2": "dchbfa",
    "rotate 3": "chbfad",
    "repeat last": "bbbbbb",
    "first half twice": "fadfad",
    "largest": "hhhhhh",
    "running min": "faaaaa",
    "sort down": "hfdcba",
    "cap": "eadceb",
    "mirror": "chefag",
    "rotate 4": "hbfadc",
    "reverse rotate 1": "hcdafb",
    "reverse rotate 2": "cdafbh",
    "reverse rotate 3": "dafbhc",
    "reverse rotate 4": "afbhcd",
}


@pytest.mark.parametrize("task", [*BASE_TASKS, *SUITE_TASKS, *RING_TASKS])
def test_tasks_by_hand(task: str):
    row = Synthetic([task]).rows(task, encode("fadchb")[None])[0]
    assert decode(row) == f"{TAGS[task]}fadchb={BY_HAND[task]}"


def test_suite_asks_what_the_base_never_saw():
    questions = draw(300, torch.Generator().manual_seed(0), "train")
    every = BASE_TASKS | SUITE_TASKS | RING_TASKS
    for a, b in itertools.combinations(every, 2):
        assert not torch.equal(every[a](questions), every[b](questions)), (a, b)
    assert len(every) == len(BASE_TASKS) + len(SUITE_TASKS) + len(RING_TASKS)
    assert len(set(TAGS.values())) == len(BASE_TASKS) + len(SUITE_TASKS)
    assert not {TAGS[task] for task in RING_TASKS} & {TAGS[task] for task in BASE_TASKS}
    ring = Synthetic([*RELATED, *RING_TASKS])  # eight tasks with tags of their own
    assert len({TAGS[task] for task in ring.tasks}) == len(ring.tasks) == 8
    assert len(SUITE_TASKS) >= 8 and set(RELATED) < set(SUITE_TASKS)


def _numbers(questions: torch.Tensor) -> set[int]:
    return set((questions * SIZE ** torch.arange(LENGTH - 1, -1, -1)).sum(1).tolist())


@given(seed=st.integers(0, 2**40), size=st.integers(1, 3000))
def test_splits_are_disjoint(seed: int, size: int):
    parts = [_numbers(draw(size, torch.Generator().manual_seed(seed), s)) for s in SPLITS]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert len(parts[1]) == len(parts[2]) == size  # nothing is asked twice


def test_batch_repeats_by_seed():
    suite = Synthetic()
    a, b, c = (suite.batch(500, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["input_ids"], c["input_ids"])
    assert a["input_ids"].shape == (500, QUESTION + LENGTH)
    assert (a["labels"][:, :QUESTION] == -100).all()
    assert torch.equal(a["labels"][:, QUESTION:], a["input_ids"][:, QUESTION:])
    tags = {decode(row[:1]) for row in a["input_ids"]}
    assert tags == {TAGS[task] for task in suite.tasks}  # tasks are mixed
    rows = suite.training_set(500, 1)
    assert all(torch.equal(rows[i]["input_ids"], a["input_ids"][i]) for i in (0, 99, 499))


class Oracle(nn.Module):
    """Predicts the next character of the row itself, but for `wrong` places of the answer."""

    def __init__(self, wrong: int) -> None:
        super().__init__()
        self.unused, self.wrong = nn.Parameter(torch.zeros(1)), wrong

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        following = input_ids.roll(-1, 1)
        if self.wrong:
            places = slice(QUESTION - 1, QUESTION - 1 + self.wrong)
            following[:, places] = (following[:, places] + 1) % SIZE
        return SimpleNamespace(logits=nn.functional.one_hot(following, len(VOCABULARY)))


@pytest.mark.parametrize("wrong", [0, 1, 4])
def test_score_counts_letters_and_answers(wrong: int):
    suite = Synthetic(["mirror", "sort down"])
    for score in suite.score(Oracle(wrong)).values():
        assert score == {"letters": pytest.approx(1 - wrong / LENGTH), "exact": float(wrong == 0)}


def test_score_leaves_the_mode_alone():
    model = Oracle(0).train()
    Synthetic(["mirror"]).score(model)
    assert model.training


def test_unknown_names():
    with pytest.raises(LabError, match="'juggle'.*mirror"):
        Synthetic(["juggle"])
    with pytest.raises(LabError, match="'mirror' and 'reverse rotate 4' have one tag"):
        Synthetic(["mirror", "reverse rotate 4"])
    with pytest.raises(LabError, match="'dev'.*validation"):
        Synthetic().batch(3, 0, "dev")
