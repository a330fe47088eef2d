"""Plans: which runs there are to be, and which of them can be done next.

A plan is a TOML file. `[settings]` holds the adapters' r, num_heads, lora_alpha, lora_dropout, and
each other table is a block of runs that belong together: one base, one suite of tasks, several
methods. The fields are those of `Block`; its `kind` says what one run of it does:

    compare     trains a method on the suite's mixed tasks (`rlora_lab.runs.one_run`)
    skewed      the same with few examples of some tasks, chapter 14 (`rlora_lab.runs.scarce`)
    alone       learns one task from few examples, in several ways, chapter 14
    study       searches for settings of R-LoRA or LoRA, chapter 13 (`rlora_lab.runs.study`)

How a method's learning rate and settings are chosen: `rlora_lab.runs.choice`. The sweep's seeds
are never measured on test data.
"""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ..errors import LabError
from ..names import AUGMENTATIONS, LAB, METHODS, SUITES, UNTRAINED
from .choice import Choice, choice_of, sweep
from .record import read_records

RECORDS = LAB / "records" / "evidence"
PLAN = LAB / "plans" / "evidence.toml"

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


RLORA_GAMMA = 64.0  # the default of RLoraConfig, which reading must not import


class Settings(BaseModel):
    """What the adapters of a plan have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: Count = 4
    num_heads: Count = 3
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    lora_dropout: Share = 0.1


class Block(BaseModel):
    """One table of a plan, of the kind "compare"; the other kinds add to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["compare"] = "compare"
    why: str
    """What the block asks."""
    base: str = "tiny"
    suite: str = "synthetic"
    tasks: tuple[str, ...] | None = None
    """Some of the suite's tasks; None: all."""
    blocks: Count | None = None
    """In the suite language, train the upper so many blocks; None: all."""
    methods: tuple[str, ...] = Field(min_length=1)
    steps: Count
    batch: Count
    rates: tuple[Rate, ...] = ()
    """To choose from, rising; a single one is taken as it is."""
    rates_from: str | None = None
    """An earlier block, whose choice for the method is taken as it is."""
    dropouts: tuple[Share, ...] = ()
    """To choose from beside the rates, in stages: see `rlora_lab.runs.choice`."""
    finalists: Count = 3
    scales: dict[str, dict[Literal["lora_alpha", "gamma"], tuple[Rate, ...]]] = {}
    """For each method that is tuned, values to try of what scales it; the usual one among them."""
    like: dict[str, str] = {}
    """Controls, each with the tuned method whose choice it takes."""
    control_seeds: Count | None = None
    """Controls run on the first so many seeds; None: on all."""
    margin: Annotated[float, Field(gt=0)] | None = None
    """Percentage points within which LoRA and R-LoRA count as equivalent. A block with `dropouts`
    is not tested before it is set."""
    chosen: dict[str, Rate] = {}
    """Rates by method, taken as they are: where they were chosen before, by another rule."""
    sweep_seeds: tuple[int, ...] = ()
    """Seeds of the choice, scored on validation data only."""
    seeds: tuple[int, ...] = Field(min_length=1)
    """Seeds of the evaluation, scored on test data only: none of sweep_seeds."""
    extend: Annotated[int, Field(ge=0)] = 4
    """How many rates a sweep may be extended by, for each method."""
    settings: Settings = Settings()

    @model_validator(mode="after")
    def _fits_together(self) -> "Block":
        for name in ("methods", "seeds", "sweep_seeds", "rates"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must hold each once, got {list(values)}")
        _refuse_unknown("suite", [self.suite], SUITES)
        self._check_methods()
        self._check_rates()
        self._check_stages()
        return self

    def _check_methods(self) -> None:
        _refuse_unknown("method", self.methods, METHODS)

    def _check_rates(self) -> None:
        if [bool(self.rates), bool(self.rates_from), bool(self.chosen)].count(True) != 1:
            raise ValueError("give one of rates, rates_from and chosen")
        if self.chosen:
            if self.chosen.keys() != set(self.methods):
                raise ValueError(f"chosen must have a rate for each of {', '.join(self.methods)}")
            return
        both = set(self.seeds) & set(self.sweep_seeds)
        if both:
            raise ValueError(f"seeds {sorted(both)} stand in seeds and in sweep_seeds")
        if bool(self.sweep_seeds) != (len(self.rates) > 1):
            raise ValueError("sweep_seeds are needed with two rates or more, and only there")
        if list(self.rates) != sorted(self.rates):
            raise ValueError(f"rates must rise, got {list(self.rates)}")
        if self.extend and self.sweep_seeds:
            ratios = np.divide(self.rates[1:], self.rates[:-1])
            if ratios.min() < 0.95 * ratios.max():
                raise ValueError(
                    f"rates must rise by one ratio, unless extend is 0, got {list(self.rates)}"
                )

    def _check_stages(self) -> None:
        _refuse_unknown("method in like", self.like, self.methods)
        tuned = [method for method in self.methods if method not in self.like]
        _refuse_unknown("method in like", self.like.values(), tuned)
        if not self.dropouts:
            if self.scales:
                raise ValueError("scales are tried in stages, which need dropouts")
            return
        if self.scales.keys() != set(tuned):
            raise ValueError("scales must name each method that is not in like, and no other")
        if len({sum(map(len, own.values())) - len(own) for own in self.scales.values()}) > 1:
            raise ValueError("each method must have equally many scales to try")
        for method, own in self.scales.items():
            for name, values in own.items():
                if list(values) != sorted(values) or self.usual(name) not in values:
                    raise ValueError(
                        f"{name} of {method} must rise and hold {self.usual(name)}, got {values}"
                    )

    def seeds_of(self, method: str) -> tuple[int, ...]:
        """The seeds that a method is measured on."""
        if method == UNTRAINED:
            return self.seeds[:1]
        return self.seeds[: self.control_seeds] if method in self.like else self.seeds

    @property
    def waits_for_margin(self) -> bool:
        """Whether its margin is still to be set, from the sweep: nothing is tested before."""
        return bool(self.dropouts) and self.margin is None

    def usual(self, name: str) -> float:
        """A setting of the adapters where nothing else is chosen."""
        return {"gamma": RLORA_GAMMA, **self.settings.model_dump()}[name]

    @property
    def base_name(self) -> str:
        """The base as records name it: a folder without the folders above it."""
        return Path(self.base).name if Path(self.base).is_dir() else self.base

    def shared(self) -> dict:
        """What all records of the block must have in common to belong to it."""
        own = self.model_dump(
            mode="json", include=set(type(self).model_fields) - set(Block.model_fields)
        )
        if self.tasks:
            own["tasks"] = list(self.tasks)
        if self.blocks:
            own["blocks"] = self.blocks
        if self.kind in ("compare", "skewed"):  # the others have their chapters' own
            own |= self.settings.model_dump()
        return {
            "kind": self.kind,
            "base": self.base_name,
            "suite": self.suite,
            "steps": self.steps,
            "batch": self.batch,
            **own,
        }


def _refuse_unknown(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown {what} {unknown[0]!r}: allowed are {', '.join(known)}")


class Skewed(Block):
    """Tasks with `sizes` training examples each, drawn at a temperature."""

    kind: Literal["skewed"]
    sizes: dict[str, Count]
    temperature: Literal["1", "3", "inf"]


class Alone(Block):
    """One task, learned from so many examples; methods are ways to make more of them."""

    kind: Literal["alone"]
    tasks: tuple[str]
    batch: Literal[32]
    examples: Count

    def _check_methods(self) -> None:
        """Augmentations, or the adapters that it starts from: those of `FRESH`, or of a task."""
        augmented = set(self.methods) & set(AUGMENTATIONS)
        if augmented:
            _refuse_unknown("method", self.methods, AUGMENTATIONS)


RUNGS = ("defaults", "and its rate", "and its shape", "best")


class Shape(BaseModel):
    """Settings of R-LoRA that a study searches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    placement: Literal["attention", "mlp", "both"]
    num_heads: Count
    r: Count
    learning_rate: Rate
    gamma: Rate
    dropout: Share


class LoraShape(BaseModel):
    """Settings of plain LoRA that a study searches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    placement: Literal["attention", "mlp", "both"]
    r: Count
    learning_rate: Rate
    lora_alpha: Rate
    dropout: Share


class Study(Block):
    """A search of `trials` trials, then the rungs in `methods`, from the defaults to the best, on
    `seeds`."""

    kind: Literal["study"]
    methods: tuple[str, ...] = RUNGS
    trials: Annotated[int, Field(ge=5)]
    defaults: Shape | LoraShape
    """Those of the method that is searched."""

    def _check_methods(self) -> None:
        _refuse_unknown("rung", self.methods, RUNGS)

    def _check_rates(self) -> None:
        """The search finds them."""

    def rungs(self, best: dict) -> dict[str, dict]:
        """From the defaults to the best trial: the rate, then the shape, then all the rest."""
        defaults = self.defaults.model_dump()
        rate = defaults | {"learning_rate": best["learning_rate"]}
        formed = [name for name in ("placement", "num_heads", "r") if name in defaults]
        shape = rate | {name: best[name] for name in formed}
        whole = {name: best[name] for name in defaults}
        return dict(zip(RUNGS, (defaults, rate, shape, whole), strict=True))


_Block = TypeAdapter(Annotated[Block | Skewed | Alone | Study, Field(discriminator="kind")])


@dataclass(frozen=True)
class Run:
    """One adapter to train, or one trial of a search."""

    block: Block
    stage: str
    """"sweep" or "test"; in a study also "search", "again" or "runner-up"."""
    method: str
    learning_rate: float | None
    """None: the run finds its own."""
    seed: int
    tuned: tuple[tuple[str, float], ...] = ()
    """Settings in the place of the block's."""
    given: dict = field(default_factory=dict, compare=False)
    """What a study found before: settings, or the records of the trials."""

    @property
    def key(self) -> tuple:
        """What tells it from the other runs of the plan."""
        choice = Choice(self.learning_rate, self.tuned)
        return self.block.name, self.stage, self.method, choice, self.seed

    @property
    def is_looked_at(self) -> bool:
        """Whether it is scored on the way too."""
        return self.block.suite == "language" and self.stage == "test"


def make_settings(values: dict, where: str) -> Settings:
    """What adapters have in common, checked.

    Raises:
        LabError: what is wrong with which of them, after the words of `where`.
    """
    try:
        return Settings(**values)
    except ValidationError as error:
        raise LabError(where + _words(error)) from error


def make_block(name: str, values: dict, where: str) -> Block:
    """A block from the values of its table.

    Raises:
        LabError: what is wrong with which of them, after the words of `where`.
    """
    try:
        return _Block.validate_python({"kind": "compare", **values, "name": name})
    except ValidationError as error:
        raise LabError(where + _words(error, skip=1)) from error  # 1: the kind


def _words(error: ValidationError, skip: int = 0) -> str:
    """What pydantic found, each with the path of the value in question."""
    found = []
    for one in error.errors():
        path = ".".join(str(part) for part in one["loc"][skip:])
        message = one["msg"].removeprefix("Value error, ")
        if path and one["type"] != "missing":
            message += f", got {one['input']!r}"
        found.append(f"{path}: {message}" if path else message)
    return "; ".join(found)


def load_plan(path: Path = PLAN) -> dict[str, Block]:
    """The blocks of a plan by name, in its order.

    Raises:
        LabError: what is wrong with the file, and what is allowed.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise LabError(f"{path} is no readable TOML file: {error}") from error
    settings = make_settings(tables.pop("settings", {}), "plan, settings: ")
    plan: dict[str, Block] = {}
    for name, table in tables.items():
        where = f"plan, block {name!r}: "
        block = make_block(name, {"settings": settings, **table}, where)
        source = block.rates_from
        if source and (source not in plan or set(block.methods) - set(plan[source].methods)):
            raise LabError(
                f"{where}rates_from must name an earlier block with the same methods, got "
                f"{source!r}"
            )
        plan[name] = block
    return plan


def missing(
    plan: dict[str, Block], block: Block, records: dict[str, list[dict]]
) -> tuple[list[Run], int]:
    """The runs of a block that can be done now, and how many more are known to come after them.

    Those of the sweep come rate by rate, those of the test seed by seed, so that a grid that was
    stopped compares all methods on the seeds that it has.
    """
    if isinstance(block, Study):
        runs, later = _study_runs(block, records[block.name])
    else:
        runs, later = _compared_runs(plan, block, records)
    done = {(r["stage"], r["method"], choice_of(r), r["seed"]) for r in records[block.name]}
    return [run for run in runs if run.key[1:] not in done], later


def _compared_runs(
    plan: dict[str, Block], block: Block, records: dict[str, list[dict]]
) -> tuple[list[Run], int]:
    sweeps: list[Run] = []
    tests: list[Run] = []
    later = 0
    source = plan[block.rates_from] if block.rates_from else block
    for method in block.methods:
        asked, chosen = sweep(plan, block, method, records)
        if method not in block.like:
            once = dict.fromkeys(asked)  # later stages ask again for what the first had
            sweeps += [_run(block, "sweep", method, choice, seed) for choice, seed in once]
        seeds = block.seeds_of(method)
        if chosen is None or source.waits_for_margin:
            later += len(seeds)
        else:
            tests += [_run(block, "test", method, chosen, seed) for seed in seeds]
    tests.sort(key=lambda run: (run.method in block.like, block.seeds.index(run.seed)))
    return sweeps + tests, later


def _run(block: Block, stage: str, method: str, choice: Choice, seed: int) -> Run:
    return Run(block, stage, method, choice.learning_rate, seed, choice.tuned)


def _study_runs(block: Study, records: list[dict]) -> tuple[list[Run], int]:
    """Trials come one by one, as each learns from those before. Then the rungs run on the seeds;
    where these are all of them, also the best trial once more on its own seed, and the next four
    on one of the seeds."""
    trials = [record for record in records if record["stage"] == "search"]
    whole = block.methods == RUNGS
    after = len(block.methods) * len(block.seeds) + (1 + 4 if whole else 0)
    if len(trials) < block.trials:
        trial = Run(block, "search", "search", None, len(trials), given={"trials": trials})
        return [trial], block.trials - len(trials) - 1 + after
    ranked = best_trials(trials)
    ladder = block.rungs(ranked[0])

    def run(stage: str, method: str, settings: dict, seed: int) -> Run:
        given = {name: settings[name] for name in ladder["defaults"]}
        return Run(block, stage, method, settings["learning_rate"], seed, given=given)

    rungs = block.methods
    runs = [run("test", name, ladder[name], seed) for seed in block.seeds for name in rungs]
    if whole:
        runs.append(run("again", "best", ladder["best"], ranked[0]["seed"]))
        for trial in ranked[1:5]:
            runs.append(run("runner-up", f"trial {trial['trial']}", trial, block.seeds[0]))
    return runs, 0


def best_trials(records: Iterable[dict]) -> list[dict]:
    """The trials of a search that were run to their end, the best first."""
    ran = [r for r in records if r["stage"] == "search" and r["state"] == "complete"]
    return sorted(ran, key=lambda record: -record["value"])


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
        now = block.shared()
        for setting in made_by[name]:
            other = sorted(k for k in now if setting.get(k) != now[k])
            if setting.get("data_sha256") != made_by[name][0].get("data_sha256"):
                other.append("data")
            if other:
                raise LabError(
                    f"{name}.jsonl holds runs with another {', '.join(other)} than the plan has: "
                    "choose another --records, or give the block another name"
                )
    return result, made_by
