"""`python -m rlora_lab.runs.scarce`: LoRA and R-LoRA of equal size on five string tasks that
have from 5,000 down to 20 training examples. Chapter 14 shows the record, and has the
functions of training.

For each method a learning rate is chosen on validation data with seeds of its own, at the middle
temperature. Then both run at every temperature on the same fresh seeds: for one seed they see the
same examples in the same order. Each run is scored on test data twice: at its end, and at the look
where the worst task was best on validation data. After that R-LoRA learns scarce tasks alone, with
augmentations that fit or do not, and from the adapters of other tasks.

A run that was stopped goes on where it stopped: what is done is in the JSON file of the result.
"""

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from ..chapters.ch14_scarce_tasks import (
    SIZES,
    Skewed,
    alone,
    best_look,
    rename,
    right,
    shuffle,
    train_skewed,
)
from ..errors import LabError
from ..models.bases import load_base
from ..models.methods import adapt, count_trainable
from ..tasks.strings import Synthetic
from .record import environment, write_result

TEMPERATURES = {"1": 1.0, "3": 3.0, "inf": math.inf}
METHODS = ("lora", "rlora")
RATES = (0.003, 0.005, 0.008)
SWEEP_SEEDS = (100, 101)
# Of the tasks alone: examples, and for a start the tasks that lend their adapters.
ALONE_SEEDS = 4
AUGMENTATIONS = {"as they are": None, "rename": rename, "shuffle": shuffle}
AUGMENTED = ("rotate 2", 20)
FRESH = "a fresh adapter"
STARTED = {
    ("rotate 3", 40): ("rotate 2", "mirror"),
    ("running min", 20): ("largest", "rotate back"),
}


def run(method: str, T: float, lr: float, seed: int, steps: int, test: bool) -> dict:
    """Train and score one adapter."""
    suite = Skewed(SIZES, T, seed=seed)
    model = adapt(method, load_base("tiny"), suite, seed=seed)
    start = time.monotonic()
    looks = train_skewed(model, suite, steps, lr, seed, every=steps // 5)
    record = {
        "seed": seed,
        "learning_rate": lr,
        "adapter_parameters": count_trainable(model)[0],
        "seconds": round(time.monotonic() - start, 1),
        "looks": [[step, {t: round(v, 4) for t, v in scores.items()}] for step, scores, _ in looks],
    }
    if test:
        record["test"] = suite.score(model.eval(), "test")
        step, _, adapter = best_look(looks)
        set_peft_model_state_dict(model, adapter)
        record |= {"stopped": step, "test_stopped": suite.score(model, "test")}
    return record


def earlier(out: Path, config: dict) -> list[dict]:
    """The runs that are in the file of the result already."""
    if not out.exists():
        return []
    try:
        before = json.loads(out.read_text())
        known, records = before["config"], before["records"]
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{out.name} is no result of this command: choose another --out") from error
    if known != config:
        raise LabError(f"{out.name} holds runs of another config: choose another --out")
    return records


def record_scarce(out: Path, seeds: int, steps: int, say: Callable = print) -> dict:
    """Choose the rates, run both methods, and keep the result in `out` after every run."""
    config = {
        "base": "tiny",
        "suite": "synthetic",
        "steps": steps,
        "batch": 48,
        "sizes": SIZES,
        "temperatures": list(TEMPERATURES),
        "rates": list(RATES),
        "sweep_seeds": list(SWEEP_SEEDS),
        "sweep_temperature": "3",
    }
    options = {"seeds": (seeds, 6), "steps": (steps, 200)}
    changed = [f"--{name} {value}" for name, (value, usual) in options.items() if value != usual]
    names = [f"{method} T={T}" for T in TEMPERATURES for method in METHODS]
    records = earlier(out, config)
    result = {
        "command": " ".join(["python -m rlora_lab.runs.scarce", *changed]),
        **environment(),
        "config": config,
        "tasks": list(SIZES),
        "metrics": list(Synthetic.metrics),
        "methods": names,
        "seeds": list(range(seeds)),
        "chosen": {},
        "complete": False,
        "records": records,
    }
    write_result(out, result)  # from now on no other run may use the file

    def once(make: Callable[[], dict], **head) -> dict:
        for record in records:
            if head.items() <= record.items():
                return record
        records.append(head | make())
        write_result(out, result)
        say(", ".join(map(str, head.values())))
        return records[-1]

    def trained(stage: str, method: str, T: str, lr: float, seed: int) -> dict:
        def make() -> dict:
            return run(method, TEMPERATURES[T], lr, seed, steps, stage == "test")

        return once(make, stage=stage, method=f"{method} T={T}", learning_rate=lr, seed=seed)

    for method in METHODS:
        means = {
            lr: np.mean(
                [
                    list(trained("sweep", method, "3", lr, seed)["looks"][-1][1].values())
                    for seed in SWEEP_SEEDS
                ]
            )
            for lr in RATES
        }
        for T in TEMPERATURES:
            result["chosen"][f"{method} T={T}"] = max(means, key=means.get)
    for seed in range(seeds):
        for T in TEMPERATURES:
            for method in METHODS:
                trained("test", method, T, result["chosen"][f"{method} T={T}"], seed)
    for head in tasks_alone():
        once(functools.partial(run_alone, **head), **head)
    result["complete"] = True
    write_result(out, result)
    return result


@functools.cache
def lender(task: str) -> dict:
    """An adapter that learned a task from 5,000 examples."""
    return get_peft_model_state_dict(alone(task, 5000, SWEEP_SEEDS[0]))


def tasks_alone() -> list[dict]:
    """The heads of the records of scarce tasks alone."""
    ways = {("augment", *AUGMENTED): AUGMENTATIONS}
    ways |= {("start", *task): (FRESH, *lenders) for task, lenders in STARTED.items()}
    return [
        {"stage": stage, "method": method, "task": task, "n": n, "seed": seed}
        for (stage, task, n), methods in ways.items()
        for seed in range(ALONE_SEEDS)
        for method in methods
    ]


def run_alone(stage: str, method: str, task: str, n: int, seed: int) -> dict:
    how = {"lr": 5e-3}
    if stage == "augment":
        how["augment"] = AUGMENTATIONS[method]
    elif method != FRESH:
        how["start"] = lender(method)
    model = alone(task, n, seed, **how)
    return {
        "learning_rate": how["lr"],
        "letters": right(model, Synthetic([task]), "test", 500)[task],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rlora_lab.runs.scarce", description=__doc__)
    parser.add_argument("--seeds", type=int, default=6, help="seeds of every method (6)")
    parser.add_argument("--steps", type=int, default=200, help="training steps of a run (200)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/scarce-tiny.json"), help="the result"
    )
    options = parser.parse_args()
    for name in ("seeds", "steps"):
        if getattr(options, name) < (low := {"seeds": 2, "steps": 5}[name]):
            parser.error(f"--{name} must be at least {low}, got {getattr(options, name)}")
    torch.set_num_threads(1)
    try:
        record_scarce(options.out, options.seeds, options.steps)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
