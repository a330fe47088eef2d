"""The cells of 13_choosing_the_randomness.ipynb that others use.

Written by `make execute` from the cells tagged `export`: change them there.
"""

import numpy as np
import optuna
from optuna.trial import TrialState
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from rlora_lab.models.bases import load_base
from rlora_lab.runs.training import train
from rlora_lab.tasks.strings import Synthetic
from rlora_min import RLoraConfig

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
PLACEMENTS = {"attention": ATTENTION, "mlp": MLP, "both": ATTENTION + MLP}
DEFAULTS = {
    "placement": "mlp",
    "num_heads": 3,
    "r": 4,
    "learning_rate": 4e-3,
    "gamma": 64.0,
    "dropout": 0.1,
}
# Sums of d_in and of d_out over the layers of a placement in `tiny`.
WIDTHS = {"attention": (512, 512), "mlp": (640, 896), "both": (1152, 1408)}


def size(placement, N, r):
    """Trained numbers: A, heads and router of every layer."""
    d_in, d_out = WIDTHS[placement]
    return r * d_in + N * r * d_out + N * d_in


LARGEST = size("mlp", N=3, r=4)  # no trial may be larger than the defaults


def suggest(trial):
    """Settings for a trial; the rank stays within what the defaults train."""
    placement = trial.suggest_categorical("placement", list(PLACEMENTS))
    N = trial.suggest_int("num_heads", 2, 5)
    highest = max(r for r in range(1, 11) if size(placement, N, r) <= LARGEST)
    return {
        "placement": placement,
        "num_heads": N,
        "r": trial.suggest_int("r", 1, highest),
        "learning_rate": trial.suggest_float("learning_rate", 1e-3, 2e-2, log=True),
        "gamma": trial.suggest_float("gamma", 8, 512, log=True),
        "dropout": trial.suggest_float("dropout", 0.0, 0.5),
        "placebo": trial.suggest_float("placebo", 0.0, 1.0),  # changes nothing
    }


def lora_size(placement, r):
    """Trained numbers of plain LoRA: A and one B of every layer."""
    return r * sum(WIDTHS[placement])


def suggest_lora(trial):
    """For plain LoRA: alpha in the place of gamma, by as large a factor."""
    placement = trial.suggest_categorical("placement", list(PLACEMENTS))
    highest = LARGEST // lora_size(placement, r=1)
    return {
        "placement": placement,
        "r": trial.suggest_int("r", 1, highest),
        "learning_rate": trial.suggest_float("learning_rate", 1e-3, 2e-2, log=True),
        "lora_alpha": trial.suggest_float("lora_alpha", 4, 256, log=True),
        "dropout": trial.suggest_float("dropout", 0.0, 0.5),
    }


def adapter(settings, seed):
    """R-LoRA's configuration, or plain LoRA's where the settings have no gamma."""
    placed = {"target_modules": PLACEMENTS[settings["placement"]]}
    shared = placed | {"r": settings["r"], "lora_dropout": settings["dropout"]}
    if "gamma" not in settings:
        alpha = settings["lora_alpha"]
        return LoraConfig(lora_alpha=alpha, use_rslora=True, **shared)
    own = {"num_heads": settings["num_heads"], "gamma": settings["gamma"]}
    return RLoraConfig(init_seed=seed, **own, **shared)


def train_with(settings, seed, steps, look=None):
    """An adapter on the ten tasks; `look(model, step)` is called after each step."""
    set_seed(seed)
    model = get_peft_model(load_base("tiny").model, adapter(settings, seed))
    on_step = None if look is None else lambda step: look(model, step)
    lr = settings["learning_rate"]
    train(model, Synthetic(), steps=steps, lr=lr, seed=seed, on_step=on_step)
    return model


def letters(model):
    """Letters right on validation data, a mean over the tasks."""
    scores = Synthetic().score(model, "validation", size=100).values()
    return float(np.mean([score["letters"] for score in scores]))


def objective(trial, seed, steps, every, suggest=suggest):
    """The value of a trial; a trial that lies behind is pruned on the way."""

    def look(model, step):
        if step % every == 0 and step < steps:
            trial.report(letters(model), step)
            if trial.should_prune():
                raise optuna.TrialPruned

    return letters(train_with(suggest(trial), seed, steps, look))


def finished(study):
    """The trials that have a result: run to their end, or pruned."""
    return study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))


def search(storage, trials, objective, startup=12):
    """Bring a stored study up to so many finished trials; it may be stopped."""
    study = optuna.create_study(
        study_name="rlora",
        storage=storage,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=startup // 2),
        load_if_exists=True,
    )
    # Those that a worker left when it was killed.
    for left in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(left.number, state=TrialState.FAIL)
    while (done := len(finished(study))) < trials:
        # A seed for each: a sampler seeded once would repeat its draws after a stop.
        sampler = optuna.samplers.TPESampler(seed=done, n_startup_trials=startup)
        study.sampler = sampler
        study.optimize(lambda trial, seed=done: objective(trial, seed), n_trials=1)
    return study
