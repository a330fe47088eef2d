"""What chapters 16 and 16b put in service."""

from pathlib import Path

import pytest
from peft import get_peft_model
from rlora_helpers import perturb

from rlora_lab.chapters.ch16_shipping import fingerprint, routing_of, write_release
from rlora_lab.models.bases import load_base
from rlora_lab.tasks.characters import Characters
from rlora_min import RLoraConfig


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Thirty, of two to eight characters."""
    return ["Ocgbcce="[-2 - i % 7 :] for i in range(30)]


@pytest.fixture(scope="session")
def releases(prompts, tmp_path_factory) -> Path:
    """Two sealed adapters, v1 and v2, all of whose numbers were moved."""
    folder, tokenizer = tmp_path_factory.mktemp("releases"), Characters()
    for name, seed in {"v1": 1, "v2": 2}.items():
        base = load_base("tiny")
        own = fingerprint(base.model)
        config = RLoraConfig(init_seed=seed, target_modules=base.targets)
        model = perturb(get_peft_model(base.model.requires_grad_(False), config).eval(), seed=seed)
        model.save_pretrained(folder / name)
        routing = routing_of(model, list(map(tokenizer.encode, prompts)), "default").mean(0)
        write_release(folder / name, own, model, tokenizer, prompts[:6], 6, routing)
    return folder
