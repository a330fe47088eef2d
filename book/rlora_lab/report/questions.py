"""What is asked of recorded runs, and the statistics that answer: intervals, contrasts, families.

Differences are paired by seed, since for one seed all methods see the same training examples.
Several questions that are asked together are a family, and Holm's correction is taken over it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import ttest_power

from ..errors import LabError
from ..names import UNTRAINED
from .loading import chosen_records, score_array, tasks_with
from .rows import BothWays, both_ways, contrast, row_differences


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval (Student's t) of at least two independent values."""
    if len(values) < 2:
        raise LabError("an interval needs at least two values")
    mean = np.mean(values)
    if np.ptp(values) == 0:  # SciPy gives NaN
        return float(mean), float(mean), float(mean)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return float(mean), float(low), float(high)


@dataclass(frozen=True)
class Contrast:
    """A paired difference of two methods over seeds, as one of a family of such questions."""

    name: str
    values: np.ndarray
    """The difference for each seed, of means over tasks."""
    mean: float
    low: float
    high: float
    """The 95 % interval of the mean (Student's t)."""
    p: float
    """Of a two-sided paired t test, alone."""
    holm: float
    """The same, corrected by Holm for all contrasts of the family."""
    detectable: float
    """The smallest true difference that so many seeds with this spread show with 80 % power, at the
    level that the family asks of its smallest p: 5 % over the number of its questions."""

    @property
    def verdict(self) -> str:
        """After Holm's correction at 5 %: "better", "worse", or "cannot tell"."""
        if self.holm >= 0.05:
            return "cannot tell"
        return "better" if self.mean > 0 else "worse"


def holm(p: Iterable[float]) -> np.ndarray:
    """Holm's correction of the p of questions that are asked together."""
    return multipletests(list(p), method="holm")[1]


def detectable(spread: float, n: int, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest true mean of `n` differences of standard deviation `spread` that a two-sided t
    test at that level finds, with its sign, with that power."""
    return _in_deviations(n, power, level) * float(spread)


@cache  # a picture asks for many of the same
def _in_deviations(n: int, power: float, level: float) -> float:
    def lacks(size: float) -> float:
        return ttest_power(size, n, level / 2, alternative="larger") - power

    enough = (2 * stats.t.ppf(1 - level / 2, n - 1) + 5) / n**0.5
    return float(optimize.brentq(lacks, 0, enough))


def family(differences: dict[str, np.ndarray]) -> list[Contrast]:
    """Contrasts from the differences by seed of each, corrected for one another."""
    p = []
    for values in differences.values():
        interval(values)  # says it where there are too few
        spread = np.ptp(values) > 0
        p.append(float(stats.ttest_1samp(values, 0).pvalue) if spread else float(not values.any()))
    return [
        Contrast(name, values, *interval(values), alone, together, limit)
        for (name, values), alone, together, limit in zip(
            differences.items(),
            p,
            holm(p).tolist(),
            [
                detectable(np.std(v, ddof=1), len(v), level=0.05 / len(differences))
                for v in differences.values()
            ],
            strict=True,
        )
    ]


def differences(
    result: dict,
    method: str,
    against: str,
    metric: str | None = None,
    tasks: Sequence[str] | None = None,
) -> np.ndarray:
    """For each seed that both were run on, the mean score over tasks (all, or those named) of a
    method less that of the other, in percentage points: (seeds,). Both see the same training
    examples for one seed.

    Raises:
        LabError: an unknown method, or methods that were not run on the same seeds.
    """
    known = tasks_with(result, metric or result["metrics"][0])
    columns = [known.index(task) for task in (known if tasks is None else tasks)]
    first, second = (
        dict(
            zip(
                [record["seed"] for record in chosen_records(result, m)],
                score_array(result, m, metric)[:, columns].mean(1),
                strict=True,
            )
        )
        for m in (method, against)
    )
    both = [seed for seed in first if seed in second]
    if not both:
        raise LabError(f"{method} and {against} were not run on the same seeds")
    return 100 * np.array([first[seed] - second[seed] for seed in both])


# The questions, each of a part of the method: its name, with it, without it.
IDEAS = (
    ("several heads and a router, zero start", "hydralora", "lora"),
    ("random heads, in HydraLoRA", "hydralora+init", "hydralora"),
    ("head dropout, in HydraLoRA", "hydralora+dropout", "hydralora"),
    ("random heads, given head dropout", "rlora", "hydralora+dropout"),
    ("head dropout, given random heads", "rlora", "hydralora+init"),
    ("random start and head dropout, one head", "one-head", "lora"),
    ("several heads and a router, random start", "rlora", "one-head"),
    ("the router", "rlora", "mlora"),
    ("head dropout, without a router", "mlora", "mlora-nodropout"),
    ("side pair rather than centred heads", "rlora", "rlora-centered"),
    ("alpha / sqrt(r) rather than alpha / r", "lora", "lora-classic"),
    ("authors' rather than HydraLoRA's own form", "hydralora", "hydralora-own"),
    ("HydraLoRA at alpha / sqrt(r) rather than alpha / r", "hydralora", "hydralora-classic"),
    ("two and a half times the parameters", "lora", "lora-rank"),
    ("a random start, at R-LoRA's rank", "lora-rank+init", "lora-rank"),
    ("a head a task, told the task", "oracle", "lora"),
    ("a router that starts at random", "rlora+router", "rlora"),
    ("a start that is not the base", "rlora-moved", "rlora"),
)


def contrasts(
    result: dict, pairs: dict[str, tuple[str, str]], metric: str | None = None
) -> list[Contrast]:
    """Questions that are asked together, each `name: (method, against)`.

    Where each row's result was kept, the intervals are over seeds and rows both.
    """
    metric = metric or result["metrics"][0]
    values = {name: differences(result, *pair, metric) for name, pair in pairs.items()}
    if not pairs or not _has_rows(result):
        return family(values)
    return _over_rows(values, {n: contrast(result, *pair, metric) for n, pair in pairs.items()})


def by_task(result: dict, method: str, against: str, metric: str | None = None) -> list[Contrast]:
    """A method less another on each task, a family; intervals as in `contrasts`."""
    metric = metric or result["metrics"][0]
    tasks = tasks_with(result, metric)
    values = {t: differences(result, method, against, metric, tasks=[t]) for t in tasks}
    if not _has_rows(result):
        return family(values)
    pair = (chosen_records(result, m) for m in (method, against))
    by_row = row_differences(*pair, len(result["tasks"]), metric)
    return _over_rows(values, {t: both_ways([d]) for t, d in zip(tasks, by_row, strict=True)})


def _has_rows(result: dict) -> bool:
    return "rows" in chosen_records(result, result["methods"][0])[0]


def _over_rows(values: dict[str, np.ndarray], found: dict[str, BothWays]) -> list[Contrast]:
    """A family from differences of which the rows are known too."""
    together = holm(c.p for c in found.values()).tolist()
    return [
        Contrast(name, values[name], c.mean, *c.interval(), c.p, corrected, _seen(c, len(found)))
        for (name, c), corrected in zip(found.items(), together, strict=True)
    ]


def _seen(c: BothWays, questions: int) -> float:
    n = c.freedom + 1
    return detectable(c.error * n**0.5, n, level=0.05 / questions)


def rlora_less(result: dict, metric: str | None = None) -> list[Contrast]:
    """R-LoRA less each other method, a family of its own; names are the others'."""
    others = [method for method in result["methods"] if method not in ("rlora", UNTRAINED)]
    return contrasts(result, {method: ("rlora", method) for method in others}, metric)


def ideas(result: dict, metric: str | None = None) -> list[Contrast]:
    """What each part of the method brings (`IDEAS`), as far as its methods were run."""
    pairs = {
        f"{idea}: {method} less {against}": (method, against)
        for idea, method, against in IDEAS
        if {method, against} <= set(result["methods"])
    }
    return contrasts(result, pairs, metric)


def relatedness(
    pairs: dict[str, tuple[dict, dict]], against: str = "lora", tasks: Sequence[str] | None = None
) -> dict[str, list[Contrast]]:
    """Does what a method gains over `against` depend on how different the tasks are?

    Args:
        pairs: `{name: (block of different tasks, block of related tasks)}`.
        tasks: score only these, which both blocks have; all of each block's, where None.

    Returns:
        three families: "different", "related" (a method less `against` in each) and "interaction"
        (for each seed, the gain on different tasks less that on related ones: above 0, the method
        gains more where tasks differ). Names are "NAME: METHOD".
    """
    found: dict[str, dict[str, np.ndarray]] = {"different": {}, "related": {}, "interaction": {}}
    for name, (different, related) in pairs.items():
        for method in related["methods"]:
            if method == against or method not in different["methods"]:
                continue
            both = [s for s in different["seeds"] if s in related["seeds"]]
            gains = []
            for result in (different, related):
                values = dict(
                    zip(
                        result["seeds"],
                        differences(result, method, against, tasks=tasks),
                        strict=True,
                    )
                )
                gains.append(np.array([values[seed] for seed in both]))
            key = f"{name}: {method}"
            found["different"][key], found["related"][key] = gains
            found["interaction"][key] = gains[0] - gains[1]
    return {kind: family(values) for kind, values in found.items()}


def correlation(
    x: Sequence[float], y: Sequence[float], groups: Sequence | None = None
) -> tuple[float, float, float]:
    """Pearson's r with its 95 % interval (Fisher's z): (r, low, high).

    With `groups`, within them: each group's means are taken off first, which costs the interval a
    degree of freedom for each group but one.
    """
    groups = ["all"] * len(x) if groups is None else list(groups)
    values = pd.DataFrame({"x": x, "y": y}, dtype=float)
    values -= values.groupby(groups).transform("mean")
    free = len(values) - len(set(groups)) + 1
    if free < 4:
        raise LabError("a correlation's interval needs at least four values more than groups")
    if values.abs().max().min() < 1e-12:
        raise LabError("a correlation needs values that differ")
    r = stats.pearsonr(values["x"], values["y"]).statistic
    low, high = np.tanh(np.arctanh(r) + stats.norm.interval(0.95) / np.sqrt(free - 3))
    return float(r), float(low), float(high)


def similarity_points(result: dict, kind: str = "change") -> list[tuple[str, float, float]]:
    """(method, mean cosine of its heads, mean score over tasks) of each run with several heads.

    `kind` is "heads", the trained heads themselves, or "change", what training added to them.
    """
    metric = result["metrics"][0]
    return [
        (
            method,
            record["similarity"][kind],
            float(np.mean([task[metric] for task in record["test"].values()])),
        )
        for method in result["methods"]
        for record in chosen_records(result, method)
        if record["similarity"]
    ]


def rate_means(result: dict, method: str) -> dict[float, list[float]]:
    """For each rate of a method's sweep, rising, the validation scores of its seeds in per cent."""
    return {
        choice.learning_rate: [100 * by_seed[s] for s in result["sweep_seeds"] if s in by_seed]
        for choice, by_seed in result["sweeps"][method].items()
    }


SIMPLEST_FIRST = ("lora", "mlora", "rlora")


def advise(result: dict) -> tuple[str, list[Contrast]]:
    """The first of `SIMPLEST_FIRST` that neither other beats, and the differences that say so.

    Each is compared with each, corrected by Holm for these three questions. So where nothing can
    be told, the simplest stays.
    """
    pairs = list(combinations(SIMPLEST_FIRST, 2))
    found = contrasts(result, {f"{two} less {one}": (two, one) for one, two in pairs})
    beaten = {
        one if c.verdict == "better" else two
        for (one, two), c in zip(pairs, found, strict=True)
        if c.verdict != "cannot tell"
    }
    return next(method for method in SIMPLEST_FIRST if method not in beaten), found
