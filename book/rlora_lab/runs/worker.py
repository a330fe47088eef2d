"""Works a plan off, run by run and with several processes, and keeps each run's record."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import lru_cache
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from ..errors import LabError
from ..models.bases import load_base
from ..models.methods import adapt, count_trainable
from ..names import UNTRAINED
from ..tasks.suite import Suite, load_suite
from .plan import Block, Run, missing, read_all
from .probes import by_metric, rounded, routing_entropy, row_strings, similarity, training_bytes
from .record import add_record, environment
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
        on_step=look if _is_looked_at(run) else None,
    )
    record = {
        "seconds": round(time.monotonic() - start - scoring, 1),
        "loss": [rounded(part.mean()) for part in np.array_split(loss, min(10, len(loss)))],
    }
    return record | ({"looks": looks} if looks else {})


def _is_looked_at(run: Run) -> bool:
    return run.block.suite == "language" and run.stage == "test"


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


def _start_worker() -> None:
    torch.set_num_threads(1)


def _scratch(run: Run) -> Path | None:
    # Checkpoints only where a run takes minutes, and where nothing is looked at on the way, which
    # a run that goes on would lack.
    if run.block.base == "tiny" or _is_looked_at(run):
        return None
    chosen = "".join(f"-{name}{value}" for name, value in run.tuned)
    name = f"{run.block.name}-{run.stage}-{run.method}-lr{run.learning_rate}{chosen}-seed{run.seed}"
    return Path("runs") / "checkpoints" / name


def _work(run: Run, workers: int) -> tuple[dict, dict]:
    return setting_of(run.block, workers), do_run(run, _scratch(run))


class RayPool:
    """Workers on Ray, on one machine or many, where a pool of processes would be: a run is a task.

    A task that is lost with its machine is begun again on another, so it keeps no checkpoints.

    Args:
        address: "local" starts Ray on this machine, for as long as the work lasts; else where a
            cluster listens, as `ray.init` takes it.

    Raises:
        LabError: Ray is not installed, or does not answer there.
    """

    def __init__(self, address: str, workers: int) -> None:
        if find_spec("ray") is None:
            raise LabError('--ray needs the extra serve: pip install "rlora-min[lab,serve]"')
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports home unless told not to
        import ray

        here = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": 2**28}
        start = here if address == "local" else {}
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **start)
        except (ConnectionError, ValueError) as error:
            raise LabError(
                f"--ray {address}: no cluster answers there. Ray said: {error}"
            ) from error
        self.task = ray.remote(num_cpus=1)(_work_on_ray)

    def submit(self, _: Callable, run: Run, workers: int) -> Future:
        return self.task.remote(run, workers).future()

    def shutdown(self, **_: bool) -> None:
        import ray

        ray.shutdown()  # which ends this program's tasks on a cluster too


def _work_on_ray(run: Run, workers: int) -> tuple[dict, dict]:
    _start_worker()
    return setting_of(run.block, workers), do_run(run)


def work(
    plan: dict[str, Block],
    folder: Path,
    console: Console,
    *,
    only: Sequence[str] = (),
    methods: Sequence[str] = (),
    minutes: float = float("inf"),
    workers: int = 2,
    ray: str = "",
) -> bool:
    """Do what is missing of a plan, as long as there is time; say whether all of it is done.

    Args:
        folder: where the records are, and where each run's is added as it ends.
        only, methods: names of blocks and of methods to work at; all, where none is named.
        minutes: start no run that would not end within them, going by the median of its block.
        workers: how many runs at once.
        ray: "local" or the address of a Ray cluster, which then does them (`RayPool`).
    """
    _check_names("block", only, list(plan))
    _check_names("method", methods, sorted({m for block in plan.values() for m in block.methods}))
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
    before = read_all(plan, folder)[0]
    seconds = {block.name: _seconds(before[block.name]) for block in blocks}

    def fits(run: Run) -> bool:
        known = seconds[run.block.name]
        expected = 1.3 * float(np.median(known)) if known else 0.0
        return time.monotonic() - start + expected < 60 * minutes

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the workers load torch
    running: dict[Future, Run] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    if ray:
        pool = RayPool(ray, workers)
    else:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
    try:
        with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
            bar = progress.add_task("", total=None)
            done = 0
            while True:
                runs, later = left()
                busy = {run.key for run in running.values()}
                free = [run for run in runs if run.key not in busy and fits(run)]
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
                    checkpoints = _scratch(run)
                    if checkpoints:
                        shutil.rmtree(checkpoints, ignore_errors=True)
                    seconds[run.block.name] += _seconds([record])
                    done += 1
                    progress.update(bar, completed=done)
    finally:
        pool.shutdown(cancel_futures=True)


def _check_names(kind: str, asked: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise LabError(f"no {kind} {unknown[0]!r} in the plan: it has {', '.join(known)}")


def _seconds(records: list[dict]) -> list[float]:
    return [record["seconds"] for record in records if "seconds" in record]


def status_table(plan: dict[str, Block], folder: Path, only: Sequence[str] = ()) -> Table:
    """For each block, or those named, the runs that are done and those known to be missing, with
    the minutes on one core that these take, going by the median of those that are done."""
    records = read_all(plan, folder)[0]
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("block", "done", "missing", "minutes on one core"):
        table.add_column(column, justify="left" if column == "block" else "right")
    for name, block in plan.items():
        if only and name not in only:
            continue
        todo, later = missing(plan, block, records)
        left = len(todo) + later
        seconds = _seconds(records[name])
        minutes = f"{left * np.median(seconds) / 60:.0f}" if seconds else "?"
        table.add_row(name, str(len(records[name])), str(left), minutes)
    return table
