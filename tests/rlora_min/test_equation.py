"""The layer is the equation: against a plain loop over the heads, in float64, to 1e-10."""

import math
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rlora_helpers import (
    STRICT,
    Operations,
    adapt,
    equation,
    layers_of,
    perturb,
    relative,
    tensors_of,
    trained_of,
)
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from rlora_min import RLoraConfig

pytestmark = STRICT
EXACT = 1e-10


def one_layer(d_in=6, d_out=5, conv=False, dtype=torch.float64, perturbed=True, **config):
    """A model of one adapted layer, and the layer."""
    torch.manual_seed(0)
    base = Conv1D(d_out, d_in) if conv else nn.Linear(d_in, d_out)
    nn.init.normal_(base.bias)  # a Conv1D's is zero
    model = adapt(nn.Sequential(base).to(dtype), ["0"], **config)
    return perturb(model) if perturbed else model, layers_of(model)[0]


def drawn(**config):
    """The tensors of a layer as drawn."""
    return tensors_of(one_layer(perturbed=False, **config)[1])


@contextmanager
def known_masks():
    """Dropout as ever, and the masks that it drew (kept numbers as 1 / (1 - p))."""
    masks, real = [], F.dropout

    def dropout(x, p=0.5, training=True, inplace=False):
        if training:
            masks.append(real(torch.ones_like(x), p))
        return x * masks[-1] if training else x

    with mock.patch.object(F, "dropout", dropout):
        yield masks


SIZE = st.integers(1, 5)
CONFIG = st.fixed_dictionaries(
    {
        "r": st.integers(1, 4),
        "num_heads": st.integers(1, 4),
        "lora_alpha": st.sampled_from([1, 8, 32]),
        "lora_dropout": st.sampled_from([0.0, 0.1, 0.6]),
        "use_rslora": st.booleans(),
        "init_heads": st.sampled_from(["random", "centered", "zeros"]),
        "dropout_on": st.sampled_from(["heads", "input"]),
        "router": st.sampled_from(["softmax", "mean"]),
        "router_init": st.just("kaiming"),
    }
)


@given(CONFIG, st.lists(st.integers(1, 3), max_size=3), SIZE, SIZE, st.booleans(), st.booleans())
@settings(max_examples=150, derandomize=True)
def test_forward_and_every_gradient_equal_a_loop_over_the_heads(
    config, tokens, d_in, d_out, conv, training
):
    model, layer = one_layer(d_in, d_out, conv, **config)
    model.train(training)
    config, trained = layer.configs["default"], tensors_of(layer)
    x = torch.randn(*tokens, d_in, dtype=torch.float64, requires_grad=True)
    with known_masks() as masks:
        h = model(x)
    assert len(masks) == (training and config.lora_dropout > 0)
    masked = {}
    if masks and config.dropout_on == "input":
        masked = {"input_mask": masks[0]}
        assert masks[0].shape == x.shape
    elif masks:
        masked = {"head_masks": masks[0]}
        assert masks[0].shape == (*tokens, config.num_heads, config.r)

    clones = {name: t.detach().clone().requires_grad_() for name, t in trained.items()}
    y = x.detach().clone().requires_grad_()
    base = layer.base_layer
    W = base.weight.T if isinstance(base, Conv1D) else base.weight
    expected = y @ W.T + base.bias + equation(y, clones, config, **masked)
    assert h.shape == (*tokens, d_out)
    assert relative(h - expected, expected) < EXACT

    weight = torch.randn_like(h)
    (h * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_close(x.grad, y.grad, rtol=EXACT / 2, atol=EXACT / 2)
    for name in trained.keys() - {"A0", "B0"}:
        assert_close(trained[name].grad, clones[name].grad, rtol=EXACT / 2, atol=EXACT / 2)


def test_several_active_adapters_add_up_each_with_its_own_settings():
    model, layer = one_layer(r=2, num_heads=3)
    second = RLoraConfig(target_modules=["0"], r=3, num_heads=2, router="mean", lora_alpha=5)
    model.add_adapter("second", second)
    perturb(model, "second", seed=7)
    model.base_model.set_adapter(["default", "second"])
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = layer.base_layer(x)
    for name in ("default", "second"):
        expected = expected + equation(x, tensors_of(layer, name), layer.configs[name])
    assert relative(model(x) - expected, expected) < EXACT


@pytest.mark.parametrize("router", ["softmax", "mean"])
@pytest.mark.parametrize("init_heads", ["random", "centered", "zeros"])
@pytest.mark.parametrize("conv", [False, True])
def test_state_is_named_and_shaped_as_promised_and_the_pair_is_frozen(router, init_heads, conv):
    d_in, d_out, r, N = 7, 9, 2, 3
    model, layer = one_layer(
        d_in, d_out, conv, r=r, num_heads=N, router=router, init_heads=init_heads, perturbed=False
    )
    trained = {"rlora_A": (r, d_in), "rlora_B": (d_out, N * r)}
    if router == "softmax":
        trained["rlora_router"] = (N, d_in)
    frozen = {"rlora_A0": (r, d_in), "rlora_B0": (d_out, r)} if init_heads == "random" else {}
    assert all(type(getattr(layer, part)["default"]) is nn.Linear for part in trained | frozen)
    names = {part: f"base_model.model.0.{part}.default.weight" for part in trained | frozen}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "rlora_" in name}
    assert shapes == {names[part]: shape for part, shape in (trained | frozen).items()}
    assert trained_of(model).keys() == {names[part] for part in trained}
    assert not list(model.named_buffers())


def test_the_defaults_are_r_lora():
    written = dict(r=4, num_heads=3, lora_alpha=32, lora_dropout=0.1, use_rslora=True, gamma=64)
    written |= dict(init_heads="random", dropout_on="heads", router="softmax", bias="none")
    written |= dict(router_init="zeros", init_weights=True)
    assert RLoraConfig() == RLoraConfig(**written)


def test_random_heads_are_drawn_as_table_1_says():
    d_in, d_out, r, N, gamma = 200, 300, 8, 4, 16
    t = drawn(d_in=d_in, d_out=d_out, r=r, num_heads=N, gamma=gamma)
    scale = d_out**0.25 / math.sqrt(gamma)
    # 1600 and 9600 numbers: their spread is known to about 2 % and 1 %
    for tensor, std in ((t["A"], scale / d_in**0.5), (t["B"], scale / d_out**0.5)):
        assert tensor.std().item() == pytest.approx(std, rel=0.06)
        assert abs(tensor.mean().item()) < 0.1 * std
        assert tensor.abs().max() > 2.5 * std  # a normal's tails, which a uniform lacks
    assert torch.equal(t["A0"], t["A"])
    mean_head = t["B"].unflatten(1, (N, r)).mean(1)
    assert relative(t["B0"] - mean_head, mean_head) < 1e-6
    assert not t["router"].any()


def test_centered_heads_are_the_random_heads_less_their_mean():
    random, centered = drawn(init_seed=3), drawn(init_seed=3, init_heads="centered")
    assert centered.keys() == {"A", "B", "router"}
    assert torch.equal(centered["A"], random["A"])
    less = random["B"].unflatten(1, (3, 4)) - random["B0"].unsqueeze(1)
    assert relative(centered["B"] - less.flatten(1), less) < 1e-6


def test_zero_heads_start_as_lora_does_and_a_router_as_released():
    """Kaiming-uniform with a = sqrt 5: uniform up to 1 / sqrt(d_in)."""
    t = drawn(d_in=100, init_heads="zeros", router_init="kaiming", r=16, num_heads=16)
    assert t.keys() == {"A", "B", "router"} and not t["B"].any()
    for tensor in (t["A"], t["router"]):
        assert 0.095 < tensor.abs().max() <= 0.1
        assert tensor.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.06)


@pytest.mark.parametrize("init_heads", ["random", "centered", "zeros"])
def test_without_init_weights_nothing_is_zeroed_centred_or_subtracted(init_heads):
    t = drawn(init_weights=False, init_heads=init_heads)
    assert t["router"].any() and t["B"].any()
    assert t["B"].unflatten(1, (3, 4)).mean(1).abs().max() > 1e-3
    if init_heads == "random":  # the pair is there, as the checkpoint has it, and takes nothing off
        assert not t["A0"].any() and not t["B0"].any()


# Matrix products, by all the names that ATen has for them.
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mv", "addmv"}


@pytest.mark.parametrize("device", ["cpu", "meta"])  # on meta, work can be counted without doing it
@pytest.mark.parametrize("router", ["softmax", "mean"])
@pytest.mark.parametrize("init_heads", ["random", "centered"])
@pytest.mark.parametrize("N", [1, 2, 7])
def test_beside_the_base_there_is_one_product_down_and_one_up_however_many_heads(
    init_heads, router, N, device
):
    with torch.device(device):
        base = nn.Sequential(nn.Linear(6, 5))
        model = adapt(base, ["0"], num_heads=N, init_heads=init_heads, router=router).train()
        with Operations() as operations:
            model(torch.ones(4, 6))
    assert sum(name in PRODUCTS for name, _ in operations.seen) == 3


@pytest.mark.parametrize("init_heads", ["random", "centered"])
def test_no_head_output_is_kept_for_the_backward(init_heads):
    """The packed form: of the tensors kept, none has N outputs a token."""
    tokens, d_in, d_out, N, r = 64, 16, 48, 8, 2
    model, _ = one_layer(d_in, d_out, num_heads=N, r=r, dtype=torch.float32, init_heads=init_heads)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(tokens, d_in, requires_grad=True))
    assert kept and max(kept) <= max(tokens * d_in, tokens * (N + 1) * r, (N + 1) * r * d_out)
    assert max(kept) < tokens * d_out < tokens * N * d_out
