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
# What is made wrong in each. With one head the softmax is 1, whatever the router.
WRONG = {"02": ["A", "B", "s"], "04": ["A", "B", "W_r", "s"], "05": ["A", "B", "W_r", "s", "A0"]}
WRONG |= {"06": WRONG["05"], "07": WRONG["05"], "05 centre": WRONG["04"]}
WRONG |= {"04 one head": ["A", "B", "s"], "07 one head": ["A", "B", "s", "A0"]}


def chapter_class(notebook: str, name: str) -> type[nn.Module]:
    return getattr(cell_code(notebook, name), name)


def twins(case: str, seed: int = 0):
    """The chapter's layer, the module's, and the pairs of what is trained in them."""
    notebook, name, settings, config = CASES[case]
    torch.manual_seed(seed)
    base = nn.Linear(D_IN, D_OUT)
    ours = chapter_class(notebook, name)(copy.deepcopy(base), r=4, alpha=8, **settings)
    dropout = settings.get("dropout", settings.get("p", 0.0))
    config = {"lora_dropout": dropout} | config
    config = RLoraConfig(r=4, lora_alpha=8, target_modules=["0"], **config)
    model = get_peft_model(nn.Sequential(base), config).double()
    theirs = model.base_model.model[0]
    parts = {"A": theirs.rlora_A, "B": theirs.rlora_B, "W_r": theirs.rlora_router}
    parts = {key: part["default"].weight for key, part in parts.items() if part}
    pairs = {key: (getattr(ours.double(), key), part) for key, part in parts.items()}
    for key, parts in {"A0": theirs.rlora_A0, "B0": theirs.rlora_B0}.items():
        if hasattr(ours, key):
            getattr(ours, key).copy_(parts["default"].weight)
    with torch.no_grad():
        for our, their in pairs.values():
            their.add_(0.3 * torch.randn_like(their))
            our.copy_(their.view_as(our))
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


@pytest.mark.parametrize(
    ("case", "wrong"), [(c, w) for c in CASES for w in WRONG.get(c, WRONG[c[:2]])]
)
def test_a_layer_made_wrong_is_seen(case, wrong):
    ours, theirs, pairs = twins(case)
    with torch.no_grad():
        if wrong == "s":
            ours.s *= 1.01
        else:
            getattr(ours, wrong)[0] += 0.01  # one row: adding to all of W_r changes nothing
    assert compare(ours, theirs, pairs)["output"] > 1e-6


def test_subtracting_in_place_is_the_side_pair():
    # Chapter 05's first way to start: the same function, at the start and anywhere else.
    made = chapter_class(*RANDOM_CLASS)
    layers = []
    for start in ("subtract", "side pair"):
        torch.manual_seed(0)
        layers.append(made(nn.Linear(D_IN, D_OUT), r=4, N=3, alpha=8, start=start).double())
    x, (taken, pair) = torch.randn(7, D_IN).double(), layers
    for moved in (0, 1):
        with torch.no_grad():
            for ours, theirs in ((getattr(taken, k), getattr(pair, k)) for k in ("A", "B", "W_r")):
                theirs.add_(moved * torch.randn_like(theirs))
                ours.copy_(theirs)
        torch.testing.assert_close(taken(x), pair(x), atol=1e-6, rtol=0)  # W0 lost some in fp32
    with torch.no_grad():
        pair.B0[0] += 0.01
    assert (taken(x) - pair(x)).abs().max() > 1e-4


def test_every_class_of_a_chapter_is_compared():
    built = set()
    for path in execute.chapters():
        code = "\n".join(chapter_sources(path.stem, solutions=True))
        built |= {(path.stem, name) for name in re.findall(r"^class (\w+Linear)\(", code, re.M)}
    assert built == {(notebook, name) for notebook, name, _, _ in CASES.values()}
