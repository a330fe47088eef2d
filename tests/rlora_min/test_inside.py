"""Looking inside: how alike the heads are, and how the router weights them."""

import math

import pytest
import torch
from peft import get_peft_model_state_dict, inject_adapter_in_model
from rlora_helpers import KINDS, STRICT, adapt, evaluated, layers_of, perturb, train
from torch import nn

from rlora_min import RLoraConfig, head_similarity, record_routing

pytestmark = STRICT
SEQUENTIAL = KINDS["sequential"]


def with_heads(*heads):
    """A model of one layer with these heads, each a (d_out, r) matrix."""
    heads = [torch.tensor(head, dtype=torch.float32) for head in heads]
    d_out, r = heads[0].shape
    base = nn.Sequential(nn.Linear(2, d_out))
    model = adapt(base, ["0"], r=r, num_heads=len(heads), init_heads="centered")
    layers_of(model)[0].rlora_B["default"].weight.data = torch.cat(heads, 1)
    return model


def test_similarity_by_hand():
    """Flattened: (1, 0, 0, 0), (1, 1, 1, 1) and (0, 0, 3, 4); |.| = 1, 2 and 5."""
    model = with_heads([[1, 0], [0, 0]], [[1, 1], [1, 1]], [[0, 0], [3, 4]])
    similarity = head_similarity(model)
    assert similarity.keys() == {"0"}
    expected = torch.tensor([[1, 0.5, 0], [0.5, 1, 0.7], [0, 0.7, 1]])
    assert torch.allclose(similarity["0"], expected, atol=1e-6)
    assert similarity["0"].dtype == torch.float32 and not similarity["0"].requires_grad


def test_similarity_keeps_the_sign_and_forgets_the_size():
    similarity = head_similarity(with_heads([[1.0], [2.0]], [[-5.0], [-10.0]]))["0"]
    assert torch.allclose(similarity, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))


def test_similarity_of_the_change_since_the_start():
    model = with_heads([[1, 0], [0, 0]], [[0, 1], [0, 0]])
    initial = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    B = layers_of(model)[0].rlora_B["default"].weight.data
    B += torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 0]])  # (1, 0, 0, 0) and (1, 0, 1, 0)
    assert head_similarity(model, initial=initial)["0"][0, 1].item() == pytest.approx(0.5**0.5)
    now = head_similarity(model)["0"][0, 1].item()
    assert now == pytest.approx(2 / (2 * 3**0.5))  # (2, 0, 0, 0) and (1, 1, 1, 0)


def test_a_head_that_is_zero_or_did_not_change_is_like_no_head():
    model = with_heads([[0.0], [0.0]], [[1.0], [2.0]])
    assert torch.allclose(head_similarity(model)["0"], torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    initial = get_peft_model_state_dict(model)
    assert not head_similarity(model, initial=initial)["0"].any()


def test_similarity_has_a_matrix_a_layer_and_random_heads_start_unlike(kind):
    model = adapt(kind.base(), kind.targets, num_heads=4)
    similarity = head_similarity(model)
    paths = {n for n, m in model.get_base_model().named_modules() if m in layers_of(model)}
    assert similarity.keys() == paths
    for matrix in similarity.values():
        assert matrix.shape == (4, 4) and torch.allclose(matrix.diag(), torch.ones(4))
        assert torch.allclose(matrix, matrix.T)
        assert (matrix - torch.eye(4)).abs().max() < 0.7  # of at least 40 numbers each


def test_each_layers_change_is_taken_from_its_own_start():
    """Paths "1" and "0.1" end alike."""
    base = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    model = adapt(base, ["0.0", "0.1", "1"])
    initial = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    train(model, [torch.randn(8, 4) for _ in range(3)])
    similarity = head_similarity(model, initial=initial)
    for path, layer in zip(("0.0", "0.1", "1"), layers_of(model), strict=True):
        B = layer.rlora_B["default"].weight - initial[f"base_model.model.{path}.rlora_B.weight"]
        one, two = B.detach().unflatten(1, (3, 4)).transpose(0, 1).flatten(1)[:2]
        expected = torch.cosine_similarity(one, two, dim=0)
        assert similarity[path][0, 1].item() == pytest.approx(expected.item(), abs=1e-5)


def test_an_initial_state_without_a_layers_heads_is_refused():
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets)
    initial = dict(get_peft_model_state_dict(model))
    for broken in ({}, initial | {"base_model.model.2.rlora_B.weight": torch.ones(2, 2)}):
        with pytest.raises(
            ValueError, match=r"initial has no heads of shape \(10, 12\) for '[02]'"
        ):
            head_similarity(model, initial=broken)


def test_similarity_of_an_adapter_without_a_peft_model():
    model = inject_adapter_in_model(RLoraConfig(target_modules=["0", "2"]), SEQUENTIAL.base())
    initial = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    assert head_similarity(model).keys() == {"0", "2"}
    assert not head_similarity(model, initial=initial)["0"].any()


def routed_by_hand(p):
    """A layer that weights its two heads (p, 1 - p) for the input 1, and (0.5, 0.5) for 0."""
    model = adapt(nn.Sequential(nn.Linear(1, 3)), ["0"], num_heads=2, r=1)
    with torch.no_grad():
        W_r = layers_of(model)[0].rlora_router["default"].weight
        W_r.copy_(torch.tensor([[math.log(p)], [math.log(1 - p)]]))
    return model


def entropy(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_the_log_by_hand():
    model = routed_by_hand(0.8)
    x = torch.tensor([[[1.0], [0.0], [1.0]]])  # one sequence of three tokens
    with record_routing(model) as log:
        model(x)
    assert log.mean["all"]["0"].tolist() == pytest.approx([0.7, 0.3])
    assert log.entropy["all"]["0"] == pytest.approx((2 * entropy(0.8) + math.log(2)) / 3)


def test_the_log_goes_by_task_and_counts_what_the_mask_counts():
    model = routed_by_hand(0.8)
    ones, zeros = torch.ones(2, 2, 1), torch.zeros(2, 2, 1)
    with record_routing(model) as log:
        log.task = "a"
        log.mask = torch.tensor([[1, 0], [0, 0]])
        model(torch.cat([ones[:, :1], zeros[:, :1]], 1))  # a 1 alone counts
        log.mask = torch.tensor([[True, True], [True, False]])
        model(zeros)  # three zeros more
        log.task, log.mask = "b", None
        model(ones)
    assert log.mean["a"]["0"].tolist() == pytest.approx([(0.8 + 1.5) / 4, (0.2 + 1.5) / 4])
    assert log.entropy["a"]["0"] == pytest.approx((entropy(0.8) + 3 * math.log(2)) / 4)
    assert log.mean["b"]["0"].tolist() == pytest.approx([0.8, 0.2])
    assert log.entropy["b"]["0"] == pytest.approx(entropy(0.8))
    assert log.mean.keys() == log.entropy.keys() == {"a", "b"}


def test_a_mask_that_counts_nothing_adds_nothing():
    model = routed_by_hand(0.8)
    with record_routing(model) as log:
        log.mask = torch.zeros(1, 2)
        model(torch.ones(1, 2, 1))
        assert log.mean == log.entropy == {}
        log.mask = None
        model(torch.ones(1, 2, 1))
    assert log.mean["all"]["0"].tolist() == pytest.approx([0.8, 0.2])


def test_a_mask_that_does_not_fit_is_refused_by_the_layers_name():
    model = routed_by_hand(0.8)
    with record_routing(model) as log:
        log.mask = torch.ones(2, 3)
        with pytest.raises(ValueError, match=r"'0' has \[1, 2\] tokens, log.mask \[2, 3\]"):
            model(torch.ones(1, 2, 1))


def test_one_head_alone_has_entropy_0_and_a_uniform_router_ln_n():
    x = torch.ones(1, 2, 1)
    for p, expected in ((1 - 1e-7, 0.0), (0.5, math.log(2))):
        with record_routing(routed_by_hand(p)) as log:
            pass
        model = routed_by_hand(p)
        with record_routing(model) as log:
            model(x)
        assert log.entropy["all"]["0"] == pytest.approx(expected, abs=1e-5)
    model = adapt(nn.Sequential(nn.Linear(1, 3)), ["0"], num_heads=5, router="mean")
    with record_routing(model) as log:
        model(x)
    assert log.entropy["all"]["0"] == pytest.approx(math.log(5))
    assert log.mean["all"]["0"].tolist() == pytest.approx([0.2] * 5)


def test_a_weight_that_underflows_to_0_has_no_part_in_the_entropy():
    model = routed_by_hand(0.5)
    layers_of(model)[0].rlora_router["default"].weight.data = torch.tensor([[1e4], [-1e4]])
    with record_routing(model) as log:
        model(torch.ones(1, 1, 1))
    assert log.entropy["all"]["0"] == 0 and log.mean["all"]["0"].tolist() == [1, 0]


def test_the_log_stops_with_its_block_and_changes_nothing(kind):
    inputs = kind.inputs()
    model = perturb(adapt(kind.base(), kind.targets))
    expected = evaluated(model, inputs)
    with record_routing(model) as log:
        assert torch.equal(evaluated(model, inputs), expected)
    layers = {n for n, m in model.get_base_model().named_modules() if m in layers_of(model)}
    assert log.mean["all"].keys() == log.entropy["all"].keys() == layers
    for path, g in log.mean["all"].items():
        assert g.shape == (3,) and g.sum().item() == pytest.approx(1, abs=1e-5)
        assert 0 < log.entropy["all"][path] < math.log(3) + 1e-6
    before = {path: g.clone() for path, g in log.mean["all"].items()}
    evaluated(model, kind.inputs(seed=3))
    assert all(torch.equal(g, before[path]) for path, g in log.mean["all"].items())
    assert not any(layer._forward_pre_hooks for layer in layers_of(model))
    with pytest.raises(ZeroDivisionError), record_routing(model):
        _ = 1 / 0
    assert not any(layer._forward_pre_hooks for layer in layers_of(model))


def test_attention_masks_fit_the_log_and_hide_the_padding():
    kind = KINDS["llama"]
    model = perturb(adapt(kind.base(), kind.targets))
    short = kind.inputs(batch=1, length=3)
    padded = {k: nn.functional.pad(v, (0, 2)) for k, v in short.items()}
    logs = []
    for inputs in (short, padded):
        with record_routing(model) as log:
            log.mask = inputs["attention_mask"]
            evaluated(model, inputs)
        logs.append(log.mean["all"])
    for path, g in logs[0].items():
        assert torch.allclose(g, logs[1][path], atol=1e-5)


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
