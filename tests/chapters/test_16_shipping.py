"""Chapter 16 and `rlora_lab.serving`: releases, the server, roll-out and back, drift, export."""

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chapter_code import BOOK, chapter_code
from peft import PeftModel, get_peft_model
from rlora_helpers import anatomy, assert_unchanged, perturb
from safetensors.torch import load_file

from rlora_lab.__main__ import main
from rlora_lab.chapters.ch16_shipping import place
from rlora_lab.errors import LabError
from rlora_lab.models.bases import load_base
from rlora_lab.serving import releases as files
from rlora_lab.serving import serve
from rlora_lab.tasks.strings import VOCABULARY
from rlora_min import RLoraConfig, export_lora, record_routing

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture(scope="module")
def chapter() -> SimpleNamespace:
    """What a reader of the chapter can call."""
    return chapter_code("16_shipping", tokenizer=serve.Characters())


def frozen_base():
    return load_base("tiny").model.requires_grad_(False)


@pytest.fixture(scope="module")
def own() -> str:
    return serve.fingerprint(frozen_base())


@pytest.fixture(scope="module")
def releases(chapter, own, tmp_path_factory) -> Path:
    """Two sealed adapters, all of whose numbers were moved, and v1 in service."""
    folder = tmp_path_factory.mktemp("releases")
    for name, seed in {"v1": 1, "v2": 2}.items():
        config = RLoraConfig(init_seed=seed, target_modules=chapter.TARGETS)
        model = perturb(get_peft_model(frozen_base(), config).eval(), seed=seed)
        model.save_pretrained(folder / name)
        prompts = [asked for task in chapter.TASKS for asked, _ in chapter.questions(task, 2)]
        serve.write_release(folder / name, own, model, chapter.tokenizer, prompts, most=6)
    files.write_current(folder, "v1")
    return folder


@pytest.fixture(scope="module")
def model(chapter, releases, own) -> PeftModel:
    model = frozen_base()
    for name in ("v1", "v2"):
        model = serve.load_release(model, releases / name, own, chapter.tokenizer)
    return model


@pytest.fixture
def folder(releases, tmp_path) -> Path:
    """A pointer file of one's own."""
    files.write_current(tmp_path, "v1")
    return tmp_path


@pytest.fixture(scope="module")
def prompts(chapter) -> list[str]:
    """Thirty, of two to eight characters."""
    asked = [asked for task in chapter.TASKS for asked, _ in chapter.questions(task, 10, seed=3)]
    return [text[-(2 + i % 7) :] for i, text in enumerate(asked)]


def alone(model, adapter: str, prompt: str, most: int = 6) -> str:
    """The answer without server and batch."""
    tokenizer = serve.Characters()
    model.set_adapter(adapter, inference_mode=True)
    return tokenizer.decode(serve.generate(model, tokenizer, [(tokenizer.encode(prompt), most)])[0])


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


@pytest.mark.parametrize("among_others", [False, True])
@pytest.mark.parametrize("case", [*OF_THE_CHAPTER, *MORE])
def test_what_is_not_whole_or_not_ours_is_refused_and_the_model_is_as_it_was(
    case, among_others, chapter, releases, own, tmp_path
):
    assert OF_THE_CHAPTER.keys() == chapter.SPOILS.keys()
    bad = Path(shutil.copytree(releases / "v1", tmp_path / "bad"))
    if case in MORE:
        spoil, said = MORE[case]
        spoil(bad, chapter)
    else:
        spoil, said = chapter.SPOILS[case], OF_THE_CHAPTER[case]
        spoil(bad)
    base = chapter.another(frozen_base()) if case == "another base" else frozen_base()
    theirs = serve.fingerprint(base) if case == "another base" else own
    if among_others:
        good = own if case != "another base" else theirs
        moved = Path(shutil.copytree(releases / "v2", tmp_path / "v2"))
        edit(moved, lambda r: r.update(base=good, canary=r["canary"] if good == own else []))
        base = PeftModel.from_pretrained(base, moved, "v2")
        base.set_adapter("v2", inference_mode=True)
        base.eval()
    before = anatomy(base)
    with pytest.raises(LabError, match=f"(?s)bad.*{said}"):
        serve.load_release(base, bad, theirs, chapter.tokenizer)
    assert_unchanged(base, before)
    if among_others:
        assert base.active_adapter == "v2"


def test_a_whole_release_loads_after_a_refused_one_and_answers_as_where_it_was_sealed(
    chapter, releases, own, tmp_path
):
    bad = Path(shutil.copytree(releases / "v1", tmp_path / "bad"))
    MORE["another answer"][0](bad, chapter)
    base = frozen_base()
    with pytest.raises(LabError):
        serve.load_release(base, bad, own, chapter.tokenizer)
    loaded = serve.load_release(base, releases / "v1", own, chapter.tokenizer)
    for asked, most, answer in json.loads((releases / "v1" / files.RELEASE).read_text())["canary"]:
        assert alone(loaded, "v1", asked, most) == answer


def test_the_fingerprint_is_of_the_numbers_and_not_of_the_dtype(chapter, own):
    base = frozen_base()
    assert serve.fingerprint(base.to(torch.bfloat16)) == own
    assert serve.fingerprint(chapter.another(frozen_base())) != own


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


# The server


def ask(chapter, port: int, prompts: list[str], **more) -> list[tuple[int, dict]]:
    """All at once."""
    bodies = [{"prompt": prompt, "max_tokens": 6} | more for prompt in prompts]
    with ThreadPoolExecutor(len(bodies)) as pool:
        call = chapter.call
        return list(pool.map(lambda body: call(port, "/v1/completions", body), bodies))


def metric(chapter, port: int, name: str) -> float:
    lines = chapter.call(port, "/metrics")[1].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def text(answer: dict) -> str:
    return answer["choices"][0]["text"]


def test_thirty_at_once_are_answered_as_one_by_one_in_fewer_calls(chapter, model, folder, prompts):
    with chapter.serving(serve.create_app(model, chapter.tokenizer, folder)) as port:
        at_once = ask(chapter, port, prompts)
        calls = metric(chapter, port, "rlora_model_calls_total")
        in_turn = [ask(chapter, port, [prompt])[0] for prompt in prompts]
        assert metric(chapter, port, 'rlora_requests_total{code="200",model="v1"}') == 60
    assert {status for status, _ in at_once + in_turn} == {200}
    assert [text(a) for _, a in at_once] == [text(a) for _, a in in_turn]
    assert [text(a) for _, a in at_once] == [alone(model, "v1", prompt) for prompt in prompts]
    assert {a["model"] for _, a in at_once} == {"v1"} and len({a["id"] for _, a in at_once}) == 30
    assert 1 <= calls < 20


def test_adapters_and_lengths_mixed_in_one_rush_are_kept_apart(chapter, model, folder, prompts):
    bodies = [
        {"prompt": prompt, "max_tokens": 1 + i % 6, "model": f"v{1 + i % 2}", "request_id": f"{i}"}
        for i, prompt in enumerate(prompts)
    ]
    with (
        chapter.serving(serve.create_app(model, chapter.tokenizer, folder)) as port,
        ThreadPoolExecutor(30) as pool,
    ):
        answers = list(pool.map(lambda b: chapter.call(port, "/v1/completions", b), bodies))
    for body, (status, answer) in zip(bodies, answers, strict=True):
        assert (status, answer["model"], answer["id"]) == (200, body["model"], body["request_id"])
        most = body["max_tokens"]
        assert text(answer) == alone(model, body["model"], body["prompt"], most)
        assert answer["usage"] == {"prompt_tokens": len(body["prompt"]), "completion_tokens": most}
    one, other = ([alone(model, f"v{i}", prompt) for prompt in prompts] for i in (1, 2))
    assert one != other


REFUSED = {
    "not JSON": (b"{'prompt'", 422, "JSON"),
    "no object": (b"[]", 422, "object"),
    "nothing": (b"", 422, "JSON"),
    "not UTF-8": (b'{"prompt": "\xff"}', 422, ""),
    "no prompt": ({}, 422, "prompt"),
    "an empty prompt": ({"prompt": ""}, 422, "prompt"),
    "a number": ({"prompt": 7}, 422, "string"),
    "no tokens": ({"prompt": "Dab=", "max_tokens": 0}, 422, "max_tokens"),
    "half a token": ({"prompt": "Dab=", "max_tokens": 1.5}, 422, "max_tokens"),
    "unknown field": ({"prompt": "Dab=", "temperature": 0.7}, 422, "temperature"),
    "unknown letters": ({"prompt": "Dxyz="}, 422, re.escape(VOCABULARY)),
    "a long prompt": ({"prompt": "D" + "a" * 40}, 422, "prompt: 41 tokens, allowed are 32"),
    "many tokens": ({"prompt": "Dab=", "max_tokens": 33}, 422, "allowed are 32"),
    "a long id": ({"prompt": "Dab=", "request_id": "x" * 200}, 422, "request_id"),
    "no such adapter": ({"prompt": "Dab=", "model": "v9"}, 404, "v9.*v1"),
    "a large body": ({"prompt": "a" * 100_000}, 413, "65536 bytes"),
}


def test_malformed_and_too_long_requests_get_a_4xx_that_says_why(chapter, model, folder):
    with chapter.serving(serve.create_app(model, chapter.tokenizer, folder)) as port:
        for case, (body, code, why) in REFUSED.items():
            status, answer = chapter.call(port, "/v1/completions", body)
            assert status == code and re.search(why, json.dumps(answer["detail"])), (case, answer)
        assert chapter.call(port, "/v1/completions")[0] == 405
        assert chapter.call(port, "/nowhere")[0] == 404
        assert metric(chapter, port, "rlora_model_calls_total") == 0
        assert ask(chapter, port, ["Dab="])[0][0] == 200


def test_a_full_queue_is_503_and_what_was_accepted_is_answered(chapter, model, folder, prompts):
    held = threading.Event()
    app = serve.create_app(
        model,
        chapter.tokenizer,
        folder,
        max_batch=2,
        max_queue=3,
        observe=lambda *_: held.wait(20),
    )
    with chapter.serving(app) as port, ThreadPoolExecutor(30) as pool:
        call = lambda p: chapter.call(port, "/v1/completions", {"prompt": p, "max_tokens": 6})  # noqa: E731
        waiting = [pool.submit(call, prompt) for prompt in prompts]
        while sum(one.done() for one in waiting) < 30 - 2 - 3:
            time.sleep(0.01)
        assert chapter.call(port, "/health")[0] == 200  # it still says how it is
        held.set()
        answers = [one.result() for one in waiting]
        assert call("Dab=")[0] == 200
    codes = Counter(status for status, _ in answers)
    assert set(codes) == {200, 503} and 3 <= codes[200] <= 5
    for prompt, (status, answer) in zip(prompts, answers, strict=True):
        if status == 200:
            assert text(answer) == alone(model, "v1", prompt)
        else:
            assert "3 requests wait" in answer["detail"]


def test_a_model_that_fails_or_takes_too_long_fails_its_requests_alone(
    chapter, model, folder, monkeypatch
):
    def broken(*args):
        raise RuntimeError("out of memory")

    def asleep(*args):
        time.sleep(0.5)
        return [[0]]

    app = serve.create_app(model, chapter.tokenizer, folder, timeout=0.3)
    with chapter.serving(app) as port:
        for how, code, why in ((broken, 500, "RuntimeError"), (asleep, 504, "0.3 s")):
            with monkeypatch.context() as patch:
                patch.setattr(serve, "generate", how)
                status, answer = ask(chapter, port, ["Dab="])[0]
                assert status == code and why in answer["detail"]
                time.sleep(0.4)
        assert ask(chapter, port, ["Dab="])[0][0] == 200
        assert chapter.call(port, "/health")[1]["status"] == "ok"


def test_a_request_that_was_given_up_costs_no_call():
    ran = []

    def run(adapter, asked):
        ran.append(asked)
        return asked

    async def main():
        batcher = serve.Batcher(run, window=0.05)
        worker = asyncio.create_task(batcher.work())
        first, second = (asyncio.create_task(batcher.ask("v1", i)) for i in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        assert await second == 1
        third, fourth = asyncio.create_task(batcher.ask("v1", 3)), batcher.ask("v2", 4)
        assert await fourth == 4 and await third == 3
        worker.cancel()

    asyncio.run(main())
    assert ran[0] == [1] and sorted(ran[1:]) == [[3], [4]]


def test_a_monitor_that_fails_takes_no_answer_with_it(chapter, model, folder):
    app = serve.create_app(model, chapter.tokenizer, folder, observe=lambda *_: 1 / 0)
    with chapter.serving(app) as port:
        assert ask(chapter, port, ["Dab="])[0][0] == 200
        assert metric(chapter, port, "rlora_observe_errors_total") == 1


# Who is served


def test_a_share_is_about_a_share_sticks_and_only_grows():
    ids = [f"user {i}" for i in range(10_000)]
    before: set[str] = set()
    for share in (0.0, 0.05, 0.25, 1.0):
        current = {"stable": "v1", "candidate": "v2", "share": share}
        chosen = {i for i in ids if serve.choose(i, current) == "v2"}
        assert chosen >= before and abs(len(chosen) / len(ids) - share) < 0.02
        before = chosen
    assert all(0 <= place(i, "v2") < 1 for i in ids)
    both = [i for i in ids if place(i, "v2") < 0.1 and place(i, "v3") < 0.1]
    assert 50 < len(both) < 200
    assert serve.choose("x", {"stable": "v1", "candidate": None, "share": 1.0}) == "v1"


BAD = {
    "not there": None,
    "cut": '{"stable": "v1", "cand',
    "a list": "[]",
    "no share": '{"stable": "v1", "candidate": null}',
    "not loaded": '{"stable": "v9", "candidate": null, "share": 0}',
    "candidate not loaded": '{"stable": "v1", "candidate": "v9", "share": 0.1}',
    "a share of 2": '{"stable": "v1", "candidate": "v2", "share": 2}',
    "a word": '{"stable": "v1", "candidate": "v2", "share": "half"}',
}


def test_a_bad_pointer_is_refused_at_the_start_and_passed_over_later(chapter, model, folder):
    app = serve.create_app(model, chapter.tokenizer, folder)
    files.write_current(folder, "v2")
    with chapter.serving(app) as port:
        assert ask(chapter, port, ["Dab="])[0][1]["model"] == "v2"
        for case, content in BAD.items():
            path = folder / files.CURRENT
            path.write_text(content) if content else path.unlink()
            status, answer = ask(chapter, port, ["Dab="])[0]
            assert (status, answer["model"]) == (200, "v2"), case
            status, health = chapter.call(port, "/health")
            assert (status, health["status"]) == (200, "degraded") and "current" in health["fault"]
            with pytest.raises(LabError, match="current"):
                serve.create_app(model, chapter.tokenizer, folder)
        files.write_current(folder, "v1")
        assert ask(chapter, port, ["Dab="])[0][1]["model"] == "v1"
        assert chapter.call(port, "/health")[1]["fault"] is None


def test_rolled_out_and_back_under_load_no_request_fails(chapter, model, folder, prompts):
    with (
        chapter.serving(serve.create_app(model, chapter.tokenizer, folder)) as port,
        ThreadPoolExecutor(8) as pool,
    ):
        call = lambda p: chapter.call(port, "/v1/completions", {"prompt": p, "max_tokens": 6})  # noqa: E731
        flowing = []
        for stable, candidate, share in (("v1", "v2", 0.5), ("v2", None, 0.0), ("v1", None, 0.0)):
            files.write_current(folder, stable, candidate, share)
            flowing += [pool.submit(call, prompt) for prompt in prompts]
            while not all(one.done() for one in flowing[:-8]):
                time.sleep(0.001)
        assert call(prompts[0])[1]["model"] == "v1"
        answers = [one.result() for one in flowing]
    assert {status for status, _ in answers} == {200}
    assert {answer["model"] for _, answer in answers} == {"v1", "v2"}
    for prompt, (_, answer) in zip(prompts * 3, answers, strict=True):
        assert text(answer) == alone(model, answer["model"], prompt)


def test_a_reader_never_sees_half_a_pointer(folder):
    stop = threading.Event()

    def write():
        for i in range(10**6):
            if stop.is_set():
                return
            files.write_current(folder, f"v{1 + i % 2}", share=0.5)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = Counter(files.read_current(folder, ["v1", "v2"])["stable"] for _ in range(2000))
    finally:
        stop.set()
        writer.join()
    assert set(seen) == {"v1", "v2"}


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


# The export, and the command


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


COMMAND = [sys.executable, "-m", "rlora_lab", "serve"]


def test_the_command_serves_and_on_sigterm_answers_what_it_has_accepted(
    chapter, model, releases, prompts
):
    more = ["--port", "0", "--threads", "1", "--window-ms", "4000"]
    server = subprocess.Popen(
        [*COMMAND, str(releases), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        lines = iter(server.stderr.readline, "")
        port = int(next(m[1] for line in lines if (m := re.search(r"127\.0\.0\.1:(\d+)", line))))
        with ThreadPoolExecutor(30) as pool:
            waiting = [
                pool.submit(chapter.call, port, "/v1/completions", {"prompt": p, "max_tokens": 6})
                for p in prompts
            ]
            end = time.monotonic() + 30
            while metric(chapter, port, "rlora_queue_length") < 29:  # one is with the worker
                assert time.monotonic() < end
                time.sleep(0.02)
            server.send_signal(signal.SIGTERM)
            answers = [one.result(timeout=30) for one in waiting]
        out, err = server.communicate(timeout=30)
    finally:
        server.kill()
    assert [text(a) for _, a in answers] == [alone(model, "v1", prompt) for prompt in prompts]
    assert server.returncode == 0, err
    assert "v1: checked and loaded" in out and "Traceback" not in err
    with pytest.raises(OSError):
        chapter.call(port, "/health")


def test_the_command_refuses_a_bad_release_and_says_which(releases, tmp_path, monkeypatch, capsys):
    copied = Path(shutil.copytree(releases, tmp_path / "releases"))
    whole = (copied / "v2" / files.FILES[1]).read_bytes()
    (copied / "v2" / files.FILES[1]).write_bytes(whole[:-1])
    monkeypatch.setattr(sys, "argv", ["rlora_lab", "serve", str(copied)])
    assert main() == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: v2 is refused") and "v1: checked and loaded" in said.out


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(LabError, match="no release"):
        serve.serve(tmp_path)


# The page for people who decide, in two languages


def test_the_pages_for_people_who_decide_say_the_same_and_type_no_measurement():
    pages = [(BOOK / name).read_text() for name in ("for_deciders.md", "for_deciders.ja.md")]
    linked = [re.findall(r"\]\((\d\d_\w+\.ipynb)\)", page) for page in pages]
    assert linked[0] == linked[1] and len(linked[0]) > 25
    assert "](for_deciders.ja.md)" in pages[0] and "](for_deciders.md)" in pages[1]
    for page in pages:
        prose = [line for line in page.splitlines() if not line.startswith("|")]
        measured = r"\d\s*(%|points|ポイント|times|倍|s\b|ms|MB|GB)"
        assert not re.search(measured, "\n".join(prose))
        assert re.search(measured, page)  # the rules, which stand in a table
