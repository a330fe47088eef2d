"""bitsandbytes: on a base of 4 or 8 bits a step is that of the plain layer with its numbers."""

import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from one_step import TRIED, assert_merging_is_refused, assert_same_step, one_step, replaced
from peft import PeftModel
from rlora_helpers import KINDS, METHODS, adapt, evaluated, layers_of, perturb
from torch import nn

pytestmark = pytest.mark.integrations


def in_4_bits(linear: nn.Linear) -> Linear4bit:
    how = {"bias": False, "compute_dtype": torch.float32, "quant_type": "nf4"}
    made = Linear4bit(linear.in_features, linear.out_features, **how)
    made.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return made.to("cpu")  # which quantizes


def from_4_bits(linear: Linear4bit) -> nn.Linear:
    return dense(dequantize_4bit(linear.weight.data, linear.weight.quant_state))


def in_8_bits(linear: nn.Linear) -> Linear8bitLt:
    how = {"bias": False, "has_fp16_weights": False, "threshold": 0.0}
    made = Linear8bitLt(linear.in_features, linear.out_features, **how)
    made.weight = Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return made.to("cpu")


def from_8_bits(linear: Linear8bitLt) -> nn.Linear:
    scales = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
    return dense(int8_vectorwise_dequant(linear.weight.data, scales))


def dense(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight.float(), requires_grad=False)
    return made


KIND = {
    "4 bits": (Linear4bit, in_4_bits, from_4_bits, 1e-4),
    # Inputs are rounded to eight bits as well.
    "8 bits": (Linear8bitLt, in_8_bits, from_8_bits, 0.1),
}


def base_in(bits: str) -> nn.Module:
    """With its linear layers quantized; the head is left, as is usual."""
    base = KINDS["llama"].base(initializer_range=0.2, hidden_size=64, intermediate_size=128)
    return replaced(base, nn.Linear, KIND[bits][1])  # its blocks have 64 numbers


def quantized(bits: str, method: str) -> nn.Module:
    settings = {"init_seed": 0} | METHODS[method] | {"lora_dropout": 0.0}
    model = perturb(adapt(base_in(bits), KINDS["llama"].targets, **settings), scale=0.05)
    assert all(type(layer.get_base_layer()) is KIND[bits][0] for layer in layers_of(model))
    return model


@pytest.mark.parametrize("bits", KIND)
@pytest.mark.parametrize("method", TRIED)
def test_a_step(method, bits):
    kind, _, undo, bound = KIND[bits]
    model, inputs = quantized(bits, method), KINDS["llama"].inputs(batch=4)
    plain = replaced(copy.deepcopy(model), kind, undo)
    assert_same_step(one_step(model, inputs), one_step(plain, inputs), bound)


@pytest.mark.parametrize("bits", KIND)
@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_refused(bits, safe):
    inputs = KINDS["llama"].inputs()
    assert_merging_is_refused(quantized(bits, "mlora"), inputs, safe_merge=safe)


@pytest.mark.parametrize("bits", KIND)
def test_saved_and_loaded_on_a_base_quantized_again(bits, tmp_path):
    model, inputs = quantized(bits, "rlora"), KINDS["llama"].inputs()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_in(bits), tmp_path)
    found = evaluated(again, inputs)
    assert torch.equal(found, evaluated(model, inputs))
    with again.disable_adapter():
        assert not torch.allclose(found, evaluated(again, inputs), atol=1e-3)
