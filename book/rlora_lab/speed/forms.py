"""R-LoRA's update in two other forms, tried where a bar was missed on CPUs.

| name | what differs from `rlora_min.rlora.rlora_update` |
| --- | --- |
| `rlora-apart` | nothing is stacked: five products in place of two, no copy of the weights |
| `rlora-folded` | the first product puts out all that the second takes, with the side pair's |

Both are the same function, for a softmax router, random heads and dropout on the heads.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlora_min import RLoraLayer
from rlora_min.rlora import routing_weights, weighted_heads

Mask = Callable[[Tensor], Tensor] | None


def apart(
    x: Tensor, A: Tensor, B: Tensor, W_r: Tensor, A0: Tensor, B0: Tensor, s: float, mask: Mask
) -> Tensor:
    """Products of x with A, router and A0, and of their outputs with heads and Bbar0, one by one:
    (..., d_in) -> (..., d_out); shapes as in `rlora_update`."""
    Ax = F.linear(x, A)
    g = routing_weights(F.linear(x, W_r)).to(Ax)
    update = F.linear(weighted_heads(Ax, g, s, mask), B)
    return update.sub_(F.linear(F.linear(x, A0), s * B0))


def folded(
    x: Tensor, A: Tensor, B: Tensor, W_r: Tensor, A0: Tensor, B0: Tensor, s: float, mask: Mask
) -> Tensor:
    """One product down to [A x, N times; A0 x; router], one factor for all, one product up."""
    r = A.shape[0]
    N = B.shape[1] // r
    packed = F.linear(x, torch.cat([A.repeat(N, 1), A0, W_r]))
    laid, logits = packed.tensor_split([(N + 1) * r], -1)
    g = routing_weights(logits).to(laid)
    factors = (s * g).repeat_interleave(r, -1)  # (..., N r)
    if mask is not None:
        factors = mask(factors)
    factors = F.pad(factors, (0, r), value=-s)  # the side pair's
    return F.linear(laid * factors, torch.cat([B, B0], 1))


FORMS = {"rlora-apart": apart, "rlora-folded": folded}


def _update(layer: RLoraLayer, form: Callable, x: Tensor, adapter_name: str) -> Tensor:
    config = layer.configs[adapter_name]
    weights = {name: part.weight for name, part in layer._parts(adapter_name).items()}
    dropout = layer.rlora_dropout[adapter_name]
    mask = dropout if layer.training and dropout.p else None
    return form(x.to(weights["A"].dtype), **weights, s=config.scaling, mask=mask)


def use_form(model: nn.Module, form: Callable) -> None:
    """Let every R-LoRA layer of a model compute its update in another form."""
    for layer in model.modules():
        if isinstance(layer, RLoraLayer):
            layer._update = partial(_update, layer, form)
