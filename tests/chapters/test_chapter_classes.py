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
    ("notebook", "name", "settings", "config"),
    [
        ("02_lora_from_scratch", "LoRALinear", {"rslora": True}, {"router": "mean"}),
        ("07_rlora", "RLoRALinear", {"N": 1}, {}),
    ],
)
def test_the_layer_is_the_equation(notebook, name, settings, config):
    torch.manual_seed(0)
    made = getattr(chapter_code(notebook), name)
    layer = made(nn.Linear(12, 20), r=4, alpha=8, **settings).double().eval()
    for tensor in layer.state_dict().values():
        tensor.add_(0.3 * torch.randn_like(tensor))
    parts = {key: getattr(layer, key) for key in ("A", "B", "A0", "B0") if hasattr(layer, key)}
    parts |= {"B": layer.B.flatten(1), "router": getattr(layer, "W_r", None)}
    x = torch.randn(7, 12).double()
    expected = layer.base(x) + equation(
        x, parts, RLoraConfig(r=4, lora_alpha=8, num_heads=1, **config)
    )
    torch.testing.assert_close(layer(x), expected)
