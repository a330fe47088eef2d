"""Two things that comparisons need and `rlora_min` does not have, as a PEFT type of the lab.

- A rank for each module (`rank_pattern`, as in PEFT's LoRA), so that methods without a router come
  as close to R-LoRA's size as LoRA does.
- HydraLoRA's own input masks (arXiv 2404.19245), one on x for each head:

      h(x) = W0 x + (alpha / r) sum_i g_i(x) B_i A D_i(x)

  In R-LoRA's authors' form all heads share one mask on x; in R-LoRA the masks sit on A x.
"""

import copy
from dataclasses import dataclass

import peft
import torch.nn.functional as F
from peft.utils.other import get_pattern_key
from torch import Tensor

from rlora_min import RLoraConfig, RLoraLayer, RLoraModel


@dataclass
class VariantConfig(RLoraConfig):
    """`RLoraConfig` with two more settings; wrong ones are a ValueError."""

    rank_pattern: dict[str, int] | None = None  # ends of module paths to ranks; others have r
    mask_per_head: bool = False  # a mask on x for each head; needs zero heads, dropout_on="input"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "RLORA_VARIANT"
        if self.mask_per_head and (self.init_heads, self.dropout_on) != ("zeros", "input"):
            raise ValueError("mask_per_head needs init_heads='zeros' and dropout_on='input'.")


class VariantLayer(RLoraLayer):
    """An `RLoraLayer` that can draw a mask on x for each head."""

    def _update(self, x: Tensor, adapter_name: str) -> Tensor:
        """(..., d_in) -> (..., d_out)"""
        config = self.configs[adapter_name]
        if not (config.mask_per_head and self.training):
            return super()._update(x, adapter_name)
        A, B = self.rlora_A[adapter_name].weight, self.rlora_B[adapter_name].weight
        x = self._cast_input_dtype(x, A.dtype)
        g = self.routing(x, adapter_name).to(x)  # (..., N)
        copies = x.unsqueeze(-2).expand(*x.shape[:-1], config.num_heads, -1)  # (..., N, d_in)
        down = F.linear(F.dropout(copies, config.lora_dropout), A)  # A D_i(x): (..., N, r)
        return F.linear((config.scaling * g.unsqueeze(-1) * down).flatten(-2), B)


class VariantModel(RLoraModel):
    """The tuner of `VariantConfig`."""

    tuner_layer_cls = VariantLayer

    def _create_and_replace(self, config, adapter_name, target, name, parent, current_key) -> None:
        pattern = config.rank_pattern or {}
        own = copy.copy(config)
        own.r = pattern.get(get_pattern_key(pattern, current_key), config.r)
        layer = VariantLayer(target, adapter_name, own, current_key)
        self._replace_module(parent, name, layer, target)


peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["RLORA_VARIANT"] = VariantConfig
peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["RLORA_VARIANT"] = VariantModel
peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["RLORA_VARIANT"] = VariantModel.prefix
