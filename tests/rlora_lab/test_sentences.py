"""The sentence tasks: from a folder, from the hub's form, and as one model with a head a task."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict

from rlora_lab.errors import LabError
from rlora_lab.models.bases import Base, load_base
from rlora_lab.models.methods import adapt, count_trainable, equal_lora_rank, target_shapes
from rlora_lab.runs.training import train
from rlora_lab.tasks import sentences
from rlora_lab.tasks.sentences import HUB, Sentences


@pytest.fixture
def base(bert_folder: Path) -> Base:
    return load_base(str(bert_folder))


@pytest.fixture(params=["bert_folder", "llama_folder"])
def any_base(request: pytest.FixtureRequest) -> Base:
    return load_base(str(request.getfixturevalue(request.param)))


def test_fixture_is_read_as_it_stands(base: Base, sentences_folder: Path):
    suite = Sentences(base)
    assert suite.tasks == ("question", "mood", "time")
    assert suite.labels["mood"] == ["negative", "positive"]
    assert suite.provenance["data"] == "folder in RLORA_DATA"
    assert suite.provenance["sentences"]["time"] == {"train": 90, "validation": 24, "test": 30}
    assert suite.provenance == Sentences(base).provenance
    row = json.loads((sentences_folder / "mood" / "test.jsonl").read_text().splitlines()[0])
    batch = suite.collate(suite._tokens["mood", "test"][:1])
    text = base.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert text.replace(" ", "") == row["text"].replace(" ", "")
    assert batch["task"].tolist() == [1] and batch["labels"].tolist() == [3 + row["label"]]


def test_training_set_mixes_tasks_shuffles_sentences_and_repeats(
    base: Base, sentences_folder: Path
):
    suite = Sentences(base)
    rows = suite.training_set(900, seed=4)
    assert rows == suite.training_set(900, seed=4) != suite.training_set(900, seed=5)
    counts = torch.bincount(torch.tensor([row["task"] for row in rows]))
    assert (counts > 220).all()  # of 300 expected
    mood = [row for row in rows if row["task"] == 1][:90]
    whole = suite._tokens["mood", "train"]
    assert mood != whole  # each sentence once before any comes again, in another order
    assert all(row in mood for row in whole)


def test_each_task_has_its_own_softmax(any_base: Base, sentences_folder: Path):
    suite = Sentences(any_base)
    model = suite.model(any_base)
    batch = suite.collate(suite.training_set(20, seed=0))
    output = model(**batch)
    losses = []
    for i in range(20):  # one sentence at a time, without padding, from the definition
        length = int(batch["attention_mask"][i].sum())
        assert batch["attention_mask"][i, :length].all()
        ids = batch["input_ids"][i : i + 1, :length]
        mean = model.encoder(ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1)
        own = (model.owner == batch["task"][i]).nonzero().flatten()
        logits = F.linear(mean, model.task_heads.weight[own], model.task_heads.bias[own])
        torch.testing.assert_close(output["logits"][i : i + 1, own], logits)
        losses.append(F.cross_entropy(logits, batch["labels"][i : i + 1] - own[0]))
        others = model.owner != batch["task"][i]
        assert (output["logits"][i, others] == -torch.inf).all()
    torch.testing.assert_close(output["loss"], torch.stack(losses).mean())


def test_training_computes_short_sentences_apart(any_base: Base, sentences_folder: Path):
    suite = Sentences(any_base)
    model = suite.model(any_base)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):  # BERT's attention, in transformers 4
            module.dropout_prob = 0.0
    batch = suite.collate(suite.training_set(20, seed=0))
    shapes = []
    model.encoder.register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape))
    )

    def loss_and_gradients(training: bool) -> list[torch.Tensor]:
        loss = model.train(training)(**batch)["loss"]
        return [loss, *torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)]

    whole, parts = loss_and_gradients(False), loss_and_gradients(True)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    lengths = sorted(batch["attention_mask"].sum(1).tolist())
    assert lengths[0] < lengths[-1]
    assert shapes == [
        (20, lengths[-1]),
        *[(len(part), part[-1]) for part in (lengths[:7], lengths[7:14], lengths[14:])],
    ]


def test_lora_has_its_size_under_the_classifier(any_base: Base, sentences_folder: Path):
    shapes = target_shapes(any_base).values()
    size = sum(equal_lora_rank(i, o, 4, 3) * (i + o) for i, o in shapes)
    assert len({equal_lora_rank(*shape, 4, 3) for shape in shapes}) > 1
    model = adapt("lora", any_base, Sentences(any_base), seed=0)
    assert count_trainable(model) == (size, 7 * 32 + 7)


def test_every_sentence_of_a_split_is_scored(
    base: Base, sentences_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = shutil.copytree(sentences_folder, tmp_path / "data")
    lines = data / "mood" / "test.jsonl"
    lines.write_text(5 * lines.read_text())  # 150, more than a batch
    monkeypatch.setenv("RLORA_DATA", str(data))
    suite = Sentences(base, ["mood"])
    model = suite.model(base).train()
    score = suite.score(model)["mood"]["accuracy"]
    assert model.training
    batch = suite.collate(suite._tokens["mood", "test"])
    assert len(batch["labels"]) == 150
    guess = model.eval()(**batch)["logits"].argmax(-1)
    assert score == pytest.approx((guess == batch["labels"]).double().mean().item())
    assert 0 < score < 1


def test_some_of_the_tasks(base: Base, sentences_folder: Path):
    whole, part = Sentences(base), Sentences(base, ["time", "question"])
    assert part.tasks == ("time", "question")
    assert part.provenance["data_sha256"] != whole.provenance["data_sha256"]
    assert {row["task"] for row in part.training_set(50, 0)} == {0, 1}
    probe = part.probe("question", 4)
    assert probe["input_ids"].shape == probe["attention_mask"].shape and len(probe["labels"]) == 4
    assert set(probe["task"].tolist()) == {1}
    with pytest.raises(LabError, match="'weather': there are question, mood, time"):
        Sentences(base, ["weather"])


def test_minilm_learns_the_fixture(sentences_folder: Path):
    base = load_base("minilm")
    suite = Sentences(base)
    model = adapt("rlora", base, suite, seed=0)
    assert count_trainable(model) == (218_880, 7 * 384 + 7)
    train(model, suite, steps=40, batch=16, seed=0)
    assert min(score["accuracy"] for score in suite.score(model).values()) > 0.9


def test_what_is_wrong_with_a_folder(
    base: Base, sentences_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = shutil.copytree(sentences_folder, tmp_path / "data")
    monkeypatch.setenv("RLORA_DATA", str(data))
    lines = data / "mood" / "validation.jsonl"
    whole = lines.read_text()
    for bad in ('{"text": "x", "label": 2}', '{"text": "x"}', "x", '{"text": 3, "label": 0}'):
        lines.write_text(whole + bad + "\n")
        with pytest.raises(LabError, match="mood/validation.jsonl line 25.*label.*0 to 1"):
            Sentences(base)
    lines.write_text("")
    with pytest.raises(LabError, match="mood/validation.jsonl is empty"):
        Sentences(base)
    lines.unlink()
    with pytest.raises(LabError, match="mood/validation.jsonl is missing"):
        Sentences(base)
    (data / "labels.json").unlink()
    with pytest.raises(LabError, match="no readable labels.json"):
        Sentences(base)


def test_the_hash_of_the_data_covers_texts_and_labels(
    base: Base, sentences_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = shutil.copytree(sentences_folder, tmp_path / "data")
    monkeypatch.setenv("RLORA_DATA", str(data))
    lines = data / "mood" / "test.jsonl"
    first, *others = lines.read_text().splitlines()
    row = json.loads(first)
    hashes = set()
    for change in ({}, {"label": 1 - row["label"]}, {"text": "another"}):
        lines.write_text("\n".join([json.dumps(row | change), *others]))
        hashes.add(Sentences(base, ["mood"]).provenance["data_sha256"])
    assert len(hashes) == 3


def test_no_network_and_no_folder(base: Base, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RLORA_DATA", raising=False)
    with pytest.raises(LabError, match="'trec'.*Set RLORA_DATA to a folder"):
        Sentences(base)


def hub_form(task: str) -> DatasetDict:
    """The hub's columns and splits, in little."""
    hub_id, column, names = HUB[task]
    splits = {"train": 40, "test": 10} | ({"validation": 10} if task.startswith("sst") else {})
    values = list(names)
    parts = {}
    for split, size in splits.items():
        chosen = [values[i % len(values)] for i in range(size)]
        rows = {"text": [f"{task} {split} {i}" for i in range(size)], column: chosen}
        if column != "label":
            rows["label"] = [99] * size  # the fine labels, which are not asked for
        parts[split] = Dataset.from_dict(rows | {"label_text": list(map(str, chosen))})
    return DatasetDict(parts)


def test_hub_form(base: Base, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RLORA_DATA", raising=False)
    by_id = {HUB[task][0]: task for task in HUB}
    monkeypatch.setattr(sentences, "load_dataset", lambda hub_id: hub_form(by_id[hub_id]))
    suite = Sentences(base)
    assert suite.tasks == tuple(HUB) and suite.provenance["data"] == "hub"
    notes = suite.provenance["data_notes"]
    assert notes["sst2"] == "splits as on the hub"
    assert "10% of the training split, cut with seed 0" in notes["cr"]
    assert suite.provenance["sentences"]["cr"] == {"train": 36, "validation": 4, "test": 10}
    # the first label of each test split is the first in HUB, and the hub's 1 is subjective
    assert suite._tokens["trec", "test"][1]["labels"] == 1
    subjective = hub_form("subj")["test"]["label"].index(1)
    offset = suite._tokens["subj", "test"][subjective]["labels"]
    assert offset == 6 + 2 + 5 + suite.labels["subj"].index("subjective")


def test_hub_form_with_a_strange_label(base: Base, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RLORA_DATA", raising=False)
    strange = Dataset.from_dict({"text": ["a"], "label_coarse_text": ["WHAT"]})
    found = DatasetDict(train=strange, test=strange)
    monkeypatch.setattr(sentences, "load_dataset", lambda hub_id: found)
    with pytest.raises(LabError, match="'trec'.*WHAT.*label_coarse_text.*DESC"):
        Sentences(base)


def test_cut_leaves_out_what_the_test_split_holds():
    rows = [f"sentence {i}" for i in range(30)]
    train_rows = Dataset.from_dict({"text": rows + rows[:5], "label": [0] * 35})
    test_rows = Dataset.from_dict({"text": rows[:3], "label": [0] * 3})
    found, note = sentences.cut_validation(DatasetDict(train=train_rows, test=test_rows))
    parts = {split: found[split]["text"][:] for split in found}
    assert sorted(parts["train"] + parts["validation"]) == sorted(rows[3:])
    assert not set(parts["train"]) & set(parts["validation"]) and "seed" in note


@pytest.mark.skipif("RLORA_DATA" not in os.environ, reason="RLORA_DATA is not set")
def test_real_sentences():
    suite = Sentences(load_base("minilm"))
    assert suite.tasks == tuple(HUB)
    assert suite.labels == {task: list(names.values()) for task, (*_, names) in HUB.items()}
    for task in suite.tasks:
        splits = {
            split: {tuple(row["input_ids"]) for row in suite._tokens[task, split]}
            for split in ("train", "test")
        }
        # trec itself asks 10 of its 500 test questions in training too
        assert len(splits["train"] & splits["test"]) <= 0.02 * len(splits["test"]), task
