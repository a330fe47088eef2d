"""The methods by name, at equal numbers of trainable parameters.

| name | heads start | dropout sits | router |
| --- | --- | --- | --- |
| `lora` | one head, zeros | on x | none |
| `hydralora` | zeros | on x | softmax |
| `hydralora+dropout` | zeros | on A x, a mask a head | softmax |
| `hydralora+init` | random | on x | softmax |
| `mlora` | random | on A x, a mask a head | none: heads averaged |
| `rlora` | random | on A x, a mask a head | softmax |

HydraLoRA is in the form that R-LoRA's authors compare with (arXiv 2502.15455, Table 5), M-LoRA is
arXiv 2508.05078. The measure of size is R-LoRA's A + heads + router at the r and num_heads asked
for. HydraLoRA and the two ablations have the same. `lora` takes in each module the rank that comes
closest, and `mlora`, which has no router, one rank for all modules, so both are off by the little
that `count_trainable` shows. All use alpha / sqrt(r), so the scale of `lora` differs a little from
module to module.
"""

import re

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import set_seed

from rlora_min import RLoraConfig

from .bases import Base
from .errors import LabError
from .training import Suite

_HYDRA = {"init_heads": "zeros", "dropout_on": "input", "router_init": "kaiming"}
_SETTINGS = {
    "hydralora": _HYDRA,
    "hydralora+dropout": _HYDRA | {"dropout_on": "heads"},
    "hydralora+init": {"dropout_on": "input"},
    "mlora": {"router": "mean"},
    "rlora": {},
}
METHODS = ("lora", *_SETTINGS)


def target_shapes(base: Base) -> dict[str, tuple[int, int]]:
    """`{module path: (d_in, d_out)}` of the base's MLP projections.

    The paths begin at the blocks' own model, below any head for language, so they are endings of
    the paths in whatever wraps it.
    """
    return {
        path: (module.in_features, module.out_features)
        for path, module in base.model.base_model.named_modules()
        if re.fullmatch(base.targets, path)
    }


def rlora_size(d_in: int, d_out: int, r: int, num_heads: int) -> int:
    """Parameters of one R-LoRA layer: A, heads and router."""
    return r * d_in + num_heads * r * d_out + num_heads * d_in


def equal_lora_rank(d_in: int, d_out: int, r: int, num_heads: int) -> int:
    """The LoRA rank whose A + B comes closest to `rlora_size`, at least 1."""
    return max(1, round(rlora_size(d_in, d_out, r, num_heads) / (d_in + d_out)))


def equal_mlora_rank(shapes: dict[str, tuple[int, int]], r: int, num_heads: int) -> int:
    """The one rank whose A + heads over all modules come closest to `rlora_size`, at least 1."""
    wanted = sum(rlora_size(*shape, r, num_heads) for shape in shapes.values())
    return max(1, round(wanted / sum(i + num_heads * o for i, o in shapes.values())))


def adapter_config(
    method: str,
    base: Base,
    *,
    r: int = 4,
    num_heads: int = 3,
    lora_alpha: float = 32,
    lora_dropout: float = 0.1,
    init_seed: int | None = None,
    modules_to_save: list[str] | None = None,
) -> PeftConfig:
    """PEFT's configuration of a method on the MLP projections of a base.

    Raises:
        LabError: an unknown method.
        ValueError: what `LoraConfig` and `RLoraConfig` refuse.
    """
    if method not in METHODS:
        raise LabError(f"unknown method {method!r}: allowed are {', '.join(METHODS)}")
    shared = {
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": base.targets,
        "modules_to_save": modules_to_save,
        "use_rslora": True,
    }
    shapes = target_shapes(base)
    if method == "lora":
        ranks = {path: equal_lora_rank(*shape, r, num_heads) for path, shape in shapes.items()}
        return LoraConfig(r=max(ranks.values()), rank_pattern=ranks, **shared)
    if method == "mlora":
        r = equal_mlora_rank(shapes, r, num_heads)
    return RLoraConfig(r=r, num_heads=num_heads, init_seed=init_seed, **_SETTINGS[method], **shared)


def adapt(method: str, base: Base, suite: Suite, *, seed: int, **settings) -> PeftModel:
    """The base, made ready for a suite, with a fresh adapter in it.

    `seed` decides all that is drawn; `settings` are those of `adapter_config`. The adapter goes
    into `base.model` itself: load the base anew for the next one.
    """
    set_seed(seed)
    model = suite.model(base)
    config = adapter_config(
        method, base, init_seed=seed, modules_to_save=suite.modules_to_save, **settings
    )
    return get_peft_model(model, config)


def count_trainable(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters: those of the adapter, and others (classification heads)."""
    adapter = other = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if re.search(r"\.(lora|rlora)_", name):
                adapter += parameter.numel()
            else:
                other += parameter.numel()
    return adapter, other
