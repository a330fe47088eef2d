"""Chapter 15's measures, as a reader sees them, on cases whose answer is known."""

import math
import re

import pytest
import torch
from chapter_code import chapter_code, chapter_sources
from peft import get_peft_model
from torch import nn

from rlora_min import RLoraConfig

N, R_, D_IN, D_OUT = 3, 4, 10, 8


@pytest.fixture(scope="module")
def chapter() -> dict:
    """What the chapter defines, with fewer shuffles."""
    found = vars(chapter_code("15_looking_inside"))
    found["SHUFFLES"] = 200
    return found


@pytest.fixture
def layer():
    """An R-LoRA layer in float64, every trained tensor off its start."""
    torch.manual_seed(0)
    config = RLoraConfig(r=R_, num_heads=N, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(D_IN, D_OUT)), config).double().eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    return model.base_model.model[0]


def inputs() -> torch.Tensor:
    return torch.randn(2, 7, D_IN, generator=torch.Generator().manual_seed(1)).double()


@torch.no_grad()
def test_terms_are_the_equation(chapter, layer):
    x = inputs()
    g, u = chapter["terms"](layer, x)
    A0, B0 = layer.rlora_A0["default"].weight, layer.rlora_B0["default"].weight
    side = layer.configs["default"].scaling * x @ A0.T @ B0.T
    torch.testing.assert_close(layer.base_layer(x) + u.sum(-2) - side, layer(x))
    torch.testing.assert_close(g.sum(-1), torch.ones(2, 7).double())


@torch.no_grad()
@pytest.mark.parametrize("i", range(N))
def test_off_is_a_head_of_zero(chapter, layer, i):
    x = inputs()
    with chapter["changed"](layer, chapter["off"](i)):
        subtracted = layer(x)
    whole = layer(x)  # the change ends with the block
    layer.rlora_B["default"].weight.unflatten(1, (N, R_))[:, i] = 0
    torch.testing.assert_close(subtracted, layer(x))
    assert (subtracted - whole).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("i", range(N))
def test_closed_is_the_softmax_of_the_others(chapter, layer, i):
    x = inputs()
    with chapter["changed"](layer, chapter["closed"](i)):
        closed = layer(x)
    with chapter["changed"](layer, chapter["off"](i)):
        off = layer(x)
    # By hand: the softmax without row i, and the heads one after the other.
    s, A = layer.configs["default"].scaling, layer.rlora_A["default"].weight
    B = layer.rlora_B["default"].weight.unflatten(1, (N, R_))
    others = [j for j in range(N) if j != i]
    g = (x @ layer.rlora_router["default"].weight[others].T).softmax(-1)
    h = layer.base_layer(x)
    h = h - s * x @ layer.rlora_A0["default"].weight.T @ layer.rlora_B0["default"].weight.T
    for k, j in enumerate(others):
        h = h + s * g[..., [k]] * (x @ A.T @ B[:, j].T)
    torch.testing.assert_close(closed, h)
    assert (off - h).abs().max() > 0.05  # the hole is another thing


@torch.no_grad()
def test_the_controls_are_as_large_as_they_say(chapter, layer):
    x = inputs()
    whole, (_, u) = layer(x), chapter["terms"](layer, x)
    with chapter["changed"](layer, chapter["noise"](1)):
        torch.testing.assert_close((layer(x) - whole).norm(dim=-1), u[..., 1, :].norm(dim=-1))
    with chapter["changed"](layer, chapter["third"](0)):
        torch.testing.assert_close(whole - layer(x), u.sum(-2) / 3)


@pytest.mark.parametrize("groups", [2, 5])
def test_told_is_a_mutual_information(chapter, groups):
    told = chapter["told"]
    g = torch.rand(groups, N, generator=torch.Generator().manual_seed(0)).double()
    g = g / g.sum(1, keepdim=True)
    joint = g / groups  # of group and head
    product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    information = (joint * (joint / product).log()).sum() / math.log(N)
    torch.testing.assert_close(told(g), information)
    assert told(g[:1].expand(groups, N)).abs() < 1e-12  # all groups alike
    sure = torch.eye(N).double()
    torch.testing.assert_close(told(sure), torch.tensor(1.0).double())


def test_shuffled_labels_are_a_null(chapter):
    # Where labels mean nothing, the true value is one of the shuffled ones: p is uniform.
    generator = torch.Generator().manual_seed(0)
    below = 0
    for _ in range(60):
        z = torch.randn(4, 30, N, generator=generator)  # (tasks, questions, N), no task in it
        g = (z + torch.randn(1, 30, N, generator=generator)).softmax(-1).double()
        chance = chapter["null"](g)
        below += (1 + (chance >= chapter["told"](g.mean(1))).sum()) / (1 + len(chance)) < 0.2
    assert 4 <= below <= 22  # of 60 about 12; outside in about one of a thousand cases
    z[0, :, 0] += 3  # a task that prefers a head
    g = z.softmax(-1).double()
    assert chapter["told"](g.mean(1)) > chapter["null"](g).max()


def test_writers_are_compared_by_shuffling_writers(chapter):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 20, generator=generator)
    assert chapter["p_value"](a, b + 3) == pytest.approx(1 / 1000)  # never zero
    values = [chapter["p_value"](*torch.randn(2, 12, generator=generator), 99) for _ in range(60)]
    assert 4 <= sum(p < 0.2 for p in values) <= 22


def test_another_basis_changes_cosines_and_not_the_update(chapter, layer):
    A = layer.rlora_A["default"].weight.detach()
    B = layer.rlora_B["default"].weight.detach().unflatten(1, (N, R_))
    new_A, new_B, _ = chapter["other_basis"](A, B, None)
    for i in range(N):
        torch.testing.assert_close(new_B[:, i] @ new_A, B[:, i] @ A)
    assert (new_B - B).abs().max() > 1

    def cosine(heads):
        return torch.cosine_similarity(heads[:, 0].flatten(), heads[:, 1].flatten(), 0)

    assert (cosine(new_B) - cosine(B)).abs() > 0.05


def test_every_function_is_defined_once(chapter):
    code = "\n".join(chapter_sources("15_looking_inside", solutions=True))
    names = re.findall(r"(?m)^def (\w+)\(", code)
    assert len(names) == len(set(names)), names
