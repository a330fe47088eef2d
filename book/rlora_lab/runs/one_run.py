"""One run of a plan: what is trained, and what of it stands in its record."""

import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from ..models.bases import load_base
from ..models.methods import adapt, count_trainable
from ..names import UNTRAINED
from ..tasks.suite import Suite, load_suite
from .plan import Block, Run
from .probes import by_metric, rounded, routing_entropy, row_strings, similarity, training_bytes
from .record import environment
from .training import train


@lru_cache(maxsize=2)
def _suite(base: str, suite: str, tasks: tuple[str, ...] | None, blocks: int | None) -> Suite:
    return load_suite(suite, load_base(base), tasks, blocks)


def suite_of(block: Block) -> Suite:
    """The tasks of a block."""
    tasks = tuple(block.sizes) if block.kind == "skewed" else block.tasks
    return _suite(block.base, block.suite, tasks, block.blocks)


def setting_of(block: Block, workers: int) -> dict:
    """What all records of a block that are made here and now share."""
    suite = suite_of(block)
    here = environment()
    return {
        "block": block.name,
        **block.shared(),
        "base_source": load_base(block.base).source,
        **suite.provenance,
        "tasks": list(suite.tasks),
        "metrics": list(suite.metrics),
        **{k: here[k] for k in ("machine", "threads", "versions")},
        "workers": workers,
    }


def compare(run: Run, suite: Suite, folder: Path | None) -> dict:
    """Train a method on the suite's mixed tasks and score it.

    In the suites language and files each row's result is kept; in language, of a test, the scores
    on validation data after a quarter and a half of the steps.
    """
    block = run.block
    settings = block.settings.model_dump() | dict(run.tuned)
    model = adapt(run.method, load_base(block.base), suite, seed=run.seed, **settings).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    test = run.stage == "test"
    initial = None
    record = {}
    if isinstance(model, PeftModel):
        initial = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    if test:
        adapter, other = count_trainable(model)
        record |= {"adapter_parameters": adapter, "other_parameters": other}
    if run.method != UNTRAINED:
        if test:
            record["kept_bytes"] = training_bytes(model, suite, block.batch)
        record |= _train(run, suite, model, folder)
    split = "test" if test else "validation"
    if block.suite in ("language", "files"):
        results = suite.results(model, split)
        record[split] = by_metric(suite.shares(results), suite)
        record["rows"] = row_strings(results, suite)
    else:
        record[split] = by_metric(suite.score(model, split), suite)
    if test:
        record["similarity"] = similarity(model, initial) if initial else None
        record["entropy"] = routing_entropy(model, suite) if initial else None
    return record


def _train(run: Run, suite: Suite, model: nn.Module, folder: Path | None) -> dict:
    """What is recorded of a training."""
    block = run.block
    looks = []
    scoring = 0.0

    def look(step: int) -> None:
        nonlocal scoring
        if step not in (block.steps // 4, block.steps // 2):
            return
        start = time.monotonic()
        model.eval()
        looks.append([step, by_metric(suite.score(model, "validation"), suite)])
        model.train()
        scoring += time.monotonic() - start

    start = time.monotonic()
    loss = train(
        model,
        suite,
        steps=block.steps,
        lr=run.learning_rate,
        batch=block.batch,
        seed=run.seed,
        folder=folder,
        on_step=look if run.is_looked_at else None,
    )
    record = {
        "seconds": round(time.monotonic() - start - scoring, 1),
        "loss": [rounded(part.mean()) for part in np.array_split(loss, min(10, len(loss)))],
    }
    return record | ({"looks": looks} if looks else {})


def kind_of(block: Block) -> Callable[[Run, Suite, Path | None], dict]:
    """What does one run of a block."""
    if block.kind == "compare":
        return compare
    from . import scarce, study  # the chapters' code, with all that it needs

    return {"skewed": scarce.skewed, "alone": scarce.alone, "study": study.measure}[block.kind]


def do_run(run: Run, folder: Path | None = None) -> dict:
    """Do one run of a plan and return its record.

    `folder` keeps checkpoints of the training, for a run that is stopped to go on from.
    """
    head = {
        "date": environment()["date"],
        "stage": run.stage,
        "method": run.method,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
    }
    if run.tuned:
        head["tuned"] = dict(run.tuned)
    return head | kind_of(run.block)(run, suite_of(run.block), folder)
