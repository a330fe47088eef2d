"""The cells of 15_looking_inside.ipynb that others use.

Written by `make execute` from the cells tagged `export`: change them there.
"""

import math
import re
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn.functional import linear

from rlora_min import RLoraLayer


def layers_of(model):
    """`{"0 gate": layer, ...}`: block and projection."""
    pattern, found = re.compile(r"layers\.(\d+)\.mlp\.(\w+)_proj$"), {}
    for path, module in model.named_modules():
        if isinstance(module, RLoraLayer):
            found[" ".join(pattern.search(path).groups())] = module
    return found


def terms(layer, x):
    """g (..., N) and u_i = s g_i B_i A x (..., N, d_out)."""
    g, N = layer.routing(x), layer.configs["default"].num_heads
    Ax = linear(x, layer.rlora_A["default"].weight)
    B = layer.rlora_B["default"].weight.unflatten(1, (N, -1))  # (d_out, N, r)
    s = layer.configs["default"].scaling
    return g, s * g[..., None] * torch.einsum("onr,...r->...no", B, Ax)


@contextmanager
def changed(layer, rule):
    """Inside, the layer gives `rule(h, g, u)` in place of h."""
    hook = layer.register_forward_hook(lambda m, x, h: rule(h, *terms(m, x[0])))
    try:
        yield
    finally:
        hook.remove()


def off(i):
    """Head i gives nothing, the others stay."""
    return lambda h, g, u: h - u[..., i, :]


def closed(i):
    """Head i gives nothing, the others share its weight."""

    def rule(h, g, u):
        share = g[..., i, None] / (1 - g[..., i, None]).clamp_min(1e-6)
        return h - u[..., i, :] + share * (u.sum(-2) - u[..., i, :])

    return rule


def H(g):
    """Entropy as a share of ln N, over the last dimension."""
    return torch.special.entr(g).sum(-1) / math.log(g.shape[-1])


def told(groups):
    """How much the group (first dimension) tells about the head (last)."""
    return H(groups.mean(0)) - H(groups).mean(0)


def mean_cosine(matrices):
    """The mean over layers and pairs of different heads."""
    pairs = (m[~torch.eye(len(m), dtype=bool)] for m in matrices.values())
    return np.mean([cosines.mean() for cosines in pairs])


SHUFFLES = 500


def null(examples, seed=0):
    """`told` by task for shuffled labels; examples (T, n, N), row by row."""
    generator, values = torch.Generator().manual_seed(seed), []
    for _ in range(SHUFFLES):
        order = torch.rand(examples.shape[:2], generator=generator).argsort(0)
        shuffled = examples.gather(0, order[..., None].expand_as(examples))
        values.append(told(shuffled.mean(1)))
    return torch.stack(values)


def third(i):
    """Every head gives a third less."""
    return lambda h, g, u: h - u.sum(-2) / 3


def noise(i):
    """Noise as large as what head i gives, and the head stays."""

    def rule(h, g, u):
        generator = torch.Generator().manual_seed(i)
        random = torch.randn(h.shape, generator=generator).to(h)
        size = u[..., i, :].norm(dim=-1, keepdim=True)
        return h + size * random / random.norm(dim=-1, keepdim=True)

    return rule


def rise(model, rule, losses):
    """How much each task's loss rises (heads of all layers, T)."""
    before, found = losses(model), []
    for layer in layers_of(model).values():
        for i in range(layer.configs["default"].num_heads):
            with changed(layer, rule(i)):
                found.append(losses(model) - before)
    return torch.stack(found)
