"""`python -m rlora_lab.runs.study`: looks for R-LoRA's settings on the string tasks, and then asks
on fresh seeds what was gained. Chapter 13 shows the record, and has the functions of
the search.

The search: Optuna's TPE with a median pruner, one training run a trial, each with its own seed.
No trial trains more numbers than the defaults do. The retest climbs from the defaults to the best
trial in three steps, every rung on the same fresh seeds, so that it can be said which step gained
what. The best trial is run once more on its own seed, the runners-up on one of the fresh ones.

Both parts go on where they were stopped: finished trials are in an SQLite file, finished runs of
the retest in the JSON file of the result.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import torch
from optuna.trial import TrialState

from ..chapters.ch13_choosing_the_randomness import (
    DEFAULTS,
    LARGEST,
    finished,
    letters,
    objective,
    search,
    size,
    train_with,
)
from ..errors import LabError
from ..models.methods import count_trainable
from ..tasks.strings import Synthetic
from .record import environment, write_result


def rungs(best: dict) -> dict[str, dict]:
    """From the defaults to the best trial: the rate, then the shape, then the randomness."""
    rate = DEFAULTS | {"learning_rate": best["learning_rate"]}
    shape = rate | {name: best[name] for name in ("placement", "num_heads", "r")}
    whole = shape | {name: best[name] for name in ("gamma", "dropout")}
    return {"defaults": DEFAULTS, "and its rate": rate, "and its shape": shape, "best": whole}


def trial_record(trial: optuna.trial.FrozenTrial, seed: int) -> dict:
    return {
        "stage": "search",
        "method": "search",
        "trial": trial.number,
        "seed": seed,
        "state": trial.state.name.lower(),
        **trial.params,
        "adapter_parameters": size(*(trial.params[k] for k in ("placement", "num_heads", "r"))),
        "seconds": round(trial.duration.total_seconds(), 1),
        "values": [[step, round(v, 4)] for step, v in trial.intermediate_values.items()],
        "value": trial.value if trial.state == TrialState.COMPLETE else None,
    }


def run_record(stage: str, name: str, settings: dict, seed: int, steps: int) -> dict:
    start = time.monotonic()
    model = train_with(settings, seed, steps)
    seconds = time.monotonic() - start
    return {
        "stage": stage,
        "method": name,
        "seed": seed,
        "learning_rate": settings["learning_rate"],
        "adapter_parameters": count_trainable(model)[0],
        "seconds": round(seconds, 1),
        "value": letters(model),  # what the search saw of its trials
        "test": Synthetic().score(model, "test"),
    }


def earlier(out: Path, config: dict) -> list[dict]:
    """The runs that are in the file of the result already."""
    if not out.exists():
        return []
    try:
        before = json.loads(out.read_text())
        if before["config"] != config:
            raise LabError(f"{out.name} holds a study of another config: choose another --out")
        return [record for record in before["records"] if record["stage"] != "search"]
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{out.name} is no result of this command: choose another --out") from error


def record_study(out: Path, trials: int, steps: int, seeds: int, say: Callable = print) -> dict:
    """Search, retest, and keep the result in `out` after every run."""
    config = {
        "base": "tiny",
        "suite": "synthetic",
        "trials": trials,
        "steps": steps,
        "every": steps // 4,
        "batch": Synthetic.default_batch,
        "lora_alpha": 32,
        "defaults": DEFAULTS,
        "largest": LARGEST,
    }
    options = {"trials": (trials, 40), "steps": (steps, 240), "seeds": (seeds, 8)}
    changed = [f"--{name} {value}" for name, (value, usual) in options.items() if value != usual]
    fresh = list(range(1000, 1000 + seeds))  # no seed of the search is among them
    runs, made = earlier(out, config), environment()
    made["versions"]["optuna"] = optuna.__version__
    result = {
        "command": " ".join(["python -m rlora_lab.runs.study", *changed]),
        **made,
        "config": config,
        "tasks": list(Synthetic().tasks),
        "metrics": list(Synthetic.metrics),
        "seeds": fresh,
        "complete": False,
        "records": runs,
    }
    write_result(out, result)  # from now on no other study may use the file
    study = search(
        f"sqlite:///{out.with_suffix('.db')}",
        trials,
        lambda trial, seed: objective(trial, seed, steps, config["every"]),
    )
    searched = [trial_record(trial, seed) for seed, trial in enumerate(finished(study))]
    ran = sorted(
        (t for t in study.trials if t.state == TrialState.COMPLETE), key=lambda t: -t.value
    )
    ladder = rungs(ran[0].params)
    result |= {
        "methods": list(ladder),
        "settings": ladder,
        "best": {"trial": ran[0].number, "value": ran[0].value},
        "chosen": {name: settings["learning_rate"] for name, settings in ladder.items()},
    }
    wanted = [("retest", name, settings, s) for s in fresh for name, settings in ladder.items()]
    own_seed = next(r["seed"] for r in searched if r["trial"] == ran[0].number)
    wanted.append(("again", "best", ladder["best"], own_seed))
    wanted += [("runner-up", f"trial {t.number}", t.params, fresh[0]) for t in ran[1:5]]
    known = {(run["method"], run["seed"]) for run in runs}
    for stage, name, settings, seed in wanted:
        if (name, seed) not in known:
            runs.append(run_record(stage, name, settings, seed, steps))
            say(f"{name}, seed {seed}: {runs[-1]['value']:.3f}")
            write_result(out, result | {"records": searched + runs})
    result |= {"complete": True, "records": searched + runs}
    write_result(out, result)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rlora_lab.runs.study", description=__doc__)
    parser.add_argument("--trials", type=int, default=40, help="finished trials of the search (40)")
    parser.add_argument("--steps", type=int, default=240, help="training steps of a run (240)")
    parser.add_argument("--seeds", type=int, default=8, help="fresh seeds of the retest (8)")
    parser.add_argument("--out", type=Path, default=Path("runs/study-tiny.json"), help="the result")
    options = parser.parse_args()
    for name in ("trials", "steps", "seeds"):
        if getattr(options, name) < (low := {"trials": 5, "steps": 6, "seeds": 2}[name]):
            parser.error(f"--{name} must be at least {low}, got {getattr(options, name)}")
    torch.set_num_threads(1)
    try:
        record_study(options.out, options.trials, options.steps, options.seeds)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
