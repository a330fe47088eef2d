"""Which modules are adapted, with which rank and scale, and what is refused or warned of."""

import copy
import math
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rlora_helpers import (
    KINDS,
    STRICT,
    adapt,
    adapter_tensors,
    anatomy,
    assert_unchanged,
    evaluated,
    layers_of,
    perturb,
    relative,
)
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from rlora_min import RLoraConfig, export_lora

pytestmark = STRICT
LLAMA = KINDS["llama"]


@pytest.mark.parametrize("targets", [r".*q_proj", "all-linear"])
def test_a_layers_number_beside_a_string_is_refused_as_loras_is(targets):
    for config in (LoraConfig, RLoraConfig):
        with pytest.raises(ValueError, match="layers_to_transform"):
            config(target_modules=targets, layers_to_transform=[0])


def test_layers_by_number():
    model = adapt(LLAMA.base(), ["q_proj", "up_proj"], layers_to_transform=[1])
    paths = [name for name, module in model.named_modules() if module in set(layers_of(model))]
    assert len(paths) == 2 and all(".layers.1." in path for path in paths)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(x)


class Named(nn.Module):
    """A user's modules may be called as parts of adapters are."""

    def __init__(self):
        super().__init__()
        self.rlora_x = nn.Linear(6, 6)
        self.base_layer = Inner()
        self.rlora_A = nn.Linear(6, 6)

    def forward(self, x):
        return self.rlora_A(self.base_layer(self.rlora_x(x)))


@pytest.mark.parametrize(
    ("targets", "whole"),
    [
        (["rlora_x"], None),
        (["fc"], None),
        (["rlora_A", "fc"], None),
        (["rlora_x", "fc", "rlora_A"], None),
        (["fc"], ["rlora_x"]),
        (["rlora_x"], ["base_layer"]),
        (["base_layer.fc", "rlora_A"], ["rlora_x"]),
    ],
)
def test_the_names_of_a_users_modules_do_not_matter(targets, whole, tmp_path):
    torch.manual_seed(0)
    base = Named()
    expected, x = copy.deepcopy(base), torch.randn(4, 6)
    model = perturb(adapt(base, targets, modules_to_save=whole))
    assert len(layers_of(model)) == len(targets)
    output = evaluated(model, x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(expected), tmp_path)
    assert torch.equal(evaluated(loaded, x), output)
    model.add_adapter("second", RLoraConfig(target_modules=targets[:1]))
    assert torch.equal(evaluated(model, x), output)
    with model.disable_adapter():
        assert torch.equal(evaluated(model, x), expected(x))


class Attention(nn.Module):
    """A linear layer of its own inside of torch's attention, which reads its weight alone."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)
        self.attention.out_proj = nn.Linear(6, 6)
        self.lazy = nn.LazyLinear(3)
        self.fc = nn.Linear(6, 6)


class Duck(nn.Module):
    """Looks like a linear layer, and is none."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 6, 6
        self.weight = nn.Parameter(torch.zeros(6, 6))


@pytest.mark.parametrize("target", ["attention.out_proj", "lazy", "duck"])
def test_what_only_looks_like_a_linear_layer_is_refused_before_any_is_adapted(target):
    base = Attention()
    base.duck = Duck()
    if target != "lazy":
        del base.lazy  # which has no tensors to compare
        before = anatomy(base)
    with pytest.raises(ValueError, match=f"'{target}'.*linear layers and GPT-2's Conv1D"):
        get_peft_model(base, RLoraConfig(target_modules=["fc", target]))
    assert not layers_of(base)
    if target != "lazy":
        assert_unchanged(base, before)


def test_a_subclass_of_linear_is_called_as_it_is():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    base, x = nn.Sequential(Doubled(6, 4)), torch.randn(3, 6)
    expected = base(x)
    assert relative(evaluated(adapt(base, ["0"]), x) - expected, expected) < 1e-6


PATTERNS = {
    "rank_pattern": {"down_proj": 2, r"layers\.1\..*q_proj": 7},
    "alpha_pattern": {"down_proj": 8.0},
}


@pytest.mark.parametrize("use_rslora", [True, False])
def test_patterns_give_modules_ranks_and_scales_of_their_own_as_in_peft(use_rslora, tmp_path):
    settings = {"r": 4, "use_rslora": use_rslora, **PATTERNS}
    model = perturb(adapt(LLAMA.base(), LLAMA.targets, **settings))
    stock = LoraConfig(target_modules=list(LLAMA.targets), lora_alpha=32, **settings)
    theirs = get_peft_model(LLAMA.base(), stock)
    modules = dict(theirs.named_modules())
    for path, layer in model.named_modules():
        if layer in set(layers_of(model)):
            r = modules[path].r["default"]
            assert layer.rlora_A["default"].weight.shape[0] == r
            assert layer.rlora_B["default"].weight.shape[1] == 3 * r
            assert layer.configs["default"].scaling == modules[path].scaling["default"]
    ranks = {tuple(v.shape) for k, v in adapter_tensors(model).items() if "rlora_A0" in k}
    assert {r for r, _ in ranks} == {2, 4, 7}

    expected = evaluated(model, LLAMA.inputs())
    model.save_pretrained(tmp_path / "own")
    loaded = PeftModel.from_pretrained(LLAMA.base(), tmp_path / "own")
    assert torch.equal(evaluated(loaded, LLAMA.inputs()), expected)
    largest, _ = export_lora(model, tmp_path / "plain", batch=LLAMA.inputs())
    plain = PeftModel.from_pretrained(LLAMA.base(), tmp_path / "plain")
    difference = (evaluated(plain, LLAMA.inputs()) - expected).abs().max().item()
    assert largest > 0 and difference == pytest.approx(largest, rel=1e-4)


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ({"rank_pattern": {"a": 0}}, r"rank_pattern\['a'\] must be an integer >= 1, got 0"),
        ({"rank_pattern": {"a": 1.5}}, r"rank_pattern\['a'\] must be an integer >= 1, got 1.5"),
        ({"alpha_pattern": {"a": -1}}, r"alpha_pattern\['a'\] must be a number > 0, got -1"),
        ({"alpha_pattern": {"a": math.inf}}, r"alpha_pattern\['a'\] must be a number > 0"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number > 0, got '8'"),
        ({"lora_dropout": "0.1"}, r"lora_dropout must lie in \[0, 1\), got '0.1'"),
    ],
)
def test_a_wrong_pattern_is_named_with_what_is_allowed(setting, allowed):
    with pytest.raises(ValueError, match=allowed):
        RLoraConfig(**setting)


def mixture() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=31)
    sizes |= dict(num_key_value_heads=1, num_hidden_layers=1, num_local_experts=2)
    model = MixtralForCausalLM(MixtralConfig(**sizes)).eval()
    if not any(p.ndim == 3 for p in model.parameters()):
        pytest.skip("in this transformers, experts are linear layers")
    return model


@pytest.mark.parametrize(
    ("targets", "left"),
    [
        (["q_proj", "gate_proj", "up_proj", "down_proj"], ["gate_up_proj", "down_proj"]),
        (["q_proj", "up_proj"], ["gate_up_proj"]),
        (["q_proj", "w1", "w2"], ["gate_up_proj", "down_proj"]),
        ("all-linear", ["gate_up_proj", "down_proj"]),
        (r".*(q_proj|down_proj)", ["down_proj"]),
        (["q_proj"], []),
    ],
)
def test_experts_that_are_one_tensor_are_named_when_they_are_left_out(targets, left):
    base = mixture()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(base, RLoraConfig(target_modules=targets))
    text = "".join(str(w.message) for w in caught if "experts" in str(w.message))
    named = {name for name in ("gate_up_proj", "down_proj") if f"experts.{name}" in text}
    assert named == set(left)
    assert layers_of(model)
