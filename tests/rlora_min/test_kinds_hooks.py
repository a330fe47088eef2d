"""Tools that work by hooks and by wrapping: output, gradients and a step equal the plain layer's.

A part that has something around it is called as a module; with nothing around them the parts are
packed into two products. What is seen here is that tools reach every part, and that the layer
computes the same with and without them.
"""

import copy
from functools import partial

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from one_step import PARTS, TRIED, assert_same_step, case, far, loss_of, one_step, parts_of
from rlora_helpers import gradients_of, layers_of, output
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

# Hooks


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("method", TRIED)
def test_hooks_on_the_parts_see_every_call_and_change_nothing(method):
    model, inputs = case(method)
    plain = one_step(copy.deepcopy(model), inputs)
    seen = {"forward": [], "pre": [], "backward": []}
    for part in parts_of(model):
        part.register_forward_hook(lambda part, *_: seen["forward"].append(part))
        part.register_forward_pre_hook(lambda part, *_: seen["pre"].append(part))
        part.register_full_backward_hook(lambda part, *_: seen["backward"].append(part))
    assert_same_step(one_step(model, inputs), plain)
    once = sorted(map(id, parts_of(model)))
    assert sorted(map(id, seen["forward"])) == sorted(map(id, seen["pre"])) == once
    # The pair of the first layers has nothing behind it that trains, so no gradient passes there.
    trained = [id(part) for part in parts_of(model) if part.weight.requires_grad]
    backward = list(map(id, seen["backward"]))
    assert set(trained) <= set(backward) <= set(once) and len(set(backward)) == len(backward)


def test_a_hook_on_every_module_sees_the_parts():
    model, inputs = case()
    plain = one_step(copy.deepcopy(model), inputs)
    seen = set()
    handle = register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        assert_same_step(one_step(model, inputs), plain)
    finally:
        handle.remove()
    assert seen >= set(parts_of(model))


# What tools do to a part: here each doubles what it gives.


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def hooked(part: nn.Linear, parts: nn.ModuleDict) -> None:
    part.register_forward_hook(lambda part, args, out: 2 * out)


def put_into(part: nn.Linear, parts: nn.ModuleDict) -> None:
    part.forward = lambda x: 2 * nn.Linear.forward(part, x)


def replaced(part: nn.Linear, parts: nn.ModuleDict) -> None:
    parts["default"] = nn.Sequential(part, Twice())


def parametrized(part: nn.Linear, parts: nn.ModuleDict) -> None:
    parametrize.register_parametrization(part, "weight", Twice())


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("tool", [hooked, put_into, replaced, parametrized])
def test_a_part_that_a_tool_doubled_is_the_part_with_twice_the_weight(tool, name):
    model, x = case(kind="sequential")
    x.requires_grad_()
    before, plain = model(x), copy.deepcopy(model)
    for layer, twin in zip(layers_of(model), layers_of(plain), strict=True):
        parts = getattr(layer, name)
        tool(parts["default"], parts)
        getattr(twin, name)["default"].weight.data *= 2
    outputs = found, expected = model(x), plain(x)
    assert far(found, expected) < 1e-9 and far(found, before) > 1e-3
    gradients = [torch.autograd.grad(loss_of(out), x, retain_graph=True)[0] for out in outputs]
    assert far(*gradients) < 1e-9
    loss_of(found).backward()
    assert all(gradient.any() for gradient in gradients_of(model).values())


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_got_a_bias_has_it(name):
    model, inputs = case()
    before, plain = output(model, inputs), copy.deepcopy(model)
    for layer, twin in zip(layers_of(model), layers_of(plain), strict=True):
        part = getattr(layer, name)["default"]
        part.bias = nn.Parameter(torch.randn(part.out_features, dtype=torch.float64))
        added = partial(lambda _, args, out, bias: out + bias, bias=part.bias)
        getattr(twin, name)["default"].register_forward_hook(added)
    found = output(model, inputs)
    assert far(found, output(plain, inputs)) < 1e-9 and far(found, before) > 1e-3


# The dropout, which is a module too


@pytest.mark.parametrize("on", ["heads", "input"])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_a_hook_on_the_dropout_is_seen_in_every_mode(on, p, training):
    # As PEFT's LoRA calls its own.
    model, inputs = case(lora_dropout=p, dropout_on=on)
    model.train(training)
    for layer in layers_of(model):
        layer.rlora_dropout["default"].register_forward_hook(lambda module, args, out: 0 * args[0])
    found = output(model, inputs)
    for layer in layers_of(model):
        layer.rlora_A["default"].weight.data.zero_()
    assert far(found, output(model, inputs)) < 1e-9


def test_dropout_that_stays_on_in_evaluation():
    model, inputs = case(lora_dropout=0.5)
    for layer in layers_of(model):
        layer.rlora_dropout["default"].forward = lambda x: nn.functional.dropout(x, 0.5, True)
    model.eval()
    assert far(output(model, inputs), output(model, inputs)) > 1e-3


# Offloading


def offload(model: nn.Module, where: str, folder) -> None:
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, folder, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("method", TRIED)
def test_offloaded(method, where, tmp_path):
    model, x = case(method, "sequential")
    x.requires_grad_()
    plain = copy.deepcopy(model.train())
    offload(model, where, tmp_path)
    outputs = model(x), plain(x)
    assert far(*outputs) < 1e-9
    # Weights that are away have no gradient, with LoRA neither; what flows through them is right.
    gradients = [torch.autograd.grad(loss_of(out), x)[0] for out in outputs]
    assert far(*gradients) < 1e-9
    assert all(p.is_meta and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("safe", [False, True])
def test_merged_while_offloaded(safe, where, tmp_path):
    model, x = case("mlora", "sequential")
    expected = model.eval()(x)
    with model.disable_adapter():
        base = model(x)
    offload(model, where, tmp_path)
    model.merge_adapter(safe_merge=safe)
    assert far(model(x), expected) < 1e-9
    model.unmerge_adapter()
    assert far(model(x), expected) < 1e-9
    with model.disable_adapter():
        assert far(model(x), base) < 1e-9
    assert far(model.merge_and_unload(safe_merge=safe)(x), expected) < 1e-9
