"""Chapter 11: data that does not fit is refused, only the answer counts, only a match is right."""

import json
from dataclasses import replace

import pytest
import torch
from chapter_code import chapter_code
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

# A made-up row of each data set, with the columns of its card.
CHOICES = {"text": ["a fork", "a spoon", "a cup", "a pan"], "label": list("ABCD")}
NUMBERED = {"text": ["a fork", "a spoon", "a cup", "a pan"], "label": list("1234")}
ROWS = {
    "boolq": {"question": "is it wet", "answer": True, "passage": "It rains."},
    "piqa": {"goal": "Dry a plate.", "sol1": "With a towel.", "sol2": "With soap.", "label": 0},
    "siqa": {
        "context": "Ann fell.",
        "question": "How is Ann?",
        "answerA": "glad",
        "answerB": "hurt",
        "answerC": "rich",
        "label": "2",
    },
    "hellaswag": {
        "ind": 4,
        "activity_label": "Cooking",
        "ctx_a": "A man cuts bread.",
        "ctx_b": "he",
        "ctx": "A man cuts bread. he",
        "endings": ["eats it.", "flies.", "sings.", "sleeps."],
        "source_id": "x",
        "split": "train",
        "split_type": "indomain",
        "label": "0",
    },
    "winogrande": {
        "sentence": "The cup fell off the shelf because the _ was slippery.",
        "option1": "cup",
        "option2": "shelf",
        "answer": "2",
    },
    "obqa": {"id": "1", "question_stem": "You eat soup with", "choices": CHOICES, "answerKey": "B"},
    "arc-easy": {"id": "1", "question": "What boils soup?", "choices": CHOICES, "answerKey": "D"},
    "arc-challenge": {"id": "1", "question": "Which?", "choices": NUMBERED, "answerKey": "3"},
}
ANSWERS = {
    "boolq": " B",
    "piqa": " A",
    "siqa": " B",
    "hellaswag": " A",
    "winogrande": " B",
    "obqa": " B",
    "arc-easy": " D",
    "arc-challenge": " C",
}
HIDDEN = {"piqa": {"label": -1}, "hellaswag": {"label": ""}, "winogrande": {"answer": ""}}


@pytest.fixture(scope="module")
def chapter(tmp_path_factory):
    work = tmp_path_factory.mktemp("chapter")
    return chapter_code("11_real_model", work=work)


@pytest.fixture(scope="module")
def base(chapter):
    """The preset `smoke` with its files, its tokenizer, and its rows to train on."""
    preset = chapter.PRESETS["smoke"]
    chapter.write_questions(preset.data, preset.tasks, {"train": 60, "validation": 20})
    rows = chapter.load_rows(preset, "train", 60)
    chapter.write_base(chapter.Path(preset.model), [r["prompt"] + r["answer"] for r in rows])
    return preset, chapter.AutoTokenizer.from_pretrained(preset.model), rows


def write(folder, task, rows, split="train"):
    (folder / task).mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / task / f"{split}.jsonl").write_text(text)


def test_every_data_set_has_a_row_here(chapter):
    assert ROWS.keys() == chapter.SOURCES.keys() == ANSWERS.keys()


@pytest.mark.parametrize("task", ROWS)
def test_a_row_in_the_hubs_format_becomes_a_prompt_and_a_letter(task, chapter, tmp_path):
    write(tmp_path, task, [ROWS[task]])
    (row,) = chapter.load_split(task, "train", tmp_path)
    text = chapter.to_text(task, row)
    assert text["answer"] == ANSWERS[task]
    letters = [line[0] for line in text["prompt"].splitlines() if line[1:3] == ". "]
    assert letters == list("ABCD"[: text["options"]])
    assert text["prompt"].endswith("\nAnswer:")
    for value in ROWS[task].values():  # what is asked stands in the prompt
        if isinstance(value, str) and len(value) > 8 and value != "indomain":
            assert value in text["prompt"]


@pytest.mark.parametrize("task", ROWS)
def test_a_renamed_column_is_named(task, chapter):
    for column in chapter.SOURCES[task].columns:
        row = dict(ROWS[task])
        row[f"{column}_new"] = row.pop(column)
        with pytest.raises(ValueError) as error:
            chapter.check(task, Dataset.from_list([row]), "the file")
        message = str(error.value)
        assert message.startswith(f"{task}: the file lacks {column};")
        assert f"{column}_new" in message and chapter.SOURCES[task].hub_id in message


@pytest.mark.parametrize("task", ROWS)
def test_a_column_of_another_type_is_named_with_its_row(task, chapter):
    good = [ROWS[task]] * 2
    chapter.check(task, Dataset.from_list(good), "the file")
    for column in chapter.SOURCES[task].columns:
        rows = Dataset.from_list([*good, ROWS[task] | {column: None}])
        with pytest.raises(ValueError, match=rf"{task}: in row 3 of the file {column} is NoneType"):
            chapter.check(task, rows, "the file")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_or_missing_task_is_named(content, chapter, tmp_path):
    with pytest.raises(ValueError, match="siqa: siqa/train.jsonl is missing"):
        chapter.load_split("siqa", "train", tmp_path)
    write(tmp_path, "siqa", [])
    (tmp_path / "siqa" / "train.jsonl").write_text(content)
    with pytest.raises(ValueError, match="siqa: siqa/train.jsonl is empty"):
        chapter.load_split("siqa", "train", tmp_path)


def test_a_file_that_is_no_json_is_named(chapter, tmp_path):
    write(tmp_path, "siqa", [ROWS["siqa"]])
    (tmp_path / "siqa" / "train.jsonl").write_text('{"context": "Ann')
    with pytest.raises(ValueError, match="siqa: siqa/train.jsonl can't be read"):
        chapter.load_split("siqa", "train", tmp_path)


@pytest.mark.parametrize("task", HIDDEN)
def test_a_hidden_label_is_refused(task, chapter):
    with pytest.raises(ValueError, match=f"{task}: no usable label in the row"):
        chapter.to_text(task, ROWS[task] | HIDDEN[task])


def test_an_answer_that_is_no_option_is_refused(chapter):
    for task, wrong in {"obqa": {"answerKey": "E"}, "siqa": {"label": "4"}}.items():
        with pytest.raises(ValueError, match=f"{task}: no usable label"):
            chapter.to_text(task, ROWS[task] | wrong)


def test_the_hub_is_asked_by_id_and_config_and_checked(chapter, monkeypatch):
    asked = []

    def from_hub(hub_id, config, split):
        asked.append((hub_id, config, split))
        return Dataset.from_list([{"question_stem": "?", "options": CHOICES, "answerKey": "A"}])

    monkeypatch.setattr(chapter, "load_dataset", from_hub)
    with pytest.raises(ValueError, match="split train of allenai/openbookqa lacks choices"):
        chapter.load_split("obqa", "train")
    assert asked == [("allenai/openbookqa", "main", "train")]


def test_without_a_hub_the_error_says_what_to_do(chapter):
    with pytest.raises(ValueError, match="boolq: split train of google/boolq could not be loaded"):
        chapter.load_split("boolq", "train")


def test_made_up_questions_stand_once(chapter, tmp_path):
    rows = {"train": 40, "validation": 12}
    chapter.write_questions(tmp_path, ["boolq", "siqa", "obqa"], rows)
    for task in ("boolq", "siqa", "obqa"):
        prompts = []
        for split, most in rows.items():
            found = chapter.load_split(task, split, tmp_path)
            assert len(found) == most
            prompts += [chapter.to_text(task, row)["prompt"] for row in found]
        assert len(set(prompts)) == len(prompts)
    with pytest.raises(ValueError, match="siqa: only"):
        chapter.write_questions(tmp_path, ["siqa"], {"train": 10_000, "validation": 1})


def test_the_answer_and_the_end_count_and_survive_a_cut(chapter, base):
    _, tokenizer, rows = base
    whole = chapter.encode(tokenizer, rows[0], 1000)
    start = whole["labels"].count(-100)
    assert whole["labels"][start:] == whole["input_ids"][start:]
    assert tokenizer.decode(whole["input_ids"][:start]) == rows[0]["prompt"]
    assert tokenizer.decode(whole["input_ids"][start:]) == rows[0]["answer"] + tokenizer.eos_token
    cut = chapter.encode(tokenizer, rows[0], 10)
    assert cut == {key: values[-10:] for key, values in whole.items()}


def test_a_batch_is_padded_on_the_left(chapter):
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
        {"input_ids": [5, 6, 9], "labels": [-100, 6, 9]},
    ]
    batch = chapter.collate(rows, pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [0, 0, 5, 6, 9]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [0, 0, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 7, 8, 9], [-100, -100, 6, 9]]
    assert batch["logits_to_keep"] == 4


@pytest.mark.parametrize(
    ("model", "config"), [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)]
)
def test_the_loss_is_the_mean_over_the_answers(model, config, chapter, base):
    _, tokenizer, rows = base
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    model = model(config(vocab_size=len(tokenizer), **sizes)).eval().double()
    encoded = [chapter.encode(tokenizer, row, 64) for row in rows[::20]]
    assert len({len(row["input_ids"]) for row in encoded}) > 1
    logs = []
    with torch.no_grad():
        for row in encoded:
            log = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            places = [i for i, label in enumerate(row["labels"]) if label != -100]
            logs += [log[i - 1, row["input_ids"][i]].item() for i in places]
        batch = chapter.collate(encoded, tokenizer.pad_token_id)
        loss = model(**batch).loss.item()
        assert abs(loss + sum(logs) / len(logs)) < 1e-5
        # made wrong: one place too few, and the first token of the answers is lost
        short = batch["logits_to_keep"] - 1
        wrong = batch | {"logits_to_keep": short, "labels": batch["labels"][:, -short:]}
        assert abs(model(**wrong).loss.item() - loss) > 1e-3


class Writes:
    """In place of a model: writes the same text after every prompt."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, text):
        self.written = tokenizer(text, add_special_tokens=False)["input_ids"]

    def eval(self):
        return self

    def generate(self, input_ids, attention_mask, generation_config):
        assert not generation_config.do_sample
        assert (attention_mask[:, -1] == 1).all()  # nothing between prompt and answer
        new = self.written[: generation_config.max_new_tokens]
        return torch.cat([input_ids, torch.tensor([new] * len(input_ids))], 1)


def test_only_a_whole_match_is_right(chapter, base):
    _, tokenizer, rows = base
    share = {}
    for text in (" A<end>", " B<end>", " A A", " a<end>"):
        found = chapter.score(Writes(tokenizer, text), tokenizer, rows, 64)
        assert {task: len(right) for task, right in found.items()} == {
            task: sum(row["task"] == task for row in rows) for task in found
        }
        share[text] = {task: sum(right) for task, right in found.items()}
    for letter in "AB":
        counted = {t: 0 for t in share[" A A"]}
        for row in rows:
            counted[row["task"]] += row["answer"] == f" {letter}"
        assert share[f" {letter}<end>"] == counted
    assert sum(share[" A A"].values()) == sum(share[" a<end>"].values()) == 0


def test_training_moves_the_adapter_and_nothing_else(chapter, base):
    preset, tokenizer, rows = base
    preset = replace(preset, steps=20)
    model = chapter.load_model(preset)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    moved = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = chapter.train(model, tokenizer, rows, preset)
    assert losses[-1] < losses[0] / 2
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, (frozen | moved)[name]) == (name in frozen)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (None, {}),
        ((7, 5), {"bf16": False, "fp16": True}),  # a T4
        ((8, 0), {"bf16": True, "fp16": False}),
    ],
)
def test_precision_asks_for_what_the_gpu_does_in_hardware(
    capability, expected, chapter, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # what a T4 says
    assert chapter.precision() == expected
