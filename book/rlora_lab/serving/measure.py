"""What an adapter costs an answer, and what a batch saves, on one thread of a CPU.

    python -m rlora_lab.serving.measure

Times are the processor's, not the wall's, so that other work on the machine spoils them less. A
ratio is taken within a round, in which everything is measured in turn. It keeps a file with

    command, date, machine, threads, versions, base, base_source
    records     one for each form of the model (`kind` "token") and each sort of request ("batch"):
                what, seconds [of each round], to [what it is compared with], ratio, low, high: the
                median of the ratios, and their quartiles
"""

import copy
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from peft import PeftModel, get_peft_model
from torch import nn
from tqdm import tqdm

from rlora_min import export_lora

from ..chapters.ch16_shipping import generate
from ..models.bases import Base, load_base
from ..models.methods import adapter_config
from ..names import LAB
from ..runs.record import write_measured
from ..tasks.characters import Characters

RECORD = LAB / "records" / "serving-cpu.json"
PROMPT, TOKENS = 16, 8  # tokens read, and tokens timed
ROWS = 30


def forms(base: Base) -> dict[str, nn.Module]:
    """The base, R-LoRA routed and exported, the export merged, and a LoRA of equal size."""
    found = {"base": copy.deepcopy(base.model)}
    for name, method in {"routed": "rlora", "LoRA": "lora"}.items():
        config = adapter_config(method, base, init_seed=0)
        model = get_peft_model(copy.deepcopy(base.model), config)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:  # as after training: nothing is at its start
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(1e-3 * drawn)
        found[name] = model
    with tempfile.TemporaryDirectory() as folder:
        export_lora(found["routed"], folder)
        exported = PeftModel.from_pretrained(copy.deepcopy(base.model), folder)
    found["export"] = exported
    found["merged export"] = copy.deepcopy(exported).merge_and_unload()
    return {name: model.eval().requires_grad_(False) for name, model in found.items()}


def timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


@torch.inference_mode()
def seconds_a_token(model: nn.Module, ids: torch.Tensor) -> float:
    """Of a forward for one token, behind a prompt that was read before; ids (1, tokens)."""
    past = model(input_ids=ids[:, :PROMPT], use_cache=True).past_key_values
    start = time.process_time()
    for i in range(PROMPT, PROMPT + TOKENS):
        past = model(input_ids=ids[:, i : i + 1], past_key_values=past).past_key_values
    return (time.process_time() - start) / TOKENS


def compared(kind: str, what: str, seconds: list, to: str, reference: list) -> dict:
    low, ratio, high = np.quantile(np.array(seconds) / np.array(reference), [0.25, 0.5, 0.75])
    named = {"kind": kind, "what": what, "to": to}
    numbers = {"ratio": float(ratio), "low": float(low), "high": float(high)}
    return named | numbers | {"seconds": seconds}


def measure_tokens(base: Base, rounds: int) -> list[dict]:
    """A token's time in each form, in an order that is drawn anew for each round."""
    models, draw = forms(base), random.Random(0)
    words = base.model.config.vocab_size
    ids = torch.randint(words, (1, PROMPT + TOKENS), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        seconds_a_token(model, ids)  # warm
    for _ in tqdm(range(rounds), "tokens", disable=None):
        for name in draw.sample(list(models), len(models)):
            seconds[name].append(seconds_a_token(models[name], ids))
    return [compared("token", name, seconds[name], "base", seconds["base"]) for name in models]


def measure_batches(base: Base, rounds: int) -> list[dict]:
    """Thirty requests at once and in turn: long ones that are only read, short ones answered."""
    tokenizer = base.tokenizer or Characters()
    generator = torch.Generator().manual_seed(0)
    found = []
    for what, (read, most) in {
        "64 tokens read, 1 said": (64, 1),
        "8 tokens read, 16 said": (8, 16),
    }.items():
        read = min(read, base.model.config.max_position_embeddings - most)
        ids = torch.randint(base.model.config.vocab_size, (ROWS, read), generator=generator)
        rows = [(row, most) for row in ids.tolist()]
        at_once, in_turn = [], []
        for _ in tqdm(range(rounds), what, disable=None):
            at_once.append(timed(lambda rows=rows: generate(base.model, tokenizer, rows)))
            each = [timed(lambda row=row: generate(base.model, tokenizer, [row])) for row in rows]
            in_turn.append(sum(each))
        found.append(compared("batch", what, in_turn, "at once", at_once))
    return found


def measure(
    base: Annotated[str, typer.Option(help="tiny, smollm2, a folder, or a hub id")] = "smollm2",
    rounds: Annotated[int, typer.Option(help="rounds for tokens", min=3)] = 21,
    batch_rounds: Annotated[int, typer.Option(help="rounds for batches", min=3)] = 3,
    out: Annotated[Path, typer.Option(help="JSON file of the result")] = RECORD,
) -> None:
    """Measure what a token takes in each form of an adapter, and what a batch saves (minutes)."""
    torch.set_num_threads(1)
    loaded = load_base(base)
    records = measure_tokens(loaded, rounds) + measure_batches(loaded, batch_rounds)
    write_measured(out, "python -m rlora_lab.serving.measure", loaded, records)
    for record in records:
        shown = "{what:24} {ratio:6.2f} times {to} ({low:.2f} to {high:.2f})".format(**record)
        print(shown)


if __name__ == "__main__":
    typer.run(measure)
