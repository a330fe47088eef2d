"""One head, zero heads, no router, input dropout: PEFT's LoRA, number for number."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rlora_helpers import METHODS, STRICT, adapt, gradients_of, output, perturb, trained_of
from torch.testing import assert_close

pytestmark = STRICT


def as_lora(tensors):
    return {name.replace("rlora_", "lora_"): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("use_rslora", [True, False])
def test_forward_gradients_and_ten_steps_equal_pefts_lora_with_dropout_from_one_seed(
    kind, use_rslora
):
    shared = dict(r=3, lora_alpha=6, lora_dropout=0.3, use_rslora=use_rslora)
    ours = perturb(adapt(kind.base().double(), kind.targets, **METHODS["lora"] | shared))
    fan_in_fan_out = kind.build.__name__ == "gpt2"
    config = LoraConfig(target_modules=list(kind.targets), fan_in_fan_out=fan_in_fan_out, **shared)
    theirs = get_peft_model(kind.base().double(), config)
    theirs.load_state_dict(as_lora(ours.state_dict()))
    inputs = kind.inputs(dtype=torch.float64)
    assert_close(output(ours, inputs), output(theirs.eval(), inputs), rtol=0, atol=1e-12)

    optimizers = [
        torch.optim.AdamW(trained_of(model).values(), lr=1e-2, weight_decay=0.01)
        for model in (ours, theirs)
    ]
    before = {name: p.detach().clone() for name, p in trained_of(ours).items()}
    for step in range(10):
        outputs = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model.train()
            torch.manual_seed(step)  # the masks of this step, the base's own dropout with them
            optimizer.zero_grad()
            outputs.append(output(model, kind.inputs(step, dtype=torch.float64)))
            outputs[-1].square().mean().backward()
        assert_close(*outputs, rtol=0, atol=1e-10)
        assert_close(as_lora(gradients_of(ours)), gradients_of(theirs), rtol=1e-8, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
    # Adam divides by the gradient's size, and so enlarges the rounding of small gradients
    assert_close(as_lora(trained_of(ours)), trained_of(theirs), rtol=0, atol=1e-7)
    assert not any(p.equal(before[name]) for name, p in trained_of(ours).items())
