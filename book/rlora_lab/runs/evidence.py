"""`python -m rlora_lab evidence`: works a plan off, run by run, and keeps each run's record.

The records of a block are a file of JSON lines, `BLOCK.jsonl`. A line with an "id" is a setting,
which many records share: block, base, suite, tasks, metrics, steps, batch, the adapters' settings,
where the data came from, machine, threads, workers and versions. Every other line is a run:

    setting             the id of its setting
    date, stage         "sweep" (for the choice of the learning rate) or "test"
    method, learning_rate, seed
    validation | test   {metric: [value of each task, in the order of the setting's tasks]}:
                        validation data in the sweep, test data in the test, never both
    seconds, loss       of training, at 10 points (null where it was not finite)

and of the test alone:

    adapter_parameters, other_parameters
    kept_bytes          what autograd keeps for the backward of a training batch, beside parameters
    similarity          mean cosine of the heads, and of their change: {"heads", "change"}, or null
    entropy             of the routing in units of ln N, a mean over modules, by task: 1 is uniform;
                        null without a router
"""

import math
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rlora_min import record_routing

from ..errors import LabError
from ..models.bases import load_base
from ..models.methods import adapt, count_trainable
from ..speed.instruments import kept_bytes
from .plan import Block, Run, missing, read_all
from .quality import load_suite, mean_similarity
from .record import add_record, environment
from .training import Suite, train

PROBE = 64  # validation examples of each task that the routing is looked at on


@lru_cache(maxsize=2)
def _suite(base: str, suite: str, tasks: tuple[str, ...] | None) -> Suite:
    return load_suite(suite, load_base(base), tasks)


def setting_of(block: Block, workers: int) -> dict:
    """What all records of a block that are made here and now share."""
    suite = _suite(block.base, block.suite, block.tasks)
    here = environment()
    return {
        "block": block.name,
        "base": block.base_name,
        "base_source": load_base(block.base).source,
        "suite": block.suite,
        **suite.provenance,
        "tasks": list(suite.tasks),
        "metrics": list(suite.metrics),
        "steps": block.steps,
        "batch": block.batch,
        **dict(block.settings),
        **{k: here[k] for k in ("machine", "threads", "versions")},
        "workers": workers,
    }


def routing_entropy(model: PeftModel, suite: Suite) -> list[float]:
    """Entropy of the routing on validation examples of each task, a mean over modules; 1 means
    uniform."""
    device = next(model.parameters()).device
    with record_routing(model) as log, torch.no_grad():
        for task in suite.tasks:
            batch = {k: v.to(device) for k, v in suite.probe(task, PROBE).items() if k != "labels"}
            log.task, log.mask = task, batch.get("attention_mask")
            model(**batch)
    uniform = math.log(len(next(iter(log.mean[suite.tasks[0]].values()))))
    return [float(np.mean([*log.entropy[task].values()])) / uniform for task in suite.tasks]


def _training_bytes(model: PeftModel, suite: Suite, batch: int) -> int:
    rows = suite.training_set(batch, 0)
    rows = suite.collate(rows) if suite.collate else torch.utils.data.default_collate(rows)
    device = next(model.parameters()).device
    rows = {k: v.to(device) for k, v in rows.items()}
    model.train()
    return kept_bytes(model, lambda: model(**rows)["loss"])[1]


def _rounded(value: float, digits: int = 4) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


def do_run(run: Run, folder: Path | None = None) -> dict:
    """Train one adapter as a run asks, score it, and return its record.

    `folder` keeps checkpoints of the training, for a run that is stopped to go on from.
    """
    block = run.block
    suite = _suite(block.base, block.suite, block.tasks)
    model = adapt(
        run.method, load_base(block.base), suite, seed=run.seed, **dict(block.settings)
    ).eval()
    initial = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    record = {
        "date": environment()["date"],
        "stage": run.stage,
        "method": run.method,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
    }
    if run.stage == "test":
        adapter, other = count_trainable(model)
        record |= {"adapter_parameters": adapter, "other_parameters": other}
        record["kept_bytes"] = _training_bytes(model, suite, block.batch)
    start = time.monotonic()
    loss = train(
        model,
        suite,
        steps=block.steps,
        lr=run.learning_rate,
        batch=block.batch,
        seed=run.seed,
        folder=folder,
    )
    record["seconds"] = round(time.monotonic() - start, 1)
    record["loss"] = [_rounded(part.mean()) for part in np.array_split(loss, min(10, len(loss)))]
    split = "test" if run.stage == "test" else "validation"
    scores = suite.score(model, split)
    record[split] = {
        metric: [round(scores[task][metric], 5) for task in suite.tasks] for metric in suite.metrics
    }
    if run.stage == "test":
        config = model.peft_config["default"]
        many = getattr(config, "num_heads", 1) > 1
        record["similarity"] = record["entropy"] = None
        if many:
            cosines = {
                "heads": mean_similarity(model),
                "change": mean_similarity(model, initial),
            }
            record["similarity"] = {k: _rounded(v) for k, v in cosines.items()}
        if many and config.router == "softmax":
            record["entropy"] = [_rounded(e) for e in routing_entropy(model, suite)]
    return record


def _start_worker() -> None:
    torch.set_num_threads(1)


def _scratch(run: Run) -> Path | None:
    # Checkpoints only where a run takes minutes: on the tiny base it takes seconds.
    name = f"{run.block.name}-{run.stage}-{run.method}-lr{run.learning_rate:g}-seed{run.seed}"
    return None if run.block.base == "tiny" else Path("runs") / "evidence" / name


def _work(run: Run, workers: int) -> tuple[dict, dict]:
    return setting_of(run.block, workers), do_run(run, _scratch(run))


def work(
    plan: dict[str, Block],
    folder: Path,
    console: Console,
    *,
    only: Sequence[str] = (),
    methods: Sequence[str] = (),
    minutes: float = math.inf,
    workers: int = 2,
) -> bool:
    """Do what is missing of a plan, as long as there is time; say whether all of it is done.

    Args:
        folder: where the records are, and where each run's is added as it ends.
        only, methods: names of blocks and of methods to work at; all, where none is named.
        minutes: start no run that would not end within them, going by the median of its block.
    """
    for kind, asked, known in (
        ("block", only, list(plan)),
        ("method", methods, sorted({m for block in plan.values() for m in block.methods})),
    ):
        if unknown := [name for name in asked if name not in known]:
            raise LabError(f"no {kind} {unknown[0]!r} in the plan: it has {', '.join(known)}")
    blocks = [block for name, block in plan.items() if not only or name in only]

    def left() -> tuple[list[Run], int]:
        records = read_all(plan, folder)[0]
        runs, later = [], 0
        for block in blocks:
            now, more = missing(plan, block, records)
            runs += [run for run in now if not methods or run.method in methods]
            later += more
        return runs, later

    start = time.monotonic()
    seconds: dict[str, list[float]] = {}
    for block in blocks:
        seconds[block.name] = [r["seconds"] for r in read_all(plan, folder)[0][block.name]]

    def fits(run: Run) -> bool:
        known = seconds[run.block.name]
        expected = 1.3 * float(np.median(known)) if known else 0.0
        return time.monotonic() - start + expected < 60 * minutes

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the workers load torch
    running: dict[Future, Run] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
    try:
        with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
            bar = progress.add_task("", total=None)
            done = 0
            while True:
                runs, later = left()
                busy = set(running.values())
                free = [run for run in runs if run not in busy and fits(run)]
                for run in free[: workers - len(running)]:
                    running[pool.submit(_work, run, workers)] = run
                names = ", ".join(f"{r.block.name}: {r.method}" for r in running.values())
                progress.update(bar, description=names, total=done + len(runs) + later)
                if not running:
                    return not runs and not (later and not methods)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    setting, record = future.result()
                    add_record(folder / f"{run.block.name}.jsonl", setting, record)
                    if checkpoints := _scratch(run):
                        shutil.rmtree(checkpoints, ignore_errors=True)
                    seconds[run.block.name].append(record["seconds"])
                    done += 1
                    progress.update(bar, completed=done)
    finally:
        pool.shutdown(cancel_futures=True)


def status_table(plan: dict[str, Block], folder: Path) -> Table:
    """For each block the runs that are done and those known to be missing, with the minutes on one
    core that these take, going by the median of those that are done."""
    records = read_all(plan, folder)[0]
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("block", "done", "missing", "minutes on one core"):
        table.add_column(column, justify="left" if column == "block" else "right")
    for name, block in plan.items():
        todo, later = missing(plan, block, records)
        seconds = [record["seconds"] for record in records[name]]
        minutes = f"{(len(todo) + later) * np.median(seconds) / 60:.0f}" if seconds else "?"
        table.add_row(name, str(len(seconds)), str(len(todo) + later), minutes)
    return table
