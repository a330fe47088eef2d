"""One head, zero heads, no router, input dropout: PEFT's LoRA, number for number."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rlora_helpers import METHODS, STRICT, adapt, output, perturb

pytestmark = STRICT


def pair(kind, use_rslora):
    """The same base under R-LoRA set to be LoRA and under LoRA, with the same perturbed A and B."""
    shared = dict(r=3, lora_alpha=6, lora_dropout=0.3, use_rslora=use_rslora)
    ours = adapt(kind.base().double(), kind.targets, **METHODS["lora"] | shared)
    perturb(ours)
    fan_in_fan_out = kind.build.__name__ == "gpt2"
    config = LoraConfig(target_modules=list(kind.targets), fan_in_fan_out=fan_in_fan_out, **shared)
    theirs = get_peft_model(kind.base().double(), config)
    theirs.load_state_dict(
        {k.replace("rlora_", "lora_"): v for k, v in ours.state_dict().items()}, strict=True
    )
    return ours, theirs


def parameters(model):
    named = model.named_parameters()
    return {n.replace("rlora_", "lora_"): p for n, p in named if p.requires_grad}


@pytest.mark.parametrize("use_rslora", [True, False])
def test_forward_gradients_and_ten_steps_equal_pefts_lora_with_dropout_from_one_seed(
    kind, use_rslora
):
    ours, theirs = pair(kind, use_rslora)
    inputs = kind.inputs(dtype=torch.float64)
    assert torch.allclose(output(ours, inputs), output(theirs.eval(), inputs), rtol=0, atol=1e-12)

    optimizers = [
        torch.optim.AdamW(parameters(model).values(), lr=1e-2, weight_decay=0.01)
        for model in (ours, theirs)
    ]
    assert parameters(ours).keys() == parameters(theirs).keys()
    before = {name: p.detach().clone() for name, p in parameters(ours).items()}
    for step in range(10):
        outputs = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model.train()
            torch.manual_seed(step)  # the masks of this step, the base's own dropout with them
            optimizer.zero_grad()
            outputs.append(output(model, kind.inputs(step, dtype=torch.float64)))
            outputs[-1].square().mean().backward()
        assert torch.allclose(*outputs, rtol=0, atol=1e-10)
        for name, p in parameters(ours).items():
            q = parameters(theirs)[name]
            assert torch.allclose(p.grad, q.grad, rtol=1e-8, atol=1e-12), (step, name)
        for optimizer in optimizers:
            optimizer.step()
    for name, p in parameters(ours).items():
        # Adam divides by the gradient's size, and so enlarges the rounding of small gradients
        assert torch.allclose(p, parameters(theirs)[name], rtol=0, atol=1e-7), name
        assert not torch.equal(p, before[name])
