"""torch.func over models: an ensemble of bases, or of adapters, in one call equals one by one."""

import copy

import pytest
import torch
from one_step import TRIED, case, far, loss_of
from rlora_helpers import SEQUENTIAL, gradients_of, trained_of
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap


def members(method: str, what: str) -> list[nn.Module]:
    """Three models that differ in their base, in their adapter, or in both."""
    first, _ = case(method, "sequential")
    found = []
    for seed in range(3):
        model = copy.deepcopy(first)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if what == "both" or ("lora_" in name) == (what == "adapters"):
                    p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        found.append(model.train())
    return found


@pytest.mark.parametrize("what", ["bases", "adapters", "both"])
@pytest.mark.parametrize("method", TRIED)
def test_an_ensemble_in_one_call(method, what):
    models = members(method, what)
    stacked, buffers = stack_module_state(models)
    x = SEQUENTIAL.inputs(dtype=torch.float64)
    shell = copy.deepcopy(models[0]).to("meta")

    def loss(parameters, x):
        return loss_of(functional_call(shell, (parameters, buffers), (x,)))

    losses = vmap(loss, in_dims=(0, None))(stacked, x)
    gradients = vmap(grad(loss), in_dims=(0, None))(stacked, x)
    assert losses.unique().numel() == 3
    for i, model in enumerate(models):
        one = loss_of(model(x))
        one.backward()
        assert far(losses[i], one) < 1e-9
        for name, gradient in gradients_of(model).items():
            assert gradient.any(), name
            assert far(gradients[name][i], gradient) < 1e-9, name


@pytest.mark.parametrize("method", ["rlora", "mlora"])
def test_a_gradient_for_each_example(method):
    model, x = case(method, "sequential")
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, row):
        return loss_of(functional_call(model, parameters, (row,)))

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    trained = trained_of(model)
    for i, row in enumerate(x):
        alone = torch.autograd.grad(loss_of(model(row)), trained.values())
        for name, one in zip(trained, alone, strict=True):
            assert far(each[name][i], one) < 1e-9, name
