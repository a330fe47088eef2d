"""The cells of 04b_alike_heads.ipynb that others use.

Written by `make execute` from the cells tagged `export`: change them there.
"""

import torch


def cosine(heads):
    """Mean cosine between two heads of (d_out, N, r); of zero heads nan."""
    rows = heads.detach().double().transpose(0, 1).flatten(1)  # (N, d_out r)
    rows = rows / rows.norm(dim=1, keepdim=True)
    between = (rows @ rows.T)[~torch.eye(len(rows), dtype=torch.bool)]
    return between.nanmean().item()
