"""The cells of 04_many_heads.ipynb that others use.

Written by `make execute` from the cells tagged `export`: change them there.
"""

import math

import torch
from torch import nn
from torch.nn.functional import linear

from rlora_lab.chapters.ch02_lora_from_scratch import (
    trained,
)


class HeadsLinear(nn.Module):
    """h = W0 x + s sum_i g_i(x) B_i A x, for x of shape (..., d_in)."""

    def __init__(self, base, r=4, N=3, alpha=32, router="kaiming"):
        super().__init__()
        d_out, d_in = base.weight.shape
        self.base = base.requires_grad_(False)  # W0: (d_out, d_in), frozen
        self.A = nn.Parameter(torch.empty(r, d_in))
        self.B = nn.Parameter(torch.zeros(d_out, N, r))  # B_i is B[:, i - 1]
        self.W_r = nn.Parameter(torch.zeros(N, d_in))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if router == "kaiming":  # else "zeros": a uniform router
            nn.init.kaiming_uniform_(self.W_r, a=math.sqrt(5))
        self.s = alpha / math.sqrt(r)

    def forward(self, x):
        g = linear(x, self.W_r).softmax(-1)  # (..., d_in) -> (..., N)
        Ax = linear(x, self.A)  # (..., d_in) -> (..., r)
        heads = self.s * g[..., None] * Ax[..., None, :]  # (..., N, r)
        heads = heads.flatten(-2)  # (..., N r)
        return self.base(x) + linear(heads, self.B.flatten(1))  # (..., d_out)


PARTS = {"A": "rlora_A", "B": "rlora_B", "W_r": "rlora_router"}


def same_numbers(ours, theirs, parts):
    """Moves our numbers away from the start, gives PEFT's layers the same, and
    pairs what is trained."""
    torch.manual_seed(0)
    pairs = []
    for path, layer in ours.named_modules():
        if not hasattr(layer, "W_r"):
            continue
        peft = theirs.base_model.model.get_submodule(path)
        for name, part in parts.items():
            our = getattr(layer, name)
            their = getattr(peft, part)["default"].weight
            if our.requires_grad:
                our.data += 0.1 * torch.randn_like(our)
                pairs.append((our, their))
            their.data.copy_(our.data.view_as(their))
    assert len(pairs) == len(trained(theirs))
    return pairs


def two_kinds(seed, d=16, r=2, n=256):
    """Tokens x, what to add to W0 x for each, and its kind: 0 or 1."""
    torch.manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64)
    read = torch.randn(r, d, dtype=torch.float64) / math.sqrt(d)
    write = torch.randn(2, d, r, dtype=torch.float64)  # one for each kind
    kind = (x[:, 0] > 0).long()
    return x, torch.einsum("nor,nr->no", write[kind], linear(x, read)), kind


def toy(N, router, seed):
    torch.manual_seed(seed)
    base = nn.Linear(16, 16, bias=False)
    return HeadsLinear(base, r=2, N=N, alpha=4, router=router).double()


def fit(layer, optimizer, x, extra):
    """One step towards W0 x + extra; gives the loss before it."""
    optimizer.zero_grad()
    loss = (layer(x) - layer.base(x) - extra).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()
