"""Recorded results: reading them, and what is said of them.

A result is a dictionary, one JSON file a run, as `rlora_lab.runs.quality` writes it:

    command, date, machine, threads, versions
    config      base, suite, steps, batch, settings of the methods, where the data came from
    tasks, metrics, methods, seeds, chosen (the learning rate of each method), complete
    rlora_parameters    the size that every method comes as close to as it can
    records     one for each method, seed and learning rate: method, seed, learning_rate,
                adapter_parameters, other_parameters, seconds (of training, since its last start),
                loss (at up to 50 points), similarity (mean cosine of the heads, and of their
                change), validation and test ({task: {metric: value}}, or null where not asked)

`load_evidence` gives a block of the plan in the same form, and more: see there. The statistics
below take either.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from scipy import optimize, stats

from ..errors import LabError
from ..runs.plan import PLAN, RECORDS, load_plan, missing, read_all, sweep


def load_result(name: str, *, say: bool = True) -> dict:
    """A recorded result of the package by name, such as "quality-minilm-sentences".

    Says (unless `say` is off) from which file, machine and date its numbers come.
    """
    folder = files("rlora_lab") / "records"
    file = folder / f"{name}.json"
    if not file.is_file():
        known = sorted(f.name.removesuffix(".json") for f in folder.iterdir() if "json" in f.name)
        raise LabError(f"no recorded result {name!r}: there are {', '.join(known) or 'none'}")
    result = json.loads(file.read_text())
    if say:
        versions = ", ".join(f"{k} {result['versions'][k]}" for k in ("torch", "peft"))
        print(
            f"records/{name}.json: {result['date']}, {result['machine']}, {versions}\n"
            f"made by: {result['command']}"
        )
    return result


def chosen_records(result: dict, method: str) -> list[dict]:
    """The tested records of a method, at its chosen learning rate, by seed."""
    if method not in result["methods"]:
        raise LabError(f"no method {method!r} here: there are {', '.join(result['methods'])}")
    records = [
        r
        for r in result["records"]
        if (r["method"], r["learning_rate"]) == (method, result["chosen"][method])
        and r["seed"] in result["seeds"]
    ]
    return sorted(records, key=lambda r: r["seed"])


def score_array(result: dict, method: str, metric: str | None = None) -> np.ndarray:
    """Scores on test data, (seeds, tasks); `metric` is the suite's first unless named."""
    metric = metric or result["metrics"][0]
    return np.array(
        [
            [record["test"][task][metric] for task in result["tasks"]]
            for record in chosen_records(result, method)
        ]
    )


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval (Student's t) of at least two independent values."""
    if len(values) < 2:
        raise LabError("an interval needs at least two values")
    mean, error = np.mean(values), stats.sem(values)
    half = stats.t.ppf(0.975, len(values) - 1) * error
    return float(mean), float(mean - half), float(mean + half)


def paired_difference(
    result: dict, method: str, against: str, metric: str | None = None
) -> tuple[float, float, float]:
    """Mean over seeds of (mean score over tasks of `method` less that of `against`), with its
    95 % interval: (mean, low, high). Both see the same training examples for one seed."""
    seeds = [[r["seed"] for r in chosen_records(result, m)] for m in (method, against)]
    if seeds[0] != seeds[1]:
        raise LabError(f"{method} and {against} were not run on the same seeds: {seeds}")
    scores = [score_array(result, m, metric).mean(1) for m in (method, against)]
    return interval(scores[0] - scores[1])


def load_evidence(
    block: str, *, say: bool = True, plan: Path = PLAN, records: Path = RECORDS
) -> dict:
    """A block of the evidence, such as "synthetic", in the form of `load_result`.

    Says (unless `say` is off) from which file, machine and date its numbers come. `methods` are
    those that were scored on test data, `seeds` those that all of them were scored on; `complete`
    says whether the plan holds more. A record of the test has `kept_bytes` and `entropy` too (a
    number a task, see `rlora_lab.runs.evidence`). `sweeps` is `{method: {rate: {seed: mean score
    over tasks on validation data}}}`, and `at_end` names the methods whose best rate is the last
    one that the plan allowed.

    Raises:
        LabError: no such block, none of its runs on test data done, or test data that was scored at
            another rate than the sweep chooses.
    """
    blocks = load_plan(plan)
    if block not in blocks:
        raise LabError(f"no block {block!r} in the plan: it has {', '.join(blocks)}")
    asked = blocks[block]
    all_records, settings = read_all(blocks, records)
    setting = settings[block][0] if settings[block] else {"tasks": [], "metrics": []}
    tasks, metrics = setting["tasks"], setting["metrics"]

    def by_task(scores: dict[str, list[float]] | None) -> dict | None:
        if scores is None:
            return None
        return {t: {m: scores[m][i] for m in metrics} for i, t in enumerate(tasks)}

    found = [
        record | {split: by_task(record.get(split)) for split in ("validation", "test")}
        for record in all_records[block]
    ]
    chosen, sweeps, at_end, by_method = {}, {}, [], {}
    for method in asked.methods:
        rates, best = sweep(blocks, asked, method, all_records)
        tested = [r for r in found if (r["method"], r["stage"]) == (method, "test")]
        if not tested:
            continue
        if others := {r["learning_rate"] for r in tested} - {best}:
            raise LabError(
                f"{block}: {method} was scored on test data at {sorted(others)}, but its sweep "
                f"chooses {best}. A rate must not be chosen anew after test data was seen."
            )
        chosen[method] = best
        at_end += [method] if len(rates) > 1 and best in (rates[0], rates[-1]) else []
        by_method[method] = {r["seed"] for r in tested} & set(asked.seeds)
        sweeps[method] = {rate: {} for rate in rates}
        for record in found:
            if (record["method"], record["stage"]) == (method, "sweep"):
                scores = [task[metrics[0]] for task in record["validation"].values()]
                by_seed = sweeps[method].setdefault(record["learning_rate"], {})
                by_seed[record["seed"]] = float(np.mean(scores))
    if not chosen:
        raise LabError(f"{block}: nothing has been scored on test data yet")
    todo, later = missing(blocks, asked, all_records)
    dates = sorted({record["date"] for record in found})
    known = [*dict.fromkeys(s["machine"] for s in settings[block])]
    result = {
        "command": f"python -m rlora_lab evidence --only {block}",
        "date": dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
        "machine": "; ".join(known),
        "threads": setting["threads"],
        "versions": setting["versions"],
        "config": {k: v for k, v in setting.items() if k not in ("machine", "threads", "versions")},
        "tasks": tasks,
        "metrics": metrics,
        "methods": list(chosen),
        "seeds": [s for s in asked.seeds if all(s in seeds for seeds in by_method.values())],
        "sweep_seeds": list(asked.sweep_seeds),
        "chosen": chosen,
        "sweeps": sweeps,
        "at_end": at_end,
        "complete": not todo and not later,
        "rlora_parameters": next(
            (
                r["adapter_parameters"]
                for r in found
                if (r["method"], r["stage"]) == ("rlora", "test")
            ),
            None,
        ),
        "records": found,
    }
    if say:
        print(provenance(result))
    return result


def provenance(result: dict) -> str:
    """Where the numbers of a block come from: command, seeds, date, machine, versions."""
    versions = ", ".join(f"{k} {result['versions'][k]}" for k in ("torch", "transformers", "peft"))
    chosen = f"on validation data with seeds {_span(result['sweep_seeds'])}"
    if not result["sweep_seeds"]:
        chosen = "in another block"
    state = "" if result["complete"] else ", not all of the plan yet"
    return (
        f"records/evidence/{result['config']['block']}.jsonl: {result['date']}, "
        f"{result['machine']}, {versions}\n"
        f"made by: {result['command']}{state}\n"
        f"seeds on test data: {_span(result['seeds'])}; learning rates chosen {chosen}"
    )


def _span(seeds: Sequence[int]) -> str:
    whole = len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(str, seeds))


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
    """The smallest true difference that so many seeds with this spread show with 80 % power at the
    uncorrected 5 % level."""

    @property
    def verdict(self) -> str:
        """After Holm's correction at 5 %: "better", "worse", or "cannot tell"."""
        if self.holm >= 0.05:
            return "cannot tell"
        return "better" if self.mean > 0 else "worse"


def holm(p: Iterable[float]) -> np.ndarray:
    """Holm's correction: the smallest p times the number of questions, the next times one less,
    never going down and never above 1."""
    p = np.asarray(list(p), dtype=float)
    order = np.argsort(p)
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected


def detectable(spread: float, n: int, power: float = 0.8) -> float:
    """The smallest true mean of `n` differences of standard deviation `spread` that a two-sided t
    test at 5 % finds with that power."""
    limit = stats.t.ppf(0.975, n - 1)

    def lacks(size: float) -> float:  # size: the true mean in standard errors
        other_tail = np.nan_to_num(stats.nct.cdf(-limit, n - 1, size))  # NaN where it is nil
        return float(stats.nct.sf(limit, n - 1, size) + other_tail) - power

    return float(optimize.brentq(lacks, 0, 2 * limit + 5)) * float(spread) / n**0.5


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
            [detectable(np.std(v, ddof=1), len(v)) for v in differences.values()],
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
    """For each seed, the mean score over tasks (all, or those named) of a method less that of the
    other, in percentage points: (seeds,)."""
    tasks = result["tasks"] if tasks is None else tasks
    columns = [result["tasks"].index(task) for task in tasks]
    first, second = (score_array(result, m, metric)[:, columns].mean(1) for m in (method, against))
    return 100 * (first - second)


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
    ("two and a half times the parameters", "lora", "lora-rank"),
)


def against_rlora(result: dict, metric: str | None = None) -> list[Contrast]:
    """Each method less R-LoRA, a family of its own."""
    return family(
        {
            method: differences(result, method, "rlora", metric)
            for method in result["methods"]
            if method != "rlora"
        }
    )


def ideas(result: dict, metric: str | None = None) -> list[Contrast]:
    """What each part of the method brings (`IDEAS`), as far as its methods were run."""
    return family(
        {
            f"{idea}: {method} less {against}": differences(result, method, against, metric)
            for idea, method, against in IDEAS
            if {method, against} <= set(result["methods"])
        }
    )


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
    x, y = np.array(x, dtype=float), np.array(y, dtype=float)
    groups = np.zeros(len(x)) if groups is None else np.asarray(groups)
    for group in np.unique(groups):
        x[groups == group] -= x[groups == group].mean()
        y[groups == group] -= y[groups == group].mean()
    free = len(x) - len(np.unique(groups)) + 1
    if free < 4:
        raise LabError("a correlation's interval needs at least four values more than groups")
    if min(np.abs(x).max(), np.abs(y).max()) < 1e-12:
        raise LabError("a correlation needs values that differ")
    r = float(x @ y / np.sqrt((x @ x) * (y @ y)))
    half = stats.norm.ppf(0.975) / np.sqrt(free - 3)
    low, high = np.tanh(np.arctanh(r) + half * np.array([-1, 1]))
    return r, float(low), float(high)


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
