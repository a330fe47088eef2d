"""HydraLoRA with its own input masks (arXiv 2404.19245), one on x for each head, as a PEFT type:

    h(x) = W0 x + (alpha / r) sum_i g_i(x) B_i A D_i(x)

In R-LoRA's authors' form, which `rlora_min` has, all heads share one mask on x; in R-LoRA the masks
sit on A x.
"""

from dataclasses import dataclass

import peft
import torch.nn.functional as F
from torch import Tensor

from rlora_min import RLoraConfig, RLoraLayer, RLoraModel
from rlora_min.rlora import RLoraType


@dataclass
class HydraLoraConfig(RLoraConfig):
    """`RLoraConfig` with a mask on x for each head; wrong settings are a ValueError."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = RLoraType("HYDRALORA")
        if (self.init_heads, self.dropout_on) != ("zeros", "input"):
            raise ValueError("HydraLoRA needs init_heads='zeros' and dropout_on='input'.")


class HydraLoraLayer(RLoraLayer):
    """An `RLoraLayer` that draws a mask on x for each head in training."""

    def _update(self, x: Tensor, adapter_name: str) -> Tensor:
        """(..., d_in) -> (..., d_out)"""
        if not self.training:
            return super()._update(x, adapter_name)
        config = self.configs[adapter_name]
        A, B = self.rlora_A[adapter_name].weight, self.rlora_B[adapter_name].weight
        x = self._cast_input_dtype(x, A.dtype)
        g = self.routing(x, adapter_name).to(x)  # (..., N)
        copies = x.unsqueeze(-2).expand(*x.shape[:-1], config.num_heads, -1)  # (..., N, d_in)
        down = F.linear(F.dropout(copies, config.lora_dropout), A)  # A D_i(x): (..., N, r)
        return F.linear((config.scaling * g.unsqueeze(-1) * down).flatten(-2), B)


class HydraLoraModel(RLoraModel):
    """The tuner of `HydraLoraConfig`."""

    tuner_layer_cls = HydraLoraLayer


peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["HYDRALORA"] = HydraLoraConfig
peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["HYDRALORA"] = HydraLoraModel
peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["HYDRALORA"] = HydraLoraModel.prefix
