"""What is inside an R-LoRA of a real model: chapter 15's measures, on SmolLM2's upper blocks.

    python -m rlora_lab.runs.inside

It trains an adapter on the eight different language tasks and looks at it on validation rows. The
file that it keeps has

    command, date, machine, threads, versions, base, base_source, seed, steps, batch, lr, tasks
    records     of each kind below, those of layers and heads in the model's order

    kind "task"     task, before, after: share of validation rows that are answered exactly
    kind "layer"    layer; start, end, change: mean cosine of two heads; weights {task: [of each
                    head]}; told by the task; chance: the most that shuffled tasks tell, and p
    kind "head"     layer, head; off, third, noise, untrained: how much each task's loss rises
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from rlora_min import head_similarity

from ..chapters import ch15_looking_inside as chapter
from ..models.bases import load_base
from ..models.methods import adapt
from ..names import LAB
from ..tasks.language import Language
from .record import write_measured
from .training import train

RECORD = LAB / "records" / "inside-smollm2.json"
BATCH, LR, SEED = 16, 2e-3, 0


@torch.no_grad()
def losses(model: nn.Module, batches: dict[str, dict]) -> Tensor:
    """The loss on the answers of each task: (tasks,)."""
    return torch.stack([model(**batch)["loss"] for batch in batches.values()])


@torch.no_grad()
def routing(model: nn.Module, batches: dict[str, dict]) -> dict[str, Tensor]:
    """Each layer's weights, a mean over the tokens of each row: {layer: (tasks, rows, N)}."""
    found: dict[str, list[Tensor]] = {}
    hooks = []
    for name, layer in chapter.layers_of(model).items():

        def note(layer: nn.Module, args: tuple, name: str = name) -> None:
            found.setdefault(name, []).append(layer.routing(args[0]).double())

        hooks.append(layer.register_forward_pre_hook(note))
    for batch in batches.values():
        model(**batch)
    for hook in hooks:
        hook.remove()
    masks = [batch["attention_mask"][..., None] for batch in batches.values()]
    return {
        name: torch.stack(
            [(g * mask).sum(1) / mask.sum(1) for g, mask in zip(weights, masks, strict=True)]
        )
        for name, weights in found.items()
    }


def layer_records(model: nn.Module, batches: dict[str, dict], cosines: dict) -> list[dict]:
    """`cosines` are {what: {layer's path: matrix}}."""
    records = []
    by_layer = {what: list(found.values()) for what, found in cosines.items()}
    for i, (name, g) in enumerate(routing(model, batches).items()):
        told, chance = chapter.told(g.mean(1)), chapter.null(g)
        above = int((chance >= told).sum())
        records.append(
            {
                "kind": "layer",
                "layer": name,
                **{w: float(chapter.mean_cosine({name: own[i]})) for w, own in by_layer.items()},
                "weights": dict(zip(batches, g.mean(1).tolist(), strict=True)),
                "told": float(told),
                "chance": float(chance.max()),
                "p": (1 + above) / (1 + len(chance)),
            }
        )
    return records


def measure(
    base: Annotated[str, typer.Option(help="smollm2, a folder, or a hub id")] = "smollm2",
    blocks: Annotated[int, typer.Option(help="adapt the upper so many", min=1)] = 2,
    most: Annotated[int, typer.Option(help="rows of each task and split", min=2)] = 24,
    rows: Annotated[int, typer.Option(help="rows of each task to look at", min=2)] = 16,
    steps: Annotated[int, typer.Option(help="training steps", min=1)] = 100,
    out: Annotated[Path, typer.Option(help="JSON file of the result")] = RECORD,
) -> None:
    """Train R-LoRA on language tasks and look inside, as chapter 15 does (ten minutes)."""
    torch.set_num_threads(1)
    loaded = load_base(base)
    suite = Language(loaded, blocks=blocks, most=most)
    model = adapt("rlora", loaded, suite, seed=SEED).eval()
    batches = {task: suite.probe(task, rows) for task in suite.tasks}
    state = get_peft_model_state_dict(model)
    initial = {name: tensor.clone() for name, tensor in state.items()}

    def loss(model: nn.Module) -> Tensor:
        return losses(model, batches)

    before = suite.score(model, "validation")
    cosines = {"start": head_similarity(model)}
    rises = {"untrained": chapter.rise(model, chapter.off, loss)}
    train(model, suite, steps=steps, lr=LR, batch=BATCH, seed=SEED)
    model.eval()
    after = suite.score(model, "validation")
    cosines |= {"end": head_similarity(model), "change": head_similarity(model, initial=initial)}
    for rule in (chapter.off, chapter.third, chapter.noise):
        rises[rule.__name__] = chapter.rise(model, rule, loss)
    records = [
        {"kind": "task", "task": t, "before": before[t]["exact"], "after": after[t]["exact"]}
        for t in suite.tasks
    ]
    records += layer_records(model, batches, cosines)
    layers = list(chapter.layers_of(model))
    each = len(rises["off"]) // len(layers)
    for i in range(len(rises["off"])):
        own = {rule: found[i].tolist() for rule, found in rises.items()}
        records.append({"kind": "head", "layer": layers[i // each], "head": i % each, **own})
    about = suite.provenance | {"seed": SEED, "steps": steps, "batch": BATCH, "lr": LR}
    about["tasks"] = list(suite.tasks)
    write_measured(out, "python -m rlora_lab.runs.inside", loaded, records, **about)
    for rule, found in rises.items():
        most = found.mean(1).max()
        print(f"{rule:10} the loss rises by {found.mean():+.3f}, at most {most:+.3f}")


if __name__ == "__main__":
    typer.run(measure)
