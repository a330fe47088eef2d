"""The cells of 02_lora_from_scratch.ipynb that others use.

Written by `make execute` from the cells tagged `export`: change them there.
"""

import torch

TARGETS = ["gate_proj", "up_proj", "down_proj"]  # of each MLP


def add_layers(model, kind, **settings):
    """Freezes a model, and puts a layer of this kind around each target."""
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in TARGETS:
            layer = kind(module, **settings)
            setattr(model.get_submodule(parent), name, layer)
    return model


def layers_of(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def largest(pairs):
    return max((a - b.view_as(a)).abs().max().item() for a, b in pairs)


def compare(*models, pairs, batch, steps=10):
    """The largest differences of output, gradients, and what is trained."""
    with torch.no_grad():
        outputs = [model.eval()(**batch).logits for model in models]
    found = {"output": largest([outputs])}
    settings = {"lr": 1e-3, "weight_decay": 0}
    optimizers = [torch.optim.AdamW(trained(m), **settings) for m in models]
    for step in range(steps):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)  # the same dropout masks
            optimizer.zero_grad()
            model.train()(**batch).loss.backward()
        if step == 0:
            found["gradients"] = largest((a.grad, b.grad) for a, b in pairs)
        for optimizer in optimizers:
            optimizer.step()
    found[f"trained numbers, {steps} steps on"] = largest(pairs)
    for what, difference in found.items():
        print(f"largest difference, {what}: {difference:.1e}")
    return found
