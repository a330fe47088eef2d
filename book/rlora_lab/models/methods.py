"""The methods by name, at equal numbers of trainable parameters.

| name | heads start | dropout sits | router |
| --- | --- | --- | --- |
| `lora` | one head, zeros | on x | none |
| `lora-classic` | the same at scale alpha / r | | |
| `lora-rank` | the same at R-LoRA's rank, so with fewer parameters | | |
| `hydralora` | zeros | on x | softmax |
| `hydralora-own` | the same at alpha / r, with a mask on x for each head | | |
| `hydralora+dropout` | zeros | on A x, a mask a head | softmax |
| `hydralora+init` | random | on x | softmax |
| `one-head` | one head, random | on A x | none |
| `mlora` | random | on A x, a mask a head | none: heads averaged |
| `mlora-nodropout` | random | nowhere | none: heads averaged |
| `rlora-centered` | random, less their mean | on A x, a mask a head | softmax |
| `rlora` | random | on A x, a mask a head | softmax |

`hydralora` is in the form that R-LoRA's authors compare with (arXiv 2502.15455, Table 5), and
`hydralora-own` in that of its own authors (arXiv 2404.19245); M-LoRA is arXiv 2508.05078.
`one-head` is the control that separates R-LoRA's two ideas: its random start with the side pair and
its dropout, without several heads.

The measure of size is R-LoRA's A + heads + router at the r and num_heads asked for. HydraLoRA and
the ablations with a router have the same. Methods without one take in each module the rank that
comes closest, so they are off by the little that `count_trainable` shows; `lora-rank` alone is much
smaller. All but `lora-classic` and `hydralora-own` use alpha / sqrt(r), so where ranks differ from
module to module, the scale does too.
"""

import re

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import set_seed

from rlora_min import RLoraConfig

from ..errors import LabError
from ..names import METHODS
from ..tasks.suite import Suite
from .bases import Base
from .hydralora import HydraLoraConfig

_HYDRA = {"init_heads": "zeros", "dropout_on": "input", "router_init": "kaiming"}
_LORA = {"lora": {}, "lora-classic": {"use_rslora": False}, "lora-rank": {}}
_HEADS = {
    "hydralora": _HYDRA,
    "hydralora-own": _HYDRA | {"use_rslora": False},  # and a mask a head
    "hydralora+dropout": _HYDRA | {"dropout_on": "heads"},
    "hydralora+init": {"dropout_on": "input"},
    "one-head": {"num_heads": 1, "router": "mean"},
    "mlora": {"router": "mean"},
    "mlora-nodropout": {"router": "mean", "lora_dropout": 0.0},
    "rlora-centered": {"init_heads": "centered"},
    "rlora": {},
}


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


def equal_rank(d_in: int, d_out: int, r: int, num_heads: int, heads: int) -> int:
    """The rank whose A + `heads` heads, without a router, come closest to `rlora_size`; >= 1."""
    return max(1, round(rlora_size(d_in, d_out, r, num_heads) / (d_in + heads * d_out)))


def equal_lora_rank(d_in: int, d_out: int, r: int, num_heads: int) -> int:
    """The LoRA rank whose A + B comes closest to `rlora_size`, at least 1."""
    return equal_rank(d_in, d_out, r, num_heads, heads=1)


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
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": base.targets,
        "modules_to_save": modules_to_save,
        "use_rslora": True,
    }

    def equal_ranks(heads: int) -> dict:
        ranks = {
            path: equal_rank(*shape, r, num_heads, heads)
            for path, shape in target_shapes(base).items()
        }
        return {"r": max(ranks.values()), "rank_pattern": ranks}

    if method in _LORA:
        ranks = {} if method == "lora-rank" else equal_ranks(1)
        return LoraConfig(**shared | ranks | _LORA[method])
    settings = shared | {"num_heads": num_heads, "init_seed": init_seed} | _HEADS[method]
    if settings.get("router") == "mean":
        settings |= equal_ranks(settings["num_heads"])
    return HydraLoraConfig(**settings) if method == "hydralora-own" else RLoraConfig(**settings)


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
