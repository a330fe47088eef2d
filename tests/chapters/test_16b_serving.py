"""Chapter 16b and `python -m rlora_lab serve`: what a client meets, over HTTP.

One server for all, started by the command as anybody would start it, with the settings of the
first fixture. At last it is stopped while it has work.
"""

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import yaml

from rlora_lab.__main__ import main
from rlora_lab.chapters.ch16_shipping import fingerprint, generate, load_release
from rlora_lab.chapters.ch16b_serving import choose
from rlora_lab.models.bases import load_base
from rlora_lab.serving import openai
from rlora_lab.serving import releases as files
from rlora_lab.serving.measure import forms, measure
from rlora_lab.serving.serve import CONFIG, read_config
from rlora_lab.tasks.characters import Characters
from rlora_lab.tasks.strings import VOCABULARY

pytest.importorskip("ray", reason='the server needs the extra "serve"')
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

TOKENIZER = Characters()
COMMAND = [sys.executable, "-m", "rlora_lab", "serve"]
MOVED = "ray_rlora_routing_distance{"


@pytest.fixture(scope="module")
def said(releases) -> Callable[[str, str, int], str]:
    """The answer of an adapter without server and batch."""
    model = load_base("tiny").model.requires_grad_(False)
    own = fingerprint(model)
    for name in ("v1", "v2"):
        model = load_release(model, releases / name, own, TOKENIZER)

    def answer(adapter: str, prompt: str, most: int = 6) -> str:
        model.set_adapter(adapter, inference_mode=True)
        return TOKENIZER.decode(generate(model, TOKENIZER, [(TOKENIZER.encode(prompt), most)])[0])

    return answer


def until(condition: Callable[[], object], seconds: float = 240) -> None:
    """Ask again and again, and fail where it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def call(port: int, path: str, body: dict | bytes | None = None) -> tuple[int, str]:
    """Status and content of an answer; POST if there is a body."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    sent = json.dumps(body) if isinstance(body, dict) else body
    line.request("GET" if body is None else "POST", path, sent)
    answer = line.getresponse()
    content = answer.read().decode()
    line.close()
    return answer.status, content


@pytest.fixture(scope="module")
def server(releases) -> Iterator[SimpleNamespace]:
    """A running server. Whatever a test left in the pointer file is put back before each."""
    files.write_current(releases, "v1")
    options = ["--port", "0", "--dtype", "float32", "--threads", "1", "--max-queue", "48"]
    options += ["--timeout", "240"]  # on a busy machine a replica takes long to come back
    process = subprocess.Popen(
        [*COMMAND, str(releases), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        shown = ""
        for line in process.stdout:
            shown += line
            if line.startswith("serving on"):
                break
        assert "serving on" in shown, shown
        ports = [int(port) for port in re.findall(r"on http://127.0.0.1:(\d+)", shown)]
        yield SimpleNamespace(process=process, shown=shown, metrics=ports[0], port=ports[1])
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=300)


@pytest.fixture
def port(server, releases) -> int:
    files.write_current(releases, "v1")
    return server.port


def ask(port: int, prompt: str, **more) -> tuple[int, dict]:
    body = {"prompt": prompt, "max_tokens": 6} | more
    status, content = call(port, "/v1/completions", body)
    return status, json.loads(content)


def ask_all(port: int, asked: list[dict]) -> list[tuple[int, dict]]:
    """All at once."""
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda one: ask(port, **one), asked))


def text(answer: dict) -> str:
    return answer["choices"][0]["text"]


# Answers


def test_it_says_what_it_checked_and_where_it_listens(server, port):
    assert "v1: checked and loaded" in server.shown and "v2: checked and loaded" in server.shown
    status, content = call(port, "/v1/models")
    assert status == 200
    assert [one["id"] for one in json.loads(content)["data"]] == ["current", "v1", "v2"]


def test_adapters_and_lengths_mixed_in_one_rush_are_kept_apart(port, prompts, said):
    asked = [
        {"prompt": prompt, "model": f"v{1 + i % 2}", "max_tokens": 1 + i % 6}
        for i, prompt in enumerate(prompts)
    ]
    answers = ask_all(port, asked)
    for one, (status, answer) in zip(asked, answers, strict=True):
        assert (status, answer["model"]) == (200, one["model"])
        assert text(answer) == said(one["model"], one["prompt"], one["max_tokens"])
        read, wrote = len(one["prompt"]), one["max_tokens"]
        assert list(answer["usage"].values()) == [read, wrote, read + wrote]
    assert len({answer["id"] for _, answer in answers}) == 30
    assert [said("v1", prompt) for prompt in prompts] != [said("v2", prompt) for prompt in prompts]


def test_what_openai_s_clients_send_is_taken(port, said):
    """Greedy decoding by its other names, a text to stop at, and a stream of one event."""
    whole = said("v1", "Ocgbcce=")
    neutral = {"temperature": 0, "top_p": 1, "n": 1, "seed": 3, "presence_penalty": 0.0}
    status, answer = ask(port, "Ocgbcce=", **neutral, user="me", logprobs=None)
    assert (status, text(answer), answer["object"]) == (200, whole, "text_completion")
    assert answer["choices"][0]["finish_reason"] == "length"
    status, answer = ask(port, "Ocgbcce=", stop=["?", whole[2:4]])
    assert (text(answer), answer["choices"][0]["finish_reason"]) == (whole[:2], "stop")
    assert text(ask(port, "Ocgbcce=", stop=whole[1])[1]) == whole[: whole.index(whole[1])]
    body = {"prompt": "Ocgbcce=", "max_tokens": 6, "stream": True}
    body["stream_options"] = {"include_usage": True}
    status, content = call(port, "/v1/completions", body)
    events = [line.removeprefix("data: ") for line in content.splitlines() if line]
    assert status == 200 and events[-1] == "[DONE]"
    chunk, usage = (json.loads(event) for event in events[:-1])
    assert text(chunk) == whole and usage["usage"]["completion_tokens"] == 6


REFUSED = {
    "not JSON": (b"{'prompt'", 400, "not JSON"),
    "no object": (b"[]", 400, "object"),
    "not UTF-8": (b'{"prompt": "\xff"}', 400, ""),
    "no prompt": ({"max_tokens": 3}, 400, "prompt"),
    "an empty prompt": ({"prompt": ""}, 400, "prompt"),
    "no tokens": ({"prompt": "Dab=", "max_tokens": 0}, 400, "max_tokens"),
    "not greedy": ({"prompt": "Dab=", "temperature": 0.7}, 400, "temperature.*greedy.*0"),
    "several answers": ({"prompt": "Dab=", "n": 2}, 400, "n: .*1"),
    "a field not known": ({"prompt": "Dab=", "logit_bias": {}}, 400, "logit_bias"),
    "an empty stop": ({"prompt": "Dab=", "stop": [""]}, 400, "stop"),
    "five stops": ({"prompt": "Dab=", "stop": list("abcde")}, 400, "stop"),
    "unknown letters": ({"prompt": "Dxyz="}, 400, re.escape(VOCABULARY)),
    "many tokens": ({"prompt": "Dab=", "max_tokens": 33}, 400, "allowed are 32"),
    "no such adapter": ({"prompt": "Dab=", "model": "v9"}, 404, "v9.*v1"),
    "a long prompt": ({"prompt": "D" + "a" * 40}, 413, "41 tokens, allowed are 32"),
    "a large body": ({"prompt": "a" * 100_000}, 413, "65536 bytes"),
}


def test_malformed_and_too_long_requests_get_a_status_and_a_reason(port):
    for case, (body, status, why) in REFUSED.items():
        found, content = call(port, "/v1/completions", body)
        assert found == status, (case, content)
        assert re.search(why, json.loads(content)["error"]["message"]), (case, content)
    assert call(port, "/v1/completions")[0] == 405
    assert call(port, "/nowhere")[0] == 404
    chat = {"messages": [{"role": "user", "content": "Dab="}]}
    status, content = call(port, "/v1/chat/completions", chat)
    assert status == 400 and "no chat template" in content
    assert ask(port, "Dab=")[0] == 200


def test_too_many_at_once_get_503_and_the_others_their_answer(port, prompts, said):
    prompts = prompts * 10
    answers = ask_all(port, [{"prompt": prompt, "max_tokens": 32} for prompt in prompts])
    codes = Counter(status for status, _ in answers)
    assert set(codes) == {200, 503} and codes[200] >= 64
    for prompt, (status, answer) in zip(prompts, answers, strict=True):
        if status == 200:
            assert text(answer) == said("v1", prompt, 32)
        else:
            assert "Too many requests" in answer["error"]["message"]


# Who is served


def test_a_share_is_about_a_share_sticks_and_only_grows():
    before: set[int] = set()
    for share in (0.0, 0.05, 0.25, 1.0):
        current = {"stable": "v1", "candidate": "v2", "share": share}
        chosen = {i for i in range(10_000) if choose(f"user {i}", current) == "v2"}
        assert chosen >= before and abs(len(chosen) / 10_000 - share) < 0.02
        before = chosen
    assert choose("x", {"stable": "v1", "candidate": None, "share": 1.0}) == "v1"


def test_rolled_out_and_back_under_load_no_request_fails(port, prompts, releases, said):
    flowing = []
    with ThreadPoolExecutor(8) as pool:
        for stable, candidate, share in (("v1", "v2", 0.5), ("v2", None, 0.0), ("v1", None, 0.0)):
            files.write_current(releases, stable, candidate, share)
            for i, prompt in enumerate(prompts):
                flowing.append(pool.submit(ask, port, prompt, user=f"{i}"))
            wait(flowing[:-8], timeout=300)
    answers = [one.result()[1] for one in flowing]
    assert answers[-1]["model"] == "v1"
    current = {"stable": "v1", "candidate": "v2", "share": 0.5}
    for i, answer in enumerate(answers[:22]):  # the last eight may have met the next stage
        assert answer["model"] == choose(f"{i}", current)
    for prompt, answer in zip(prompts * 3, answers, strict=True):
        assert text(answer) == said(answer["model"], prompt)


BAD = {
    "not there": None,
    "cut": '{"stable": "v1", "cand',
    "a list": "[]",
    "no share": '{"stable": "v1", "candidate": null}',
    "no such release": '{"stable": "v9", "candidate": null, "share": 0}',
    "a share of 2": '{"stable": "v1", "candidate": "v2", "share": 2}',
    "a word": '{"stable": "v1", "candidate": "v2", "share": "half"}',
}


def test_a_bad_pointer_is_passed_over_and_told(port, releases):
    files.write_current(releases, "v2")
    assert ask(port, "Dab=")[1]["model"] == "v2"
    for case, content in BAD.items():
        (releases / files.CURRENT).unlink(missing_ok=True)
        if content is not None:
            (releases / files.CURRENT).write_text(content)
        status, answer = ask(port, "Dab=")
        assert (status, answer["model"]) == (200, "v2"), case
        status, health = call(port, "/health")
        health = json.loads(health)
        assert (status, health["status"]) == (200, "degraded") and "current" in health["fault"], (
            case
        )
    files.write_current(releases, "v1")
    assert ask(port, "Dab=")[1]["model"] == "v1"
    assert json.loads(call(port, "/health")[1])["fault"] is None


def test_releases_that_come_later_are_served_and_bad_ones_refused(port, releases, said):
    """More than there is room for: the first ones go, and come back when they are asked for."""
    later = [Path(shutil.copytree(releases / "v2", releases / f"later{i}")) for i in range(9)]
    try:
        for folder in later:
            status, answer = ask(port, "Ocgbcce=", model=folder.name)
            assert (status, text(answer)) == (200, said("v2", "Ocgbcce="))
        assert text(ask(port, "Ocgbcce=")[1]) == said("v1", "Ocgbcce=")
        bad = Path(shutil.copytree(later[0], releases / "bad"))
        later.append(bad)
        (bad / files.FILES[1]).write_bytes(b"")
        status, answer = ask(port, "Ocgbcce=", model="bad")
        assert status == 500 and "bad is refused" in answer["error"]["message"]
        assert text(ask(port, "Ocgbcce=", model="later0")[1]) == said("v2", "Ocgbcce=")
    finally:
        for folder in later:
            shutil.rmtree(folder)


# What the engine does


def test_the_engine_tells_its_numbers_and_how_far_the_routing_moved(server, port, prompts):
    """The thirty prompts are the calibration; all the same prompt is not."""

    def moved() -> float:
        _, content = call(server.metrics, "/metrics")  # of a few seconds ago
        found = [line for line in content.splitlines() if line.startswith(MOVED)]
        return sum(float(line.split()[-1]) for line in found if 'adapter="v1"' in line)

    for asked, expected in ((prompts, (0, 0.02)), (["hh"] * 30, (0.05, 1))):
        for _ in range(4):
            ask_all(port, [{"prompt": prompt} for prompt in asked])
        until(lambda between=expected: between[0] < moved() < between[1])
    assert "ray_serve_deployment_processing_latency" in call(server.metrics, "/metrics")[1]


def test_it_answers_what_it_has_and_ends_within_seconds(server, port, prompts, said):
    """The last one of this server: what is running is answered, what comes later is refused."""
    started = psutil.Process(server.process.pid).children(recursive=True)
    commands = " ".join(" ".join(process.cmdline()) for process in started)
    temporary = Path(re.search(r"--temp-dir=(\S*/rlora-\S+)", commands)[1])
    with ThreadPoolExecutor(30) as pool:
        flowing = [pool.submit(ask, port, prompt, max_tokens=32) for prompt in prompts]
        wait(flowing, return_when=FIRST_COMPLETED)
        server.process.send_signal(signal.SIGTERM)
    answers = [one.result() for one in flowing]
    assert [text(answer) for _, answer in answers] == [said("v1", p, 32) for p in prompts]
    shown, _ = server.process.communicate(timeout=30)
    assert server.process.returncode == 0 and "Traceback" not in shown, shown
    with pytest.raises(OSError):
        call(port, "/health")
    assert not temporary.exists()


# What is refused before anything is started, and the file for a cluster


def test_the_command_names_what_it_can_t_serve(releases, tmp_path, monkeypatch, capsys):
    def refused(folder: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["rlora_lab", "serve", str(folder)])
        assert main() == 2
        return capsys.readouterr().err

    assert "holds no release" in refused(tmp_path)
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / files.RELEASE).write_text("{}")
    assert "can't be an adapter's name" in refused(tmp_path)
    (tmp_path / "a b").rename(tmp_path / "ab")
    assert "current.json can't be read" in refused(tmp_path)


def test_a_batch_ends_with_its_time_and_the_base_has_the_dtype_that_was_asked_for(releases):
    from rlora_lab.serving.adapters import Adapters, Settings

    own = {"folder": str(releases), "threads": 1}
    replica = Adapters.func_or_class(Settings(**own, dtype="float32", max_time=1e-6))
    replica._load("v1")
    ids = TOKENIZER.encode("Ocgbcce=")
    (answer,) = replica._answer_all("v1", [(ids, 32, [])])
    assert (answer["completion_tokens"], answer["finish_reason"]) == (1, "length")
    assert next(replica.model.parameters()).dtype == torch.float32
    half = Adapters.func_or_class(Settings(**own, dtype="bfloat16"))
    assert next(half.model.parameters()).dtype == torch.bfloat16


def test_the_file_for_a_cluster_says_what_the_command_does():
    from ray.serve.schema import ServeDeploySchema

    from rlora_lab.serving.adapters import Settings
    from rlora_lab.serving.app import build

    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    (application,) = config.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    settings = Settings(**application.args)
    assert settings == Settings(folder="releases")  # what stands there are the defaults
    _, options = read_config()
    assert options.keys() == {"front", "stable", "candidate"}
    assert build(settings)._bound_deployment.name == "front"


def test_chats_and_limits_in_openai_s_form():
    body = {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 3}
    chat = openai.read(openai.Chat, json.dumps(body).encode())
    assert (chat.max_tokens, chat.model) == (3, "current")
    told = {"text": "yes", "finish_reason": "stop", "prompt_tokens": 5, "completion_tokens": 1}
    answer = openai.answer(chat, "1", "v1", told)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "yes"}
    chunks = list(openai.events(chat, answer))
    chunk = json.loads(chunks[0].removeprefix("data: "))
    assert chunk["object"] == "chat.completion.chunk"
    assert chunk["choices"][0]["delta"]["content"] == "yes" and chunks[-1] == "data: [DONE]\n\n"


# The record that chapter 16b shows


def test_the_measurement_keeps_rounds_and_the_ratios_within_them(tmp_path):
    measure(base="tiny", rounds=3, batch_rounds=3, out=tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    rows = {row["what"]: row for row in record["records"]}
    assert list(rows)[:5] == ["base", "routed", "LoRA", "export", "merged export"]
    assert len(rows) == 7 and record["threads"] == 1 and record["base"] == "tiny"
    for name, row in rows.items():
        assert len(row["seconds"]) == 3 and 0 < row["low"] <= row["ratio"] <= row["high"], name
    ratios = np.divide(rows["routed"]["seconds"], rows["base"]["seconds"])
    assert rows["routed"]["ratio"] == pytest.approx(np.median(ratios))


@torch.no_grad()
def test_what_is_measured_is_what_it_is_called():
    models = forms(load_base("tiny"))
    ids = torch.randint(0, len(VOCABULARY), (2, 14), generator=torch.Generator().manual_seed(0))
    logits = {name: model(input_ids=ids).logits for name, model in models.items()}
    torch.testing.assert_close(logits["merged export"], logits["export"], atol=1e-4, rtol=1e-4)
    for name in ("routed", "LoRA", "export"):
        assert (logits[name] - logits["base"]).abs().max() > 1e-2, name
    sizes = {
        name: sum(
            p.numel()
            for part, p in models[name].named_parameters()
            if "lora_" in part and not re.search("_[AB]0", part)  # trained, so not the side pair
        )
        for name in ("routed", "LoRA")
    }
    assert sizes["LoRA"] == pytest.approx(sizes["routed"], rel=0.1)
