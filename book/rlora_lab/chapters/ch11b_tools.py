"""The cells of 11b_tools.ipynb that others use.

Written by `make execute` from the cells tagged `export`: change them there.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset, interleave_datasets
from safetensors import safe_open

from rlora_min import RLoraConfig


def encode_chat(tokenizer, messages):
    """Ids and labels of a chat that ends with an answer; it and its end count.

    ValueError: the last message is no answer, or the template has no stable prompt.
    """
    *asked, answer = messages
    if answer["role"] != "assistant":
        raise ValueError(f"the last message is the {answer['role']}'s, no answer")
    write = partial(tokenizer.apply_chat_template, tokenize=False)
    prompt = write(asked, add_generation_prompt=True)
    whole = write(messages).rstrip()
    if not whole.startswith(prompt):
        raise ValueError("the template writes an answered prompt otherwise")
    texts = prompt, whole[len(prompt) :]
    read, said = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts)
    return {"input_ids": read + said, "labels": [-100] * len(read) + said}


def sft(base, tokenizer, rows, folder, **settings):
    """TRL's trainer, after it trained R-LoRA on prompts and completions."""
    from trl import SFTConfig, SFTTrainer

    mlp = ["gate_proj", "up_proj", "down_proj"]
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(str(folder), report_to="none", **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=RLoraConfig(target_modules=mlp, task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer


def mixture(pieces, T=1.0, weights=None, seed=0):
    """One data set of several, tasks drawn by n^(1/T) or by your own weights."""
    n = np.array([len(piece) for piece in pieces.values()], dtype=float)
    p = n ** (1 / T) if weights is None else np.array([weights[k] for k in pieces])
    how = {"seed": seed, "stopping_strategy": "all_exhausted"}
    return interleave_datasets(list(pieces.values()), list(p / p.sum()), **how)


def most_likely(logits, labels):
    """For preprocess_logits_for_metrics: (rows, tokens, V) to (rows, tokens)."""
    return logits.argmax(-1)


def by_worst(tasks):
    """compute_metrics that scores each task, by the task of each evaluated row."""
    tasks = np.array(tasks)

    def metrics(evaluated):
        labels, said = evaluated.label_ids[:, 1:], evaluated.predictions[:, :-1]
        right = ((said == labels) | (labels == -100)).all(1)
        scores = {task: right[tasks == task].mean() for task in dict.fromkeys(tasks)}
        return {**scores, "worst": min(scores.values())}

    return metrics


RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM may be told


MODULES = (".lora_A.weight", ".lora_B.weight")


def ready_for(folder):
    """What vLLM and llama.cpp's converter would say of an adapter's files.

    Returns the largest rank, the --max-lora-rank for vLLM, and reasons why either
    refuses, or would scale it otherwise.
    """
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    why = []
    if strange := [name for name in names if not name.endswith(MODULES)]:
        why.append(f"llama.cpp stops at {strange[0].rpartition('layers.')[2]}")
    if config["peft_type"] != "LORA":
        return {"rank": None, "max-lora-rank": None, "why": [*why, "vLLM: no LoRA"]}
    ranks = [config["r"], *config.get("rank_pattern", {}).values()]
    if len(set(ranks)) > 1:
        why.append("one rank for all modules is read, and rank_pattern is not")
    if config.get("modules_to_save"):
        why.append("vLLM refuses modules_to_save")
    if config.get("use_rslora"):
        why.append("llama.cpp scales by alpha / r, whatever use_rslora says")
    allowed = [rank for rank in RANKS if rank >= max(ranks)]
    most = min(allowed, default=None)
    return {"rank": max(ranks), "max-lora-rank": most, "why": why}
