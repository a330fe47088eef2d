"""Intervals over seeds and rows: against SciPy and statsmodels where rows don't matter, and against
samples of which the truth is known where they do."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.weightstats import ttost_paired

from rlora_lab.errors import LabError
from rlora_lab.report.rows import (
    BothWays,
    Spread,
    both_ways,
    chance_of_equivalence,
    row_differences,
    spread_of,
)

TRUTH = Spread(seeds=2.0, rows=1.5, rest=0.8)  # of the mean over three tasks
ROWS = (40, 60, 90)


def sample(generator: np.random.Generator, seeds: int, mean: float = 0.0) -> list[np.ndarray]:
    """Differences whose variances are those of `TRUTH`."""
    of_seed = generator.normal(0, TRUTH.seeds**0.5, (seeds, 1))
    found = []
    for rows in ROWS:
        of_row = generator.normal(0, (len(ROWS) * rows * TRUTH.rows) ** 0.5, (1, rows))
        rest = generator.normal(0, (len(ROWS) * rows * TRUTH.rest) ** 0.5, (seeds, rows))
        found.append(mean + of_seed + of_row + rest)
    return found


def test_it_is_the_t_interval_where_all_rows_are_alike():
    of_seed = np.random.default_rng(0).normal(1.0, 2.0, 8)
    alike = [np.repeat(of_seed[:, None], rows, axis=1) for rows in ROWS]
    found = both_ways(alike)
    theirs = stats.ttest_1samp(of_seed, 0)
    assert found.interval() == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert found.freedom == pytest.approx(7)
    for margin in (0.5, 1.5, 2.5, 3.5, 5.0):
        low, high = found.interval(0.9)
        equivalent = ttost_paired(of_seed, np.zeros(8), -margin, margin)[0] < 0.05
        assert (-margin < low and high < margin) == equivalent


def test_the_variances_are_found():
    generator = np.random.default_rng(1)
    found = [spread_of(sample(generator, 6)) for _ in range(400)]
    for part in ("seeds", "rows", "rest"):
        mean = np.mean([getattr(spread, part) for spread in found])
        assert mean == pytest.approx(getattr(TRUTH, part), rel=0.15), part


@pytest.mark.parametrize("seeds", [4, 12])
def test_the_interval_covers_the_truth_as_often_as_it_says(seeds: int):
    generator = np.random.default_rng(2)
    held = []
    for _ in range(600):
        low, high = both_ways(sample(generator, seeds, mean=3.0)).interval()
        held.append(low < 3.0 < high)
    assert 0.93 < np.mean(held) < 0.985
    # an interval over seeds alone does not
    alone = []
    for _ in range(600):
        means = np.mean([d.mean(1) for d in sample(generator, seeds, mean=3.0)], 0)
        low, high = stats.ttest_1samp(means, 0).confidence_interval(0.95)
        alone.append(low < 3.0 < high)
    assert np.mean(alone) < 0.9


def test_the_chance_of_equivalence_is_what_whole_samples_give():
    generator = np.random.default_rng(3)
    for margin in (2.5, 4.0):
        found = []
        for _ in range(400):
            low, high = both_ways(sample(generator, 12)).interval(0.9)
            found.append(-margin < low and high < margin)
        assert chance_of_equivalence(TRUTH, 12, margin) == pytest.approx(np.mean(found), abs=0.08)
    more_rows = chance_of_equivalence(TRUTH, 12, 2.5, share=0.3)
    assert more_rows > chance_of_equivalence(TRUTH, 12, 2.5) + 0.2


@pytest.mark.parametrize(
    ("mean", "error", "verdict"),
    [
        (2.0, 0.5, "better"),
        (-2.0, 0.5, "worse"),
        (0.1, 0.3, "equivalent"),
        (0.5, 0.1, "better, by less than the margin"),
        (-0.5, 0.1, "worse, by less than the margin"),
        (0.5, 1.0, "cannot tell"),
        (0.0, 0.0, "equivalent"),
    ],
)
def test_verdicts(mean: float, error: float, verdict: str):
    assert BothWays(mean, error, 11.0, 12).verdict(1.0) == verdict


def test_pairs_are_by_seed():
    def record(seed: int, *tasks: str) -> dict:
        return {"seed": seed, "rows": {"exact": list(tasks)}}

    first = [record(1, "11", "100"), record(2, "10", "111"), record(7, "00", "000")]
    second = [record(2, "01", "110"), record(1, "10", "100")]
    one, other = row_differences(first, second, tasks=2)
    assert one.tolist() == [[0, 100], [100, -100]]
    assert other.tolist() == [[0, 0, 0], [0, 0, 100]]
    assert both_ways([one, other]).mean == pytest.approx((25 + 100 / 6) / 2)
    with pytest.raises(LabError, match="same seeds"):
        row_differences(first, [record(3, "11", "111")], tasks=2)
    with pytest.raises(LabError, match="at least two seeds"):
        both_ways([one[:1], other[:1]])
