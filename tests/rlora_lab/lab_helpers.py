"""Plan files and made-up records, for the tests of `rlora_lab`; what a real model needs."""

import json
import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlora_lab.models.bases import smollm2_folder
from rlora_lab.tasks.strings import SUITE_TASKS, TAGS, decode, draw

needs_smollm2 = pytest.mark.skipif(
    not smollm2_folder().is_dir(), reason="SmolLM2 is not here: make smollm2 fetches it"
)

needs_language = pytest.mark.skipif(
    "RLORA_LANGUAGE" not in os.environ and find_spec("bigbench") is None,
    reason="the language tasks are not here: RLORA_LANGUAGE names their folder",
)


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """A file of JSON lines; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def letter_rows(task: str) -> list[dict]:
    """Sixty questions of a string task with their answers, as files have them."""
    questions = draw(60, torch.Generator().manual_seed(0), "test")
    answers = SUITE_TASKS[task](questions)
    return [
        {"prompt": f"{TAGS[task]}{decode(q)}=", "answer": decode(a)}
        for q, a in zip(questions, answers, strict=True)
    ]


def stand_in(folder: Path, scale: float = 1.0, **config: object) -> None:
    """A model of six small random blocks, in SmolLM2's place; `scale` makes its logits larger."""
    tokenizer = make_tokenizer(["Today Yesterday yes no"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        **config,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data *= scale
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that learned up to 1024 pieces from some texts."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "<end>"}
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, **special)


BLOCK = {
    "why": "a test",
    "base": "tiny",
    "suite": "synthetic",
    "methods": ["rlora", "lora"],
    "steps": 2,
    "batch": 4,
    "rates": [0.001, 0.002, 0.004],
    "sweep_seeds": [10, 11],
    "seeds": [0, 1],
}


# What the records of a block share.
SETTING = {
    "kind": "compare",
    "base": "tiny",
    "base_source": "here",
    "suite": "synthetic",
    "metrics": ["letters", "exact"],
    "steps": 2,
    "batch": 4,
    "r": 4,
    "num_heads": 3,
    "lora_alpha": 32.0,
    "lora_dropout": 0.1,
    "machine": "a machine",
    "threads": 1,
    "workers": 1,
    "versions": {"torch": "2", "transformers": "5", "peft": "0.21"},
}

# Two methods tuned in stages, and two controls.
STAGED = {
    "methods": ["lora", "rlora", "mlora", "none"],
    "dropouts": [0.0, 0.1],
    "sweep_seeds": [10, 11, 12],
    "finalists": 2,
    "control_seeds": 1,
    "margin": 2.0,
    "like": {"mlora": "rlora", "none": "lora"},
    "scales": {
        "lora": {"lora_alpha": [8.0, 16.0, 32.0, 64.0]},
        "rlora": {"lora_alpha": [16.0, 32.0, 64.0], "gamma": [16.0, 64.0]},
    },
}


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{k}" = {toml(v)}' for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def plan_file(folder: Path, **blocks: dict) -> Path:
    """A plan of blocks, each given by what it has other than BLOCK; None leaves a word out."""
    lines = []
    for name, changes in blocks.items():
        lines.append(f"[{name}]")
        values = (BLOCK | changes) if name != "settings" else changes
        lines += [f"{k} = {toml(v)}" for k, v in values.items() if v is not None]
    path = folder / "plan.toml"
    path.write_text("\n".join(lines))
    return path


def swept(method: str, means: dict[float, float], seeds=(10, 11)) -> list[dict]:
    """Records of a sweep whose seeds lie around the means."""
    return [
        {
            "stage": "sweep",
            "method": method,
            "learning_rate": rate,
            "seed": seed,
            "validation": {"letters": [mean + shift, mean - shift / 2], "exact": [0.9, 0.9]},
        }
        for rate, mean in means.items()
        for seed, shift in zip(seeds, (0.02, -0.04), strict=True)
    ]
