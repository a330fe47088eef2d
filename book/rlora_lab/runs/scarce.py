"""What a run is of the blocks of chapter 14: tasks with few examples, trained as the chapter does.

A run of "skewed" is scored on test data twice: at its end, and at the look where the worst task was
best on validation data. A run of "alone" is R-LoRA on a single task, with augmentations that fit or
do not, or from the adapter of another task.
"""

import functools
import time
from pathlib import Path

from peft import get_peft_model_state_dict, set_peft_model_state_dict

from ..chapters import ch14_scarce_tasks as chapter
from ..models.bases import load_base
from ..models.methods import adapt, count_trainable
from ..names import AUGMENTATIONS, FRESH
from ..tasks.suite import Suite
from .plan import Run
from .probes import by_metric

LENT, LENDERS_SEED = 5000, 100  # examples of a task that lends its adapter; no seed is measured


def skewed(run: Run, suite: Suite, folder: Path | None) -> dict:
    """Train and score one adapter on tasks of unequal size."""
    block = run.block
    tasks = chapter.Skewed(block.sizes, float(block.temperature), seed=run.seed)
    settings = block.settings.model_dump()
    model = adapt(run.method, load_base(block.base), tasks, seed=run.seed, **settings)
    start = time.monotonic()
    looks = chapter.train_skewed(
        model,
        tasks,
        block.steps,
        run.learning_rate,
        run.seed,
        block.batch,
        every=max(1, block.steps // 5),
    )
    shown = [[step, {"letters": [round(v, 4) for v in s.values()]}] for step, s, _ in looks]
    record = {
        "adapter_parameters": count_trainable(model)[0],
        "seconds": round(time.monotonic() - start, 1),
        "looks": shown,
    }
    if run.stage == "sweep":
        return record | {"validation": shown[-1][1]}
    record["test"] = by_metric(suite.score(model.eval(), "test"), suite)
    step, _, adapter = chapter.best_look(looks)
    set_peft_model_state_dict(model, adapter)
    return record | {
        "stopped": step,
        "test_stopped": by_metric(suite.score(model, "test"), suite),
    }


@functools.cache
def lender(task: str) -> dict:
    """An adapter that learned a task from many examples."""
    return get_peft_model_state_dict(chapter.alone(task, LENT, LENDERS_SEED))


def alone(run: Run, suite: Suite, folder: Path | None) -> dict:
    """Train R-LoRA on few examples of one task and score it."""
    augment = start = None
    if run.method not in (*AUGMENTATIONS, FRESH):
        start = lender(run.method)
    elif run.method in ("rename", "shuffle"):
        augment = getattr(chapter, run.method)
    began = time.monotonic()
    model = chapter.alone(
        run.block.tasks[0],
        run.block.examples,
        run.seed,
        augment,
        start,
        run.block.steps,
        run.learning_rate,
    )
    seconds = round(time.monotonic() - began, 1)
    return {"seconds": seconds, "test": by_metric(suite.score(model, "test"), suite)}
