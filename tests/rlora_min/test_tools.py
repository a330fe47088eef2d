"""What transformers and PEFT's helpers ask of an adapter, they find."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from peft.utils.hotswap import hotswap_adapter
from rlora_helpers import (
    LLAMA,
    SEQUENTIAL,
    STRICT,
    adapt,
    evaluated,
    layers_of,
    perturb,
    same_tensors,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlora_min import RLoraConfig

pytestmark = STRICT


def test_the_type_is_a_string_with_what_is_read_of_pefts_own_types():
    kind = RLoraConfig().peft_type
    assert kind == "RLORA" and kind in {"RLORA"} and isinstance(kind, str)
    assert (kind.value, kind.name, str(kind)) == ("RLORA", "RLORA", "PeftType.RLORA")
    assert type(kind.value) is str
    assert type(copy.deepcopy(kind)) is type(kind)


@pytest.fixture
def saved(tmp_path):
    """A base on disk, an adapter on it, and what the two give together."""
    saved = SimpleNamespace(base=tmp_path / "base", adapter=tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LLAMA.base().save_pretrained(saved.base)
        base = AutoModelForCausalLM.from_pretrained(saved.base)
        model = perturb(adapt(base, ["q_proj", "up_proj"], task_type="CAUSAL_LM"))
        saved.expected = evaluated(model, LLAMA.inputs())
        model.save_pretrained(saved.adapter)
        saved.tensors = load_file(saved.adapter / "adapter_model.safetensors")
    return saved


def from_the_adapters_folder(saved):
    return AutoModelForCausalLM.from_pretrained(saved.adapter)


def load_adapter(saved):
    model = AutoModelForCausalLM.from_pretrained(saved.base)
    model.load_adapter(str(saved.adapter))
    return model


def add_adapter(saved):
    model = AutoModelForCausalLM.from_pretrained(saved.base)
    model.add_adapter(RLoraConfig(target_modules=["q_proj", "up_proj"]))
    state = model.state_dict()
    for key, tensor in saved.tensors.items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        state[f"{name}.default.weight"].copy_(tensor)
    return model


@pytest.mark.parametrize("way", [from_the_adapters_folder, load_adapter, add_adapter])
def test_transformers_own_ways_give_the_same_model(way, saved, tmp_path):
    model = way(saved)
    assert torch.equal(evaluated(model, LLAMA.inputs()), saved.expected)
    assert model.active_adapters() == ["default"]
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert same_tensors(again, saved.tensors)
    model.disable_adapters()
    assert torch.equal(evaluated(model, LLAMA.inputs()), evaluated(LLAMA.base(), LLAMA.inputs()))


def test_what_transformers_add_adapter_trains_is_the_adapter_alone(saved):
    model = AutoModelForCausalLM.from_pretrained(saved.base)
    model.add_adapter(RLoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trains and not any("_A0." in name or "_B0." in name for name in trains)
    assert all(".rlora_" in name or "modules_to_save" in name for name in trains)


def test_pefts_status_knows_the_adapter():
    model = adapt(LLAMA.base(), LLAMA.targets)
    status = model.get_model_status()
    assert status.peft_types == {"default": "RLORA"}
    assert status.adapter_model_type == "RLoraModel"
    assert status.num_adapter_layers == len(layers_of(model))
    assert status.requires_grad == {"default": True}
    assert {s.module_type for s in model.get_layer_status()} == {"RLoraLayer"}


def test_pefts_refusals_name_the_type(tmp_path):
    with pytest.raises(ValueError, match="RLORA.*not compatible with the `PeftMixedModel`"):
        get_peft_model(SEQUENTIAL.base(), RLoraConfig(target_modules=["0"]), mixed=True)
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="RLORA"):
        hotswap_adapter(model, tmp_path, "default")


def test_the_model_card_says_which_import_loading_needs(tmp_path):
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets)
    for _ in range(2):
        model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---") and text.count("import rlora_min") == 1
    model.add_adapter("second", RLoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path)
    assert "import rlora_min" in (tmp_path / "second" / "README.md").read_text()
    assert not list(tmp_path.rglob("*.new"))
