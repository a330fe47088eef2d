"""From a folder of a model and files to an adapter: scored, saved, checked, exported, repeated."""

import copy
import json
import os
import re
import weakref
from pathlib import Path

import pytest
import torch
from lab_helpers import letter_rows, write_rows
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, GenerationConfig

from rlora_lab.errors import LabError
from rlora_lab.models.answers import AnswerModel, as_matrix
from rlora_lab.models.bases import Base, load_base
from rlora_lab.models.methods import adapt
from rlora_lab.runs import adapter
from rlora_lab.runs.adapter import chance, foretell, judge, train_adapter, write_answers
from rlora_lab.runs.training import train
from rlora_lab.tasks.files import Files, lay_out
from rlora_lab.tasks.language import SPLITS

SHORT = {"steps": 4, "batch": 8, "lr": 4e-3, "test_rows": 6}


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Two string tasks as files for the tiny base, one of them with options."""
    for task in ("largest", "mirror"):
        rows = letter_rows(task)
        if task == "largest":
            options = [letter * 6 for letter in "abcdefgh"]
            rows = [row | {"options": options} for row in rows]
        write_rows(tmp_path / "mine" / f"{task}.jsonl", rows)
    return tmp_path / "mine"


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small causal model that nobody trained, whose tokenizer has an end; and a cache."""
    monkeypatch.setenv("RLORA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "base"
    load_base(str(llama_folder)).model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder, eos_token="[SEP]")
    tokenizer.save_pretrained(folder)
    return folder


def words(path: Path, count: int = 40) -> None:
    """Files whose answer stands in the prompt."""
    names = ["walk", "talk", "jump", "play", "open"]
    options = names + ["close", "cook", "look", "work", "turn", "run"]  # more than eight
    rows = [
        {"prompt": f"Say {names[n % 5]}, {n}.", "answer": names[n % 5], "options": options}
        for n in range(count)
    ]
    write_rows(path / "say.jsonl", rows)


@pytest.mark.parametrize("method", ["rlora", "lora"])
def test_one_call_trains_scores_saves_and_exports(method: str, letters: Path, tmp_path: Path):
    said: list[str] = []
    out = tmp_path / "out"
    record = train_adapter("tiny", letters, out, method=method, say=said.append, **SHORT)
    assert json.loads((out / "record.json").read_text()) == record
    assert record["base"] == "tiny" and record["settings"]["seed"] == 0
    assert record["command"].startswith("python -m rlora_lab train --base tiny --data mine")
    assert ("--method lora" in record["command"]) == (method == "lora")
    for task, own in record["tasks"].items():
        assert own["rows"] == {"train": 43, "validation": 2, "test": 6}
        for when in ("before", "after"):
            assert 0 <= own[when]["exact"] <= 1
            assert (own[when]["no_option"] is None) == (task == "mirror")
            assert (own[when]["choice"] is None) == (task == "mirror")
    assert record["tasks"]["largest"]["chance"] == 1 / 8
    assert record["tasks"]["largest"]["before"]["no_option"] > 0
    assert record["reloaded_off"] < 1e-3
    assert record["foretold"]["seconds"] >= 0 < record["foretold"]["bytes"]
    # the adapter is that of the method, and stock PEFT loads what was exported
    kinds = {"rlora": "RLORA", "lora": "LORA"}
    config = PeftConfig.from_pretrained(out / "adapter")
    assert config.peft_type == kinds[method] and config.task_type == "CAUSAL_LM"
    assert (out / "exported").exists() == (method == "rlora")
    if method == "rlora":
        assert record["exported_off"]["relative"] > 0
        assert isinstance(PeftConfig.from_pretrained(out / "exported"), LoraConfig)
        assert {"exact", "no_option"} == record["tasks"]["mirror"]["exported"].keys()
        PeftModel.from_pretrained(load_base("tiny").model, out / "exported")
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and lines[0].keys() >= {"prompt", "answer", "before", "after", "from"}
    assert all(("exported" in line) == (method == "rlora") for line in lines)
    for task, own in record["tasks"].items():
        right = [line["after"] == line["answer"] for line in lines if line["task"] == task]
        assert own["after"]["exact"] == pytest.approx(sum(right) / 6, abs=1e-4)
    assert not (out / "checkpoints").exists()
    text = "\n".join(said)
    assert "Foretold:" in text and "no option" in text and "saved and loaded again" in text
    with pytest.raises(LabError, match="out holds a run that is finished: choose another --out"):
        train_adapter("tiny", letters, out, method=method, say=said.append, **SHORT)


def test_no_hub_is_asked_for_a_base_of_the_labs_name(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn
):
    """As PEFT does, to see whether the vocabulary was changed; where none answers, it warns."""
    asked = []
    hub = "peft.utils.save_and_load.check_file_exists_on_hf_hub"
    monkeypatch.setattr(hub, lambda *names, **_: asked.append(names))
    train_adapter("tiny", letters, tmp_path / "out", say=str, **SHORT)
    assert not asked
    assert not [w for w in recwarn if "config file" in str(w.message)]
    for name in ("adapter", "exported"):
        config = PeftConfig.from_pretrained(tmp_path / "out" / name)
        assert config.base_model_name_or_path == "tiny"


def test_one_model_is_in_memory_at_a_time(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What was loaded is gone before it is loaded again, with what was trained on it."""
    loaded = []

    def load(name: str) -> Base:
        assert not [model for model in loaded if model() is not None]
        base = load_base(name)
        loaded.append(weakref.ref(base.model))
        return base

    monkeypatch.setattr(adapter, "load_base", load)
    train_adapter("tiny", letters, tmp_path / "out", say=str, **SHORT)
    assert len(loaded) == 3  # to train, to check what was saved, to try what was exported


class Stopped(Exception):
    pass


def test_a_run_that_was_stopped_gives_the_same(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = SHORT | {"steps": 6}
    whole = train_adapter("tiny", letters, tmp_path / "whole", say=str, **settings)

    def stops(model, suite, **kwargs):
        def stop(step: int) -> None:
            if step == 4:
                raise Stopped

        return train(model, suite, **kwargs | {"on_step": stop, "save_steps": 2})

    monkeypatch.setattr(adapter, "train", stops)
    with pytest.raises(Stopped):
        train_adapter("tiny", letters, tmp_path / "again", say=str, **settings)
    monkeypatch.undo()
    with pytest.raises(LabError, match="again holds a run with another seed: choose another"):
        train_adapter("tiny", letters, tmp_path / "again", say=str, seed=1, **settings)
    steps = []

    def counts(model, suite, **kwargs):
        return train(model, suite, **kwargs | {"on_step": steps.append})

    monkeypatch.setattr(adapter, "train", counts)
    again = train_adapter("tiny", letters, tmp_path / "again", say=str, **settings)
    assert 1 not in steps and steps[-1] == 6  # it went on
    assert again["tasks"] == whole["tasks"] and again["loss"] == whole["loss"]
    states = [
        load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in ("whole", "again")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_sign_of_life(letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapter.Pulse.__init__, "__defaults__", (0.0,))
    said: list[str] = []
    train_adapter("tiny", letters, tmp_path / "out", say=said.append, **SHORT)
    assert [line for line in said if re.match(r"  step \d of 4, \d+ s left", line)]
    assert [line for line in said if re.match(r"  mirror: 6 of 6 answers written", line)]


def test_a_folder_and_files_with_eleven_options(folder: Path, tmp_path: Path):
    words(tmp_path / "mine")
    record = train_adapter(
        str(folder), tmp_path / "mine", tmp_path / "out", say=str, blocks=1, **SHORT
    )
    assert record["base"] == "base" and record["trained_blocks"] == "1 to 1 of 2"
    assert record["tasks"]["say"]["chance"] == pytest.approx(1 / 11, abs=1e-4)
    state = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert state and all(".layers.1.mlp." in name for name in state)
    assert str(tmp_path) not in (tmp_path / "out/record.json").read_text()


def test_a_base_of_large_logits_passes_the_check(folder: Path, tmp_path: Path):
    """Where a loss is about 20, roundings are larger than 1e-5 and mean nothing."""
    loaded = load_base(str(folder))
    loaded.model.lm_head.weight.data *= 200
    loaded.model.save_pretrained(folder)
    words(tmp_path / "mine")
    record = train_adapter(str(folder), tmp_path / "mine", tmp_path / "out", say=str, **SHORT)
    assert max(record["loss"]) > 15 and record["reloaded_off"] < 1e-3


def test_an_adapter_that_was_saved_wrong_is_seen(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    load = PeftModel.from_pretrained.__func__

    def other(cls, model, path, **kwargs):
        loaded = load(cls, model, path, **kwargs)
        for name, parameter in loaded.named_parameters():
            if "rlora_B." in name:
                parameter.data += 0.1
        return loaded

    monkeypatch.setattr(PeftModel, "from_pretrained", classmethod(other))
    with pytest.raises(LabError, match="loaded again is off by"):
        train_adapter("tiny", letters, tmp_path / "out", say=str, bf16=False, **SHORT)


def test_what_can_not_be_trained_is_refused(letters: Path, tmp_path: Path):
    with pytest.raises(LabError, match="no method 'oracle' to train: allowed are rlora, lora"):
        train_adapter("tiny", letters, tmp_path / "out", method="oracle", say=str)
    with pytest.raises(LabError, match="r: Input should be greater than or equal to 1, got 0"):
        train_adapter("tiny", letters, tmp_path / "out", r=0, say=str)
    assert not (tmp_path / "out").exists()
    with pytest.raises(LabError, match="gives no numbers any more: lower the rate of 1e"):
        train_adapter("tiny", letters, tmp_path / "out", say=str, **SHORT | {"lr": 1e30})
    assert not (tmp_path / "out" / "adapter").exists()


def suite_of(base: Base, data: Path, out: Path, **kwargs) -> Files:
    lay_out(data, out, test_rows=12)
    return Files(base, bf16=False, folder=out, **kwargs)


def test_greedy_is_greedy_whatever_the_generation_config_says(folder: Path, tmp_path: Path):
    words(tmp_path / "mine")
    base = load_base(str(folder))
    suite = suite_of(base, tmp_path / "mine", tmp_path / "out")
    train(suite.model(base), suite, steps=60, lr=1e-2, batch=16, seed=0)
    base.model.generation_config.eos_token_id = base.tokenizer.eos_token_id
    rows = suite.files["say"]["test"]
    expected = suite.results(suite.model(base))["say"]["exact"]
    assert 0 < sum(expected)
    penalty = GenerationConfig(
        repetition_penalty=50.0, no_repeat_ngram_size=1, num_beams=3, eos_token_id=102
    )
    for config in (base.model.generation_config, penalty):
        base.model.generation_config = config
        texts = write_answers(base.model, suite)["say"]
        assert [t == r["answer"] for t, r in zip(texts, rows, strict=True)] == expected


def test_answers_that_are_no_option_are_counted():
    rows = [{"answer": "yes", "options": ["yes", "no"]}] * 4
    assert judge(["yes", "no", "yes yes", ""], rows) == {"exact": 0.25, "no_option": 0.5}
    rows = [{"answer": "yes", "options": None}] * 4
    assert judge(["yes", "no", "yes yes", ""], rows) == {"exact": 0.25, "no_option": None}


def test_chance_is_of_options_or_of_the_commonest_answer():
    def rows(*answers, options=None):
        return [{"answer": answer, "options": options} for answer in answers]

    four = {"train": rows("a", options=list("abcd")), "test": rows("b", options=list("abcd"))}
    assert chance(four) == 0.25
    assert chance({"train": rows("a", "b", "b"), "test": rows("a", "b", "b", "b")}) == 0.75


@pytest.mark.parametrize("batch", [4, 8])
def test_batches_that_are_gathered_make_the_step_of_all(batch: int, letters: Path, tmp_path: Path):
    """Every row has as many tokens to answer, so the mean over batches is that over rows."""
    states = []
    for size, accumulate in ((16, 1), (batch, 16 // batch)):
        base = load_base("tiny")
        suite = suite_of(base, letters, tmp_path / "out")
        model = adapt("rlora", base, suite, seed=0, lora_dropout=0.0)
        train(model, suite, steps=3, lr=1e-3, batch=size, accumulate=accumulate, seed=0)
        states.append(get_peft_model_state_dict(model))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-5)
    assert (states[0][name] - torch.zeros_like(value)).abs().max() > 0


class Products(TorchDispatchMode):
    """The names of the products in which a weight of a head's size takes part."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.found = numbers, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            if any(t.numel() >= self.numbers for t in tensors):
                self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_head_is_not_copied_for_each_row(folder: Path):
    """As torch does in bf16 with a slice of hidden states: `logits_to_keep`."""
    model = load_base(str(folder)).model.to(torch.bfloat16).requires_grad_(False)
    head = copy.deepcopy(model.lm_head)
    ids = {"input_ids": torch.arange(60).reshape(6, 10), "logits_to_keep": 2}
    with Products(head.weight.numel()) as before:
        expected = model(**ids).logits
    assert before.found == ["bmm"]  # six copies of the head
    as_matrix(model.lm_head)
    with Products(head.weight.numel()) as after:
        torch.testing.assert_close(model(**ids).logits, expected)
    assert after.found == ["mm"]


@pytest.mark.parametrize("training", [False, True])
def test_the_answers_head_is_asked_for_a_matrix(training: bool, folder: Path, tmp_path: Path):
    words(tmp_path / "mine")
    base = load_base(str(folder))
    suite = suite_of(base, tmp_path / "mine", tmp_path / "out")
    model = AnswerModel(base.model.requires_grad_(False), bf16=True).train(training)
    shapes = []
    base.model.lm_head.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    batch = suite.collate(suite.training_set(8, seed=0))
    model(**batch)
    assert shapes == [((batch["labels"] != -100).sum(), base.model.config.hidden_size)]


def test_time_and_memory_are_foretold(letters: Path, tmp_path: Path):
    base = load_base("tiny")
    suite = suite_of(base, letters, tmp_path / "out")
    model = adapt("rlora", base, suite, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    short = foretell(model, suite, steps=10, batch=8)
    long = foretell(model, suite, steps=10_000, batch=8, accumulate=3)
    assert long["seconds"] > 100 * short["seconds"] > 0
    assert 1e7 < short["bytes"] < 1e11
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.skipif("RLORA_DATA" not in os.environ, reason="the sentences are not here")
def test_files_that_nobody_here_made(folder: Path, tmp_path: Path):
    """The five tasks of sentences, as prompts."""
    data = Path(os.environ["RLORA_DATA"])
    labels = json.loads((data / "labels.json").read_text())
    for task, options in labels.items():
        for split in SPLITS:
            lines = (data / task / f"{split}.jsonl").read_text().strip().split("\n")
            rows = [
                {
                    "prompt": f"{' / '.join(options)}? {row['text']}",
                    "answer": options[row["label"]],
                    "options": options,
                }
                for row in map(json.loads, lines)
            ]
            write_rows(tmp_path / "mine" / task / f"{split}.jsonl", rows)
    said: list[str] = []
    out = tmp_path / "out"
    record = train_adapter(
        str(folder), tmp_path / "mine", out, say=said.append, train_rows=60, **SHORT
    )
    assert record["tasks"].keys() == labels.keys()
    assert [own["chance"] for own in record["tasks"].values()] == pytest.approx(
        [1 / len(labels[task]) for task in record["tasks"]], abs=1e-4
    )
    assert any("rows of train left out" in note for note in record["notes"])  # trec's
    assert (out / "exported" / "adapter_model.safetensors").is_file()
