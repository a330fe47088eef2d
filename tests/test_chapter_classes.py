"""The layers that chapters build by hand are those of `rlora_min`, number for number.

The class is taken out of its notebook as a reader sees it, put on a layer beside `rlora_min`'s,
and given the same numbers, all moved away from their start. Then the output, all gradients and
all trained tensors after some steps of AdamW have to agree in float64, with dropout where the
two draw masks of the same shape.
"""

import ast
import copy
from pathlib import Path

import nbformat
import pytest
import torch
from peft import get_peft_model
from torch import nn

from rlora_min import RLoraConfig

BOOK = Path(__file__).parent.parent / "book"
D_IN, D_OUT, STEPS = 12, 20, 5

LORA = {"num_heads": 1, "init_heads": "zeros", "dropout_on": "input", "router": "mean"}
HEADS = {"init_heads": "zeros", "dropout_on": "input", "router_init": "kaiming", "lora_dropout": 0}
# name: (notebook, class, its settings, those of RLoraConfig). Common to all: r, alpha.
CASES = {
    "02": ("02_lora_from_scratch", "LoRALinear", {"dropout": 0.3, "rslora": True}, LORA),
    "02 alpha/r": ("02_lora_from_scratch", "LoRALinear", {}, LORA | {"use_rslora": False}),
    "07": ("07_rlora", "RLoRALinear", {"N": 3, "p": 0.3}, {"num_heads": 3}),
    "07 one head": ("07_rlora", "RLoRALinear", {"N": 1, "p": 0.3}, {"num_heads": 1}),
}


def chapter_class(notebook: str, name: str) -> type[nn.Module]:
    """A class out of a chapter: the set-up's imports, then the definitions of the class's cell."""
    cells = nbformat.read(BOOK / f"{notebook}.ipynb", as_version=4).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    holder = next(source for source in sources if f"class {name}(" in source)
    set_up = [line for line in sources[0].splitlines() if "%pip" not in line]
    set_up = [line for line in set_up if not line.startswith("if find_spec")]
    kinds = (ast.Import, ast.ImportFrom)
    body = [node for node in ast.parse("\n".join(set_up)).body if isinstance(node, kinds)]
    definitions = (ast.ClassDef, ast.FunctionDef)
    body += [node for node in ast.parse(holder).body if isinstance(node, definitions)]
    found: dict = {}
    exec(compile(ast.Module(body, []), notebook, "exec"), found)
    return found[name]


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
    for key, buffers in {"A0": theirs.rlora_A0, "B0": theirs.rlora_B0}.items():
        if hasattr(ours, key):
            getattr(ours, key).copy_(buffers["default"])
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrong", ["A", "B", "W_r", "s", "A0"])
def test_a_layer_made_wrong_is_seen(case, wrong):
    ours, theirs, pairs = twins(case)
    if not hasattr(ours, wrong):
        pytest.skip(f"chapter {case} has no {wrong}")
    if case == "07 one head" and wrong == "W_r":
        pytest.skip("the softmax of one number is 1, whatever the router")
    with torch.no_grad():
        value = getattr(ours, wrong)
        if wrong == "s":
            ours.s *= 1.01
        else:
            value[0] += 0.01  # one row alone: adding to all rows of W_r changes nothing
    found = compare(ours, theirs, pairs)
    assert found["output"] > 1e-6, found
