"""One training step as a comparison: what a tool does to a model, and the plain layer beside it."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from rlora_helpers import KINDS, METHODS, adapt, layers_of, output, perturb
from torch import Tensor, nn

LR = 1.0  # of plain gradient descent
TRIED = ("rlora", "mlora", "hydralora")  # with the pair, without a router, masked before A
PARTS = ("rlora_A", "rlora_B", "rlora_router", "rlora_A0", "rlora_B0")
# Weights so wide that every part of the adapter gets a gradient well above rounding.
WIDE = {"llama": {"initializer_range": 0.4}}
# The same step by transformers' Trainer, and by those made from it.
TRAINER = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "optim": "sgd",
    "learning_rate": LR,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
# What tools put into the names of a model's parameters.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "_module.")


@dataclass
class Step:
    """What a step was, by the names that the plain model has."""

    output: Tensor
    gradients: dict[str, Tensor]  # of what trains in the adapter
    moved: dict[str, Tensor]  # after less before: the whole adapter, the side pair included


def plain_name(name: str) -> str:
    name = name.removeprefix("module.")  # of DDP and DeepSpeed
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def trains(name: str) -> bool:
    """Whether it is trained, as all of an adapter is but the side pair."""
    return ".rlora_A0." not in name and ".rlora_B0." not in name


def adapter_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the adapter, the side pair included."""
    named = {plain_name(name): p for name, p in model.named_parameters()}
    return {name: p for name, p in named.items() if "rlora_" in name}


def parts_of(model: nn.Module) -> list[nn.Module]:
    """The linear maps of its adapters."""
    found = []
    for layer in layers_of(model):
        found += [part for name in PARTS for part in getattr(layer, name).values()]
    return found


def case(method: str = "rlora", kind: str = "llama", dtype=torch.float64, **settings):
    """A small model with an adapter off its start and no dropout, and a batch for it.

    In float64, so that rounding hides nothing, where a tool allows it.
    """
    base = KINDS[kind].base(**WIDE.get(kind, {})).to(dtype)
    settings = {"init_seed": 0} | METHODS[method] | {"lora_dropout": 0.0} | settings
    model = perturb(adapt(base, KINDS[kind].targets, **settings))
    return model, KINDS[kind].inputs(batch=4, dtype=dtype)


def without_dropout(model: nn.Module) -> nn.Module:
    """The model, its own dropout and the base's switched off in training too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def replaced(model: nn.Module, kind: type, make: Callable) -> nn.Module:
    """The model with the base's projections of this kind made anew."""
    for path, module in list(model.named_modules()):
        if type(module) is kind and "proj" in path and "rlora" not in path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, make(module))
    return model


def loss_of(out: Tensor) -> Tensor:
    return out.square().mean()


def one_step(model: nn.Module, inputs, run: Callable = output, loss: Callable = loss_of) -> Step:
    """Trains the model by one step."""
    model.train()
    adapter = adapter_of(model)
    before = {name: p.detach().clone() for name, p in adapter.items()}
    trained = {name: p for name, p in adapter.items() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=LR)
    out = run(model, inputs)
    loss(out).backward()
    gradients = {name: p.grad.detach().clone() for name, p in trained.items()}
    optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in adapter.items()}
    return Step(out.detach(), gradients, moved)


def far(one: Tensor, other: Tensor) -> float:
    """How far apart, in units of the other's length."""
    difference = one.detach().double() - other.detach().double()
    return (difference.norm() / other.detach().double().norm()).item()


def assert_same_step(found: Step, plain: Step, bound: float = 1e-9) -> None:
    """Output, gradients and what moved agree; the step moved all that trains, and not the pair."""
    assert found.gradients.keys() == plain.gradients.keys() and plain.gradients
    assert found.moved.keys() == plain.moved.keys() >= plain.gradients.keys()
    assert far(found.output, plain.output) < bound
    for name, gradient in plain.gradients.items():
        assert far(found.gradients[name], gradient) < bound, name
        assert far(found.moved[name], plain.moved[name]) < bound, name
    for name in plain.moved.keys() - plain.gradients.keys():
        assert found.moved[name].abs().max() == 0 == plain.moved[name].abs().max(), name


@torch.no_grad()
def assert_merging_is_refused(model: nn.Module, inputs, **how) -> None:
    """Before anything was changed."""
    before = output(model, inputs)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="can't be merged into: export_lora"):
            merge(**how)
        assert not any(layer.merged for layer in layers_of(model))
    assert output(model, inputs).equal(before)
