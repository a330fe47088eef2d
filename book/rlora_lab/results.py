"""Recorded results: reading them, and what is said of them.

A result is a dictionary, one JSON file a run, as `rlora_lab.quality` writes it:

    command, date, machine, threads, versions
    config      base, suite, steps, batch, settings of the methods, where the data came from
    tasks, metrics, methods, seeds, chosen (the learning rate of each method), complete
    rlora_parameters    the size that every method comes as close to as it can
    records     one for each method, seed and learning rate: method, seed, learning_rate,
                adapter_parameters, other_parameters, seconds (of training, since its last start),
                loss (at up to 50 points), similarity (mean cosine of the heads, and of their
                change), validation and test ({task: {metric: value}}, or null where not asked)
"""

import json
from importlib.resources import files

import numpy as np
from scipy import stats

from .errors import LabError


def load_result(name: str, *, say: bool = True) -> dict:
    """A recorded result of the package by name, such as "quality-minilm-sentences".

    Says (unless `say` is off) from which file, machine and date its numbers come.
    """
    folder = files("rlora_lab") / "results"
    file = folder / f"{name}.json"
    if not file.is_file():
        known = sorted(f.name.removesuffix(".json") for f in folder.iterdir() if "json" in f.name)
        raise LabError(f"no recorded result {name!r}: there are {', '.join(known) or 'none'}")
    result = json.loads(file.read_text())
    if say:
        versions = ", ".join(f"{k} {result['versions'][k]}" for k in ("torch", "peft"))
        print(
            f"results/{name}.json: {result['date']}, {result['machine']}, {versions}\n"
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
