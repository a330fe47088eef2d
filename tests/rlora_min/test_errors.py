"""Bad input is an error that names the culprit and what is allowed, and changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from rlora_helpers import (
    KINDS,
    STRICT,
    adapt,
    anatomy,
    assert_unchanged,
    evaluated,
    perturb,
)
from torch import nn

from rlora_min import RLoraConfig, export_lora, head_similarity, record_routing

pytestmark = STRICT
SEQUENTIAL = KINDS["sequential"]


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("r", 0, "integer >= 1"),
        ("r", -3, "integer >= 1"),
        ("r", 2.0, "integer >= 1"),
        ("num_heads", 0, "integer >= 1"),
        ("num_heads", -1, "integer >= 1"),
        ("num_heads", 1.5, "integer >= 1"),
        ("lora_dropout", -0.1, r"\[0, 1\)"),
        ("lora_dropout", 1.0, r"\[0, 1\)"),
        ("lora_dropout", float("nan"), r"\[0, 1\)"),
        ("gamma", 0, "> 0"),
        ("gamma", -64, "> 0"),
        ("gamma", float("nan"), "> 0"),
        ("gamma", float("inf"), "> 0"),
        ("lora_alpha", 0, "> 0"),
        ("lora_alpha", -1, "> 0"),
        ("init_heads", "kaiming", r"'random', 'centered', 'zeros'"),
        ("dropout_on", "output", r"'heads', 'input'"),
        ("router", "top-k", r"'softmax', 'mean'"),
        ("router_init", "random", r"'zeros', 'kaiming'"),
        ("bias", "lora_only", r"'none', 'all', 'rlora_only'"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed_and_what_it_was(setting, value, allowed):
    with pytest.raises(ValueError, match=f"{setting} must .*{allowed}.*got {value!r}"):
        RLoraConfig(**{setting: value})


@given(
    r=st.integers(-3, 3),
    num_heads=st.integers(-3, 3),
    p=st.floats(-0.5, 1.5),
    gamma=st.floats(-1, 1),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_config_is_made_if_and_only_if_every_number_is_allowed(r, num_heads, p, gamma):
    given = dict(r=r, num_heads=num_heads, lora_dropout=p, gamma=gamma)
    good = {
        "r": r >= 1,
        "num_heads": num_heads >= 1,
        "lora_dropout": 0 <= p < 1,
        "gamma": gamma > 0,
    }
    if all(good.values()):
        assert RLoraConfig(**given).r == r
    else:
        with pytest.raises(ValueError) as caught:
            RLoraConfig(**given)
        assert str(caught.value).split()[0] in {name for name, fine in good.items() if not fine}


@given(
    num_heads=st.integers(1, 4),
    init_heads=st.sampled_from(["random", "centered", "zeros"]),
    router=st.sampled_from(["softmax", "mean"]),
    router_init=st.sampled_from(["zeros", "kaiming"]),
    dropout_on=st.sampled_from(["heads", "input"]),
    lora_dropout=st.sampled_from([0, 0.1]),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_heads_that_can_never_separate_are_refused_and_no_others(**config):
    """Zero heads get equal gradients under a uniform router, unless each has its own mask."""
    never = (
        config["num_heads"] > 1
        and config["init_heads"] == "zeros"
        and (config["router"], config["router_init"]) == ("softmax", "zeros")
        and not (config["dropout_on"] == "heads" and config["lora_dropout"] > 0)
    )
    if not never:
        RLoraConfig(**config)
        return
    with pytest.raises(ValueError, match="never separate.*random or centered.*kaiming.*heads"):
        RLoraConfig(**config)


def test_layers_pattern_alone_would_be_ignored():
    with pytest.raises(ValueError, match="layers_pattern needs layers_to_transform"):
        RLoraConfig(layers_pattern=["layers"])


@pytest.mark.parametrize(
    ("targets", "closest"),
    [
        (["gate_projj"], "gate_proj"),
        (["q_porj", "nothing"], "q_proj"),
        ("gate_proj", "gate_proj"),  # a string is a pattern for whole paths
        (["zzz"], "model.embed_tokens"),  # nothing is close: all there is, as far as it goes
    ],
)
def test_a_target_that_is_not_found_is_named_with_the_closest_names(targets, closest):
    base = KINDS["llama"].base()
    before = anatomy(base)
    with pytest.raises(ValueError) as caught:
        get_peft_model(base, RLoraConfig(target_modules=targets))
    for name in [targets] if isinstance(targets, str) else targets:
        assert repr(name) in str(caught.value)
    assert "not found in the base model" in str(caught.value)
    assert closest in str(caught.value).partition("Closest names")[2]
    assert_unchanged(base, before)


def test_targets_that_are_all_excluded_are_named():
    base = KINDS["llama"].base()
    before = anatomy(base)
    config = RLoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"])
    with pytest.raises(ValueError, match="q_proj.*exclude_modules"):
        get_peft_model(base, config)
    assert_unchanged(base, before)


class Many(nn.Module):
    """One of each that can't be adapted, behind a linear layer that can."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.embedding = nn.Embedding(4, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.block = nn.Sequential(nn.Linear(4, 4))
        self.bilinear = nn.Bilinear(4, 4, 4)

    def forward(self, x):
        return self.first(x)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("embedding", "Embedding"),
        ("conv", "Conv1d"),
        ("norm", "LayerNorm"),
        ("attention", "MultiheadAttention"),
        ("attention.out_proj", "NonDynamicallyQuantizableLinear"),
        ("block", "Sequential"),
        ("bilinear", "Bilinear"),
    ],
)
def test_a_layer_that_cant_be_adapted_is_named_with_what_can_before_any_is(target, kind):
    base = Many()
    before = anatomy(base)
    config = RLoraConfig(target_modules=["first", target])
    with pytest.raises(ValueError, match=f"'{target}', a {kind}.*linear.*Conv1D"):
        get_peft_model(base, config)
    assert_unchanged(base, before)
    get_peft_model(base, RLoraConfig(target_modules=["first"]))  # nothing was left behind


def test_all_linear_refuses_what_it_cant_adapt_before_it_adapts_any():
    class Pooled(type(KINDS["llama"].base())):
        def __init__(self, config):
            super().__init__(config)
            self.pool = nn.MultiheadAttention(16, 2)

    base = Pooled(KINDS["llama"].base().config)
    before = anatomy(base)
    with pytest.raises(ValueError, match="pool.out_proj.*MultiheadAttention"):
        get_peft_model(base, RLoraConfig(target_modules="all-linear"))
    assert_unchanged(base, before)


def test_a_second_adapter_that_is_refused_leaves_the_first_as_it_was():
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    before, expected = anatomy(model), evaluated(model, SEQUENTIAL.inputs())
    for targets in (["nowhere"], ["0", "1"]):
        with pytest.raises(ValueError, match="nowhere|'1', a Tanh"):
            model.add_adapter("second", RLoraConfig(target_modules=targets))
        assert_unchanged(model, before)
        assert list(model.peft_config) == ["default"]
    assert torch.equal(evaluated(model, SEQUENTIAL.inputs()), expected)
    model.add_adapter("second", RLoraConfig(target_modules=["0"]))


@pytest.mark.parametrize(
    "weights",
    [
        [0.5, 0.5],
        [0.25] * 4,
        [],
        "median",
        "abc",  # three letters are not three numbers
        [0.5, 0.5, float("nan")],
        [0.5, float("inf"), 0.5],
        torch.ones(2),
        {"0": [1, 0, 0], "2": [1, 0]},
        {"0": "mean", "2": "uniform"},
    ],
)
def test_routing_weights_that_are_not_n_finite_numbers_are_refused(weights, tmp_path):
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    before = anatomy(model)
    with pytest.raises(ValueError, match="Layer '[02]' needs 3 finite weights or 'mean', got"):
        export_lora(model, tmp_path / "out", weights)
    assert_unchanged(model, before)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "culprit"),
    [({"0": [1, 0, 0]}, "2"), ({"0": "mean", "2": "mean", "4": "mean"}, "4"), ({}, "0")],
)
def test_routing_weights_of_other_layers_are_refused(weights, culprit, tmp_path):
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    with pytest.raises(ValueError, match=f"weights must name.*'{culprit}'"):
        export_lora(model, tmp_path / "out", weights)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "call", [head_similarity, record_routing, lambda m, name: export_lora(m, "out", "mean", name)]
)
def test_an_adapter_that_is_not_there_is_refused_with_those_that_are(call):
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets)
    with pytest.raises(ValueError, match=r"'other'.*\['default'\]"):
        call(model, "other")
    with pytest.raises(ValueError, match=r"'default'.*\[\]"):
        call(SEQUENTIAL.base(), "default")


def test_a_batch_is_refused_while_the_adapter_is_off_merged_or_not_alone(tmp_path):
    inputs = SEQUENTIAL.inputs()
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets, router="mean"))
    model.add_adapter("second", RLoraConfig(target_modules=["0"]))

    def refused():
        with pytest.raises(ValueError, match="'default' must be active, alone and unmerged"):
            export_lora(model, tmp_path / "out", [1, 0, 0], batch=inputs)
        assert not (tmp_path / "out").exists()

    with model.disable_adapter():
        refused()
    model.set_adapter("second")
    refused()
    model.base_model.set_adapter(["default", "second"])
    refused()
    model.set_adapter("default")
    model.merge_adapter()
    refused()
    model.unmerge_adapter()
    assert export_lora(model, tmp_path / "out", [1, 0, 0], batch=inputs)[0] > 0
