"""Looking inside: how alike the heads are, and how the router weights them."""

import copy
import math

import pytest
import torch
from peft import get_peft_model_state_dict, inject_adapter_in_model
from rlora_helpers import (
    SEQUENTIAL,
    STRICT,
    adapt,
    evaluated,
    layer_paths,
    layers_of,
    perturb,
    train,
)
from torch import nn
from torch.testing import assert_close

from rlora_min import RLoraConfig, head_similarity, record_routing

pytestmark = STRICT


def test_similarity_by_hand():
    """Flattened: (1, 0, 0, 0), (1, 1, 1, 1) and (0, 0, -3, -4); |.| = 1, 2 and 5; and none."""
    heads = [[1, 0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, -3, -4, 0, 0]]
    model = adapt(nn.Sequential(nn.Linear(2, 2)), ["0"], r=2, num_heads=4, init_heads="centered")
    layers_of(model)[0].rlora_B["default"].weight.data = torch.tensor(heads, dtype=torch.float32)
    expected = [[1, 0.5, 0, 0], [0.5, 1, -0.7, 0], [0, -0.7, 1, 0], [0, 0, 0, 0]]
    assert_close(head_similarity(model), {"0": torch.tensor(expected)}, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrapped", [True, False])
def test_each_layers_change_is_taken_from_its_own_start(wrapped):
    """Paths "1" and "0.1" end alike."""
    base = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    paths = ["0.0", "0.1", "1"]
    model = adapt(base, paths)
    if not wrapped:
        model = inject_adapter_in_model(RLoraConfig(target_modules=paths), model.unload())
    initial = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    assert not head_similarity(model, initial=initial)["0.0"].any()
    train(model, [torch.randn(8, 4) for _ in range(3)])
    of_changes = head_similarity(model, initial=initial)
    prefix = "base_model.model." if wrapped else ""
    for path, layer in zip(paths, layers_of(model), strict=True):
        layer.rlora_B["default"].weight.data -= initial[f"{prefix}{path}.rlora_B.weight"]
    assert_close(of_changes, head_similarity(model), rtol=0, atol=1e-5)


def test_an_initial_state_without_a_layers_heads_is_refused():
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets)
    initial = dict(get_peft_model_state_dict(model))
    for broken in ({}, initial | {"base_model.model.2.rlora_B.weight": torch.ones(2, 2)}):
        with pytest.raises(ValueError, match=r"no heads of shape \(10, 12\) for '[02]'"):
            head_similarity(model, initial=broken)


def routed_by_hand(p):
    """A layer that weights its two heads (p, 1 - p) for the input 1, and (0.5, 0.5) for 0."""
    model = adapt(nn.Sequential(nn.Linear(1, 3)), ["0"], num_heads=2, r=1)
    logits = torch.tensor([[math.log(p)], [math.log(1 - p)]])
    layers_of(model)[0].rlora_router["default"].weight.data = logits
    return model


def test_the_log_goes_by_task_and_counts_what_the_mask_counts():
    model = routed_by_hand(0.8)
    ones, zeros = torch.ones(2, 2, 1), torch.zeros(2, 2, 1)
    with record_routing(model) as log:
        log.task = "a"
        log.mask = torch.zeros(2, 2)
        model(ones)  # nothing counts
        assert log.mean == log.entropy == {}
        log.mask = torch.tensor([[1, 0], [0, 0]])
        model(torch.cat([ones[:, :1], zeros[:, :1]], 1))  # a 1 alone counts
        log.mask = torch.tensor([[True, True], [True, False]])
        model(zeros)  # three zeros more
        log.task, log.mask = "b", None
        model(ones)
        log.mask = torch.ones(2, 3)
        with pytest.raises(ValueError, match=r"'0' has \[2, 2\] tokens, log.mask \[2, 3\]"):
            model(ones)
    assert log.mean["a"]["0"].tolist() == pytest.approx([(0.8 + 1.5) / 4, (0.2 + 1.5) / 4])
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert log.entropy["a"]["0"] == pytest.approx((entropy + 3 * math.log(2)) / 4)
    assert log.mean["b"]["0"].tolist() == pytest.approx([0.8, 0.2])
    assert log.entropy["b"]["0"] == pytest.approx(entropy)
    assert log.mean.keys() == log.entropy.keys() == {"a", "b"}


def test_one_head_alone_has_entropy_0_and_no_router_ln_n():
    x = torch.ones(1, 2, 1)
    model = routed_by_hand(0.5)
    layers_of(model)[0].rlora_router["default"].weight.data = torch.tensor([[1e4], [-1e4]])
    with record_routing(model) as log:
        model(x)
    assert log.entropy["all"]["0"] == 0 and log.mean["all"]["0"].tolist() == [1, 0]
    model = adapt(nn.Sequential(nn.Linear(1, 3)), ["0"], num_heads=5, router="mean")
    with record_routing(model) as log:
        model(x)
    assert log.entropy["all"]["0"] == pytest.approx(math.log(5))
    assert log.mean["all"]["0"].tolist() == pytest.approx([0.2] * 5)


def test_the_log_stops_with_its_block_and_changes_nothing(kind):
    inputs = kind.inputs()
    model = perturb(adapt(kind.base(), kind.targets))
    expected = evaluated(model, inputs)
    recording = record_routing(model)
    evaluated(model, inputs)  # before the block
    with recording as log:
        assert log.mean == {}
        assert torch.equal(evaluated(model, inputs), expected)
    assert log.mean["all"].keys() == log.entropy["all"].keys() == layer_paths(model).keys()
    before = copy.deepcopy(log.mean)
    evaluated(model, kind.inputs(seed=3))
    assert_close(log.mean, before, rtol=0, atol=0)
    with pytest.raises(ZeroDivisionError), record_routing(model):
        _ = 1 / 0
    assert not any(layer.recorders for layer in layers_of(model))


def test_an_adapter_that_is_off_or_not_active_is_not_logged():
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    model.add_adapter("second", RLoraConfig(target_modules=["0"], num_heads=2))
    with record_routing(model) as log, record_routing(model, "second") as second:
        with model.disable_adapter():
            evaluated(model, SEQUENTIAL.inputs())
        assert log.mean == {}
        evaluated(model, SEQUENTIAL.inputs())
        assert log.mean["all"].keys() == {"0", "2"} and second.mean == {}
        model.set_adapter("second")
        evaluated(model, SEQUENTIAL.inputs())
    assert second.mean["all"]["0"].shape == (2,)


def test_in_training_the_log_sees_what_the_layer_uses():
    """Dropout never touches the routing."""
    model = perturb(adapt(SEQUENTIAL.base(), ["0"], lora_dropout=0.9, dropout_on="input"))
    with record_routing(model) as log:
        model.eval()
        model(SEQUENTIAL.inputs())
        log.task = "training"
        model.train()
        model(SEQUENTIAL.inputs())
    assert torch.equal(log.mean["all"]["0"], log.mean["training"]["0"])


@pytest.mark.parametrize("inside", [False, True])
def test_routing_is_recorded_on_a_compiled_model_or_the_error_says_that_it_cant(inside):
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    x = SEQUENTIAL.inputs()
    with record_routing(model) as log:
        evaluated(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    evaluated(compiled, x)
    with record_routing(compiled if inside else model) as again:
        value = evaluated(compiled, x)
    assert_close(again.mean, log.mean, rtol=1e-5, atol=1e-6)
    assert torch.equal(evaluated(compiled, x), value)
    torch._dynamo.reset()
    whole = torch.compile(model, fullgraph=True, backend="eager")
    evaluated(whole, x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RoutingLog.add"):
        with record_routing(model):
            evaluated(whole, x)
