"""A causal language model that is asked for answers only, whole or by its upper blocks alone.

On CPUs two things save most of the time of a step. The head, a product with every word of the
vocabulary, is computed where an answer is asked for and nowhere else. And where only the upper
blocks have adapters, the lower ones give the same outputs at every step: `lower_outputs` computes
them once and keeps them in a file that is mapped into memory, for `AnswerModel` to begin with.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn
from tqdm import tqdm

from .oracle import TASKS

GROUPS = 4  # of equal size, that a training batch is computed in
BATCH = 64  # rows at once, where nothing is trained


class _Skipped(nn.Module):
    """Stands where a block was, so that the others keep their names: hands on what it gets."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)  # Qwen's models ask for it

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states


def skip_blocks(model: nn.Module, which: range) -> None:
    """Take blocks out of a causal language model, in place."""
    layers = model.base_model.layers
    for i in which:
        layers[i] = _Skipped(layers[i])


def has_bf16() -> bool:
    """Whether this machine has units for bf16; without them it is slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


class AnswerModel(nn.Module):
    """A Llama or the like, whose parts keep their names: an adapter of one fits the other.

    Rows are padded on the right. A causal model does not look there, so it needs no mask.

    Args:
        causal: the whole model, or one whose lower blocks are skipped.
        bf16: compute products in bf16, by autocast.
    """

    def __init__(self, causal: nn.Module, bf16: bool) -> None:
        super().__init__()
        self.model = causal.base_model
        self.lm_head = causal.get_output_embeddings()
        self.bf16 = bf16

    def forward(
        self,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        tasks: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What is answered at the places whose label is not -100.

        Args:
            attention_mask: (n, tokens), 0 after a row's end.
            labels: (n, tokens), the tokens themselves: they are shifted here.
            input_ids: (n, tokens), for a whole model.
            inputs_embeds: (n, tokens, width), for an upper part: what the lower blocks put out.
            tasks: (n,), the number of each row's task, for an adapter that is told.

        Returns:
            `logits` (answer tokens, words) in the order of the labels, and `loss`, the mean cross
            entropy; nothing without labels.
        """
        name, inputs = "input_ids", input_ids
        if inputs_embeds is not None:
            name, inputs = "inputs_embeds", inputs_embeds
        parts = torch.arange(len(attention_mask), device=attention_mask.device)
        hidden, targets = [], []
        with torch.autocast(attention_mask.device.type, torch.bfloat16, enabled=self.bf16):
            # Each part has its own longest row: padded to that of the batch, half of what is
            # computed would be padding. `collate` puts short rows beside short ones.
            for part in parts.chunk(GROUPS if self.training else 1):
                longest = int(attention_mask[part].sum(1).max())
                own = {name: inputs[part, :longest], "use_cache": False}
                told = TASKS.set(None if tasks is None else tasks[part])
                states = self.model(**own).last_hidden_state
                TASKS.reset(told)
                if labels is not None:
                    wanted = labels[part, 1:longest]
                    hidden.append(states[:, :-1][wanted != -100])
                    targets.append(wanted[wanted != -100])
            if labels is None:
                return {}
            logits = self.lm_head(torch.cat(hidden))
        logits = logits.float()
        return {"logits": logits, "loss": F.cross_entropy(logits, torch.cat(targets))}


def as_matrix(head: nn.Module) -> None:
    """Let a model's head see whole tensors only, in place.

    A model that keeps the last places alone hands its head a slice. On CPUs torch multiplies that
    row by row, and in bf16 copies the head's weights, all words of the vocabulary, once a row.
    """
    head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of tokens, padded on the right with 0, and their mask; both (n, longest)."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.tensor([token for row in rows for token in row])
    return ids, mask


def _digest(model: nn.Module, rows: Sequence[Sequence[int]], words: str) -> str:
    digest = hashlib.sha256(f"{words} {list(rows)}".encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.float().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def lower_outputs(
    causal: nn.Module, blocks: int, rows: Sequence[Sequence[int]], folder: Path, bf16: bool
) -> np.ndarray:
    """What the lowest `blocks` blocks put out for rows of tokens, in fp32.

    It is computed once and kept in `folder`, in a file named by the weights, the rows, and how they
    are computed; other processes wait for it.

    Returns:
        (tokens of all rows, width), mapped from the file.
    """
    how = f"{blocks} blocks, bf16 {bf16}, torch {torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    with _lower_blocks(causal, blocks) as model:
        path = folder / f"lower-{_digest(model, rows, how)}.npy"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _write_outputs(model, rows, path, bf16)
    return np.load(path, mmap_mode="r")


@contextmanager
def _lower_blocks(causal: nn.Module, blocks: int) -> Iterator[nn.Module]:
    """The model below its head, for a while without its upper blocks and its last norm."""
    model = causal.base_model
    upper = range(blocks, len(model.layers))
    whole = [*model.layers], model.norm
    skip_blocks(causal, upper)
    model.norm = nn.Identity()
    try:
        yield model
    finally:
        layers, model.norm = whole
        for i in upper:
            model.layers[i] = layers[i]


def _write_outputs(model: nn.Module, rows: Sequence[Sequence[int]], path: Path, bf16: bool) -> None:
    """The file, whole or not at all."""
    ends = np.cumsum([len(row) for row in rows])
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    shape = (int(ends[-1]), model.config.hidden_size)
    unfinished = path.with_suffix(".part")  # what a killed process leaves is written over
    try:
        file = np.lib.format.open_memmap(unfinished, "w+", np.float32, shape)
        for first in tqdm(range(0, len(rows), BATCH), "lower blocks", disable=None):
            batch = order[first : first + BATCH]
            ids, mask = pad([rows[i] for i in batch])
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                states = model(input_ids=ids, use_cache=False).last_hidden_state
            for i, state in zip(batch, states, strict=True):
                length = len(rows[i])
                file[ends[i] - length : ends[i]] = state[:length].float().numpy()
        file.flush()
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
