"""Chapter 15's measures, as a reader sees them, on cases whose answer is known."""

import math
import re

import pytest
import torch
from chapter_code import chapter_code, chapter_sources
from peft import get_peft_model
from rlora_helpers import equation, perturb, tensors_of
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
    """An R-LoRA layer in float64, every tensor off its start."""
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    config = RLoraConfig(r=R_, num_heads=N, target_modules=["0"])
    return perturb(get_peft_model(model, config).double().eval()).base_model.model[0]


def inputs() -> torch.Tensor:
    return torch.randn(2, 7, D_IN, generator=torch.Generator().manual_seed(1)).double()


@torch.no_grad()
def test_closed_is_the_softmax_of_the_others(chapter, layer):
    x, t, others = inputs(), tensors_of(layer), [0, 2]
    with chapter["changed"](layer, chapter["closed"](1)):
        closed = layer(x)
    g = torch.zeros(2, 7, N).double()
    g[..., others] = (x @ t["router"][others].T).softmax(-1)
    torch.testing.assert_close(
        closed, layer.base_layer(x) + equation(x, t, layer.configs["default"], g=g)
    )


@torch.no_grad()
def test_the_controls_are_as_large_as_they_say(chapter, layer):
    x = inputs()
    whole, (_, u) = layer(x), chapter["terms"](layer, x)
    with chapter["changed"](layer, chapter["noise"](1)):
        torch.testing.assert_close((layer(x) - whole).norm(dim=-1), u[..., 1, :].norm(dim=-1))
    with chapter["changed"](layer, chapter["third"](0)):
        torch.testing.assert_close(whole - layer(x), u.sum(-2) / 3)


def test_told_is_a_mutual_information(chapter):
    g = torch.rand(5, N, generator=torch.Generator().manual_seed(0)).double()
    joint = g / g.sum(1, keepdim=True) / 5  # of group and head
    product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    information = (joint * (joint / product).log()).sum() / math.log(N)
    torch.testing.assert_close(chapter["told"](5 * joint), information)


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


def test_every_function_is_defined_once(chapter):
    code = "\n".join(chapter_sources("15_looking_inside", solutions=True))
    names = re.findall(r"(?m)^def (\w+)\(", code)
    assert len(names) == len(set(names)), names
