"""How a method's settings are chosen: on validation data, with seeds that are not measured.

Of the learning rate alone: each rate has the mean validation score over sweep seeds and tasks, and
the best is taken. If it is at an end, the next rate beyond is run, and so on, as often as `extend`
allows.

Of a block with `dropouts`, in stages, the same for each method in `tuned`:

1.  Every rate at every dropout is run with the first sweep seed, and rates are added at an end as
    above.
2.  The best `finalists` of these run with every sweep seed. The best mean leads.
3.  Every scale in `scales` is tried in the leader's place, one changed at a time, with the first
    sweep seed. The best of them runs with every sweep seed if it beats the leader's first, and is
    taken if its mean is better too. If its scale is at an end, the next beyond is tried.

A method in `like` is a control: it takes what was chosen for its relative.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..names import UNTRAINED

if TYPE_CHECKING:
    from .plan import Block


class Choice(NamedTuple):
    """What a method is run at."""

    learning_rate: float | None
    tuned: tuple[tuple[str, float], ...] = ()
    """Settings in the place of the block's own: lora_dropout, lora_alpha, gamma."""

    def with_value(self, name: str, value: float) -> Choice:
        """The same with one setting changed."""
        return self._replace(tuned=tuple(sorted((dict(self.tuned) | {name: value}).items())))


Scores = dict[Choice, dict[int, float]]
Asked = list[tuple[Choice, int]]


def choice_of(record: dict) -> Choice:
    """What a recorded run was run at."""
    return Choice(record["learning_rate"], tuple(sorted(record.get("tuned", {}).items())))


def sweep_scores(records: Iterable[dict], method: str) -> Scores:
    """`{choice: {seed: mean score over tasks on validation data}}`, rates rising; of the metric to
    choose by, which records hold first."""
    found: Scores = {}
    for record in records:
        if (record["method"], record["stage"]) == (method, "sweep"):
            by_task = next(iter(record["validation"].values()))
            found.setdefault(choice_of(record), {})[record["seed"]] = float(np.mean(by_task))
    return dict(sorted(found.items()))


def sweep(
    plan: dict[str, Block], block: Block, method: str, records: dict[str, list[dict]]
) -> tuple[Asked, Choice | None]:
    """The choices and seeds that a method's sweep is known to need, and what it chooses, once all
    of them are run.

    Nothing at all: it waits for what its choice comes from, or needs no sweep. `records` are those
    of each block by name.
    """
    if method == UNTRAINED:
        return [], Choice(None)
    if method in block.like:
        return [], sweep(plan, block, block.like[method], records)[1]
    if block.chosen:
        return [], Choice(block.chosen[method])
    if block.rates_from:
        return [], sweep(plan, plan[block.rates_from], method, records)[1]
    if len(block.rates) == 1 and not block.sweep_seeds:
        return [], Choice(block.rates[0])
    scores = sweep_scores(records[block.name], method)
    return _staged(block, method, scores) if block.dropouts else _best_rate(block, scores)


def _best_rate(block: Block, scores: Scores) -> tuple[Asked, Choice | None]:
    asked, choices = _grid(block, scores, block.sweep_seeds)
    return asked, _best(choices, block.sweep_seeds, scores) if choices else None


def _staged(block: Block, method: str, scores: Scores) -> tuple[Asked, Choice | None]:
    screen, every = block.sweep_seeds[:1], block.sweep_seeds
    asked, choices = _grid(block, scores, screen)
    choices.sort(key=lambda choice: -_mean(choice, screen, scores))
    finalists = choices[: block.finalists]
    asked += _asked(finalists, every)
    if not choices or not _all_run(asked, scores):
        return asked, None
    return _scaled(block, method, scores, asked, _best(finalists, every, scores))


def _grid(block: Block, scores: Scores, seeds: Sequence[int]) -> tuple[Asked, list[Choice]]:
    """What a grid of rates, at each dropout, needs; and its choices, once all of them are run.
    Rates are added at an end that is best."""
    rates = block.rates
    for left in reversed(range(block.extend + 1)):
        choices = [choice for rate in rates for choice in _at(block, rate)]
        asked = _asked(choices, seeds)
        if not _all_run(asked, scores):
            return asked, []
        beyond = _beyond(rates, _best(choices, seeds, scores).learning_rate)
        if beyond is None or not left:
            return asked, choices
        rates = sorted((*rates, beyond))
    raise AssertionError("the last round returns")


def _at(block: Block, rate: float) -> list[Choice]:
    if not block.dropouts:
        return [Choice(rate)]
    return [Choice(rate).with_value("lora_dropout", dropout) for dropout in block.dropouts]


def _scaled(
    block: Block, method: str, scores: Scores, asked: Asked, leader: Choice
) -> tuple[Asked, Choice | None]:
    screen, every = block.sweep_seeds[:1], block.sweep_seeds
    grids = dict(block.scales[method])
    for left in reversed(range(block.extend + 1)):
        others = {
            leader.with_value(name, value): name
            for name, values in grids.items()
            for value in values
            if value != block.usual(name)
        }
        asked = asked + _asked(others, screen)
        if not _all_run(asked, scores):
            return asked, None
        best = _best(others, screen, scores)
        if _mean(best, screen, scores) <= _mean(leader, screen, scores):
            return asked, leader
        asked = asked + _asked([best], every)
        if not _all_run(asked, scores):
            return asked, None
        if _mean(best, every, scores) <= _mean(leader, every, scores):
            return asked, leader
        name = others[best]
        beyond = _beyond(grids[name], dict(best.tuned)[name])
        if beyond is None or not left:
            return asked, best
        grids[name] = sorted((*grids[name], beyond))
    raise AssertionError("the last round returns")


def _asked(choices: Iterable[Choice], seeds: Sequence[int]) -> Asked:
    return [(choice, seed) for choice in choices for seed in seeds]


def _all_run(asked: Asked, scores: Scores) -> bool:
    return all(seed in scores.get(choice, {}) for choice, seed in asked)


def _mean(choice: Choice, seeds: Sequence[int], scores: Scores) -> float:
    return float(np.mean([scores[choice][seed] for seed in seeds]))


def _best(choices: Iterable[Choice], seeds: Sequence[int], scores: Scores) -> Choice:
    return max(choices, key=lambda choice: _mean(choice, seeds, scores))


def _beyond(values: Sequence[float], best: float) -> float | None:
    """The next value after the end of a grid that the best is at; None within it."""
    if best == values[0]:
        return float(f"{values[0] ** 2 / values[1]:.3g}")
    if best == values[-1]:
        return float(f"{values[-1] ** 2 / values[-2]:.3g}")
    return None
