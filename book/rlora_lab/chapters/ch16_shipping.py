"""The cells of 16_shipping.ipynb that others use.

Written by `make execute` from the cells tagged `export`: change them there.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from rlora_lab.errors import LabError
from rlora_lab.serving.releases import FILES, RELEASE, replace_json, sha256
from rlora_min import RLoraLayer


def fingerprint(base: nn.Module) -> str:
    """SHA-256 of a base's names, shapes and numbers, these rounded to bf16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_release(
    folder: Path,
    base: str,
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    most: int = 16,
    routing: Tensor | None = None,
) -> None:
    """Seal an adapter where it was trained, with answers of at most `most` tokens.

    `routing`, (layers, N), is what a server compares later routing with.
    """
    rows = [(tokenizer.encode(asked), most) for asked in prompts]
    answers = generate(model, tokenizer, rows)
    release = {
        "base": base,
        "files": {name: sha256(folder / name) for name in FILES},
    }
    release["canary"] = []
    for asked, new in zip(prompts, answers, strict=True):
        release["canary"].append([asked, most, tokenizer.decode(new)])
    if routing is not None:
        release["routing"] = routing.tolist()
    replace_json(folder / RELEASE, release)


def check_release(folder: Path, base: str) -> list:
    """The prompts and answers of a release, if all else is as it was sealed."""
    try:
        release = json.loads((folder / RELEASE).read_text())
        made_for, sealed = str(release["base"]), release["files"]
        canary = [(str(a), int(n), str(said)) for a, n, said in release["canary"]]
        kind = json.loads((folder / FILES[0]).read_text())["peft_type"]
        there = [path for path in folder.iterdir() if path.is_file()]
        found = {path.name: sha256(path) for path in there}
        changed = [name for name in FILES if found.get(name) != sealed[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabError(f"{folder.name} can't be read: {error!r}") from error
    strange = sorted(found.keys() - {*FILES, RELEASE, "README.md"})
    if strange:
        why = f"it holds {strange}, which no release has"
    elif changed:
        why = f"{changed} changed since it was sealed, or did not arrive whole"
    elif kind != "RLORA":
        why = f"its type is {kind!r}, and only RLORA is served"
    elif made_for != base:
        why = f"it was made for base {made_for[:12]}, and this is {base[:12]}"
    else:
        return canary
    raise LabError(f"{folder.name} is refused: {why}.")


def load_release(
    model: nn.Module,
    folder: Path,
    base: str,
    tokenizer: Any,
) -> PeftModel:
    """Add a release to a frozen base, or to a model that has others already."""
    canary, name = check_release(folder, base), folder.name
    first = not isinstance(model, PeftModel)
    before = None if first else model.active_adapter
    try:
        if first:
            model = PeftModel.from_pretrained(model, folder, name)
        else:
            model.load_adapter(folder, name)
    except (
        ValueError,
        KeyError,
    ) as error:  # rlora_min and PEFT left the model whole
        raise LabError(f"{name} is refused: {error}") from error
    try:
        model.eval().set_adapter(name, inference_mode=True)
        rows = [(tokenizer.encode(asked), most) for asked, most, _ in canary]
        said = [tokenizer.decode(new) for new in generate(model, tokenizer, rows)]
    except Exception as error:  # a prompt that can't be asked here
        said = error
    if not first:
        model.set_adapter(before, inference_mode=True)
    if said == [answer for _, _, answer in canary]:
        return model
    model.unload() if first else model.delete_adapter(name)
    why = f"where it was sealed, its prompts did not give {said}"
    raise LabError(f"{name} is refused: {why}")


def ends_of(model: nn.Module) -> set[int]:
    """The tokens that end an answer: none, one, or several."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list) else {ends}


@contextmanager
def nothing_but_greedy(model: nn.Module) -> Iterator[None]:
    """Leave out what `generation_config` adds, such as a repetition penalty."""
    holders = [m for m in model.modules() if "generation_config" in vars(m)]
    before = [holder.generation_config for holder in holders]
    ends = model.generation_config.eos_token_id
    for holder in holders:
        holder.generation_config = GenerationConfig(eos_token_id=ends)
    try:
        yield
    finally:
        for holder, own in zip(holders, before, strict=True):
            holder.generation_config = own


class Enough(StoppingCriteria):
    """Each row ends at its own limit, or where a text to stop at stands."""

    def __init__(
        self,
        tokenizer: Any,
        start: int,
        rows: list,
        stops: Sequence,
    ) -> None:
        self.tokenizer, self.start, self.stops = tokenizer, start, stops
        self.lengths = [most for _, most in rows]  # of answers, as far as known

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        for i, new in enumerate(input_ids[:, self.start :].tolist()):
            if self.stops[i] and len(new) < self.lengths[i]:
                text = self.tokenizer.decode(new)
                if any(stop in text for stop in self.stops[i]):
                    self.lengths[i] = len(new)
        done = [input_ids.shape[1] - self.start >= length for length in self.lengths]
        return torch.tensor(done, device=input_ids.device)


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: Any,
    rows: list[tuple[list[int], int]],
    stops: Sequence[Sequence[str]] = (),
    seconds: float | None = None,
) -> list[list[int]]:
    """Greedy answers to (token ids, how many new ones at most), all in one call.

    Args:
        stops: for each row, texts to stop at; they stay in the answer.
        seconds: after them, every answer stays as far as it came.

    Returns:
        The new tokens of each row; the one that ended it, if any, is the last.
    """
    pad, longest = tokenizer.pad_token_id, max(len(ids) for ids, _ in rows)
    padded = [[pad] * (longest - len(ids)) + ids for ids, _ in rows]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in rows]
    device = next(model.parameters()).device
    enough = Enough(tokenizer, longest, rows, stops or [()] * len(rows))
    with nothing_but_greedy(model):
        out = model.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max(most for _, most in rows),
            max_time=seconds,
            do_sample=False,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([enough]),
        )
    answers, ends = [], ends_of(model)
    for new, length in zip(out[:, longest:].tolist(), enough.lengths, strict=True):
        new = new[:length]
        until = [i for i, token in enumerate(new) if token in ends]
        answers.append(new[: until[0] + 1] if until else new)
    return answers


def difference(
    new: Sequence[bool], old: Sequence[bool], z: float = 1.96
) -> tuple[float, float, float]:
    """Share right of `new` less that of `old` on the same requests: d, low, high."""
    new, old = np.asarray(new, bool), np.asarray(old, bool)
    n, gained, lost = len(new) + 2, (new & ~old).sum() + 1, (old & ~new).sum() + 1
    p, q = gained / n, lost / n
    half = z * math.sqrt((p + q - (p - q) ** 2) / n)
    return p - q, p - q - half, p - q + half


def verdict(low: float, high: float, margin: float) -> str:
    """Of an interval: is the new one no worse than by the margin?"""
    if low > -margin:
        return "go"
    return "no-go" if high < -margin else "cannot tell"


def distance(window: Tensor, calibration: Tensor) -> float:
    """Share of the routing weight that moved; both (requests, layers, N)."""
    return (window.mean(0) - calibration.mean(0)).abs().sum(-1).mean().item() / 2


@torch.inference_mode()
def routing_of(model: nn.Module, prompts: list[list[int]], adapter: str) -> Tensor:
    """Mean routing weights of each of the prompts (token ids): (n, layers, N)."""
    longest, device = max(map(len, prompts)), next(model.parameters()).device
    ids = [p + [0] * (longest - len(p)) for p in prompts]
    mask = [[1.0] * len(p) + [0.0] * (longest - len(p)) for p in prompts]
    ids, mask = torch.tensor(ids, device=device), torch.tensor(mask, device=device)
    found, hooks = [], []

    def look(layer, args):
        g = layer.routing(args[0], adapter)  # (requests, tokens, N)
        found.append((g * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    for layer in model.modules():
        if isinstance(layer, RLoraLayer):
            hooks.append(layer.register_forward_pre_hook(look))
    try:
        model(input_ids=ids, attention_mask=mask.long())
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found, 1)
