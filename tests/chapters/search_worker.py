"""A search without training, and a process that is in the middle of one until it is killed."""

import sys
import time

import numpy as np
import optuna

from rlora_lab.chapters.ch13_choosing_the_randomness import search, suggest


def fake(trial: optuna.Trial, seed: int, suggest=suggest) -> float:
    """As good as its rate is close to 0.005, and a little luck."""
    settings = suggest(trial)
    value = -abs(np.log(settings["learning_rate"] / 0.005))
    for step in (1, 2):
        trial.report(value, step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return value + 0.01 * np.random.default_rng(seed).standard_normal()


def stuck(trial: optuna.Trial, seed: int) -> float:
    """The same, but the trial with seed 9 does not end."""
    if seed == 9:
        suggest(trial)
        print("in the middle", flush=True)
        time.sleep(60)
    return fake(trial, seed)


if __name__ == "__main__":
    search(sys.argv[1], 14, stuck, startup=6)
