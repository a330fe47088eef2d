"""Exact counts of one projection with an adapter, on the meta device: nothing is computed."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rlora_min import RLoraConfig

from ..models.methods import equal_lora_rank
from ..models.published_loops import PublishedHydraLora, PublishedRLora
from .instruments import Work, kept_bytes

PUBLISHED = {"published-rlora": PublishedRLora, "published-hydralora": PublishedHydraLora}


def make_layer(
    method: str,
    d_in: int,
    d_out: int,
    r: int = 4,
    N: int = 5,
    p: float = 0.1,
    device: str = "meta",
) -> nn.Module:
    """One projection with an adapter of `rlora_lab.speed.cases`, training; LoRA at equal size."""
    linear = nn.Linear(d_in, d_out, bias=False, device=device)
    W0 = nn.Sequential(linear.requires_grad_(False))
    settings = {"target_modules": ["0"], "lora_alpha": 32, "lora_dropout": p}
    if method == "lora":
        rank = equal_lora_rank(d_in, d_out, r, N)
        config = LoraConfig(r=rank, use_rslora=True, **settings)
    elif method == "rlora":
        config = RLoraConfig(r=r, num_heads=N, **settings)
    elif method == "base":
        return W0
    else:
        with torch.device(device):
            return PUBLISHED[method](W0[0], r, N, 32, p)
    return get_peft_model(W0, config).train()


def watch(
    method: str,
    T: int,
    d_in: int,
    d_out: int,
    dtype: torch.dtype = torch.float32,
    **settings: float,
) -> tuple[Work, int]:
    """The work of a step of T tokens, and what it keeps, less parameters."""
    layer = make_layer(method, d_in, d_out, **settings).to(dtype)
    x = torch.empty(T, d_in, device="meta", dtype=dtype, requires_grad=True)
    with Work() as work:
        layer(x).sum().backward()
    return work, kept_bytes(layer, lambda: layer(x))[1]


def count(
    method: str, T: int, d_in: int, d_out: int, **settings: float
) -> tuple[int, int, int, int]:
    """FLOPs, bytes moved, operations, bytes kept."""
    work, kept = watch(method, T, d_in, d_out, **settings)
    return work.flops, work.bytes, len(work.ops), kept
