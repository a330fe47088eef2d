"""The methods by name, at equal numbers of trainable parameters.

| name | heads start | dropout sits | router |
| --- | --- | --- | --- |
| `none` | no adapter; nothing is trained | | |
| `heads` | no adapter; what else the suite trains | | |
| `lora` | one head, zeros | on x | none |
| `lora-classic` | the same at scale alpha / r | | |
| `lora-rank` | the same at R-LoRA's rank, so with fewer parameters | | |
| `lora-rank+init` | one head, random, at R-LoRA's rank | on x | none |
| `hydralora` | zeros | on x | softmax |
| `hydralora-classic` | the same at alpha / r | | |
| `hydralora-own` | the same at alpha / r, with a mask on x for each head | | |
| `hydralora+dropout` | zeros | on A x, a mask a head | softmax |
| `hydralora+init` | random | on x | softmax |
| `one-head` | one head, random | on A x | none |
| `mlora` | random | on A x, a mask a head | none: heads averaged |
| `mlora-nodropout` | random | nowhere | none: heads averaged |
| `oracle` | a head a task, zeros | on x | told the task |
| `rlora-centered` | random, less their mean | on A x, a mask a head | softmax |
| `rlora+router` | random | on A x, a mask a head | softmax, random at the start |
| `rlora-moved` | random, and the base moves: no side pair | on A x, a mask a head | softmax |
| `rlora` | random | on A x, a mask a head | softmax |

A softmax router starts at zero in `rlora`, `rlora-centered` and `rlora-moved`. Elsewhere it starts
at random: under a zero router zero heads would stay equal.

`hydralora` is in the form that R-LoRA's authors compare with (arXiv 2502.15455, Table 5), at
R-LoRA's scale. Their released code runs it as `hydralora-classic`, and starts R-LoRA's router as
`rlora+router` does. `hydralora-own` is in the form of its own authors (arXiv 2404.19245); M-LoRA is
arXiv 2508.05078.
`one-head` is the control that separates R-LoRA's two ideas: its random start with the side pair and
its dropout, without several heads.

The measure of size is R-LoRA's A + heads + router at the r and num_heads asked for. HydraLoRA and
the ablations with a router have the same. Methods without one take in each module the rank that
comes closest, so they are off by the little that `count_trainable` shows; `lora-rank` alone is much
smaller, as is `lora-rank+init`. All but `lora-classic`, `hydralora-classic` and `hydralora-own` use
alpha / sqrt(r), so where ranks differ from module to module, the scale does too.
"""

import re

from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import set_seed

from rlora_min import RLoraConfig

from ..errors import LabError
from ..names import UNTRAINED
from ..tasks.suite import Suite
from .bases import Base
from .hydralora import HydraLoraConfig
from .oracle import OracleConfig

_HYDRA = {"init_heads": "zeros", "dropout_on": "input", "router_init": "kaiming"}
_LORA = {"lora": {}, "lora-classic": {"use_rslora": False}, "lora-rank": {}}
_ONE = {"num_heads": 1, "router": "mean"}
_HEADS = {
    "lora-rank+init": _ONE | {"dropout_on": "input"},
    "hydralora": _HYDRA,
    "hydralora-classic": _HYDRA | {"use_rslora": False},
    "hydralora-own": _HYDRA | {"use_rslora": False},  # and a mask a head
    "hydralora+dropout": _HYDRA | {"dropout_on": "heads"},
    "hydralora+init": {"dropout_on": "input"},
    "one-head": _ONE,
    "mlora": {"router": "mean"},
    "mlora-nodropout": {"router": "mean", "lora_dropout": 0.0},
    "oracle": {"init_heads": "zeros", "dropout_on": "input", "router": "mean"},
    "rlora-centered": {"init_heads": "centered"},
    "rlora+router": {"router_init": "kaiming"},
    "rlora-moved": {},
    "rlora": {},
}
_SAME_RANK = ("lora-rank", "lora-rank+init")
_CONFIGS = {"hydralora-own": HydraLoraConfig, "oracle": OracleConfig}


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
    gamma: float = 64,
    num_tasks: int = 1,
    init_seed: int | None = None,
    modules_to_save: list[str] | None = None,
) -> PeftConfig:
    """PEFT's configuration of a method on the MLP projections of a base.

    `gamma` is for random heads, `num_tasks` for the oracle.

    Raises:
        LabError: a method that is unknown or has no adapter.
        ValueError: what `LoraConfig` and `RLoraConfig` refuse.
    """
    known = [*_LORA, *_HEADS]
    if method not in known:
        raise LabError(f"no adapter method {method!r}: allowed are {', '.join(known)}")
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
        ranks = {} if method in _SAME_RANK else equal_ranks(1)
        return LoraConfig(**shared | ranks | _LORA[method])
    own = {"num_heads": num_heads, "gamma": gamma, "init_seed": init_seed}
    settings = shared | own | _HEADS[method]
    if method == "oracle":
        settings["num_heads"] = num_tasks
    if settings.get("router") == "mean" and method not in _SAME_RANK:
        settings |= equal_ranks(settings["num_heads"])
    return _CONFIGS.get(method, RLoraConfig)(**settings)


def adapt(method: str, base: Base, suite: Suite, *, seed: int, **settings) -> nn.Module:
    """The base, made ready for a suite, with a fresh adapter in it: a `PeftModel`, but for the
    methods without an adapter.

    `seed` decides all that is drawn; `settings` are those of `adapter_config`. The adapter goes
    into `base.model` itself: load the base anew for the next one.
    """
    set_seed(seed)
    model = suite.model(base)
    if method in (UNTRAINED, "heads"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.split(".")[0] in (suite.modules_to_save or ())
        return model
    config = adapter_config(
        method,
        base,
        num_tasks=len(suite.tasks),
        init_seed=seed,
        modules_to_save=suite.modules_to_save,
        **settings,
    )
    model = get_peft_model(model, config)
    if method == "rlora-moved":
        for name, parameter in model.named_parameters():
            if ".rlora_B0." in name:
                nn.init.zeros_(parameter)
    return model


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
