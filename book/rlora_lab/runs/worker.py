"""Works a plan off, run by run and with several processes, and keeps each run's record.

Runs are done in workers, and only they load torch.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import LabError
from .plan import Block, Run, missing, read_all
from .record import add_record


def _start_worker() -> None:
    import torch

    torch.set_num_threads(1)


def _scratch(run: Run) -> Path | None:
    # Checkpoints only where a run takes minutes, and where nothing is looked at on the way, which
    # a run that goes on would lack.
    if run.block.base == "tiny" or run.is_looked_at:
        return None
    chosen = "".join(f"-{name}{value}" for name, value in run.tuned)
    name = f"{run.block.name}-{run.stage}-{run.method}-lr{run.learning_rate}{chosen}-seed{run.seed}"
    return Path("runs") / "checkpoints" / name


def _work(run: Run, workers: int, keep: bool = True) -> tuple[dict, dict]:
    """The run's setting and record; `keep` leaves checkpoints to go on from."""
    from .one_run import do_run, setting_of

    return setting_of(run.block, workers), do_run(run, _scratch(run) if keep else None)


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
    return _work(run, workers, keep=False)


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
