"""The layers that chapters build by hand are those of `rlora_min`, number for number.

The class is taken out of its notebook as a reader sees it, put on a layer beside `rlora_min`'s,
and given the same numbers, all moved away from their start. Then the output, all gradients and
all trained tensors after some steps of AdamW have to agree in float64, with dropout where the
two draw masks of the same shape.
"""

import copy
import re

import pytest
import torch
from chapter_code import cell_code, chapter_sources, execute
from peft import get_peft_model
from rlora_helpers import perturb, tensors_of
from torch import nn

from rlora_min import RLoraConfig

D_IN, D_OUT, STEPS = 12, 20, 5

LORA = {"num_heads": 1, "init_heads": "zeros", "dropout_on": "input", "router": "mean"}
HEADS = {"init_heads": "zeros", "dropout_on": "input", "router_init": "kaiming"}
LORA_CLASS = "02_lora_from_scratch", "LoRALinear"
HEADS_CLASS = "04_many_heads", "HeadsLinear"
RANDOM_CLASS = "05_random_heads", "RandomHeadsLinear"
DROPOUT_CLASS = "06_head_dropout", "DropoutHeadsLinear"
RLORA_CLASS = "07_rlora", "RLoRALinear"
# name: (notebook, class, its settings, those of RLoraConfig). Common to all: r, alpha.
CASES = {
    "02": (*LORA_CLASS, {"dropout": 0.3, "rslora": True}, LORA),
    "02 alpha/r": (*LORA_CLASS, {}, LORA | {"use_rslora": False}),
    "04": (*HEADS_CLASS, {"N": 3}, HEADS | {"num_heads": 3}),
    "04 one head": (*HEADS_CLASS, {"N": 1}, HEADS | {"num_heads": 1}),
    "05 side pair": (*RANDOM_CLASS, {"N": 3}, {"num_heads": 3}),
    "05 centre": (*RANDOM_CLASS, {"N": 3, "start": "centre"}, {"init_heads": "centered"}),
    "06 heads": (*DROPOUT_CLASS, {"N": 3, "p": 0.3}, {"num_heads": 3}),
    "06 input": (*DROPOUT_CLASS, {"N": 3, "p": 0.3, "drop": "input"}, {"dropout_on": "input"}),
    "07": (*RLORA_CLASS, {"N": 3, "p": 0.3}, {"num_heads": 3}),
    "07 one head": (*RLORA_CLASS, {"N": 1, "p": 0.3}, {"num_heads": 1}),
}


def twins(case: str):
    """The chapter's layer, the module's, and the pairs of what is trained in them."""
    notebook, name, settings, config = CASES[case]
    torch.manual_seed(0)
    base, made = nn.Linear(D_IN, D_OUT), getattr(cell_code(notebook, name), name)
    ours = made(copy.deepcopy(base), r=4, alpha=8, **settings)
    dropout = settings.get("dropout", settings.get("p", 0.0))
    config = RLoraConfig(r=4, lora_alpha=8, target_modules=["0"], lora_dropout=dropout, **config)
    model = perturb(get_peft_model(nn.Sequential(base), config).double(), scale=0.3)
    theirs = model.base_model.model[0]
    parts = {key.replace("router", "W_r"): part for key, part in tensors_of(theirs).items()}
    pairs = {key: (getattr(ours.double(), key), part) for key, part in parts.items()}
    with torch.no_grad():
        for our, their in pairs.values():
            our.copy_(their.view_as(our))
    pairs = {key: pair for key, pair in pairs.items() if pair[1].requires_grad}
    for model in (ours, theirs):
        assert sum(p.requires_grad for p in model.parameters()) == len(pairs)
    return ours, theirs, pairs


def compare(ours, theirs, pairs) -> dict[str, float]:
    """The largest differences of output, gradients and trained tensors, these after STEPS steps."""
    x, target = torch.randn(2, 7, D_IN).double(), torch.randn(2, 7, D_OUT).double()
    models = ours.eval(), theirs.eval()
    with torch.no_grad():
        found = {"output": (ours(x) - theirs(x)).abs().max().item()}
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in models
    ]

    def largest(a, b):
        return (a - b.view_as(a)).abs().max().item()

    for step in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)  # the same masks
            optimizer.zero_grad()
            (model.train()(x) - target).square().mean().backward()
        if step == 0:
            found |= {f"gradient of {k}": largest(a.grad, b.grad) for k, (a, b) in pairs.items()}
        for optimizer in optimizers:
            optimizer.step()
    return found | {k: largest(a, b) for k, (a, b) in pairs.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_chapter_builds_what_the_module_is(case):
    found = compare(*twins(case))
    assert max(found.values()) < 1e-12, found


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_layer_made_wrong_is_seen(case):
    (_, _, settings, _), x = CASES[case], torch.randn(7, D_IN).double()
    for part in ("A", "B", "W_r", "A0"):
        ours, theirs, _ = twins(case)
        if hasattr(ours, part) and not (part == "W_r" and settings.get("N") == 1):
            getattr(ours, part)[0] += 0.01  # one row: adding to all of W_r changes nothing
            assert (ours.eval()(x) - theirs.eval()(x)).abs().max() > 1e-6, part


def test_every_class_of_a_chapter_is_compared():
    built = set()
    for path in execute.chapters():
        code = "\n".join(chapter_sources(path.stem, solutions=True))
        built |= {(path.stem, name) for name in re.findall(r"^class (\w+Linear)\(", code, re.M)}
    assert built == {(notebook, name) for notebook, name, _, _ in CASES.values()}
