"""Training: it learns, repeats, and goes on where it stopped as if it had not."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict

from rlora_lab.models.bases import load_base
from rlora_lab.models.methods import adapt
from rlora_lab.runs.training import train
from rlora_lab.tasks.strings import Synthetic

SUITE = Synthetic(["largest", "repeat last"])


def fresh(method: str):
    return adapt(method, load_base("tiny"), SUITE, seed=3)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("method", ["lora", "rlora"])
def test_a_stopped_training_goes_on(method: str, tmp_path: Path):
    whole = fresh(method)
    loss = train(whole, SUITE, steps=12, batch=8, seed=3)

    def stop(step: int) -> None:
        if step == 8:
            raise Stopped

    options = {"steps": 12, "batch": 8, "seed": 3, "folder": tmp_path, "save_steps": 3}
    with pytest.raises(Stopped):
        train(fresh(method), SUITE, on_step=stop, **options)
    # a checkpoint that was being written when the run was stopped is passed over
    (tmp_path / "checkpoint-9").mkdir()
    steps, resumed = [], fresh(method)
    assert train(resumed, SUITE, on_step=steps.append, **options) == loss
    assert steps == list(range(7, 13))
    a, b = get_peft_model_state_dict(whole), get_peft_model_state_dict(resumed)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_training_learns_and_keeps_the_base():
    model = fresh("rlora")
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = SUITE.score(model, "validation")
    loss = train(model, SUITE, steps=40, batch=32, seed=0)
    after = SUITE.score(model, "validation")
    assert loss[-1] < loss[0] / 2
    assert all(after[task]["letters"] > before[task]["letters"] + 0.1 for task in SUITE.tasks)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert not model.training


def test_seeds_decide_the_examples():
    losses = [train(fresh("rlora"), SUITE, steps=2, batch=8, seed=s) for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
