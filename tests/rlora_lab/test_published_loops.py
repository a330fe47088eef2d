"""The published forms: without dropout they are `rlora_min`, and each head has its own mask."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from rlora_helpers import layers_of, perturb, relative
from torch import nn

from rlora_lab.models.published_loops import PublishedHydraLora, PublishedRLora
from rlora_min import RLoraConfig


def pair_of_layers(form: type, d_in: int = 6, d_out: int = 7, **settings) -> tuple:
    """An R-LoRA layer, moved off its start, and a published form with the same tensors."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(d_in, d_out)).double().requires_grad_(False)
    weight = base[0].weight
    config = RLoraConfig(r=2, num_heads=3, target_modules=["0"], lora_dropout=0, **settings)
    model = get_peft_model(base, config)
    ours = layers_of(perturb(model))[0]
    theirs = form(ours.base_layer, r=2, num_heads=3, alpha=32, dropout=0).double()
    with torch.no_grad():
        theirs.A.weight.copy_(ours.rlora_A["default"].weight)
        theirs.router.weight.copy_(ours.rlora_router["default"].weight)
        for i, B in enumerate(theirs.heads):
            B.weight.copy_(ours.rlora_B["default"].weight[:, 2 * i : 2 * i + 2])
        theirs.weight = weight
        if form is PublishedRLora:
            theirs.subtract(ours.rlora_B0["default"].weight, ours.rlora_A0["default"].weight)
    return ours, theirs


FP32 = 1e-6  # of the published forms' softmax
HYDRA = {"init_heads": "zeros", "router_init": "kaiming", "dropout_on": "input"}


@pytest.mark.parametrize(
    ("form", "settings"),
    [(PublishedRLora, {}), (PublishedHydraLora, HYDRA | {"use_rslora": False})],
)
def test_without_dropout_a_published_form_is_rlora_min(form, settings):
    ours, theirs = pair_of_layers(form, **settings)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    h, same = ours(x), theirs(x)
    assert (h - ours.base_layer(x)).abs().max() > 0.1
    assert relative(same - h, h) < FP32
    for out in (h, same):
        out.square().sum().backward()
    for part in ("A", "router"):
        grad = getattr(ours, f"rlora_{part}")["default"].weight.grad
        assert relative(getattr(theirs, part).weight.grad - grad, grad) < FP32
    grad = ours.rlora_B["default"].weight.grad
    assert relative(torch.cat([B.weight.grad for B in theirs.heads], 1) - grad, grad) < FP32


def test_a_published_form_starts_at_the_base_under_a_uniform_router():
    for form in (PublishedRLora, PublishedHydraLora):
        _, theirs = pair_of_layers(form)
        linear = nn.Linear(6, 7).requires_grad_(False)
        fresh = form(linear, r=2, num_heads=3, alpha=32, dropout=0.5).eval()
        nn.init.zeros_(fresh.router.weight)
        x = torch.randn(9, 6)
        assert relative(fresh(x) - linear(x), linear(x)) < 1e-5
        assert fresh.A.weight.any() and theirs.heads[0].weight.any()


@pytest.mark.parametrize(("form", "width"), [(PublishedRLora, 2), (PublishedHydraLora, 6)])
def test_each_head_has_its_mask_on_what_the_table_says(form, width):
    layer = form(nn.Linear(6, 7), r=2, num_heads=3, alpha=32, dropout=0.5)
    with mock.patch.object(F, "dropout", side_effect=F.dropout) as dropout:
        layer(torch.randn(5, 6))
    assert [call.args[0].shape for call in dropout.call_args_list] == [(5, width)] * 3
    assert all(call.args[1:] == (0.5, True) for call in dropout.call_args_list)
