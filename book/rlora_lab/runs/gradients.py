"""How long the first gradient is, and which part of an adapter it is of.

    python -m rlora_lab.runs.gradients

On a real model the first gradient of R-LoRA can be a hundred times as long as LoRA's, and all but
nothing of that is the router's, in one module. It keeps a file with

    command, date, machine, threads, versions, base, base_source, and where the data came from
    records     one for each method, gamma and seed: loss, norm [of the whole], parts {part: norm},
                module [the one with the longest gradient], module_norm, input_norm [of the longest
                input of that module, over the batch's tokens]
"""

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from tqdm import tqdm

from ..models.bases import load_base
from ..models.methods import adapt
from ..names import LAB
from ..tasks.suite import load_suite
from .record import write_measured

RECORD = LAB / "records" / "first-gradients.json"
CASES = [("lora", 64.0), ("rlora", 16.0), ("rlora", 64.0), ("rlora", 256.0)]


def module_of(name: str) -> str:
    """The adapted module of a parameter: `layers.3.mlp.down_proj`."""
    path = name.partition(".rlora_")[0].partition(".lora_")[0]
    return "layers." + path.rpartition("layers.")[2]


def part_of(name: str) -> str:
    """A, B or router, of LoRA's parameters too."""
    return name.partition("lora_")[2].partition(".")[0]


def longest(squares: dict[str, float]) -> tuple[str, float]:
    name = max(squares, key=squares.__getitem__)
    return name, squares[name] ** 0.5


def first_gradient(model: nn.Module, batch: dict[str, Tensor], seed: int) -> dict:
    """Of a training batch, with the dropout masks of `seed`: what a record holds."""
    inputs = {}

    def keep(path: str):
        def hook(module, args):
            inputs[path] = args[0].detach().norm(dim=-1).max().item()

        return hook

    hooks = [
        module.register_forward_pre_hook(keep(module_of(path.removesuffix(".base_layer"))))
        for path, module in model.named_modules()
        if path.endswith(".base_layer")
    ]
    torch.manual_seed(seed)
    model.train().zero_grad()
    loss = model(**batch)["loss"]
    loss.backward()
    for hook in hooks:
        hook.remove()
    parts: dict[str, float] = defaultdict(float)
    modules: dict[str, float] = defaultdict(float)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            square = parameter.grad.double().pow(2).sum().item()
            parts[part_of(name)] += square
            modules[module_of(name)] += square
    module, module_norm = longest(modules)
    return {
        "loss": loss.item(),
        "norm": sum(parts.values()) ** 0.5,
        "parts": {part: square**0.5 for part, square in parts.items()},
        "module": module,
        "module_norm": module_norm,
        "input_norm": inputs[module],
    }


def measure(
    base: Annotated[str, typer.Option(help="smollm2, a folder, or a hub id")] = "smollm2",
    suite: Annotated[str, typer.Option(help="language or synthetic")] = "language",
    batch: Annotated[int, typer.Option(help="examples of the batch", min=1)] = 8,
    seeds: Annotated[int, typer.Option(help="adapters, batches and masks of each", min=1)] = 2,
    out: Annotated[Path, typer.Option(help="JSON file of the result")] = RECORD,
) -> None:
    """Measure the first gradient of LoRA and of R-LoRA at three gammas (minutes on SmolLM2)."""
    torch.set_num_threads(1)
    loaded = load_base(base)
    tasks = load_suite(suite, loaded)
    collate = tasks.collate or torch.utils.data.default_collate
    batches = [collate(tasks.training_set(batch, seed)) for seed in range(seeds)]
    records = []
    todo = [(*case, seed) for case in CASES for seed in range(seeds)]
    for method, gamma, seed in tqdm(todo, disable=None):
        model = adapt(method, load_base(base), tasks, seed=seed, gamma=gamma)
        found = first_gradient(model, batches[seed], seed)
        records.append({"method": method, "gamma": gamma, "seed": seed} | found)
        print("{method:5} gamma {gamma:3.0f}: {norm:7.2f} {module}".format(**records[-1]))
    about = {"suite": suite, "batch": batch} | tasks.provenance
    write_measured(out, "python -m rlora_lab.runs.gradients", loaded, records, **about)


if __name__ == "__main__":
    typer.run(measure)
