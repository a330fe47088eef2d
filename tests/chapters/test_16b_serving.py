"""Chapter 16b and `python -m rlora_lab serve`: what a client meets, over HTTP.

One server for all, started by the command as anybody would start it, with the settings of the
first fixture. It is killed in part once, and at last it is stopped while it has work.
"""

import asyncio
import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml

from rlora_lab.__main__ import main
from rlora_lab.chapters.ch16_shipping import (
    fingerprint,
    generate,
    load_release,
)
from rlora_lab.chapters.ch16b_serving import choose, place
from rlora_lab.errors import LabError
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
PROMPTS = ["Ocgbcce="[-2 - i % 7 :] for i in range(30)]  # of two to eight characters
COMMAND = [sys.executable, "-m", "rlora_lab", "serve"]
# A thread of Ray's that looked for an answer when Ray had ended: a race of its own, now and then.
RAY_AFTER_ITS_END = re.compile(
    r"failed to consume generator ref after _on_ready\n"
    r"Traceback [^\n]*\n(?: +[^\n]*\n)+"
    r"ray\.exceptions\.RaySystemError: System error: Ray has not been started yet"
)


@pytest.fixture(scope="module")
def releases(releases: Path, tmp_path_factory) -> Path:
    """A folder of this server's own."""
    return shutil.copytree(releases, tmp_path_factory.mktemp("served") / "releases")


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


def ask_all(port: int, prompts: list[str], **more) -> list[tuple[int, dict]]:
    """All at once."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: ask(port, prompt, **more), prompts))


def text(answer: dict) -> str:
    return answer["choices"][0]["text"]


def metric(server, name: str, label: str = "") -> float:
    """What the engine counted; it tells its numbers every few seconds."""
    _, content = call(server.metrics, "/metrics")
    lines = [line for line in content.splitlines() if line.startswith(f"ray_{name}{{")]
    return sum(float(line.split()[-1]) for line in lines if label in line)


# Answers


def test_it_says_what_it_checked_and_where_it_listens(server, port):
    assert "v1: checked and loaded" in server.shown and "v2: checked and loaded" in server.shown
    status, content = call(port, "/v1/models")
    assert (status, [one["id"] for one in json.loads(content)["data"]]) == (
        200,
        ["current", "v1", "v2"],
    )


def test_thirty_at_once_are_batched_and_answered_as_one_by_one(server, port, said):
    before = metric(server, "serve_batches_processed_total")
    assert before == 0  # nobody has asked for anything yet
    answers = ask_all(port, PROMPTS)
    assert {status for status, _ in answers} == {200}
    assert [text(answer) for _, answer in answers] == [said("v1", prompt) for prompt in PROMPTS]
    assert {answer["model"] for _, answer in answers} == {"v1"}
    assert len({answer["id"] for _, answer in answers}) == 30
    counter, stable = "serve_deployment_request_counter_total", 'deployment="stable"'
    until(lambda: metric(server, counter, stable) >= 30)
    assert 1 <= metric(server, "serve_batches_processed_total") <= 20


def test_adapters_and_lengths_mixed_in_one_rush_are_kept_apart(port, said):
    asked = [(prompt, f"v{1 + i % 2}", 1 + i % 6) for i, prompt in enumerate(PROMPTS)]
    with ThreadPoolExecutor(30) as pool:
        answers = list(
            pool.map(lambda one: ask(port, one[0], model=one[1], max_tokens=one[2]), asked)
        )
    for (prompt, adapter, most), (status, answer) in zip(asked, answers, strict=True):
        assert (status, answer["model"]) == (200, adapter)
        assert text(answer) == said(adapter, prompt, most)
        assert answer["usage"] == {
            "prompt_tokens": len(prompt),
            "completion_tokens": most,
            "total_tokens": len(prompt) + most,
        }
    assert [said("v1", prompt) for prompt in PROMPTS] != [said("v2", prompt) for prompt in PROMPTS]


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
    "nothing": (b"", 400, "not JSON"),
    "not UTF-8": (b'{"prompt": "\xff"}', 400, ""),
    "no prompt": ({"max_tokens": 3}, 400, "prompt"),
    "an empty prompt": ({"prompt": ""}, 400, "prompt"),
    "a number": ({"prompt": 7}, 400, "string"),
    "no tokens": ({"prompt": "Dab=", "max_tokens": 0}, 400, "max_tokens"),
    "half a token": ({"prompt": "Dab=", "max_tokens": 1.5}, 400, "max_tokens"),
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


def test_too_many_at_once_get_503_and_the_others_their_answer(port, said):
    prompts = PROMPTS * 10
    answers = ask_all(port, prompts, max_tokens=32)
    codes = Counter(status for status, _ in answers)
    assert set(codes) == {200, 503} and codes[200] >= 64
    for prompt, (status, answer) in zip(prompts, answers, strict=True):
        if status == 200:
            assert text(answer) == said("v1", prompt, 32)
        else:
            assert "Too many requests" in answer["error"]["message"]


# Who is served


def test_a_share_is_about_a_share_sticks_and_only_grows():
    ids = [f"user {i}" for i in range(10_000)]
    before: set[str] = set()
    for share in (0.0, 0.05, 0.25, 1.0):
        current = {"stable": "v1", "candidate": "v2", "share": share}
        chosen = {i for i in ids if choose(i, current) == "v2"}
        assert chosen >= before and abs(len(chosen) / len(ids) - share) < 0.02
        before = chosen
    both = [i for i in ids if place(i, "v2") < 0.1 and place(i, "v3") < 0.1]
    assert 50 < len(both) < 200
    assert choose("x", {"stable": "v1", "candidate": None, "share": 1.0}) == "v1"


def test_rolled_out_and_back_under_load_no_request_fails(port, releases, said):
    flowing = []
    with ThreadPoolExecutor(8) as pool:
        for stable, candidate, share in (("v1", "v2", 0.5), ("v2", None, 0.0), ("v1", None, 0.0)):
            files.write_current(releases, stable, candidate, share)
            flowing += [
                pool.submit(ask, port, prompt, user=f"{i}") for i, prompt in enumerate(PROMPTS)
            ]
            for one in flowing[:-8]:
                one.result(timeout=300)
        answers = [one.result() for one in flowing]
    assert ask(port, "Dab=")[1]["model"] == "v1"
    assert {status for status, _ in answers} == {200}
    assert {answer["model"] for _, answer in answers} == {"v1", "v2"}
    current = {"stable": "v1", "candidate": "v2", "share": 0.5}
    for i, (_, answer) in enumerate(answers[:22]):  # the last eight may have met the next stage
        assert answer["model"] == choose(f"{i}", current)
    for prompt, (_, answer) in zip(PROMPTS * 3, answers, strict=True):
        assert text(answer) == said(answer["model"], prompt)


BAD = {
    "not there": None,
    "cut": '{"stable": "v1", "cand',
    "a list": "[]",
    "no share": '{"stable": "v1", "candidate": null}',
    "no such release": '{"stable": "v9", "candidate": null, "share": 0}',
    "no such candidate": '{"stable": "v1", "candidate": "v9", "share": 0.1}',
    "a share of 2": '{"stable": "v1", "candidate": "v2", "share": 2}',
    "a word": '{"stable": "v1", "candidate": "v2", "share": "half"}',
}


def test_a_bad_pointer_is_passed_over_and_told(port, releases):
    files.write_current(releases, "v2")
    assert ask(port, "Dab=")[1]["model"] == "v2"
    pointer = releases / files.CURRENT
    for case, content in BAD.items():
        if content is None:
            pointer.unlink()
        else:
            pointer.write_text(content)
        status, answer = ask(port, "Dab=")
        assert (status, answer["model"]) == (200, "v2"), case
        status, health = call(port, "/health")
        assert status == 200 and json.loads(health)["status"] == "degraded", case
        assert "current" in json.loads(health)["fault"]
    files.write_current(releases, "v1")
    assert ask(port, "Dab=")[1]["model"] == "v1"
    assert json.loads(call(port, "/health")[1])["fault"] is None


@pytest.mark.parametrize("case", BAD)
def test_a_bad_pointer_is_refused(case: str, tmp_path):
    if BAD[case] is not None:
        (tmp_path / files.CURRENT).write_text(BAD[case])
    with pytest.raises(LabError, match="current"):
        files.read_current(tmp_path, ["v1", "v2"])


def test_a_reader_never_sees_half_a_pointer(tmp_path):
    stop = threading.Event()
    files.write_current(tmp_path, "v1")

    def write():
        for i in range(10**6):
            if stop.is_set():
                return
            files.write_current(tmp_path, f"v{1 + i % 2}", share=0.5)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = Counter()
        end = time.monotonic() + 30  # on a busy machine the writer comes late
        while seen.total() < 2000 or (len(seen) < 2 and time.monotonic() < end):
            seen[files.read_current(tmp_path, ["v1", "v2"])["stable"]] += 1
    finally:
        stop.set()
        writer.join()
    assert set(seen) == {"v1", "v2"}


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


def test_the_engine_tells_its_numbers_and_how_far_the_routing_moved(server, port):
    """PROMPTS are the calibration; all the same prompt is not."""

    def moved() -> float:
        return metric(server, "rlora_routing_distance", 'adapter="v1"')

    def ask_each(prompts: list[str]) -> None:
        for start in range(0, len(prompts), 30):
            assert {status for status, _ in ask_all(port, prompts[start : start + 30])} == {200}

    ask_each(PROMPTS * 4)
    until(lambda: 0 < moved() < 0.02)
    ask_each(["hh"] * 110)
    until(lambda: moved() > 0.05)
    content = call(server.metrics, "/metrics")[1]
    for name in (
        "deployment_request_counter",
        "deployment_processing_latency",
        "num_http_requests",
    ):
        assert f"ray_serve_{name}" in content


def replica(server) -> psutil.Process | None:
    """The process that has the stable adapters."""
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if process.cmdline()[0].startswith("ray::ServeReplica:rlora:stable"):
                return process
        except (psutil.NoSuchProcess, IndexError):
            continue
    return None


def test_a_replica_that_is_killed_comes_back_and_no_request_is_lost(server, port, said):
    prompts = PROMPTS * 3
    old = replica(server)
    with ThreadPoolExecutor(30) as pool:
        flowing = [pool.submit(ask, port, prompt, max_tokens=32) for prompt in prompts]
        until(lambda: any(one.done() for one in flowing))
        old.kill()
        answers = [one.result() for one in flowing]
    assert {status for status, _ in answers} == {200}
    assert [text(answer) for _, answer in answers] == [said("v1", p, 32) for p in prompts]
    until(lambda: replica(server) is not None)
    assert replica(server).pid != old.pid


def test_it_answers_what_it_has_and_ends_within_seconds(server, port, said):
    """The last one of this server: what is running is answered, what comes later is refused."""
    temporary = re.search(
        r"--temp-dir=(\S*/rlora-\S+)",
        " ".join(
            " ".join(p.cmdline())
            for p in psutil.Process(server.process.pid).children(recursive=True)
        ),
    )
    with ThreadPoolExecutor(30) as pool:
        flowing = [pool.submit(ask, port, prompt, max_tokens=32) for prompt in PROMPTS]
        until(lambda: any(one.done() for one in flowing))
        server.process.send_signal(signal.SIGTERM)
        answers = [one.result() for one in flowing]
    assert [text(answer) for _, answer in answers] == [said("v1", p, 32) for p in PROMPTS]
    start = time.monotonic()
    shown, _ = server.process.communicate(timeout=300)
    assert time.monotonic() - start < 30
    shown = RAY_AFTER_ITS_END.sub("", shown)
    assert server.process.returncode == 0 and "Traceback" not in shown, shown
    with pytest.raises(OSError):
        call(port, "/health")
    assert temporary and not Path(temporary[1]).exists()


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


def test_the_command_s_options_reach_the_deployments(releases, monkeypatch):
    files.write_current(releases, "v1")
    given = []
    monkeypatch.setattr("rlora_lab.serving.serve._run", lambda *all: given.append(all))
    options = ["--max-queue", "3", "--max-batch", "5", "--timeout", "7"]
    monkeypatch.setattr(sys, "argv", ["rlora_lab", "serve", str(releases), *options])
    with pytest.raises(SystemExit):
        main()
    args, deployments, names = given[0][:3]
    own = {"folder": str(releases), "base": "tiny", "max_batch": 5, "timeout": 7, "max_time": 10}
    assert args | own == args and names == ["v1", "v2"]
    for name in ("stable", "candidate"):
        assert deployments[name]["max_queued_requests"] == 3
        assert deployments[name]["max_ongoing_requests"] == 2 * 5


# Parts of the server, without it


class Handle:
    """In the place of a deployment's: each call takes the next of these, seconds or an answer."""

    def __init__(self, *outcomes: float | dict | Exception) -> None:
        self.outcomes = list(outcomes)

    def options(self, **names: str) -> "Handle":
        return self

    async def remote(self, asked: openai.Asked) -> dict:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome, float):
            await asyncio.sleep(outcome)
        return outcome


TOLD = {"text": "yes", "finish_reason": "stop", "prompt_tokens": 5, "completion_tokens": 1}


def front_of(folder: Path, *outcomes: float | dict | Exception, timeout: float = 30):
    """The front, without what Ray Serve puts around it; the stable adapters answer like that."""
    from rlora_lab.serving.front import Front

    files.write_current(folder, "v1")
    return Front.func_or_class.__mro__[1](str(folder), timeout, Handle(*outcomes), Handle())


def test_what_fails_behind_the_front_has_a_status_and_a_reason(releases):
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError

    from rlora_lab.serving import front

    asked, dead = openai.Completion(prompt="Dab="), RayActorError()
    assert asyncio.run(front_of(releases, dead, dead, TOLD)._ask("v1", asked)) == TOLD
    for outcomes, status, why in (
        ([1.0], 504, "0.1 s"),
        ([RuntimeError("out of memory")], 500, "RuntimeError"),
        ([dead] * front.TRIES, 500, "RayActorError"),
        ([BackPressureError(3, 3)], 503, "Too many"),
    ):
        with pytest.raises(openai.Refused, match=why) as found:
            asyncio.run(front_of(releases, *outcomes, timeout=0.1)._ask("v1", asked))
        answer = asyncio.run(front.refused(None, found.value))
        assert answer.status_code == status
        assert ("Retry-After" in answer.headers) == (status == 503)


def test_while_it_ends_nothing_new_is_taken(releases, monkeypatch):
    monkeypatch.setattr("rlora_lab.serving.front.QUIET", 0.1)

    async def end() -> None:
        front = front_of(releases)
        front.waiting = 1
        closing = asyncio.create_task(front.close())
        await asyncio.sleep(0.3)
        assert not closing.done()  # somebody still waits
        with pytest.raises(openai.Refused, match="being stopped"):
            await front._reply(openai.Completion, None)
        front.waiting = 0
        await closing

    asyncio.run(end())


def test_what_one_replica_does(releases, said, monkeypatch):
    """Loads what is asked for and makes room, cuts at a stop, knows an end, keeps to its limits."""
    from rlora_lab.serving.adapters import Adapters, Settings

    own = Settings(folder=str(releases), threads=1, dtype="float32")
    replica = Adapters.func_or_class(own)
    row = TOKENIZER.encode("Ocgbcce="), 6, []

    def answers_of(*names: str) -> list[str]:
        return [replica._answer_all(name, [row])[0]["text"] for name in names]

    expected = [said(name, "Ocgbcce=") for name in ("v1", "v2")]
    replica._load("v1")
    assert answers_of("v1", "v2") == expected
    replica._drop("v1")
    assert list(replica.model.peft_config) == ["v2"]
    replica.calibration["v2"] = "spoiled"  # what watches must not take answers with it
    assert answers_of("v1", "v2") == expected

    new = TOKENIZER.encode("abc")
    assert replica._said((*row[:2], ["c", "bc"]), new)["text"] == "a"
    assert replica._said(row, new)["finish_reason"] == "length"
    replica.model.generation_config.eos_token_id = new[-1]
    assert replica._said(row, new)["finish_reason"] == "stop"

    async def far_enough(name: str) -> str:
        return "not looked at here"

    monkeypatch.setattr(replica, "check", far_enough)
    for letters, most, status in ((32, 32, 500), (33, 32, 413), (32, 33, 400)):
        asked = openai.Completion(prompt="a" * letters, max_tokens=most)
        assert asyncio.run(replica.answer(asked)).status == status


def test_a_batch_ends_with_its_time_and_the_base_has_the_dtype_that_was_asked_for(releases):
    from rlora_lab.serving.adapters import Adapters, Settings

    own = {"folder": str(releases), "threads": 1}
    replica = Adapters.func_or_class(Settings(**own, dtype="float32", max_time=1e-6))
    replica._load("v1")
    ids = TOKENIZER.encode(PROMPTS[0])
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
    answer = openai.answer(chat, "1", "v1", TOLD)
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
    base = rows["base"]["seconds"]
    for name, row in rows.items():
        assert len(row["seconds"]) == 3 and 0 < row["low"] <= row["ratio"] <= row["high"], name
    ratios = [a / b for a, b in zip(rows["routed"]["seconds"], base, strict=True)]
    assert rows["routed"]["ratio"] == pytest.approx(sorted(ratios)[1])
    assert rows["base"]["ratio"] == 1


@torch.no_grad()
def test_what_is_measured_is_what_it_is_called():
    models = forms(load_base("tiny"))
    ids = torch.randint(0, len(VOCABULARY), (2, 14), generator=torch.Generator().manual_seed(0))
    logits = {name: model(input_ids=ids).logits for name, model in models.items()}
    torch.testing.assert_close(logits["merged export"], logits["export"], atol=1e-4, rtol=1e-4)
    for name in ("routed", "LoRA", "export"):
        assert (logits[name] - logits["base"]).abs().max() > 1e-2, name
    sizes = {}
    for name in ("routed", "LoRA"):
        adapters = [p.numel() for n, p in models[name].named_parameters() if "lora_" in n]
        sizes[name] = sum(adapters)
    side = sum(p.numel() for n, p in models["routed"].named_parameters() if re.search("_[AB]0", n))
    assert sizes["LoRA"] == pytest.approx(sizes["routed"] - side, rel=0.1)
