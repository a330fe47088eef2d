"""The cells of 16_shipping.ipynb that others use.

Written by `make execute` from the cells tagged `export`: change them there.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from rlora_lab.errors import LabError
from rlora_lab.serving.releases import FILES, RELEASE, sha256


def fingerprint(base: nn.Module) -> str:
    """SHA-256 of a base's names, shapes and numbers, these rounded to bf16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_release(folder: Path, base: str) -> list:
    """The prompts and answers of a release, if all else is as it was sealed."""
    try:
        release = json.loads((folder / RELEASE).read_text())
        made_for = str(release["base"])
        canary = [(str(asked), int(n), str(answer)) for asked, n, answer in release["canary"]]
        sealed = {name: release["files"][name] for name in FILES}
        found = {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}
        kind = json.loads((folder / FILES[0]).read_text())["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabError(f"{folder.name} can't be read: {error!r}") from error
    if strange := sorted(found.keys() - {*FILES, RELEASE, "README.md"}):
        why = f"it holds {strange}, which no release has"
    elif changed := [name for name in FILES if found.get(name) != sealed[name]]:
        why = f"{changed} changed since it was sealed, or did not arrive whole"
    elif kind != "RLORA":
        why = f"its type is {kind!r}, and only RLORA is served"
    elif made_for != base:
        why = f"it was made for base {made_for[:12]}, and this is {base[:12]}"
    else:
        return canary
    raise LabError(f"{folder.name} is refused: {why}.")


def load_release(model: nn.Module, folder: Path, base: str, tokenizer: Any) -> PeftModel:
    """Add a release to a frozen base, or to a model that has others already."""
    canary, name = check_release(folder, base), folder.name
    first = not isinstance(model, PeftModel)
    before = None if first else model.active_adapter
    try:
        if first:
            model = PeftModel.from_pretrained(model, folder, name)
        else:
            model.load_adapter(folder, name)
    except (ValueError, KeyError) as error:  # rlora_min and PEFT left the model whole
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
    raise LabError(f"{name} is refused: where it was sealed, its prompts did not give {said}")


@torch.inference_mode()
def generate(
    model: nn.Module, tokenizer: Any, rows: Sequence[tuple[list[int], int]]
) -> list[list[int]]:
    """Greedy answers to (token ids, how many new ones at most), all in one call."""
    pad, longest = tokenizer.pad_token_id, max(len(ids) for ids, _ in rows)
    padded = [[pad] * (longest - len(ids)) + ids for ids, _ in rows]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in rows]
    device = next(model.parameters()).device
    out = model.generate(
        input_ids=torch.tensor(padded, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=max(most for _, most in rows),
        do_sample=False,
        pad_token_id=pad,
    )
    return [new[:most].tolist() for new, (_, most) in zip(out[:, longest:], rows, strict=True)]


async def deliver(run: Callable, adapter: str, rows: list) -> None:
    """Runs one batch and hands out its answers, or its error."""
    try:
        asked = [request for _, request, _ in rows]
        answers = await asyncio.to_thread(run, adapter, asked)
    except Exception as error:  # these requests fail, and the worker goes on
        answers = [error] * len(rows)
    for (_, _, future), answer in zip(rows, answers, strict=True):
        if future.done():  # it was given up meanwhile
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)


class Batcher:
    """Runs requests that wait together as one batch; a batch has one adapter."""

    def __init__(
        self, run: Callable, window: float = 0.005, max_batch: int = 32, max_queue: int = 64
    ) -> None:
        self.run, self.window, self.max_batch = run, window, max_batch
        self.queue = asyncio.Queue(max_queue)

    async def ask(self, adapter: str, request: Any) -> Any:
        answer = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((adapter, request, answer))
        return await answer

    async def work(self) -> None:
        while True:
            batch = [await self.queue.get()]
            if self.queue.qsize() + 1 < self.max_batch:
                await asyncio.sleep(self.window)  # others may be on their way
            while len(batch) < self.max_batch and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            waiting = [row for row in batch if not row[2].done()]
            for adapter in dict.fromkeys(row[0] for row in waiting):
                rows = [row for row in waiting if row[0] == adapter]
                await deliver(self.run, adapter, rows)


def place(request_id: str, salt: str) -> float:
    """A number in [0, 1) that looks random, and is always the same for an id and a salt."""
    digest = hashlib.sha256(f"{salt}:{request_id}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def choose(request_id: str, current: dict) -> str:
    """The adapter that answers: the candidate for its share of the ids, else the stable one."""
    candidate = current["candidate"]
    if candidate and place(request_id, candidate) < current["share"]:
        return candidate
    return current["stable"]
