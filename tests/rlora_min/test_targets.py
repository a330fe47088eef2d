"""Which modules are adapted, with which rank and scale, and what is warned of."""

from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rlora_helpers import (
    LLAMA,
    SIZES,
    STRICT,
    adapt,
    evaluated,
    exported,
    layer_paths,
    layers_of,
    perturb,
)
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from rlora_min import RLoraConfig

pytestmark = STRICT
ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# Settings, and the layers and leaves that they mean in a model of three layers.
FORMS = [
    ({"target_modules": ["q_proj", "up_proj"]}, "012", {"q_proj", "up_proj"}),
    ({"target_modules": r".*\.(up|down)_proj"}, "012", {"up_proj", "down_proj"}),
    ({"target_modules": "all-linear"}, "012", ALL_LINEAR),
    ({"target_modules": ["model.layers.1.mlp.up_proj"]}, "1", {"up_proj"}),
    ({}, "012", {"q_proj", "v_proj"}),  # PEFT's choice for the architecture
    ({"target_modules": ["up_proj"], "layers_to_transform": [0, 2]}, "02", {"up_proj"}),
    (
        {"target_modules": ["up_proj"], "layers_to_transform": 1, "layers_pattern": ["layers"]},
        "1",
        {"up_proj"},
    ),
    ({"target_modules": ["up_proj"], "exclude_modules": r".*\.1\..*"}, "02", {"up_proj"}),
]


@pytest.mark.parametrize(("settings", "layers", "leaves"), FORMS)
def test_targets_of_every_form_are_adapted_and_exported(settings, layers, leaves, tmp_path):
    model = perturb(get_peft_model(LLAMA.base(layers=3), RLoraConfig(**settings)))
    paths = [path.split(".") for path in layer_paths(model)]
    assert {(path[2], path[-1]) for path in paths} == {(n, leaf) for n in layers for leaf in leaves}
    loaded = exported(model, LLAMA.base(layers=3), LLAMA.inputs(), tmp_path)
    assert loaded.targeted_module_names == model.targeted_module_names


def named_as_parts() -> nn.Module:
    """A user's modules may be called as parts of adapters are."""
    torch.manual_seed(0)
    inner = nn.Sequential(OrderedDict(fc=nn.Linear(6, 6)))
    named = OrderedDict(rlora_x=nn.Linear(6, 6), base_layer=inner, rlora_A=nn.Linear(6, 6))
    return nn.Sequential(named)


@pytest.mark.parametrize(
    ("targets", "whole"),
    [
        (["fc"], None),
        (["rlora_x", "fc", "rlora_A"], None),
        (["fc"], ["rlora_x"]),
        (["rlora_x"], ["base_layer"]),
        (["base_layer.fc", "rlora_A"], ["rlora_x"]),
    ],
)
def test_the_names_of_a_users_modules_do_not_matter(targets, whole, tmp_path):
    x = torch.randn(4, 6)
    model = perturb(adapt(named_as_parts(), targets, modules_to_save=whole))
    assert len(layers_of(model)) == len(targets)
    output = evaluated(model, x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(named_as_parts(), tmp_path)
    assert torch.equal(evaluated(loaded, x), output)
    model.add_adapter("second", RLoraConfig(target_modules=targets[:1]))
    assert torch.equal(evaluated(model, x), output)
    with model.disable_adapter():
        assert torch.equal(evaluated(model, x), named_as_parts()(x))


@pytest.mark.parametrize("use_rslora", [True, False])
def test_patterns_give_modules_ranks_and_scales_of_their_own_as_in_peft(use_rslora, tmp_path):
    ranks = {"down_proj": 2, r"layers\.1\..*q_proj": 7}
    patterns = {"rank_pattern": ranks, "alpha_pattern": {"down_proj": 8.0}}
    settings = patterns | {"r": 4, "use_rslora": use_rslora}
    model = perturb(adapt(LLAMA.base(), LLAMA.targets, **settings))
    stock = LoraConfig(target_modules=list(LLAMA.targets), lora_alpha=32, **settings)
    theirs = get_peft_model(LLAMA.base(), stock).get_base_model()
    found = set()
    for path, layer in layer_paths(model).items():
        r = theirs.get_submodule(path).r["default"]
        found.add(r)
        assert layer.rlora_A["default"].weight.shape[0] == r
        assert layer.rlora_B["default"].weight.shape[1] == 3 * r
        assert layer.configs["default"].scaling == theirs.get_submodule(path).scaling["default"]
    assert found == {2, 4, 7}

    expected = evaluated(model, LLAMA.inputs())
    model.save_pretrained(tmp_path / "own")
    loaded = PeftModel.from_pretrained(LLAMA.base(), tmp_path / "own")
    assert torch.equal(evaluated(loaded, LLAMA.inputs()), expected)
    exported(model, LLAMA.base(), LLAMA.inputs(), tmp_path / "plain")


@pytest.mark.parametrize(
    ("targets", "left"),
    [
        (["q_proj", "gate_proj", "up_proj", "down_proj"], {"gate_up_proj", "down_proj"}),
        (["q_proj", "up_proj"], {"gate_up_proj"}),
        (["q_proj", "w1", "w2"], {"gate_up_proj", "down_proj"}),
        ("all-linear", {"gate_up_proj", "down_proj"}),
        (r".*(q_proj|down_proj)", {"down_proj"}),
        (["q_proj"], set()),
    ],
)
def test_experts_that_are_one_tensor_are_named_when_they_are_left_out(targets, left, recwarn):
    experts = dict(num_key_value_heads=1, num_hidden_layers=1, num_local_experts=2)
    base = MixtralForCausalLM(MixtralConfig(**SIZES | experts))
    if not any(p.ndim == 3 for p in base.parameters()):
        pytest.skip("in this transformers, experts are linear layers")
    model = get_peft_model(base, RLoraConfig(target_modules=targets))
    text = "".join(str(w.message) for w in recwarn if "experts" in str(w.message))
    assert {name for name in ("gate_up_proj", "down_proj") if f"experts.{name}" in text} == left
    assert layers_of(model)
