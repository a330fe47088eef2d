"""The cells of 05_random_heads.ipynb that others use.

Written by `make execute` from the cells tagged `export`: change them there.
"""

import math

import torch
from torch import nn
from torch.nn.functional import linear


class RandomHeadsLinear(nn.Module):
    """h = W0 x + s sum_i g_i B_i A x, less what the heads write at the start."""

    def __init__(self, base, r=4, N=3, alpha=32, gamma=64, start="side pair"):
        assert start in ("side pair", "subtract", "centre"), start
        super().__init__()
        d_out, d_in = base.weight.shape
        self.base = base.requires_grad_(False)  # W0: (d_out, d_in), frozen
        self.s, self.start = alpha / math.sqrt(r), start
        A = torch.randn(r, d_in) * d_out**0.25 / math.sqrt(gamma * d_in)
        B = torch.randn(d_out, N, r) * d_out**0.25 / math.sqrt(gamma * d_out)
        if start == "side pair":
            self.A0, self.B0 = nn.Buffer(A.clone()), nn.Buffer(B.mean(1))
        elif start == "subtract":
            base.weight.data -= self.s * B.mean(1) @ A
        else:
            B = B - B.mean(1, keepdim=True)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.W_r = nn.Parameter(torch.zeros(N, d_in))

    def forward(self, x):
        g, Ax = linear(x, self.W_r).softmax(-1), linear(x, self.A)
        heads = self.s * g[..., None] * Ax[..., None, :]  # (..., N, r)
        h = self.base(x) + linear(heads.flatten(-2), self.B.flatten(1))
        if self.start == "side pair":
            h = h - self.s * linear(linear(x, self.A0), self.B0)
        return h  # (..., d_out)
