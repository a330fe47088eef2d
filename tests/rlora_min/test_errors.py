"""Bad input is an error that names the culprit and what is allowed, and changes nothing."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from rlora_helpers import LLAMA, SEQUENTIAL, STRICT, adapt, perturb, unchanged
from torch import nn

from rlora_min import RLoraConfig, export_lora, head_similarity, record_routing

pytestmark = STRICT
TEXT = st.text(max_size=5)
FLOATS = st.floats(0, 5, exclude_min=True)
RIGHT = {
    "r": st.integers(1, 9),
    "num_heads": st.integers(1, 9),
    "lora_alpha": FLOATS,
    "gamma": FLOATS,
    "lora_dropout": st.floats(0, 1, exclude_max=True),
    "rank_pattern": st.dictionaries(TEXT, st.integers(1, 9)),
    "alpha_pattern": st.dictionaries(TEXT, FLOATS),
}
NOT_WHOLE = st.integers(max_value=0) | st.floats() | TEXT
NOT_POSITIVE = st.floats(max_value=0) | st.sampled_from([math.nan, math.inf]) | TEXT
NO_WORD = st.sampled_from(["", "Zeros", "top-k", "lora_only", None]) | st.integers()
NO_RATE = st.floats().filter(lambda p: not 0 <= p < 1) | st.just(1.0) | TEXT
# What is wrong for a setting, and what the error says is allowed.
WRONG = {
    "r": (NOT_WHOLE, "an integer >= 1"),
    "num_heads": (NOT_WHOLE, "an integer >= 1"),
    "lora_alpha": (NOT_POSITIVE, "a number > 0"),
    "gamma": (NOT_POSITIVE, "a number > 0"),
    "lora_dropout": (NO_RATE, "lie in [0, 1)"),
    "rank_pattern": (NOT_WHOLE, "an integer >= 1"),
    "alpha_pattern": (NOT_POSITIVE, "a number > 0"),
    "init_heads": (NO_WORD, "one of ('random', 'centered', 'zeros')"),
    "dropout_on": (NO_WORD, "one of ('heads', 'input')"),
    "router": (NO_WORD, "one of ('softmax', 'mean')"),
    "router_init": (NO_WORD, "one of ('zeros', 'kaiming')"),
    "bias": (NO_WORD, "one of ('none', 'all', 'rlora_only')"),
}


@given(st.fixed_dictionaries({}, optional=RIGHT))
def test_what_is_allowed_makes_a_config(asked):
    config = RLoraConfig(**asked)
    assert {name: getattr(config, name) for name in asked} == asked


@pytest.mark.parametrize("setting", WRONG)
@given(data=st.data())
@settings(max_examples=50)
def test_a_wrong_setting_is_named_with_what_is_allowed_and_what_it_was(setting, data):
    values, allowed = WRONG[setting]
    value = data.draw(values)
    asked, name = {setting: value}, setting
    if setting.endswith("pattern"):
        asked, name = {setting: {"a": value}}, f"{setting}['a']"
    with pytest.raises(ValueError) as caught:
        RLoraConfig(**asked)
    said = str(caught.value)
    assert said.startswith(f"{name} must ") and allowed in said and f"got {value!r}" in said


@given(
    num_heads=st.integers(1, 4),
    init_heads=st.sampled_from(["random", "centered", "zeros"]),
    router=st.sampled_from(["softmax", "mean"]),
    router_init=st.sampled_from(["zeros", "kaiming"]),
    dropout_on=st.sampled_from(["heads", "input"]),
    lora_dropout=st.sampled_from([0, 0.1]),
)
@settings(max_examples=200, derandomize=True)
def test_heads_that_can_never_separate_are_refused_and_no_others(**config):
    """Zero heads get equal gradients under a uniform router, unless each has its own mask."""
    equal = config["num_heads"] > 1 and config["init_heads"] == "zeros"
    uniform = (config["router"], config["router_init"]) == ("softmax", "zeros")
    if equal and uniform and (config["dropout_on"], config["lora_dropout"]) != ("heads", 0.1):
        with pytest.raises(ValueError, match="never separate.*random or centered.*kaiming.*heads"):
            RLoraConfig(**config)
    else:
        RLoraConfig(**config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers_pattern": ["layers"]}, "layers_pattern needs layers_to_transform"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "names layers by itself"),
        ({"target_modules": "all-linear", "layers_to_transform": 0}, "names layers by itself"),
    ],
)
def test_what_would_be_ignored_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RLoraConfig(**settings)


# Targets


def one_of_each() -> nn.Module:
    """What can't be adapted, behind a linear layer that can."""
    duck = nn.LayerNorm(4)
    duck.in_features = duck.out_features = 4  # looks like a linear layer, and is none
    own = nn.MultiheadAttention(4, 2)
    own.out_proj = nn.Linear(4, 4)  # torch's attention reads its weight alone
    parts = dict(first=nn.Linear(4, 4), embedding=nn.Embedding(4, 4), conv=nn.Conv1d(4, 4, 1))
    parts |= dict(attention=nn.MultiheadAttention(4, 2), own=own, duck=duck)
    return nn.ModuleDict(parts)


def pooled() -> nn.Module:
    base = LLAMA.base()
    base.pool = nn.MultiheadAttention(16, 2)
    return base


ONLY = ".*linear layers and GPT-2's Conv1D"
REFUSED = [
    (one_of_each, ["first", "embedding"], f"'embedding', a Embedding{ONLY}"),
    (one_of_each, ["first", "conv"], f"'conv', a Conv1d{ONLY}"),
    (one_of_each, ["first", "attention"], f"'attention', a MultiheadAttention{ONLY}"),
    (one_of_each, ["first", "attention.out_proj"], f"'attention.out_proj', a Non.*{ONLY}"),
    (one_of_each, ["first", "own.out_proj"], f"'own.out_proj', a Linear{ONLY}"),
    (one_of_each, ["first", "duck"], f"'duck', a LayerNorm{ONLY}"),
    (pooled, "all-linear", "'pool.out_proj'.*MultiheadAttention"),
    (LLAMA.base, ["q_porj", "nothing"], "'nothing', 'q_porj'.*not found in.*Closest.*'q_proj'"),
    # a string is a pattern for whole paths
    (LLAMA.base, "gate_proj", "'gate_proj'.*not found.*Closest.*'gate_proj'"),
    # nothing is close: all there is, as far as it goes
    (LLAMA.base, ["zzz"], "'zzz'.*not found.*Closest.*'model.embed_tokens'"),
]


@pytest.mark.parametrize(("make", "targets", "message"), REFUSED)
def test_what_cant_be_adapted_is_named_with_what_can_before_any_is(make, targets, message):
    base = make()
    with unchanged(base), pytest.raises(ValueError, match=message):
        get_peft_model(base, RLoraConfig(target_modules=targets))


def test_a_layer_of_unknown_size_is_refused():
    base = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))  # without tensors to compare
    with pytest.raises(ValueError, match="'1', a LazyLinear.*of known size"):
        get_peft_model(base, RLoraConfig(target_modules=["0", "1"]))
    assert type(base[0]) is nn.Linear


def test_targets_that_are_all_excluded_are_named():
    base = LLAMA.base()
    config = RLoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"])
    with unchanged(base), pytest.raises(ValueError, match="q_proj.*exclude_modules"):
        get_peft_model(base, config)


def test_a_second_adapter_that_is_refused_leaves_the_first_as_it_was():
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    for targets in (["nowhere"], ["0", "1"]):
        with unchanged(model), pytest.raises(ValueError, match="nowhere|'1', a Tanh"):
            model.add_adapter("second", RLoraConfig(target_modules=targets))
    model.add_adapter("second", RLoraConfig(target_modules=["0"]))


# Export, and looking inside

NOT_THREE = "Layer '[02]' needs 3 finite weights or 'mean', got"
WRONG_WEIGHTS = [
    ([0.5, 0.5], NOT_THREE),
    ("median", NOT_THREE),
    ("abc", NOT_THREE),  # three letters are not three numbers
    ([0.5, 0.5, math.nan], NOT_THREE),
    ([0.5, math.inf, 0.5], NOT_THREE),
    ({"0": [1, 0, 0], "2": [1, 0]}, NOT_THREE),
    ({"0": "mean", "2": "uniform"}, NOT_THREE),
    ({"0": [1, 0, 0]}, "weights must name.*'2'"),
    ({"0": "mean", "2": "mean", "4": "mean"}, "weights must name.*'4'"),
]


@pytest.mark.parametrize(("weights", "message"), WRONG_WEIGHTS)
def test_wrong_routing_weights_are_refused(weights, message, tmp_path):
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    with unchanged(model), pytest.raises(ValueError, match=message):
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
            export_lora(model, tmp_path / "out", batch=inputs)
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
    export_lora(model, tmp_path / "out", batch=inputs)
