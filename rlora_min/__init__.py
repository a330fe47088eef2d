"""R-LoRA (randomized multi-head LoRA, arXiv 2502.15455) as a PEFT tuner.

Importing this package registers the tuner with PEFT under the type "RLORA". The whole method is in
`rlora_min.rlora`.
"""

from .rlora import (
    RLoraConfig,
    RLoraLayer,
    RLoraModel,
    export_lora,
    head_similarity,
    record_routing,
)

__all__ = [
    "RLoraConfig",
    "RLoraLayer",
    "RLoraModel",
    "export_lora",
    "head_similarity",
    "record_routing",
]
