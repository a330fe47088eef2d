"""Tools that work by hooks and by wrapping: output, gradients and a step equal the plain layer's.

A part that has something around it is called as a module; with nothing around them the parts are
packed into two products. What is seen here is that tools reach every part, and that the layer
computes the same with and without them.
"""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from one_step import adapter_of, assert_same_step, case, far, loss_of, one_step
from peft import LoraConfig, get_peft_model
from rlora_helpers import KINDS, layers_of, output
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune

PARTS = ("rlora_A", "rlora_B", "rlora_router", "rlora_A0", "rlora_B0")
METHODS = ("rlora", "mlora", "hydralora")


def parts_of(model: nn.Module) -> list[nn.Linear]:
    found = []
    for layer in layers_of(model):
        found += [part for name in PARTS for part in getattr(layer, name).values()]
    return found


# Hooks


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("name", PARTS)
def test_what_a_hook_returns_is_used(name):
    # A part's output doubled by a hook is that of a part with twice the weight.
    model, inputs = case()
    twice = copy.deepcopy(model)
    for layer in layers_of(twice):
        for part in getattr(layer, name).values():
            part.weight.data *= 2
    handles = []
    for layer in layers_of(model):
        for part in getattr(layer, name).values():
            handles.append(part.register_forward_hook(lambda part, args, out: 2 * out))
    plain, hooked = output(twice, inputs), output(model, inputs)
    assert far(hooked, plain) < 1e-9
    for handle in handles:
        handle.remove()
    assert far(output(model, inputs), plain) > 1e-3  # the hooks did something, and are gone


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


def test_a_forward_that_was_put_into_a_part_is_called():
    model, inputs = case()
    plain = one_step(copy.deepcopy(model), inputs)
    seen = []
    for part in parts_of(model):

        def forward(x, part=part):
            seen.append(part)
            return nn.Linear.forward(part, x)

        part.forward = forward
    assert_same_step(one_step(model, inputs), plain)
    assert set(seen) == set(parts_of(model))


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_part_that_was_replaced_is_called(name, bias):
    # By a linear layer with a bias, and by a module of another kind.
    model, inputs = case()
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    for layer, twin in zip(layers_of(other), layers_of(plain), strict=True):
        old = getattr(layer, name)["default"]
        new = nn.Linear(old.in_features, old.out_features, dtype=torch.float64)
        new.weight.data.copy_(old.weight)
        getattr(layer, name)["default"] = new if bias else nn.Sequential(new)
        shift = new.bias.detach()
        part = getattr(twin, name)["default"]
        part.register_forward_hook(lambda part, args, out, shift=shift: out + shift)
    found = output(other, inputs)
    assert far(found, output(plain, inputs)) < 1e-9
    assert far(found, output(model, inputs)) > 1e-3


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


def adapted(method: str) -> nn.Module:
    """Of vectors, so that a gradient can be asked of the input; "lora" is PEFT's own."""
    if method == "lora":
        config = LoraConfig(target_modules=["0", "2"], init_lora_weights=False)
        return get_peft_model(KINDS["sequential"].base(), config).double().train()
    model, _ = case(method, "sequential")
    return model.train()


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("method", ["lora", *METHODS])
def test_offloaded(method, where, tmp_path):
    model = adapted(method)
    plain = copy.deepcopy(model)
    x = KINDS["sequential"].inputs(dtype=torch.float64).requires_grad_()
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    one, other = model(x), plain(x)
    assert far(one, other) < 1e-9
    # Weights that are away have no gradient, with LoRA neither; what flows through them is right.
    gradients = [torch.autograd.grad(loss_of(out), x)[0] for out in (one, other)]
    assert far(*gradients) < 1e-9
    assert all(p.is_meta and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_trained_after_the_weights_came_back(method):
    model, inputs = case(method, "sequential")
    plain = copy.deepcopy(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    cpu_offload(model, execution_device=torch.device("cpu"))
    model(inputs)
    remove_hook_from_submodules(model)
    with torch.no_grad():
        for name, p in weights.items():
            module, _, own = name.rpartition(".")
            trained = model.get_parameter(name).requires_grad
            setattr(model.get_submodule(module), own, nn.Parameter(p, requires_grad=trained))
    assert_same_step(one_step(model, inputs), one_step(plain, inputs))


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("method", ["lora", "mlora"])
def test_merged_while_offloaded(method, safe, where, tmp_path):
    model = adapted(method).eval()
    x = KINDS["sequential"].inputs(dtype=torch.float64)
    expected = model(x)
    with model.disable_adapter():
        base = model(x)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    model.merge_adapter(safe_merge=safe)
    assert far(model(x), expected) < 1e-9
    model.unmerge_adapter()
    assert far(model(x), expected) < 1e-9
    with model.disable_adapter():
        assert far(model(x), base) < 1e-9
    assert far(model.merge_and_unload(safe_merge=safe)(x), expected) < 1e-9


# Pruning and parametrizations


@pytest.mark.parametrize("method", METHODS)
def test_pruned(method):
    model, inputs = case(method)
    plain = copy.deepcopy(model)
    for part, twin in zip(parts_of(model), parts_of(plain), strict=True):
        if part.weight.requires_grad:
            prune.l1_unstructured(part, "weight", amount=0.5)
            twin.weight.data *= part.weight_mask
            twin.weight.register_hook(lambda gradient, mask=part.weight_mask: gradient * mask)
    found, expected = one_step(model, inputs), one_step(plain, inputs)
    for step in (found, expected):
        for group in (step.gradients, step.moved):
            for name in list(group):
                group[name.removesuffix("_orig")] = group.pop(name)
    assert_same_step(found, expected)
    for part in parts_of(model):
        if part.weight.requires_grad:
            assert (part.weight[part.weight_mask == 0] == 0).all()
            assert 0 < part.weight_mask.mean() < 1


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("name", PARTS)
def test_parametrized(name):
    model, inputs = case()
    plain = copy.deepcopy(model)
    for layer, twin in zip(layers_of(model), layers_of(plain), strict=True):
        getattr(twin, name)["default"].weight.data *= 2
        parametrize.register_parametrization(getattr(layer, name)["default"], "weight", Twice())
    key = f".{name}.default."
    found, expected = one_step(model, inputs), one_step(plain, inputs)
    for group in (found.gradients, found.moved):
        for old in list(group):
            factor = 0.5 if key in old else 1  # the weight below the factor gets twice as much
            new = old.replace("parametrizations.weight.original", "weight")
            group[new] = factor * group.pop(old)
    assert_same_step(found, expected)


def test_weight_norm():
    model, inputs = case()
    plain = one_step(copy.deepcopy(model), inputs)
    for layer in layers_of(model):
        parametrizations.weight_norm(layer.rlora_B["default"])
    out = output(model, inputs)
    assert far(out, plain.output) < 1e-9
    loss_of(out).backward()
    for name, p in adapter_of(model).items():
        if "original" in name:
            assert p.grad.abs().max() > 0, name
        elif p.requires_grad:
            assert far(p.grad, plain.gradients[name]) < 1e-9, name
