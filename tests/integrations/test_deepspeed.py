"""DeepSpeed in bf16, in two processes: a step of ZeRO is that of the plain layer in bf16.

This file is also the script that the two processes run.
"""

import os
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from one_step import (
    LR,
    TRIED,
    WIDE,
    Step,
    adapter_of,
    assert_same_step,
    case,
    far,
    loss_of,
    one_step,
    without_dropout,
)
from rlora_helpers import KINDS, adapt, output, perturb, trained_of
from torch import Tensor, nn
from two_processes import in_shares, run_two, shares, step_of_both

pytestmark = pytest.mark.integrations
BF16 = torch.bfloat16
STAGES = {
    "ZeRO 1": {"stage": 1},
    "ZeRO 2": {"stage": 2},
    "ZeRO 3": {"stage": 3},  # parameters as small as these stay whole
    "ZeRO 3, all cut": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


# What the two processes do


def settings(stage: dict) -> dict:
    return {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,  # DeepSpeed cuts at 1 where nothing is said
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,
    }


def whole(model: nn.Module) -> dict[str, Tensor]:
    """What trains as the optimizer has it, in fp32; the pair as the model has it."""
    found = {}
    for name, p in adapter_of(model).items():
        if p.requires_grad:
            found[name] = safe_get_full_fp32_param(p).clone()
        else:
            with deepspeed.zero.GatheredParameters([p]):
                found[name] = p.detach().clone()
    return found


def engine_of(model: nn.Module, stage: dict) -> deepspeed.DeepSpeedEngine:
    optimizer = torch.optim.SGD(trained_of(model).values(), lr=LR)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage))[0]


def zero_step(model: nn.Module, inputs: dict, stage: dict) -> Step:
    engine = engine_of(model.train(), stage)
    before = whole(engine)
    out = output(engine, shares(inputs)[dist.get_rank()])
    engine.backward(loss_of(out.float()))
    engine.step()
    return step_of_both(out, before, whole(engine))


def made_cut() -> nn.Module:
    """GPT-2, whose Conv1D says its sizes by other names, in parts before it gets an adapter."""
    with deepspeed.zero.Init(config_dict_or_path=settings(STAGES["ZeRO 3, all cut"])):
        base = KINDS["gpt2"].build()
    assert all(p.numel() == 0 for p in base.parameters())
    model = adapt(base, KINDS["gpt2"].targets, init_seed=0)
    return perturb(without_dropout(model), scale=0.05)


def resumed(folder: Path, init_seed: int | None) -> list[Tensor]:
    """Output of a trained model, and of the one that its checkpoint is loaded into.

    As transformers' Trainer saves a PEFT model: DeepSpeed's checkpoint without what is frozen.
    """
    outputs = []
    for run in (0, 1):
        base = KINDS["llama"].base(**WIDE["llama"])
        model = adapt(base, KINDS["llama"].targets, seed=run, init_seed=init_seed)
        engine = engine_of(model.train(), STAGES["ZeRO 2"])
        inputs = KINDS["llama"].inputs(batch=4)
        if run == 0:
            engine.backward(loss_of(output(engine, inputs).float()))
            engine.step()
            engine.save_checkpoint(folder, exclude_frozen_parameters=True)
        else:
            engine.load_checkpoint(folder, load_module_strict=False)
        engine.eval()
        outputs.append(output(engine, inputs).float().detach())
    return outputs


def work(folder: Path) -> None:
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    for method in TRIED:
        for name, stage in STAGES.items():
            model, inputs = case(method, dtype=BF16)
            step = zero_step(model, inputs, stage)
            torch.save(vars(step), folder / f"{method}, {name}, {rank}")
    model = made_cut()
    state = {}
    for name, p in model.named_parameters():
        with deepspeed.zero.GatheredParameters([p]):
            state[name] = p.detach().clone()
    torch.save(state, folder / f"made cut, {rank}, before")
    step = zero_step(model, KINDS["gpt2"].inputs(batch=4), STAGES["ZeRO 3, all cut"])
    torch.save(vars(step), folder / f"made cut, {rank}")
    for init_seed in (0, None):
        outputs = resumed(folder / f"checkpoint {init_seed}", init_seed)
        torch.save(outputs, folder / f"resumed {init_seed}, {rank}")
    dist.barrier()
    os._exit(0)  # DeepSpeed on CPUs now and then aborts as the interpreter ends


if __name__ == "__main__":
    work(Path(sys.argv[1]))


# What they wrote, against one process


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    run_two(Path(__file__), folder, folder=folder, limit=400, DS_ACCELERATOR="cpu")
    return folder


def plain_step(model: nn.Module, inputs: dict, called: bool) -> Step:
    """In bf16; where the parts are called, as ZeRO 3 has it, they round one by one."""
    for p in model.parameters():
        p.data = p.data.to(BF16)
    for name, module in model.named_modules():
        if called and "rlora_" in name and isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: None)
    step = one_step(model, inputs, in_shares, loss=lambda out: loss_of(out.float()))
    # Its own step is rounded to bf16; that of DeepSpeed's optimizer is not.
    step.moved |= {name: -LR * gradient for name, gradient in step.gradients.items()}
    return step


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("method", TRIED)
def test_a_step_is_that_of_one_process(folder, method, name, rank):
    model, inputs = case(method, dtype=BF16)
    cut = STAGES[name]["stage"] == 3
    found = Step(**torch.load(folder / f"{method}, {name}, {rank}"))
    # ZeRO 3 has a linear layer of its own, whose gradients are summed in another order in bf16.
    assert_same_step(found, plain_step(model, inputs, called=cut), bound=0.1 if cut else 1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_base_that_was_made_in_parts(folder, rank):
    model = without_dropout(adapt(KINDS["gpt2"].base(), KINDS["gpt2"].targets, init_seed=0))
    state = torch.load(folder / f"made cut, {rank}, before")
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing == ["base_model.model.lm_head.weight"]  # tied
    expected = plain_step(model, KINDS["gpt2"].inputs(batch=4), called=True)
    found = Step(**torch.load(folder / f"made cut, {rank}"))
    assert_same_step(found, expected, bound=0.1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_is_resumed_if_it_has_a_seed(folder, rank):
    # The pair is frozen and so in no such checkpoint: it is drawn again, and a seed draws the same.
    before, after = torch.load(folder / f"resumed 0, {rank}")
    assert before.equal(after)
    before, after = torch.load(folder / f"resumed None, {rank}")
    assert far(after, before) > 0.01
