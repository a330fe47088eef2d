"""Contrasts of which each row's result was kept: intervals over seeds and test rows both.

Seeds and rows are two samples of what could have been run. A difference d of seed s and row i is
taken apart as in an analysis of variance, d = mean + seed + row + rest, for each task; a task
weighs the same however many rows it has. The variance of the mean is then that between seeds, with
that between rows, less the rest, which both hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from ..errors import LabError
from ..runs.choice import choice_of, sweep
from ..runs.plan import Block
from .loading import chosen_records

MARGINS = (1.0, 1.5, 2.0, 3.0)
# The variance over rows on test data to that on validation data: tasks have 246 to 300 rows there,
# and 100 here. A mean over the language suite's eight tasks.
SHARE = float(np.mean([100 / rows for rows in (300, 300, 300, 250, 300, 300, 300, 246)]))
SEEDS = range(12, 21)


@dataclass(frozen=True)
class Spread:
    """Variances of a paired difference in percentage points, of the mean over tasks."""

    seeds: float
    """Of one seed, as if all rows had been seen."""
    rows: float
    """Of the rows there are, as if all seeds had been run."""
    rest: float
    """Of one seed on the rows there are, beside both."""


@dataclass(frozen=True)
class BothWays:
    """A paired difference in percentage points, with its error over seeds and rows."""

    mean: float
    error: float
    freedom: float
    """Degrees of freedom of the error (Satterthwaite)."""
    seeds: int

    @property
    def p(self) -> float:
        """Of a two-sided test against 0."""
        if self.error == 0:
            return float(self.mean == 0)
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """From and to."""
        if self.error == 0:
            return self.mean, self.mean
        low, high = stats.t.interval(level, self.freedom, self.mean, self.error)
        return float(low), float(high)

    def verdict(self, margin: float | None) -> str:
        """ "better" or "worse" (95 % interval), or "equivalent" (two one-sided tests at 5 %: the
        90 % interval lies within the margin), or "cannot tell"; a difference within the margin is
        said to be that. Without a margin nothing is equivalent."""
        low, high = self.interval(0.9)
        within = margin is not None and -margin < low and high < margin
        low, high = self.interval(0.95)
        if low > 0 or high < 0:
            word = "better" if low > 0 else "worse"
            return f"{word}, by less than the margin" if within else word
        return "equivalent" if within else "cannot tell"


def row_array(records: Sequence[dict], task: int, metric: str) -> np.ndarray:
    """Which rows of a task were right, (seeds, rows) of 0 and 1."""
    return np.array([[int(c) for c in record["rows"][metric][task]] for record in records])


def row_differences(
    first: Sequence[dict], second: Sequence[dict], tasks: int, metric: str = "exact"
) -> list[np.ndarray]:
    """For each task that has the metric the results of one method less those of another in
    percentage points, (seeds, rows), on the seeds that both have.

    Raises:
        LabError: no seed in common.
    """
    by_seed = [{record["seed"]: record for record in records} for records in (first, second)]
    both = [seed for seed in by_seed[0] if seed in by_seed[1]]
    if not both:
        raise LabError("the two methods were not run on the same seeds")
    left, right = ([own[seed] for seed in both] for own in by_seed)
    return [
        100 * (row_array(left, task, metric) - row_array(right, task, metric))
        for task in range(tasks)
        if left[0]["rows"][metric][task] is not None
    ]


def spread_of(differences: Sequence[np.ndarray]) -> Spread:
    """The variances in differences of at least two seeds; none is below 0."""
    weight = 1 / len(differences) ** 2
    count = len(differences[0])
    rest = between_rows = 0.0
    for d in differences:
        seeds, rows = d.shape
        left = d - d.mean(1, keepdims=True) - d.mean(0, keepdims=True) + d.mean()
        own = (left**2).sum() / ((seeds - 1) * (rows - 1))
        rest += weight * own / rows
        between_rows += weight * max(0.0, (d.mean(0).var(ddof=1) - own / seeds) / rows)
    means = np.mean([d.mean(1) for d in differences], 0)
    between_seeds = max(0.0, means.var(ddof=1) - rest) if count > 1 else 0.0
    return Spread(float(between_seeds), float(between_rows), float(rest))


def both_ways(differences: Sequence[np.ndarray]) -> BothWays:
    """The mean difference over tasks, with its error over seeds and rows.

    Raises:
        LabError: fewer than two seeds.
    """
    seeds = len(differences[0])
    if seeds < 2:
        raise LabError("an interval needs at least two seeds")
    spread = spread_of(differences)
    of_seeds = (spread.seeds + spread.rest) / seeds
    total = of_seeds + spread.rows
    freedom = (seeds - 1) * (total / of_seeds) ** 2 if of_seeds else np.inf
    mean = float(np.mean([d.mean() for d in differences]))
    return BothWays(mean, float(total**0.5), float(freedom), seeds)


def contrast(result: dict, method: str, against: str, metric: str = "exact") -> BothWays:
    """A method less another on test data."""
    pair = (chosen_records(result, m) for m in (method, against))
    return both_ways(row_differences(*pair, len(result["tasks"]), metric))


def chosen_spread(plan: dict[str, Block], name: str, records: dict[str, list[dict]]) -> Spread:
    """The variances of R-LoRA less LoRA at what the sweep chose, on its seeds and validation rows.

    Raises:
        LabError: the sweep is not done.
    """
    block = plan[name]
    pair = []
    for method in ("rlora", "lora"):
        choice = sweep(plan, block, method, records)[1]
        if choice is None:
            raise LabError(f"{name}: the sweep of {method} is not done")
        pair.append(
            [
                r
                for r in records[name]
                if (r["stage"], r["method"]) == ("sweep", method) and choice_of(r) == choice
            ]
        )
    tasks = len(pair[0][0]["rows"]["exact"])
    return spread_of(row_differences(*pair, tasks))


def chance_of_equivalence(
    spread: Spread, seeds: int, margin: float, share: float = 1.0, draws: int = 4000
) -> float:
    """How often so many seeds would find two methods equivalent that are, by simulation.

    Args:
        share: rows that the spread was seen on, of those that are measured.
    """
    generator = np.random.default_rng(0)
    rows, rest = spread.rows * share, spread.rest * share
    of_seed = generator.normal(0, (spread.seeds + rest) ** 0.5, (draws, seeds))
    mean = of_seed.mean(1) + generator.normal(0, rows**0.5, draws)
    of_seeds = of_seed.var(1, ddof=1) / seeds
    total = of_seeds + rows
    freedom = (seeds - 1) * (total / of_seeds) ** 2
    reach = np.abs(mean) + stats.t.ppf(0.95, freedom) * total**0.5
    return float((reach < margin).mean())


def chances_table(spread: Spread, share: float = SHARE) -> pd.DataFrame:
    """`chance_of_equivalence` for each number of seeds and each margin that the plan allows."""
    return pd.DataFrame(
        {
            f"{margin:g} points": {
                f"{seeds} seeds": chance_of_equivalence(spread, seeds, margin, share)
                for seeds in SEEDS
            }
            for margin in MARGINS
        }
    )
