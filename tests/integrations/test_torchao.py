"""torchao: a model whose linear layers were quantized is the plain model with the same numbers."""

import copy

import pytest
import torch
from one_step import WIDE, assert_merging_is_refused, assert_same_step, case, far, one_step
from peft import PeftModel
from rlora_helpers import KINDS, METHODS, adapt, evaluated, layers_of, perturb
from torch import Tensor, nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)

from rlora_min import export_lora

pytestmark = pytest.mark.integrations
CONFIGS = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4),
    "float8": Float8WeightOnlyConfig(),
}
# In fp32: torchao multiplies by the scales after the product, and dense numbers have them inside.
BOUND = 1e-4


def quantize(model: nn.Module, which: str, config) -> None:
    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and which in name

    quantize_(model, config, filter_fn=chosen)


def is_quantized(weight: Tensor) -> bool:
    return type(weight) is not nn.Parameter


def dense(model: nn.Module) -> nn.Module:
    """The plain model with the numbers that the quantized one has."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.Linear) and is_quantized(module.weight):
            weight = module.weight.dequantize().float()
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    return plain


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("order", ["adapter first", "base first"])
@pytest.mark.parametrize("method", ["rlora", "mlora"])
def test_a_step_on_a_quantized_base(method, order, config):
    model, inputs = case(method, dtype=torch.float32)
    if order == "adapter first":
        quantize(model, "base_layer", CONFIGS[config])
    else:
        base = model.unload()
        quantize(base, "proj", CONFIGS[config])
        settings = METHODS[method] | {"lora_dropout": 0.0, "init_seed": 0}
        model = perturb(adapt(base, KINDS["llama"].targets, **settings))
    assert all(is_quantized(layer.get_base_layer().weight) for layer in layers_of(model))
    plain = dense(model)
    assert_same_step(one_step(model, inputs), one_step(plain, inputs), BOUND)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "which", ["rlora_A.", "rlora_B.", "rlora_router", "rlora_A0", "rlora_B0", ""]
)
def test_the_parts_quantized_as_well(which, config):
    # As for serving: the whole model, or any part of it, after training.
    model, inputs = case(dtype=torch.float32)
    before = evaluated(model, inputs)
    quantize(model, which, CONFIGS[config])
    names = [name for name, p in model.named_parameters() if is_quantized(p) and which in name]
    assert len(names) >= len(layers_of(model))
    out = evaluated(model, inputs)
    assert far(out, evaluated(dense(model), inputs)) < BOUND
    assert far(out, before) > BOUND  # it was quantized


@pytest.mark.parametrize("config", CONFIGS)
def test_saved_and_loaded_on_a_base_quantized_again(config, tmp_path):
    model, inputs = case(dtype=torch.float32)
    quantize(model, "base_layer", CONFIGS[config])
    model.save_pretrained(tmp_path)
    base = KINDS["llama"].base(**WIDE["llama"])
    for target in KINDS["llama"].targets:
        quantize(base, target, CONFIGS[config])
    again = PeftModel.from_pretrained(base, tmp_path)
    assert all(is_quantized(layer.get_base_layer().weight) for layer in layers_of(again))
    found = evaluated(again, inputs)
    assert torch.equal(found, evaluated(model, inputs))
    with again.disable_adapter():
        assert far(evaluated(again, inputs), found) > 0.01


def test_activations_in_int8():
    # What torchao rounds on the way depends on the data; so the step is that to int8's rounding.
    model, inputs = case("mlora", dtype=torch.float32)
    quantize(model, "base_layer", Int8DynamicActivationInt8WeightConfig())
    assert far(evaluated(model, inputs), evaluated(dense(model), inputs)) < 0.1


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("safe", [False, True])
# all of the base, or a part of it
@pytest.mark.parametrize("which", ["base_layer", "layers.1.mlp.up_proj.base_layer"])
def test_merging_into_a_quantized_base_is_refused(which, safe, config):
    model, inputs = case("mlora", dtype=torch.float32)
    quantize(model, which, CONFIGS[config])
    assert_merging_is_refused(model, inputs, safe_merge=safe)


def test_a_quantized_adapter_is_not_exported(tmp_path):
    model, _ = case("mlora", dtype=torch.float32)
    quantize(model, "rlora_B.", CONFIGS["int8"])
    with pytest.raises(ValueError, match="B of 'default' must be a whole, dense tensor"):
        export_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())
