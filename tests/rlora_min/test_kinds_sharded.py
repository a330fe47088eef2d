"""Sharded by torch and by accelerate, in two processes: a step equals the plain layer's.

This file is also the script that the two processes run. Each case shards the same small model,
gives each rank half of the batch, takes a step, and brings the adapter together again.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict
from one_step import LR, Step, adapter_of, assert_same_step, case, loss_of, one_step, parts_of
from peft.utils.other import fsdp_auto_wrap_policy
from rlora_helpers import output, trained_of
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from two_processes import in_shares, run_two, shares, step_of_both

BF16, FP32 = torch.bfloat16, torch.float32


# What the two processes do


def units_of(model: nn.Module, parts: bool) -> list[nn.Module]:
    """The blocks; with `parts`, each part of an adapter as well, of whatever dtype."""
    names = model.get_base_model()._no_split_modules
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    return [*parts_of(model), *blocks] if parts else blocks


def by_units(model: nn.Module, parts: bool) -> CustomPolicy:
    """Without `parts` it does not know of adapters; FSDP 1 takes it with original parameters."""
    units = set(units_of(model, parts))
    return CustomPolicy(lambda module: module in units)


def fsdp1(model: nn.Module, original: bool = False, policy=fsdp_auto_wrap_policy) -> nn.Module:
    how = {"use_orig_params": original, "device_id": torch.device("cpu")}
    return FSDP(model, auto_wrap_policy=policy(model), **how)


def fsdp2(model: nn.Module, parts: bool = False, **how) -> nn.Module:
    for unit in units_of(model, parts):
        fully_shard(unit, **how)
    return fully_shard(model, **how)


def loaded_by_accelerate(model: nn.Module) -> nn.Module:
    """Rank 0 has the weights, as with `accelerate launch` by default; the others anything."""
    main = dist.get_rank() == 0
    full = {name: t.clone() if main else t * torch.nan for name, t in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    model = fsdp2(model.to("meta"))
    fsdp2_load_full_state_dict(SimpleNamespace(is_main_process=main), model, full)
    for name, buffer in buffers.items():  # in no state dict, and so put back, as accelerate does
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner).register_buffer(own, buffer, persistent=False)
    return model


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The adapter, brought together."""
    if not isinstance(model, FSDP):
        return {name: p.detach().full_tensor() for name, p in adapter_of(model).items()}
    with FSDP.summon_full_params(model, writeback=False):
        return {name: p.detach().clone() for name, p in adapter_of(model).items()}


def sharded_step(model: nn.Module, share: dict) -> Step:
    """A step of both ranks."""
    before = whole(model.train())
    optimizer = torch.optim.SGD(trained_of(model).values(), lr=LR)
    out = output(model, share)
    loss_of(out).backward()
    optimizer.step()
    return step_of_both(out, before, whole(model))


@dataclass
class Case:
    wrap: Callable[[nn.Module], nn.Module]
    base: torch.dtype = torch.float64
    plain: torch.dtype | None = None  # that all parameters have in the model to compare with


PARTS = partial(by_units, parts=True)
BLOCKS = partial(by_units, parts=False)
ORIGINAL = partial(fsdp1, original=True)
CASES = {
    "FSDP 1, flat": Case(fsdp1),
    "FSDP 1, original": Case(ORIGINAL),
    "FSDP 1, flat, fp32": Case(fsdp1, FP32),
    # PEFT's policy leaves what is frozen in the block's unit: a base in bf16, the pair in fp32.
    "FSDP 1, flat, bf16": Case(partial(fsdp1, policy=PARTS), BF16),
    "FSDP 1, original, bf16": Case(partial(ORIGINAL, policy=PARTS), BF16),
    "FSDP 1, original, blocks": Case(partial(ORIGINAL, policy=BLOCKS)),
    "FSDP 2, blocks": Case(fsdp2),
    "FSDP 2, parts and blocks": Case(partial(fsdp2, parts=True)),
    "FSDP 2, bf16": Case(fsdp2, BF16),
    "FSDP 2, mixed": Case(partial(fsdp2, mp_policy=MixedPrecisionPolicy(BF16)), FP32, plain=BF16),
    "FSDP 2, loaded by accelerate": Case(loaded_by_accelerate),
}


def work(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    for name, each in CASES.items():
        model, inputs = case(dtype=each.base)
        step = sharded_step(each.wrap(model), shares(inputs)[rank])
        torch.save(vars(step), folder / f"{name}, {rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]))


# What they wrote, against one process


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run_two(Path(__file__), folder, folder=folder)
    return folder


def plain_step(each: Case) -> Step:
    model, inputs = case(dtype=each.base)
    for p in model.parameters():
        p.data = p.data.to(each.plain or p.dtype)
    step = one_step(model, inputs, in_shares)
    if each.plain:  # its own step is rounded to that; the weights that are sharded are not
        step.moved |= {name: -LR * gradient for name, gradient in step.gradients.items()}
    return step


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_one_process(folder, name, rank):
    each = CASES[name]
    # The two shares' gradients are summed in another order; in fp32 that shows.
    bound = 1e-9 if each.base == torch.float64 else 1e-3
    found = Step(**torch.load(folder / f"{name}, {rank}"))
    assert_same_step(found, plain_step(each), bound)
