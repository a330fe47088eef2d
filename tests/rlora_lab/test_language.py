"""The language tasks: rows from each source, the answers that are asked for, upper blocks alone."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from lab_helpers import needs_smollm2, plan_file, write_rows
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from torch import Tensor, nn

from rlora_lab.errors import LabError
from rlora_lab.models import answers
from rlora_lab.models.bases import Base, load_base
from rlora_lab.models.methods import adapt, count_trainable
from rlora_lab.runs import inside, one_run
from rlora_lab.runs.plan import load_plan
from rlora_lab.runs.probes import by_metric, routing_entropy
from rlora_lab.runs.record import read_records
from rlora_lab.runs.training import train
from rlora_lab.runs.worker import work
from rlora_lab.tasks import language
from rlora_lab.tasks.language import DIFFERENT, RELATED, TASKS, Language, cut_splits, load_rows
from rlora_lab.tasks.suite import load_suite

WORDS = ("walk", "talk", "jump", "play", "open", "close", "cook", "look", "work", "turn")


def made_up(split: str) -> dict[str, list[dict]]:
    """Answers that stand in the prompt, once or twice; and two options that begin alike. How often,
    and which, can't be known: a model will be wrong about ends and about options."""
    draw = random.Random(split)
    words = [f"{a} the {b}" for a in WORDS for b in WORDS[:4]]
    words = words[0:24] if split == "train" else words[24:]
    options = ["quite long", "quite short"]
    copied = []
    chosen = []
    for word in words:
        answer = " ".join([word.split()[-1]] * draw.choice((1, 2)))
        copied.append({"prompt": f"Say {word}.", "answer": answer, "options": None})
        prompt = f"Is this long or short? {word}"
        answer = draw.choice(options)
        chosen.append({"prompt": prompt, "answer": answer, "options": options})
    return {"copy": copied, "choose": chosen}


@pytest.fixture
def made_up_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The rows in files, and a cache of its own."""
    folder = tmp_path / "language"
    for split in language.SPLITS:
        for task, rows in made_up(split).items():
            write_rows(folder / task / f"{split}.jsonl", rows)
    monkeypatch.setenv("RLORA_LANGUAGE", str(folder))
    monkeypatch.setenv("RLORA_CACHE", str(tmp_path / "cache"))
    return folder


def test_a_line_ends_at_a_line_feed_alone(made_up_folder: Path):
    """U+0085 and U+2028 stand in people's texts; Python's splitlines ends a line at them."""
    row = {"prompt": "one\u0085two\u2028three", "answer": "three", "options": None}
    file = made_up_folder / "copy" / "train.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert language.load_rows("copy")[0]["train"] == [row]


TASKS_MADE_UP = ["copy", "choose"]


def small(llama_folder: Path) -> Base:
    base = load_base(str(llama_folder))
    base.tokenizer.eos_token = "[SEP]"
    return base


def perturb(model: nn.Module) -> None:
    """All that is trained, so that no equality holds because an adapter does nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def loss_of_a_row(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """From the definition: the whole model, one row, its loss at each token of the answer."""
    ids = torch.tensor([prompt + answer])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(answer), reduction="none")


def tokens_of(base: Base, row: dict) -> tuple[list[int], list[int]]:
    def encode(text: str) -> list[int]:
        return base.tokenizer(text, add_special_tokens=False)["input_ids"]

    return encode(row["prompt"] + "\n"), encode(row["answer"]) + [base.tokenizer.eos_token_id]


def test_only_answers_and_their_ends_are_asked_for(llama_folder: Path, made_up_folder: Path):
    base = small(llama_folder)
    suite = Language(base, TASKS_MADE_UP, bf16=False)
    assert suite.provenance["data"] == "folder in RLORA_LANGUAGE"
    assert suite.provenance == Language(small(llama_folder), TASKS_MADE_UP, bf16=False).provenance
    batch = suite.collate(suite.training_set(20, seed=0))
    lengths = batch["attention_mask"].sum(1)
    assert (lengths.diff() >= 0).all() and lengths[0] < lengths[-1]
    texts = {row["answer"] for rows in made_up("train").values() for row in rows}
    for ids, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        asked = labels[labels != -100]
        assert base.tokenizer.decode(asked[:-1]) in texts and asked[-1] == 102
        assert torch.equal(ids[mask.bool()][-len(asked) :], asked)


@pytest.mark.parametrize("training", [False, True])
def test_loss_is_that_of_the_whole_model(training: bool, llama_folder: Path, made_up_folder: Path):
    base = small(llama_folder)
    suite = Language(base, TASKS_MADE_UP, bf16=False)
    rows = suite.training_set(20, seed=0)
    whole = [
        loss_of_a_row(base.model, row["ids"][: row["answer"]], row["ids"][row["answer"] :])
        for row in sorted(rows, key=lambda row: len(row["ids"]))
    ]
    expected = torch.cat(whole).mean()
    model = suite.model(base).train(training)
    found = model(**suite.collate(rows))["loss"]
    torch.testing.assert_close(found, expected)
    weights = [*model.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights)
    )


@pytest.fixture
def trained(llama_folder: Path, made_up_folder: Path) -> tuple[Base, Language]:
    """A model that is right about some rows and wrong about others."""
    base = small(llama_folder)
    suite = Language(base, TASKS_MADE_UP, bf16=False)
    train(suite.model(base), suite, steps=60, lr=1e-2, batch=16, seed=0)
    return base, suite


def written(base: Base, model: nn.Module, rows: list[dict]) -> list[bool]:
    """Whether greedy decoding, with nothing else, writes each row's answer and its end."""
    tokens = [tokens_of(base, row) for row in rows]
    longest = max(len(prompt) for prompt, _ in tokens)
    ids = torch.full((len(rows), longest), base.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, (prompt, _) in enumerate(tokens):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max(len(answer) for _, answer in tokens),
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=base.tokenizer.eos_token_id,
        pad_token_id=base.tokenizer.pad_token_id,
    )[:, longest:].tolist()
    return [new[: len(answer)] == answer for new, (_, answer) in zip(out, tokens, strict=True)]


def test_exact_is_what_greedy_decoding_writes(trained: tuple[Base, Language]):
    base, suite = trained
    exact = []
    results = suite.results(suite.model(base))
    for task in TASKS_MADE_UP:
        assert results[task]["exact"] == written(base, base.model, made_up("test")[task])
        exact += results[task]["exact"]
    assert 0.1 < np.mean(exact) < 0.9


def test_choice_is_the_likeliest_option(trained: tuple[Base, Language]):
    base, suite = trained
    results = suite.results(suite.model(base))
    expected = []
    for row in made_up("test")["choose"]:
        losses = [
            loss_of_a_row(base.model, *tokens_of(base, row | {"answer": option})).sum().item()
            for option in row["options"]
        ]
        expected.append(row["options"][int(np.argmin(losses))] == row["answer"])
    assert results["choose"]["choice"] == expected and "choice" not in results["copy"]
    assert 0 < np.mean(expected) < 1
    scores = suite.score(suite.model(base))
    assert by_metric(scores, suite)["choice"] == [None, round(float(np.mean(expected)), 5)]


def upper_and_whole(load, tasks: list[str], blocks: int, bf16: bool, method: str = "rlora"):
    """The same perturbed adapter on upper blocks over kept outputs, and in the whole model."""
    suite = Language(load(), tasks, blocks=blocks, bf16=bf16)
    base = load()
    upper = adapt(method, base, suite, seed=0, lora_dropout=0.0)
    perturb(upper)
    whole_suite = Language(load(), tasks, bf16=bf16)
    whole_base = load()
    whole_base.targets = base.targets
    whole = adapt(method, whole_base, whole_suite, seed=3, lora_dropout=0.0)
    state = get_peft_model_state_dict(upper)
    assert state.keys() == get_peft_model_state_dict(whole).keys()
    set_peft_model_state_dict(whole, state)
    return (suite, upper), (whole_suite, whole)


@pytest.mark.parametrize("method", ["rlora", "lora"])
def test_upper_blocks_equal_the_whole_model(method: str, llama_folder: Path, made_up_folder: Path):
    pairs = upper_and_whole(lambda: small(llama_folder), TASKS_MADE_UP, 1, False, method)
    (suite, upper), (whole_suite, whole) = pairs
    assert suite.provenance["trained_blocks"] == "1 to 1 of 2"
    found = []
    for own, model in pairs:
        loss = model.train()(**own.collate(own.training_set(20, seed=0)))["loss"]
        loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append((loss.detach(), trained))
    torch.testing.assert_close(*found)
    assert len(found[0][1]) == 3 * (3 if method == "rlora" else 2)
    with upper.disable_adapter():
        without = upper(**suite.collate(suite.training_set(20, seed=0)))["loss"]
    assert abs(without - found[0][0]) > 1e-3  # the adapter is not nothing
    assert suite.results(upper) == whole_suite.results(whole)
    assert count_trainable(upper) == count_trainable(whole)
    if method == "rlora":
        torch.testing.assert_close(
            routing_entropy(upper.eval(), suite), routing_entropy(whole.eval(), whole_suite)
        )


def test_an_adapter_of_upper_blocks_goes_into_the_model(
    llama_folder: Path, made_up_folder: Path, tmp_path: Path
):
    suite = Language(small(llama_folder), TASKS_MADE_UP, blocks=1, bf16=False)
    upper = adapt("rlora", small(llama_folder), suite, seed=0).eval()
    perturb(upper)
    upper.save_pretrained(tmp_path / "adapter")
    base = small(llama_folder)
    whole = PeftModel.from_pretrained(base.model, tmp_path / "adapter").eval()
    row = suite._rows["copy", "test"][0]
    expected = loss_of_a_row(whole, row["ids"][: row["answer"]], row["ids"][row["answer"] :])
    torch.testing.assert_close(upper(**suite.collate([row]))["loss"], expected.mean())


def test_the_oracle_gives_each_task_its_own_head(llama_folder: Path, made_up_folder: Path):
    base = small(llama_folder)
    suite = Language(base, TASKS_MADE_UP, bf16=False)
    model = adapt("oracle", base, suite, seed=0).eval()
    batch = suite.collate(suite.training_set(12, seed=0))
    assert set(batch["tasks"].tolist()) == {0, 1}
    start = model(**batch)["logits"]
    with model.disable_adapter():
        torch.testing.assert_close(start, model(**batch)["logits"])
    perturb(model)
    found = model(**batch)["logits"]
    # the same, task by task, by PEFT's LoRA with the head of the task as its B
    asked = (batch["labels"] != -100).sum(1).tolist()
    parts = found.split(asked)
    for task in (0, 1):
        other = small(llama_folder)
        lora = adapt("lora", other, Language(other, TASKS_MADE_UP, bf16=False), seed=0).eval()
        for path, layer in model.named_modules():
            if not hasattr(layer, "rlora_A"):
                continue
            A, B = layer.rlora_A["default"].weight, layer.rlora_B["default"].weight
            r = layer.configs["default"].r
            twin = lora.get_submodule(path)
            twin.lora_A["default"].weight = nn.Parameter(A)
            twin.lora_B["default"].weight = nn.Parameter(B[:, task * r : (task + 1) * r])
            twin.scaling["default"] = 32 / r**0.5
        rows = [i for i, own in enumerate(batch["tasks"].tolist()) if own == task]
        expected = lora(**batch)["logits"].split(asked)
        for i in rows:
            torch.testing.assert_close(parts[i], expected[i])
    with pytest.raises(LabError, match="told the task"):
        model(**{name: value for name, value in batch.items() if name != "tasks"})


@pytest.mark.parametrize(
    ("method", "starts_at_the_base"),
    [("rlora", True), ("rlora+router", False), ("rlora-moved", False), ("lora-rank+init", True)],
)
def test_how_methods_start(
    method: str, starts_at_the_base: bool, llama_folder: Path, made_up_folder: Path
):
    base = small(llama_folder)
    suite = Language(base, TASKS_MADE_UP, bf16=False)
    model = adapt(method, base, suite, seed=0).eval()
    batch = suite.probe("copy", 4)
    with torch.no_grad():
        start = model(**batch)["logits"]
        with model.disable_adapter():
            assert torch.allclose(start, model(**batch)["logits"], atol=1e-5) == starts_at_the_base


def test_methods_without_an_adapter(llama_folder: Path, made_up_folder: Path):
    base = small(llama_folder)
    suite = Language(base, TASKS_MADE_UP, bf16=False)
    model = adapt("none", base, suite, seed=0)
    assert count_trainable(model) == (0, 0) and not isinstance(model, PeftModel)
    found = suite.score(model)
    adapted = adapt("lora", small(llama_folder), suite, seed=0).eval()
    assert suite.score(adapted) == found  # it starts at the base


def test_lower_outputs_are_kept_whole_or_not_at_all(
    llama_folder: Path, made_up_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, folder, rows = small(llama_folder), tmp_path / "kept", [[5, 6, 7], [8], [9, 10]]
    before = [id(module) for module in base.model.modules()]
    with monkeypatch.context() as patch:
        patch.setattr(answers, "pad", lambda rows: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answers.lower_outputs(base.model, 1, rows, folder, False)
    assert {path.suffix for path in folder.iterdir()} <= {".lock"}
    assert [id(module) for module in base.model.modules()] == before
    first = answers.lower_outputs(base.model, 1, rows, folder, False)
    ends = base.model(input_ids=torch.tensor([rows[2]]), output_hidden_states=True)
    torch.testing.assert_close(torch.from_numpy(first[4:6].copy()), ends.hidden_states[1][0])
    with monkeypatch.context() as patch:
        patch.setattr(answers, "_write_outputs", lambda *args: 1 / 0)
        again = answers.lower_outputs(base.model, 1, rows, folder, False)
        assert np.array_equal(first, again) and isinstance(again, np.memmap)
        base.model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
        with pytest.raises(ZeroDivisionError):  # other weights are not taken for these
            answers.lower_outputs(base.model, 1, rows, folder, False)


def test_what_does_not_fit(llama_folder: Path, bert_folder: Path, made_up_folder: Path):
    with pytest.raises(LabError, match="'language' needs a causal model with a tokenizer"):
        Language(load_base(str(bert_folder)))
    with pytest.raises(LabError, match="no end token"):
        Language(load_base(str(llama_folder)))
    with pytest.raises(LabError, match="blocks must be between 1 and 1 of 2, got 2"):
        Language(small(llama_folder), TASKS_MADE_UP, blocks=2)
    with pytest.raises(LabError, match="unknown task 'weather': there are past_tense"):
        load_rows("weather")
    with pytest.raises(LabError, match="'language' does not fit base 'tiny'"):
        load_suite("language", load_base("tiny"))
    with pytest.raises(LabError, match="blocks is for the suites language and files"):
        load_suite("sentences", load_base(str(bert_folder)), blocks=1)


def test_a_plan_trains_upper_blocks(
    llama_folder: Path, made_up_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(one_run, "load_base", lambda folder: small(Path(folder)))
    language_block = {"base": str(llama_folder), "suite": "language", "tasks": TASKS_MADE_UP}
    language_block["steps"] = 4
    rates = {"rates": [0.001], "sweep_seeds": None, "methods": ["rlora"], "seeds": [0]}
    plan = load_plan(plan_file(here, a=language_block | rates | {"blocks": 1}))
    assert work(plan, here / "records", Console(quiet=True))
    settings, records = read_records(here / "records" / "a.jsonl")
    (setting,) = settings.values()
    assert (setting["blocks"], setting["trained_blocks"]) == (1, "1 to 1 of 2")
    assert setting["metrics"] == ["exact", "choice"] and setting["tasks"] == TASKS_MADE_UP
    (record,) = records
    assert record["test"]["choice"][0] is None and 0 <= record["test"]["choice"][1] <= 1
    assert len(record["entropy"]) == 2 and record["kept_bytes"] > 0
    # each row's result, and looks on the way
    for metric in ("exact", "choice"):
        for share, rows in zip(record["test"][metric], record["rows"][metric], strict=True):
            assert (share is None) == (rows is None)
            assert share is None or share == round(rows.count("1") / len(rows), 5)
    assert [step for step, _ in record["looks"]] == [1, 2]
    assert [len(scores["exact"]) for _, scores in record["looks"]] == [2, 2]
    assert str(here) not in (here / "records" / "a.jsonl").read_text()
    shared = load_plan(plan_file(here, a=language_block | rates))["a"].shared()
    assert "blocks" not in shared  # records of blocks without it still belong to them
    lower = [*(here / "cache" / "lower").glob("*.npy")]
    assert len(lower) == 1


@pytest.mark.parametrize(
    "line",
    [
        "x",
        "[]",
        '{"prompt": "x"}',
        '{"prompt": 3, "answer": "a"}',
        '{"prompt": "x", "answer": ""}',
        '{"prompt": "x", "answer": "a", "options": ["b"]}',
        '{"prompt": "x", "answer": "a", "options": 3}',
    ],
)
def test_what_is_wrong_with_a_line(line: str, made_up_folder: Path):
    file = made_up_folder / "copy" / "validation.jsonl"
    count = len(file.read_text().splitlines())
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(LabError, match=f"copy/validation.jsonl line {count + 1} is not.*options"):
        load_rows("copy")
    file.write_text("")
    with pytest.raises(LabError, match="copy/validation.jsonl is empty"):
        load_rows("copy")
    file.unlink()
    with pytest.raises(LabError, match="copy/validation.jsonl is missing"):
        load_rows("copy")


# One example of each task in BIG-bench's files, and the row that it makes.
EXAMPLES = {
    "past_tense": (
        {"input": "jog", "target": "jogged"},
        ("Today I jog. Yesterday I", "jogged", None),
    ),
    "plural": (
        {"input": "jar", "target": "jars"},
        ("This is a jar. Now there is another one. There are two", "jars", None),
    ),
    "negation": (
        {"input": "she runs", "target": "she does not run"},
        ("John thinks she runs, but", "she does not run", None),
    ),
    "question": (
        {"input": "she runs", "target": "does she run"},
        ("John thinks she runs. So I ask:", "does she run", None),
    ),
    "pronoun": (
        {"input": "Ann saw Ann", "target": "Ann saw herself"},
        ("If Ann saw Ann, then", "Ann saw herself", None),
    ),
    "units": (
        {"input": "5 m in cm is ", "target_scores": {"500 cm.": 1, "500 cg.": 0}},
        ("5 m in cm is Options: 500 cm. / 500 cg.", "500 cm.", ["500 cm.", "500 cg."]),
    ),
    "counting": (
        {"input": "I have a cup. How many cups?", "target": ["one", "1"]},
        ("I have a cup. How many cups?", "1", None),
    ),
    "adjectives": (
        {"input": "Which sentence is it: a or b ?", "target_scores": {"a": 0, "b": 1}},
        ("Which sentence is it: a or b ?", "b", ["a", "b"]),
    ),
    "colors": (
        {"input": "On the desk lies a red pen. What color?", "target_scores": {"red": 1, "tan": 0}},
        ("On the desk lies a red pen. What color?", "red", None),
    ),
    "sentiment": (
        {"input": "It was\u00a0 fine.", "target_scores": {"positive": 1, "neutral": 0}},
        (
            "Is this opinion positive, negative, neutral or ambivalent? It was fine.",
            "positive",
            ["positive", "neutral"],
        ),
    ),
    "sports": (
        {"input": "She bowled", "target_scores": {"plausible": 1, "implausible": 0}},
        (
            "Is this plausible or implausible? She bowled",
            "plausible",
            ["plausible", "implausible"],
        ),
    ),
}
HUB_FORMS = {  # what stands around the input on the hub
    "past_tense": "Today I {}. Yesterday I",
    "plural": "This is a {}. Now there is another one. There are two",
    "negation": "John thinks {}, but",
    "question": "John thinks {}, but",
    "pronoun": "If {}, then",
    "counting": "Q: {}\nA:",
    "sports": "Determine whether it is plausible:\nStatement: {}\nPlausible/implausible?",
}


def parts_of(example: dict) -> tuple[list[str], list[str]]:
    """The answers and the options of an example."""
    if "target_scores" in example:
        scores = example["target_scores"]
        return [option for option in scores if scores[option]], [*scores]
    targets = example["target"]
    return targets if isinstance(targets, list) else [targets], []


def test_every_task_has_an_example():
    assert set(EXAMPLES) == set(TASKS) == set(DIFFERENT) | set(RELATED)
    assert len(DIFFERENT) == 8 and len(RELATED) == 5


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("packaged", [False, True])
def test_rows_of_bigbench(
    task: str, packaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    example, row = EXAMPLES[task]
    others = [example | {"input": f"{example['input'].strip()} {i} is"} for i in range(15)]
    long = example | {"input": "x" * 241}
    file = tmp_path / "bigbench" / "benchmark_tasks" / TASKS[task].path / "task.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"examples": [example, *others, example, long]}))
    if packaged:
        (tmp_path / "bigbench" / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delenv("RLORA_LANGUAGE", raising=False)
    else:
        monkeypatch.setenv("RLORA_LANGUAGE", str(tmp_path / "bigbench" / "benchmark_tasks"))
    splits, source = load_rows(task)
    assert source == ("PyPI package bigbench" if packaged else "BIG-bench in RLORA_LANGUAGE")
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 10,
        "validation": 2,
        "test": 4,
    }
    found = [row for rows in splits.values() for row in rows]
    assert dict(zip(("prompt", "answer", "options"), row, strict=True)) in found
    assert len({row["prompt"] for row in found}) == 16
    file.write_text(json.dumps({"examples": [{"input": "x"}]}))
    with pytest.raises(LabError, match=f"'{task}': .*task.json is no file of BIG-bench"):
        load_rows(task)


def test_splits_are_cut_once_and_for_all():
    rows = [{"prompt": f"{i}", "answer": "a", "options": None} for i in range(5000)]
    parts = cut_splits(rows)
    assert {split: len(part) for split, part in parts.items()} == language.MOST
    assert cut_splits(rows[::-1]) == parts
    prompts = [row["prompt"] for part in parts.values() for row in part]
    assert len(set(prompts)) == len(prompts) == 2400


def hub_form(task: str, columns: dict | None = None) -> DatasetDict:
    """The hub's columns and splits: a task's rows among those of another subtask."""
    example, _ = EXAMPLES[task]
    answers_, options = parts_of(example)
    rows = []
    for i in range(20):
        text = example["input"].strip()
        if i:
            text = f" {i} ".join(text.rsplit(" ", 1))
        if " " not in text:
            text += "x" * i
        rows.append(
            {
                "inputs": HUB_FORMS.get(task, "{}").format(text).strip(),
                "targets": answers_,
                "multiple_choice_targets": options,
            }
            | (columns or {})
        )
    other = {"inputs": "Another task:", "targets": ["b"], "multiple_choice_targets": []}
    split = Dataset.from_list([*rows, other])
    return DatasetDict(train=split.select(range(15)), validation=split.select(range(15, 21)))


@pytest.mark.parametrize("task", [task for task in TASKS if task != "sentiment"])
def test_rows_of_the_hub(task: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RLORA_LANGUAGE", raising=False)
    asked = []

    def load(name: str, config: str) -> DatasetDict:
        asked.append((name, config))
        return hub_form(task)

    monkeypatch.setattr(language, "load_dataset", load)
    splits, source = load_rows(task)
    assert asked == [("tasksource/bigbench", TASKS[task].path.split("/")[0])]
    assert source == "hub tasksource/bigbench"
    found = [row for rows in splits.values() for row in rows]
    assert len(found) == 20
    assert dict(zip(("prompt", "answer", "options"), EXAMPLES[task][1], strict=True)) in found
    renamed = hub_form(task).rename_column("targets", "answers")
    monkeypatch.setattr(language, "load_dataset", lambda *args: renamed)
    with pytest.raises(LabError, match=f"'{task}': .* has no column targets"):
        load_rows(task)
    strange = hub_form(task, {"inputs": "nothing that is known"})
    monkeypatch.setattr(language, "load_dataset", lambda *args: strange)
    with pytest.raises(LabError, match="has the form that is known"):
        load_rows(task)


def test_negation_and_question_are_told_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RLORA_LANGUAGE", raising=False)
    both = DatasetDict(
        train=Dataset.from_dict(
            {
                "inputs": ["John thinks she runs, but"] * 2,
                "targets": [["does she run"], ["she does not run"]],
                "multiple_choice_targets": [[], []],
            }
        )
    )
    monkeypatch.setattr(language, "load_dataset", lambda *args: both)
    for task in ("negation", "question"):
        (row,) = load_rows(task)[0]["train"]
        assert row["answer"] == EXAMPLES[task][1][1]


def test_no_hub_and_no_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RLORA_LANGUAGE", raising=False)
    with pytest.raises(LabError, match="'plural': tasksource/bigbench could not.*RLORA_LANGUAGE"):
        load_rows("plural")
    with pytest.raises(LabError, match="'sentiment' can't be told.*benchmark_tasks"):
        load_rows("sentiment")


# What chapter 15 shows of a real model


@torch.no_grad()
def test_a_head_that_is_off_is_one_of_zeros(llama_folder: Path, made_up_folder: Path):
    base = small(llama_folder)
    suite = Language(base, TASKS_MADE_UP, blocks=1, bf16=False)
    model = adapt("rlora", base, suite, seed=0).eval()
    perturb(model)
    batches = {task: suite.probe(task, 6) for task in suite.tasks}
    rises = inside.chapter.rise(
        model, inside.chapter.off, lambda model: inside.losses(model, batches)
    )
    before, layers = inside.losses(model, batches), inside.chapter.layers_of(model)
    assert rises.shape == (3 * len(layers), 2) and list(layers) == ["1 gate", "1 up", "1 down"]
    for i, layer in enumerate(layers.values()):
        heads = layer.rlora_B["default"].weight.unflatten(1, (3, -1))
        for head in range(3):
            kept = heads[:, head].clone()
            heads[:, head] = 0
            now = inside.losses(model, batches)
            torch.testing.assert_close(now - before, rises[3 * i + head], atol=1e-5, rtol=0)
            heads[:, head] = kept
    assert rises.abs().max() > 1e-3


def test_looking_inside_leaves_what_chapter_15_reads(
    llama_folder: Path, made_up_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inside, "load_base", lambda name: small(llama_folder))
    monkeypatch.setattr(language, "DIFFERENT", TASKS_MADE_UP)
    file = made_up_folder / "inside.json"
    inside.measure("a base", blocks=1, most=8, rows=4, steps=2, out=file)
    record = json.loads(file.read_text())
    kinds = {"task": [], "layer": [], "head": []}
    for row in record["records"]:
        kinds[row["kind"]].append(row)
    assert [row["task"] for row in kinds["task"]] == record["tasks"] == TASKS_MADE_UP
    assert [row["layer"] for row in kinds["layer"]] == ["1 gate", "1 up", "1 down"]
    for row in kinds["layer"]:
        assert abs(row["start"]) < 0.5 and row["end"] != row["start"] and 0 < row["p"] <= 1
        assert row["told"] >= -1e-12 and row["chance"] >= -1e-12
        for weights in row["weights"].values():
            assert len(weights) == 3 and sum(weights) == pytest.approx(1)
    assert [row["head"] for row in kinds["head"]] == [0, 1, 2] * 3
    for rule in ("off", "third", "noise", "untrained"):
        rises = np.array([row[rule] for row in kinds["head"]])
        assert rises.shape == (9, 2) and np.abs(rises).max() > 0, rule
    assert record["trained_blocks"] == "1 to 1 of 2" and record["seed"] == inside.SEED


# From here on with SmolLM2, where it is; on the real tasks too, where RLORA_LANGUAGE names them.


@needs_smollm2
@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-4), (True, 0.03)])
def test_upper_blocks_of_smollm2(
    bf16: bool, tolerance: float, made_up_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RLORA_CACHE")  # where SmolLM2 is
    monkeypatch.setattr(language, "cache_folder", lambda: made_up_folder.parent)
    if bf16 and not answers.has_bf16():
        pytest.skip("this machine has no units for bf16")
    pairs = upper_and_whole(lambda: load_base("smollm2"), TASKS_MADE_UP, 10, bf16)
    losses = [
        model.eval()(**own.collate(own.training_set(8, seed=0)))["loss"].item()
        for own, model in pairs
    ]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


@needs_smollm2
@pytest.mark.skipif("RLORA_LANGUAGE" not in os.environ, reason="RLORA_LANGUAGE names no rows")
def test_exact_on_real_tasks_is_what_smollm2_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = {}
    for task in TASKS:
        splits, source = load_rows(task)
        sizes = {"train": 40, "validation": 1, "test": 50}
        rows[task] = {split: splits[split][:size] for split, size in sizes.items()}
    monkeypatch.setattr(language, "load_rows", lambda task: (rows[task], source))
    monkeypatch.setattr(language, "cache_folder", lambda: tmp_path)
    suite = Language(load_base("smollm2"), TASKS, blocks=10, bf16=False)
    upper = adapt("rlora", load_base("smollm2"), suite, seed=0)
    train(upper, suite, steps=20, lr=2e-3, seed=0)
    upper.save_pretrained(tmp_path / "adapter")
    base = load_base("smollm2")
    whole = PeftModel.from_pretrained(base.model, tmp_path / "adapter").eval()
    results = suite.results(upper)
    for task in TASKS:
        assert results[task]["exact"] == written(base, whole, rows[task]["test"]), task
    assert 0 < np.mean([result["exact"] for result in results.values()]) < 1
