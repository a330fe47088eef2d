"""The layers that chapters build by hand, in the settings that their own proofs leave out.

A chapter proves its class equal to PEFT's or `rlora_min`'s: output, gradients, and what is trained
after some steps.
"""

import pytest
import torch
from chapter_code import chapter_code
from rlora_helpers import equation
from torch import nn

from rlora_min import RLoraConfig


@torch.no_grad()
@pytest.mark.parametrize(
    ("notebook", "name", "settings"),
    [
        ("02_lora_from_scratch", "LoRALinear", {"rslora": True}),
        ("04_many_heads", "HeadsLinear", {"N": 1}),
        ("05_random_heads", "RandomHeadsLinear", {"N": 1}),
        ("06_head_dropout", "DropoutHeadsLinear", {"N": 1}),
        ("07_rlora", "RLoRALinear", {"N": 1}),
    ],
)
def test_the_layer_is_the_equation_and_its_base_is_frozen(notebook, name, settings):
    torch.manual_seed(0)
    made = getattr(chapter_code(notebook), name)
    layer = made(nn.Linear(12, 20), r=4, alpha=8, **settings).double().eval()
    for tensor in layer.state_dict().values():
        tensor.add_(0.3 * torch.randn_like(tensor))
    parts = {key: getattr(layer, key) for key in ("A", "B", "A0", "B0") if hasattr(layer, key)}
    parts["B"], g = layer.B.flatten(1), torch.ones(7, 1).double()  # one head has all the weight
    x, config = torch.randn(7, 12).double(), RLoraConfig(r=4, lora_alpha=8, num_heads=1)
    torch.testing.assert_close(layer(x), layer.base(x) + equation(x, parts, config, g=g))
    assert not layer.base.weight.requires_grad
