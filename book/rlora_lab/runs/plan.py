"""The plan of the evidence: which runs there are to be, and which of them can be done next.

A plan is a TOML file. `[settings]` holds the adapters' r, num_heads, lora_alpha, lora_dropout, and
each other table is a block, one suite of tasks on one base:

    why             what the block asks
    base, suite     as in `python -m rlora_lab quality`; tasks: some of the suite's, else all
    methods, steps, batch
    rates           learning rates to sweep, rising by one ratio; or rates_from: a block whose
                    choice for the method, with a neighbour on each side, is where the sweep begins
    sweep_seeds     seeds of the sweep, scored on validation data only; none, with rates_from: the
                    other block's choice is taken as it is
    seeds           seeds of the evaluation, scored on test data only: none of sweep_seeds
    extend          how many rates a sweep may be extended by, for each method

How a method's learning rate is chosen: each rate has the mean validation score over sweep seeds and
tasks. These means are smoothed over neighbouring rates with weights 1, 2, 1 (2, 1 at an end), and
the rate with the best smoothed mean is taken. A lone lucky rate between bad neighbours thus loses
to a good one between good ones. No form of the curve is assumed, as a parabola would: it rises
slowly and falls off a cliff. If the best is at an end, the next rate beyond is run, and so on.
"""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path

import numpy as np

from ..errors import LabError
from ..models.methods import METHODS
from .quality import DEFAULTS, SUITES
from .record import read_records

LAB = Path(str(files("rlora_lab")))
RECORDS = LAB / "records" / "evidence"
PLAN = LAB / "plans" / "evidence.toml"
EXTEND = 4


@dataclass(frozen=True)
class Block:
    """One table of a plan; see the top of this module."""

    name: str
    why: str
    base: str
    suite: str
    methods: tuple[str, ...]
    steps: int
    batch: int
    sweep_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    settings: tuple[tuple[str, float], ...]
    tasks: tuple[str, ...] | None = None
    rates: tuple[float, ...] = ()
    rates_from: str | None = None
    extend: int = EXTEND

    def __post_init__(self) -> None:
        def refuse(what: str) -> None:
            raise LabError(f"plan, block {self.name!r}: {what}")

        if unknown := [m for m in self.methods if m not in METHODS]:
            refuse(f"unknown method {unknown[0]!r}: allowed are {', '.join(METHODS)}")
        if self.suite not in SUITES:
            refuse(f"unknown suite {self.suite!r}: allowed are {', '.join(SUITES)}")
        for name in ("methods", "seeds", "sweep_seeds"):
            values = getattr(self, name)
            empty = not values and not (name == "sweep_seeds" and self.rates_from)
            if empty or len(set(values)) < len(values):
                refuse(f"{name} must hold at least one, and each once, got {list(values)}")
        if both := set(self.seeds) & set(self.sweep_seeds):
            refuse(f"seeds {sorted(both)} stand in seeds and in sweep_seeds")
        if self.steps < 1 or self.batch < 1:
            refuse(f"steps and batch must be at least 1, got {self.steps} and {self.batch}")
        if bool(self.rates) == bool(self.rates_from):
            refuse("give either rates or rates_from")
        ratios = np.divide(self.rates[1:], self.rates[:-1])
        if self.rates and not (len(ratios) and 1 < ratios.min() > 0.95 * ratios.max()):
            refuse(f"rates must be two or more, rising by one ratio, got {list(self.rates)}")

    @property
    def base_name(self) -> str:
        """The base as records name it: a folder without the folders above it."""
        return Path(self.base).name if Path(self.base).is_dir() else self.base


@dataclass(frozen=True)
class Run:
    """One adapter to train: for the sweep, or for the test."""

    block: Block
    method: str
    learning_rate: float
    seed: int
    stage: str
    """"sweep" or "test"."""


def load_plan(path: Path = PLAN) -> dict[str, Block]:
    """The blocks of a plan by name, in its order.

    Raises:
        LabError: what is wrong with the file, and what is allowed.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise LabError(f"{path} is no readable TOML file: {error}") from error
    settings = DEFAULTS | tables.pop("settings", {})
    if unknown := settings.keys() - DEFAULTS.keys():
        raise LabError(f"{path}: unknown settings {sorted(unknown)}: allowed are {list(DEFAULTS)}")
    names = {f.name for f in fields(Block)} - {"name", "settings"}
    plan = {}
    for name, table in tables.items():
        if unknown := table.keys() - names:
            raise LabError(f"plan, block {name!r}: unknown {sorted(unknown)}: {sorted(names)}")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
        try:
            plan[name] = Block(name, settings=tuple(settings.items()), **values)
        except TypeError as error:
            raise LabError(f"plan, block {name!r}: {error}") from error
        source = plan[name].rates_from
        if source and (source not in plan or set(plan[name].methods) - set(plan[source].methods)):
            raise LabError(
                f"plan, block {name!r}: rates_from must name an earlier block with the same methods"
            )
    return plan


def validation_means(block: Block, method: str, records: Iterable[dict]) -> dict[float, float]:
    """`{rate: mean validation score}` for the rates that all sweep seeds were run at, rising."""
    scores: dict[float, dict[int, float]] = {}
    for record in records:
        if (record["method"], record["stage"]) == (method, "sweep"):
            first = next(iter(record["validation"].values()))  # the metric to choose by
            scores.setdefault(record["learning_rate"], {})[record["seed"]] = np.mean(first)
    return {
        rate: float(np.mean([by_seed[seed] for seed in block.sweep_seeds]))
        for rate, by_seed in sorted(scores.items())
        if set(block.sweep_seeds) <= by_seed.keys()
    }


def smooth(means: Iterable[float]) -> np.ndarray:
    """Weighted means with the neighbours: 1, 2, 1, and 2, 1 at the ends."""
    values = np.asarray(list(means), dtype=float)
    padded = np.pad(values, 1)
    weights = np.pad(np.ones(len(values)), 1)
    kernel = np.array([1, 2, 1])
    return np.convolve(padded, kernel, "valid") / np.convolve(weights, kernel, "valid")


def _round(rate: float) -> float:
    return float(f"{rate:.3g}")


def sweep(
    plan: dict[str, Block], block: Block, method: str, records: dict[str, list[dict]]
) -> tuple[tuple[float, ...], float | None]:
    """The rates that a method's sweep is to hold, and the chosen one once they are all run.

    No rates at all: it must wait for the block that it begins from. `records` are those of each
    block by name.
    """
    rates = block.rates
    if block.rates_from:
        _, center = sweep(plan, plan[block.rates_from], method, records)
        if center is None:
            return (), None
        if not block.sweep_seeds:
            return (center,), center
        others = plan[block.rates_from].rates
        ratio = others[1] / others[0]
        rates = (_round(center / ratio), center, _round(center * ratio))
    means = validation_means(block, method, records[block.name])
    for extended in range(block.extend + 1):
        if not set(rates) <= means.keys():
            return rates, None
        best = int(np.argmax(smooth(means[rate] for rate in rates)))
        if 0 < best < len(rates) - 1 or extended == block.extend:
            return rates, rates[best]
        if best == 0:
            rates = (_round(rates[0] ** 2 / rates[1]), *rates)
        else:
            rates = (*rates, _round(rates[-1] ** 2 / rates[-2]))
    raise AssertionError("the last round returns")


def missing(
    plan: dict[str, Block], block: Block, records: dict[str, list[dict]]
) -> tuple[list[Run], int]:
    """The runs of a block that can be done now, and how many more are known to come after them.

    Those of the sweep come rate by rate, those of the test seed by seed, so that a grid that was
    stopped compares all methods on the seeds that it has.
    """
    done = {(r["stage"], r["method"], r["learning_rate"], r["seed"]) for r in records[block.name]}
    sweeps: list[Run] = []
    tests: list[Run] = []
    later = 0
    for method in block.methods:
        rates, chosen = sweep(plan, block, method, records)
        sweeps += [
            Run(block, method, rate, seed, "sweep") for rate in rates for seed in block.sweep_seeds
        ]
        later += 0 if rates else 3 * len(block.sweep_seeds)
        if chosen is None:
            later += len(block.seeds)
        else:
            tests += [Run(block, method, chosen, seed, "test") for seed in block.seeds]
    tests.sort(key=lambda run: block.seeds.index(run.seed))
    todo = [
        run
        for run in (*sweeps, *tests)
        if (run.stage, run.method, run.learning_rate, run.seed) not in done
    ]
    return todo, later


def read_all(
    plan: dict[str, Block], folder: Path
) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """The records of each block of a plan, and their settings.

    Raises:
        LabError: records that were made for another block than the plan has now.
    """
    result, made_by = {}, {}
    for name, block in plan.items():
        settings, result[name] = read_records(folder / f"{name}.jsonl")
        made_by[name] = list(settings.values())
        now = {
            "base": block.base_name,
            "suite": block.suite,
            "steps": block.steps,
            "batch": block.batch,
            **dict(block.settings),
        }
        now |= {"tasks": list(block.tasks)} if block.tasks else {}
        for setting in settings.values():
            other = sorted(k for k in now if setting.get(k) != now[k])
            data = next(iter(settings.values())).get("data_sha256")
            other += ["data"] * (setting.get("data_sha256") != data)
            if other:
                raise LabError(
                    f"{name}.jsonl holds runs with another {', '.join(other)} than the plan has: "
                    "give the block another name, or take the file away"
                )
    return result, made_by
