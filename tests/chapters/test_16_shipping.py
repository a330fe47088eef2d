"""Chapter 16: what is in a release, what is refused, the verdict, drift, the export."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chapter_code import BOOK, chapter_code
from peft import PeftModel, get_peft_model
from rlora_helpers import anatomy, assert_unchanged, perturb
from safetensors.torch import load_file
from transformers import GenerationConfig

from rlora_lab.chapters.ch16_shipping import fingerprint, generate, load_release, write_release
from rlora_lab.errors import LabError
from rlora_lab.models.bases import load_base
from rlora_lab.serving import releases as files
from rlora_lab.tasks.characters import Characters
from rlora_lab.tasks.strings import VOCABULARY
from rlora_min import RLoraConfig, export_lora, record_routing

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
def releases(chapter, own, tmp_path_factory) -> Path:
    """Two sealed adapters, all of whose numbers were moved."""
    folder = tmp_path_factory.mktemp("releases")
    prompts = [asked for task in chapter.TASKS for asked, _ in chapter.questions(task, 2)]
    for name, seed in {"v1": 1, "v2": 2}.items():
        config = RLoraConfig(init_seed=seed, target_modules=chapter.TARGETS)
        model = perturb(get_peft_model(frozen_base(), config).eval(), seed=seed)
        model.save_pretrained(folder / name)
        write_release(folder / name, own, model, chapter.tokenizer, prompts, most=6)
    return folder


@pytest.fixture(scope="module")
def model(chapter, releases, own) -> PeftModel:
    model = frozen_base()
    for name in ("v1", "v2"):
        model = load_release(model, releases / name, own, chapter.tokenizer)
    return model


@pytest.fixture(scope="module")
def prompts(chapter) -> list[str]:
    """Thirty, of two to eight characters."""
    asked = [asked for task in chapter.TASKS for asked, _ in chapter.questions(task, 10, seed=3)]
    return [text[-(2 + i % 7) :] for i, text in enumerate(asked)]


# Releases


def sealed_again(folder: Path) -> None:
    """The hashes of what is there now, as somebody would write them who means no harm."""
    release = json.loads((folder / files.RELEASE).read_text())
    release["files"] = {name: files.sha256(folder / name) for name in files.FILES}
    (folder / files.RELEASE).write_text(json.dumps(release))


def edit(folder: Path, change) -> None:
    release = json.loads((folder / files.RELEASE).read_text())
    change(release)
    (folder / files.RELEASE).write_text(json.dumps(release))


def and_sealed(name: str):
    def spoil(folder, chapter):
        chapter.SPOILS[name](folder)
        sealed_again(folder)

    return spoil


# What is done to a folder beside the chapter's own spoils, and what the error says.
MORE = {
    "no seal": (lambda f, c: (f / files.RELEASE).unlink(), "can't be read"),
    "a seal cut": (lambda f, c: (f / files.RELEASE).write_text('{"base": "'), "can't be read"),
    "a seal of another form": (lambda f, c: (f / files.RELEASE).write_text("[]"), "can't be read"),
    "no tensors": (lambda f, c: (f / files.FILES[1]).unlink(), "safetensors.*changed"),
    "no config": (lambda f, c: (f / files.FILES[0]).unlink(), "can't be read"),
    "a pickle": (lambda f, c: (f / "adapter_model.bin").write_bytes(b"."), r"adapter_model\.bin"),
    "NaN, sealed": (and_sealed("a NaN in a head"), "rlora_B.*finite"),
    "missing, sealed": (and_sealed("a tensor missing"), "rlora_B"),
    "a shape, sealed": (and_sealed("of another shape"), r"rlora_B.*\(9, 12\)"),
    "cut, sealed": (and_sealed("cut in half"), "not a whole file"),
    "a LoRA, sealed": (and_sealed("a plain LoRA"), "'LORA'"),
    "alpha, sealed": (and_sealed("alpha edited"), "did not give"),
    "another answer": (
        lambda f, c: edit(f, lambda r: r["canary"][0].__setitem__(2, "aaaaaa")),
        "did not give",
    ),
    "a prompt of another base": (
        lambda f, c: edit(f, lambda r: r["canary"][0].__setitem__(0, "xyz")),
        "unknown characters",
    ),
    "a shorter answer": (
        lambda f, c: edit(f, lambda r: r["canary"][0].__setitem__(1, 2)),
        "did not give",
    ),
    "no prompts": (lambda f, c: edit(f, lambda r: r.update(canary=[])), "empty"),
    "prompts of another form": (
        lambda f, c: edit(f, lambda r: r.update(canary=[["Dab=", 6]])),
        "can't be read",
    ),
}
OF_THE_CHAPTER = {
    "cut in half": "safetensors.*whole",
    "a NaN in a head": "safetensors.*changed",
    "a tensor missing": "safetensors.*changed",
    "of another shape": "safetensors.*changed",
    "a bit flipped": "safetensors.*changed",
    "alpha edited": "config.*changed",
    "a plain LoRA": "changed",
    "another base": "made for base",
}


def refused(base, folder, own: str, chapter, said: str) -> None:
    """It is, with a reason, and the base is what it was."""
    before = anatomy(base)
    with pytest.raises(LabError, match=f"(?s)bad.*{said}"):
        load_release(base, folder, own, chapter.tokenizer)
    assert_unchanged(base, before)


@pytest.mark.parametrize("case", [*OF_THE_CHAPTER, *MORE])
def test_what_is_not_whole_or_not_ours_is_refused_and_the_base_is_as_it_was(
    case, chapter, releases, own, tmp_path
):
    assert OF_THE_CHAPTER.keys() == chapter.SPOILS.keys()
    bad = Path(shutil.copytree(releases / "v1", tmp_path / "bad"))
    base = frozen_base()
    if case in MORE:
        spoil, said = MORE[case]
        spoil(bad, chapter)
    else:
        said = OF_THE_CHAPTER[case]
        chapter.SPOILS[case](bad)
    if case == "another base":
        base = chapter.another(base)
        own = fingerprint(base)
    refused(base, bad, own, chapter, said)


@pytest.mark.parametrize("case", ["no seal", "NaN, sealed", "another answer"])
def test_beside_others_that_are_loaded_too(case, chapter, releases, own, tmp_path):
    bad = Path(shutil.copytree(releases / "v1", tmp_path / "bad"))
    spoil, said = MORE[case]
    spoil(bad, chapter)
    model = load_release(frozen_base(), releases / "v2", own, chapter.tokenizer)
    refused(model, bad, own, chapter, said)
    assert model.active_adapter == "v2"


def test_a_whole_release_loads_after_a_refused_one_and_answers_as_where_it_was_sealed(
    chapter, releases, own, tmp_path
):
    bad = Path(shutil.copytree(releases / "v1", tmp_path / "bad"))
    MORE["another answer"][0](bad, chapter)
    base = frozen_base()
    with pytest.raises(LabError):
        load_release(base, bad, own, chapter.tokenizer)
    loaded = load_release(base, releases / "v1", own, chapter.tokenizer)
    for asked, most, answer in json.loads((releases / "v1" / files.RELEASE).read_text())["canary"]:
        row = chapter.tokenizer.encode(asked), most
        assert chapter.tokenizer.decode(generate(loaded, chapter.tokenizer, [row])[0]) == answer


def test_the_fingerprint_is_of_the_numbers_and_not_of_the_dtype(chapter, own):
    base = frozen_base()
    assert fingerprint(base.to(torch.bfloat16)) == own
    assert fingerprint(chapter.another(frozen_base())) != own


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    files.write_current(tmp_path, "v1")
    before = (tmp_path / files.CURRENT).read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, broken, full)
            with pytest.raises(OSError, match="No space"):
                files.write_current(tmp_path, "v2")
        assert [path.name for path in tmp_path.iterdir()] == [files.CURRENT]
        assert (tmp_path / files.CURRENT).read_bytes() == before


# Answers


def test_a_batch_gives_what_one_by_one_gives(chapter, model, prompts):
    rows = [(chapter.tokenizer.encode(asked), 1 + i % 6) for i, asked in enumerate(prompts)]
    model.set_adapter("v1", inference_mode=True)
    together = generate(model, chapter.tokenizer, rows)
    assert together == [generate(model, chapter.tokenizer, [row])[0] for row in rows]
    assert [len(new) for new in together] == [most for _, most in rows]


def test_greedy_is_greedy_whatever_the_generation_config_says(chapter, model):
    """A penalty that would forbid to say a letter twice, where the answer is one letter."""
    rows = [(chapter.tokenizer.encode(asked), 6) for asked, _ in chapter.questions("largest", 8)]
    model.set_adapter("v1", inference_mode=True)
    plain = generate(model, chapter.tokenizer, rows)
    penalty = GenerationConfig(repetition_penalty=50.0, no_repeat_ngram_size=1, num_beams=3)
    own, model.generation_config = model.generation_config, penalty
    inner = model.get_base_model()
    inner.generation_config = penalty
    try:
        ids = torch.tensor([rows[0][0]])
        obeyed = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        assert obeyed[0, -6:].tolist() != plain[0]  # transformers does as it says
        assert generate(model, chapter.tokenizer, rows) == plain
        assert model.generation_config is penalty and inner.generation_config is penalty
    finally:
        model.generation_config = inner.generation_config = own


def test_an_answer_ends_with_its_time_its_text_or_the_model_s_own_end(chapter, model):
    row = chapter.tokenizer.encode("Ocgbcce="), 20
    model.set_adapter("v1", inference_mode=True)
    whole = generate(model, chapter.tokenizer, [row])[0]
    said = chapter.tokenizer.decode(whole)
    assert len(whole) == 20
    assert generate(model, chapter.tokenizer, [row], seconds=0.0) == [whole[:1]]
    two = generate(model, chapter.tokenizer, [row, row], stops=[[said[2:4]], []])
    assert two == [whole[: said.index(said[2:4]) + 2], whole]
    own, inner = model.generation_config, model.get_base_model()
    model.generation_config = inner.generation_config = GenerationConfig(eos_token_id=[whole[3]])
    try:
        first = whole.index(whole[3])
        assert generate(model, chapter.tokenizer, [row]) == [whole[: first + 1]]
    finally:
        model.generation_config = inner.generation_config = own


# The verdict


def test_the_rule(chapter):
    def judged(b, c, n, margin=0.02):
        new = np.repeat([True, False, True], [b, c, n - b - c])
        old = np.repeat([False, True, True], [b, c, n - b - c])
        return chapter.verdict(*chapter.difference(new, old)[1:], margin)

    assert judged(8, 2, 98) == "go" and judged(8, 2, 98, margin=0) == "cannot tell"
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


def test_the_drift_alarm_goes_off_on_shifted_traffic_and_not_on_the_same(chapter, model):
    calibration_of = dict.fromkeys(chapter.TASKS, 200)
    model.set_adapter("v1", inference_mode=True)

    def seen(counts, seed, split="test"):
        return chapter.routing_of(model, chapter.traffic(counts, seed, split), "v1")

    calibration = seen(calibration_of, 0, "validation")
    alarm, same = chapter.threshold(calibration)
    assert np.mean(np.array(same) > alarm) <= 0.011
    mixes = [np.random.default_rng(i).multinomial(chapter.WINDOW, [1 / 3] * 3) for i in range(20)]
    far = [
        chapter.distance(seen(dict(zip(chapter.TASKS, mix.tolist(), strict=True)), i), calibration)
        for i, mix in enumerate(mixes)
    ]
    assert sum(d > alarm for d in far) <= 2
    for foreign in ("reverse", "shift 4", "swap ends"):
        some = dict.fromkeys(chapter.TASKS, 20) | {foreign: 40}
        assert chapter.distance(seen({foreign: chapter.WINDOW}, 1), calibration) > 2 * alarm
        assert chapter.distance(seen(some, 1), calibration) > alarm


def test_the_routing_read_for_drift_is_that_of_record_routing_whatever_the_padding(
    chapter, model, prompts
):
    model.set_adapter("v1", inference_mode=True)
    ids = [chapter.tokenizer.encode(prompt) for prompt in prompts[:7]]
    batched = chapter.routing_of(model, ids, "v1")
    with record_routing(model, "v1") as log, torch.no_grad():
        for i, one in enumerate(ids):
            log.task = i
            model(input_ids=torch.tensor([one]))
    expected = torch.stack([torch.stack(list(log.mean[i].values())) for i in range(len(ids))])
    torch.testing.assert_close(batched, expected, atol=1e-5, rtol=0)
    assert (batched.sum(-1) - 1).abs().max() < 1e-5
    assert not any(m._forward_pre_hooks for m in model.modules())


# The export


def test_the_export_loads_in_stock_peft_with_equal_outputs(chapter, releases, tmp_path):
    model = PeftModel.from_pretrained(frozen_base(), releases / "v1").eval()
    batch = {"input_ids": torch.randint(0, len(VOCABULARY), (8, 14))}
    with torch.no_grad(), record_routing(model) as log:
        routed = model(**batch).logits
    error = export_lora(model, tmp_path / "lora", weights=log.mean["all"], batch=batch)
    logits, said = chapter.in_stock_peft(tmp_path / "lora", batch)
    assert said == "LoraConfig modules of rlora loaded: []"
    off = (routed - logits).abs().max().item(), ((routed - logits).norm() / routed.norm()).item()
    assert off == pytest.approx(error, rel=1e-3, abs=1e-5) and error[1] > 1e-3
    # For equal weights and a router made uniform there is nothing to lose.
    for name, tensor in model.named_parameters():
        if "rlora_router" in name:
            tensor.data.zero_()
    with torch.no_grad():
        routed = model(**batch).logits
    export_lora(model, tmp_path / "lora")
    here = PeftModel.from_pretrained(frozen_base(), tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(here(**batch).logits, routed, atol=1e-4, rtol=1e-4)
    assert load_file(tmp_path / "lora" / files.FILES[1])


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
