"""Chapter 16: what is in a release, what is refused, the verdict, drift."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from chapter_code import BOOK, chapter_code
from peft import PeftModel
from rlora_helpers import unchanged
from transformers import GenerationConfig

from rlora_lab.chapters.ch16_shipping import fingerprint, generate, load_release
from rlora_lab.errors import LabError
from rlora_lab.models.bases import load_base
from rlora_lab.serving import releases as files
from rlora_lab.tasks.characters import Characters
from rlora_min import record_routing

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture(scope="module")
def chapter() -> SimpleNamespace:
    """What a reader of the chapter can call."""
    return chapter_code("16_shipping", tokenizer=Characters())


def frozen_base():
    return load_base("tiny").model.requires_grad_(False)


@pytest.fixture(scope="module")
def own() -> str:
    return fingerprint(frozen_base())


@pytest.fixture(scope="module")
def model(chapter, releases, own) -> PeftModel:
    """With both, v1 in service."""
    model = frozen_base()
    for name in ("v1", "v2"):
        model = load_release(model, releases / name, own, chapter.tokenizer)
    model.set_adapter("v1", inference_mode=True)
    return model


# Releases


def edit(folder: Path, **changes) -> None:
    release = json.loads((folder / files.RELEASE).read_text())
    (folder / files.RELEASE).write_text(json.dumps(release | changes))


def canary(*asked):
    """With these prompts and answers in place of its own."""
    return lambda folder, chapter: edit(folder, canary=list(asked))


def sealed(name: str):
    """With a spoil of the chapter's, and the hashes of what is there now."""

    def spoil(folder, chapter):
        chapter.SPOILS[name](folder)
        edit(folder, files={name: files.sha256(folder / name) for name in files.FILES})

    return spoil


# What is done to a folder, and what the error says. The chapter does more of what a seal shows.
SPOILED = {
    "a bit flipped": (lambda f, c: c.SPOILS["a bit flipped"](f), "safetensors.*changed"),
    "alpha edited": (lambda f, c: c.SPOILS["alpha edited"](f), "config.*changed"),
    "for another base": (lambda f, c: edit(f, base="0"), "made for base"),
    "no seal": (lambda f, c: (f / files.RELEASE).unlink(), "can't be read"),
    "a seal of another form": (lambda f, c: (f / files.RELEASE).write_text("[]"), "can't be read"),
    "no tensors": (lambda f, c: (f / files.FILES[1]).unlink(), "safetensors.*changed"),
    "no config": (lambda f, c: (f / files.FILES[0]).unlink(), "can't be read"),
    "a pickle": (lambda f, c: (f / "adapter_model.bin").write_bytes(b"."), r"adapter_model\.bin"),
    "NaN, sealed": (sealed("a NaN in a head"), "rlora_B.*finite"),
    "missing, sealed": (sealed("a tensor missing"), "rlora_B"),
    "a shape, sealed": (sealed("of another shape"), r"rlora_B.*\(9, 12\)"),
    "cut, sealed": (sealed("cut in half"), "not a whole file"),
    "a LoRA, sealed": (sealed("a plain LoRA"), "'LORA'"),
    "alpha, sealed": (sealed("alpha edited"), "did not give"),
    "another answer": (canary(["Dab=", 6, "aaaaaa"]), "did not give"),
    "a prompt of another base": (canary(["xyz", 6, "aaaaaa"]), "unknown characters"),
    "no prompts": (canary(), "empty"),
    "prompts of another form": (canary(["Dab=", 6]), "can't be read"),
}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
@pytest.mark.parametrize("case", SPOILED)
def test_what_is_not_whole_or_not_ours_is_refused_and_the_base_is_as_it_was(
    case, beside, chapter, releases, own, tmp_path
):
    spoil, said = SPOILED[case]
    bad = Path(shutil.copytree(releases / "v1", tmp_path / "bad"))
    spoil(bad, chapter)
    model = frozen_base()
    if beside:
        model = load_release(model, releases / "v2", own, chapter.tokenizer)
    with unchanged(model), pytest.raises(LabError, match=f"(?s)bad.*{said}"):
        load_release(model, bad, own, chapter.tokenizer)


def test_the_fingerprint_is_of_the_numbers_and_not_of_the_dtype(chapter, own):
    base = frozen_base()
    assert fingerprint(base.to(torch.bfloat16)) == own
    assert fingerprint(chapter.another(frozen_base())) != own


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(broken, tmp_path, monkeypatch):
    files.write_current(tmp_path, "v1")
    before = (tmp_path / files.CURRENT).read_bytes()
    monkeypatch.setattr(files.os, broken, Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write_current(tmp_path, "v2")
    assert [path.name for path in tmp_path.iterdir()] == [files.CURRENT]
    assert (tmp_path / files.CURRENT).read_bytes() == before


# Answers


def configure(monkeypatch, model: PeftModel, **settings) -> GenerationConfig:
    """Gives a model and its base another `generation_config`."""
    config = GenerationConfig(**settings)
    for holder in (model, model.get_base_model()):
        monkeypatch.setattr(holder, "generation_config", config)
    return config


def test_greedy_is_greedy_whatever_the_generation_config_says(chapter, model, monkeypatch):
    """A penalty that would forbid to say a letter twice, where the answer is one letter."""
    rows = [(chapter.tokenizer.encode(asked), 6) for asked, _ in chapter.questions("largest", 8)]
    plain = generate(model, chapter.tokenizer, rows)
    penalty = configure(
        monkeypatch, model, repetition_penalty=50.0, no_repeat_ngram_size=1, num_beams=3
    )
    ids = torch.tensor([rows[0][0]])
    obeyed = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert obeyed[0, -6:].tolist() != plain[0]  # transformers does as it says
    assert generate(model, chapter.tokenizer, rows) == plain
    assert model.generation_config is penalty is model.get_base_model().generation_config


def test_an_answer_ends_with_its_time_its_text_or_the_model_s_own_end(chapter, model, monkeypatch):
    row = chapter.tokenizer.encode("Ocgbcce="), 20
    whole = generate(model, chapter.tokenizer, [row])[0]
    said = chapter.tokenizer.decode(whole)
    assert len(whole) == 20
    assert generate(model, chapter.tokenizer, [row], seconds=0.0) == [whole[:1]]
    two = generate(model, chapter.tokenizer, [row, row], stops=[[said[2:4]], []])
    assert two == [whole[: said.index(said[2:4]) + 2], whole]
    configure(monkeypatch, model, eos_token_id=[whole[3]])
    first = whole.index(whole[3])
    assert generate(model, chapter.tokenizer, [row]) == [whole[: first + 1]]


# The verdict


def test_the_rule(chapter):
    def judged(b, c, n, margin=0.02):
        new = np.repeat([True, False, True], [b, c, n - b - c])
        old = np.repeat([False, True, True], [b, c, n - b - c])
        return chapter.verdict(*chapter.difference(new, old)[1:], margin)

    assert judged(0, 60, 200) == "no-go" and judged(60, 0, 200) == "go"
    assert judged(0, 0, 10) == "cannot tell"  # never different, but on few requests
    assert judged(0, 0, 1000) == "go"
    random = np.random.default_rng(0)  # the interval holds the truth in about 95 % of the cases
    held = []
    for _ in range(400):
        kind = random.choice(3, size=300, p=[0.08, 0.03, 0.89])
        _, low, high = chapter.difference(kind != 1, kind != 0)
        held.append(low <= 0.05 <= high)
    assert 0.91 < np.mean(held) < 0.99


# Drift


def test_the_routing_read_for_drift_is_that_of_record_routing_whatever_the_padding(
    chapter, model, prompts
):
    ids = [chapter.tokenizer.encode(prompt) for prompt in prompts[:7]]
    batched = chapter.routing_of(model, ids, "v1")
    with record_routing(model, "v1") as log, torch.no_grad():
        for i, one in enumerate(ids):
            log.task = i
            model(input_ids=torch.tensor([one]))
    expected = torch.stack([torch.stack(list(log.mean[i].values())) for i in range(len(ids))])
    torch.testing.assert_close(batched, expected, atol=1e-5, rtol=0)
    assert not any(m._forward_pre_hooks for m in model.modules())


# The page for people who decide, in two languages


def test_the_pages_for_people_who_decide_say_the_same_and_type_no_measurement():
    pages = [(BOOK / name).read_text() for name in ("for_deciders.md", "for_deciders.ja.md")]
    linked = [re.findall(r"\]\((\d\d\w+\.ipynb)(?:#[\w-]+)?\)", page) for page in pages]
    assert linked[0] == linked[1] and len(linked[0]) > 25
    assert "](for_deciders.ja.md)" in pages[0] and "](for_deciders.md)" in pages[1]
    for page in pages:
        prose = [line for line in page.splitlines() if not line.startswith("|")]
        measured = r"\d\s*(%|points|ポイント|times|倍|s\b|ms|MB|GB)"
        assert not re.search(measured, "\n".join(prose))
        assert re.search(measured, page)  # the rules, which stand in a table
