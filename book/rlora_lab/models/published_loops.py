"""The multi-head forms as published, from their equations: what the packed form is measured by.

| class | h(x) | in training |
| --- | --- | --- |
| `PublishedRLora` | (W0 - s Bbar0 A0) x + s sum_i g_i(x) B_i D_i(A x) | a mask D_i on A x a head |
| `PublishedHydraLora` | W0 x + s sum_i g_i(x) B_i A D_i(x) | a mask D_i on x a head |

g(x) = softmax(W_r x), in fp32. Both run over the heads one by one, and each head computes its own
A x: arXiv 2502.15455 and 2404.19245. R-LoRA takes its random start off W0 itself, and its
s is alpha / sqrt(r); HydraLoRA's heads start at zero, and its s is alpha / r. s is folded into
g, a number a token, which is kinder to these forms than a product with each head's whole output.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Heads(nn.Module):
    """W0, A, N heads B_i and the router W_r around one linear layer: (..., d_in) -> (..., d_out)"""

    def __init__(self, base_layer: nn.Linear, r: int, num_heads: int, alpha: float, dropout: float):
        super().__init__()
        d_in, d_out = base_layer.in_features, base_layer.out_features
        self.weight, self.bias = base_layer.weight, base_layer.bias
        self.A = nn.Linear(d_in, r, bias=False)
        self.heads = nn.ModuleList(nn.Linear(r, d_out, bias=False) for _ in range(num_heads))
        self.router = nn.Linear(d_in, num_heads, bias=False)
        self.p, self.s = dropout, self.scaling(r, alpha)
        self.start()

    def base_and_weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W0 x, x in the adapter's type, and s g(x) in that of W0 x: (..., d_out), (..., d_in),
        (..., N)."""
        h, x = F.linear(x, self.weight, self.bias), x.to(self.A.weight.dtype)
        return h, x, (self.s * self.router(x).softmax(-1, torch.float32)).to(h)


class PublishedRLora(_Heads):
    @staticmethod
    def scaling(r: int, alpha: float) -> float:
        return alpha / math.sqrt(r)

    @torch.no_grad()
    def start(self, gamma: float = 64) -> None:
        """Table 1 of the paper, and the mean head taken off a copy of W0."""
        scale = self.weight.shape[0] ** 0.25 / math.sqrt(gamma)
        for linear in (self.A, *self.heads):
            size = linear.in_features if linear is self.A else linear.out_features
            nn.init.normal_(linear.weight, 0, scale / math.sqrt(size))
        self.subtract(torch.stack([B.weight for B in self.heads]).mean(0), self.A.weight)

    @torch.no_grad()
    def subtract(self, B0: Tensor, A0: Tensor) -> None:
        """W0 - s Bbar0 A0, in a weight of its own: other models hold W0 too."""
        start = (self.s * B0 @ A0).to(self.weight)
        self.weight = nn.Parameter(self.weight - start, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h, x, g = self.base_and_weights(x)
        for i, B in enumerate(self.heads):
            h = h + g[..., i : i + 1] * B(F.dropout(self.A(x), self.p, self.training))
        return h.to(g.dtype)


class PublishedHydraLora(_Heads):
    @staticmethod
    def scaling(r: int, alpha: float) -> float:
        return alpha / r

    @torch.no_grad()
    def start(self) -> None:
        nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))
        for B in self.heads:
            B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        h, x, g = self.base_and_weights(x)
        for i, B in enumerate(self.heads):
            h = h + g[..., i : i + 1] * B(self.A(F.dropout(x, self.p, self.training)))
        return h.to(g.dtype)


def publish(model: nn.Module, form: type[_Heads], targets: str, **settings) -> nn.Module:
    """Put a published form around each linear layer whose path matches `targets`; in place."""
    for path, module in list(model.named_modules()):
        if re.fullmatch(targets, path):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, form(module, **settings))
    return model
