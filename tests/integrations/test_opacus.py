"""Opacus: every part has gradients per example, and a private step without noise is as by hand."""

import copy
from collections.abc import Callable

import pytest
import torch
from one_step import LR, TRIED, adapter_of, case, far, loss_of
from opacus import GradSampleModule, PrivacyEngine
from rlora_helpers import KINDS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


def trained_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in adapter_of(model).items() if p.requires_grad}


def each_alone(model: nn.Module, loss: Callable[[int], Tensor]) -> dict[str, Tensor]:
    """By name, the gradients of the loss of each of four examples: (4, ...)."""
    trained = trained_of(model)
    rows = [torch.autograd.grad(loss(i), trained.values()) for i in range(4)]
    return dict(zip(trained, map(torch.stack, zip(*rows, strict=True)), strict=True))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("method", TRIED)
def test_gradients_per_example(method, tokens):
    model, _ = case(method, "sequential")
    x = KINDS["sequential"].inputs(batch=4, length=tokens, dtype=torch.float64)
    plain = each_alone(model.train(), lambda i: loss_of(model(x[i : i + 1])))
    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="mean")
    out = wrapped(x)
    assert far(out, model(x)) < 1e-9
    loss_of(out).backward()
    assert trained_of(wrapped).keys() == plain.keys()
    for name, p in adapter_of(wrapped).items():
        if name in plain:
            assert plain[name].abs().amax(dim=(1, 2)).min() > 0, name
            assert far(p.grad_sample, plain[name]) < 1e-9, name
        else:
            assert p.grad is None and getattr(p, "grad_sample", None) is None, name


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("method", TRIED)
def test_a_private_step(method, mode):
    model, _ = case(method, "sequential")
    x = KINDS["sequential"].inputs(batch=4, length=1, dtype=torch.float64)[:, 0]
    y = torch.arange(4)
    plain = copy.deepcopy(model)
    before = {name: p.detach().clone() for name, p in adapter_of(plain).items()}

    # By hand: each example's gradient, cut to the median of their lengths; then the mean.
    lost = nn.CrossEntropyLoss()
    each = each_alone(plain, lambda i: lost(plain(x[i : i + 1]), y[i : i + 1]))
    lengths = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
    clip = lengths.median().item()
    factors = (clip / lengths).clamp(max=1)
    assert 0 < (factors < 1).sum() < 4
    steps = {name: (factors[:, None, None] * g).mean(0) for name, g in each.items()}

    optimizer = torch.optim.SGD(trained_of(model).values(), lr=LR)
    settings = {"criterion": lost} if mode == "ghost" else {}
    private = PrivacyEngine().make_private(
        module=model.train(),
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=4),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **settings,
    )
    model, optimizer = private[:2]
    lost = private[2] if mode == "ghost" else lost
    lost(model(x), y).backward()
    optimizer.step()
    for name, p in adapter_of(model).items():
        if name in steps:
            assert steps[name].abs().max() > 0, name
            # Opacus adds 1e-6 to each length that it divides by.
            assert far(before[name] - p, LR * steps[name]) < 1e-5, name
        else:
            assert p.equal(before[name]), name
