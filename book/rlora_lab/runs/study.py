"""What a run of a study is: one trial of the search for a method's settings, or a rung again.

The search is chapter 13's: Optuna's TPE with a median pruner, one training run a trial, each with
its own seed, and no trial trains more numbers than R-LoRA's defaults do. It is kept in the records
alone: each trial is asked for with all earlier ones put back into a study in memory.
"""

import time
from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.trial import FixedTrial, TrialState, create_trial

from ..chapters import ch13_choosing_the_randomness as chapter
from ..models.methods import count_trainable
from ..tasks.suite import Suite
from .plan import Run, Shape
from .probes import by_metric


def measure(run: Run, suite: Suite, folder: Path | None) -> dict:
    """A trial, or the run of settings that were found."""
    return _trial(run) if run.stage == "search" else _again(run, suite)


def _trial(run: Run) -> dict:
    steps = run.block.steps
    suggest = chapter.suggest if isinstance(run.block.defaults, Shape) else chapter.suggest_lora

    def objective(trial: optuna.Trial, seed: int) -> float:
        return chapter.objective(trial, seed, steps, steps // 4, suggest)

    study = chapter.search(remembered(run.given["trials"], suggest), run.seed + 1, objective)
    trial = chapter.finished(study)[-1]
    return {
        "trial": run.seed,
        "state": trial.state.name.lower(),
        **trial.params,
        "adapter_parameters": _size(trial.params),
        "seconds": round(trial.duration.total_seconds(), 1),
        "values": [[step, value] for step, value in trial.intermediate_values.items()],
        "value": trial.value if trial.state == TrialState.COMPLETE else None,
    }


def _size(settings: dict) -> int:
    placement, r = settings["placement"], settings["r"]
    if "num_heads" in settings:
        return chapter.size(placement, settings["num_heads"], r)
    return chapter.lora_size(placement, r)


def remembered(
    records: list[dict], suggest: Callable[[optuna.trial.BaseTrial], dict]
) -> optuna.storages.InMemoryStorage:
    """The recorded trials as Optuna holds them, for the search to go on from."""
    storage = optuna.storages.InMemoryStorage()
    study = chapter.search(storage, 0, objective=None)  # made, and nothing run
    for record in sorted(records, key=lambda record: record["seed"]):
        fixed = FixedTrial(record)
        suggest(fixed)  # tells the ranges that it was drawn from
        value = record["value"]
        if value is None:  # Optuna's value of a trial that was given up is the last that it saw
            value = record["values"][-1][1]
        study.add_trial(
            create_trial(
                state=TrialState[record["state"].upper()],
                value=value,
                params=fixed.params,
                distributions=fixed.distributions,
                intermediate_values=dict(record["values"]),
            )
        )
    return storage


def _again(run: Run, suite: Suite) -> dict:
    start = time.monotonic()
    model = chapter.train_with(run.given, run.seed, run.block.steps)
    seconds = time.monotonic() - start
    return {
        "settings": run.given,
        "adapter_parameters": count_trainable(model)[0],
        "seconds": round(seconds, 1),
        "value": chapter.letters(model),  # what the search saw of its trials
        "test": by_metric(suite.score(model, "test"), suite),
    }
