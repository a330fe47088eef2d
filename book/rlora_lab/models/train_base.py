"""`python -m rlora_lab train-base`: trains the `tiny` base on its string tasks."""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from ..runs.record import environment
from ..runs.training import train
from ..tasks.strings import BASE_TASKS, TAGS, VOCABULARY, Synthetic

LEARNING_RATE, BATCH = 3e-3, 128


def tiny_config() -> LlamaConfig:
    """Two Llama blocks of width 64 over single characters: 0.11 million parameters."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def train_base(out: Path, *, seed: int, steps: int, command: str) -> dict:
    """Train the base and write `out` (config.json, model.safetensors, training.json) whole.

    Returns what training.json says: tasks, seed, steps, versions, date, and the share of letters
    right in each task, measured on the bf16 weights as they are kept.
    """
    suite = Synthetic(BASE_TASKS)
    set_seed(seed)
    model = LlamaForCausalLM(tiny_config())
    start = time.monotonic()
    with Progress() as progress:
        bar = progress.add_task("tiny base", total=steps)
        train(
            model,
            suite,
            steps=steps,
            lr=LEARNING_RATE,
            batch=BATCH,
            seed=seed,
            on_step=lambda done: progress.update(bar, completed=done),
        )
    seconds = time.monotonic() - start
    model.to(torch.bfloat16)
    scores = suite.score(model.float())
    record = {
        "what": "a Llama trained from scratch on string tasks, weights in bf16",
        "command": command,
        "tasks": {task: TAGS[task] for task in BASE_TASKS},
        "vocabulary": VOCABULARY,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "steps": steps,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "seconds": round(seconds, 1),
        "test": scores,
        **environment(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        new = Path(temporary) / "new"
        model.to(torch.bfloat16).save_pretrained(new)
        (new / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        if out.exists():
            shutil.move(out, Path(temporary) / "old")
        os.replace(new, out)
    return record
