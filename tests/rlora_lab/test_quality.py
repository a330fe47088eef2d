"""The command `quality`: its record, its choices, its resumption and its errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from rlora_lab.__main__ import app, main
from rlora_lab.errors import LabError
from rlora_lab.report.tables import table
from rlora_lab.runs.quality import Quality
from rlora_lab.runs.training import train

QUIET = Console(quiet=True)


def command(*arguments: str, cwd: Path, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "rlora_lab", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"},
        **kwargs,
    )


def screen(result: dict) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table(result))
    return capture.get()


def test_sentences_end_to_end(
    bert_folder: Path,  # noqa: F811
    sentences_folder: Path,  # noqa: F811
    tmp_path: Path,
):
    arguments = ["quality", "--base", str(bert_folder), "--suite", "sentences"]
    arguments += ["--methods", "lora,rlora", "--seeds", "2", "--steps", "4", "--batch", "6"]
    process = command(*arguments, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    file = tmp_path / "runs" / "quality-tiny-bert-sentences-4.json"
    result = json.loads(file.read_text())

    assert result["command"] == (
        "python -m rlora_lab quality --base tiny-bert --suite sentences --methods lora,rlora "
        "--seeds 2 --steps 4 --batch 6"
    )
    for path in (bert_folder, sentences_folder, tmp_path, Path.home()):
        assert str(path) not in file.read_text()  # a result names no place of its machine
    assert result["config"] == {
        "base": "tiny-bert",
        "base_source": "folder tiny-bert",
        "suite": "sentences",
        "data": "folder in RLORA_DATA",
        "data_sha256": result["config"]["data_sha256"],
        "data_notes": {},
        "sentences": result["config"]["sentences"],
        "steps": 4,
        "batch": 6,
        "r": 4,
        "num_heads": 3,
        "lora_alpha": 32.0,
        "lora_dropout": 0.1,
    }
    assert result["tasks"] == ["question", "mood", "time"] and result["metrics"] == ["accuracy"]
    assert result["complete"] and result["chosen"] == {"lora": 1e-3, "rlora": 1e-3}
    assert {"date", "machine", "threads", "versions"} <= set(result)
    assert [(r["method"], r["seed"]) for r in result["records"]] == [
        ("lora", 0),
        ("lora", 1),
        ("rlora", 0),
        ("rlora", 1),
    ]
    for record in result["records"]:
        assert record["other_parameters"] == 7 * 32 + 7
        assert record["learning_rate"] == 1e-3 and record["seconds"] > 0
        assert len(record["loss"]) == 4 and record["validation"] is None
        for task in result["tasks"]:
            size = result["config"]["sentences"][task]["test"]
            right = record["test"][task]["accuracy"] * size
            assert 0 <= right <= size and right == pytest.approx(round(right))
    assert result["records"][0]["similarity"] is None
    assert set(result["records"][2]["similarity"]) == {"heads", "change"}
    size = 2 * ((4 * 32 + 12 * 64 + 3 * 32) + (4 * 64 + 12 * 32 + 3 * 64))
    assert result["records"][2]["adapter_parameters"] == size == result["rlora_parameters"]

    for word in ("question", "mood", "time", "mean", "spread over tasks", "spread over seeds"):
        assert word in out
    for word in ("cosine of heads", "adapter size", "against R-LoRA", "+0.0%"):
        assert word in out


def test_learning_rates_are_chosen_on_validation_data(tmp_path: Path):
    options = {"seeds": 2, "steps": 3, "lrs": [1e-5, 1e-2], "batch": 16}
    out = tmp_path / "a.json"
    result = Quality("tiny", "synthetic", ["lora", "rlora"], out=out, **options).run(QUIET)
    assert json.loads(out.read_text()) == result
    for method in ("lora", "rlora"):
        records = [r for r in result["records"] if r["method"] == method]
        means = {
            lr: np.mean(
                [
                    task["letters"]
                    for r in records
                    if r["learning_rate"] == lr
                    for task in r["validation"].values()
                ]
            )
            for lr in options["lrs"]
        }
        assert result["chosen"][method] == max(means, key=means.get)
        for record in records:  # only the chosen one has seen test data
            chosen = record["learning_rate"] == result["chosen"][method]
            assert (record["test"] is not None) == chosen
    text = screen(result)
    for method in ("lora", "rlora"):
        assert f"{result['chosen'][method]:g}" in text
    assert "less lora" in text and "95 %" in text and "spread over seeds" in text

    # A wider grid keeps what is done; the adapter of a new choice is scored then.
    wide = options | {"lrs": [*options["lrs"], 1e-4]}
    trained = []
    run = Quality("tiny", "synthetic", ["lora", "rlora"], out=out, **wide)
    original = run._train
    run._train = lambda *key: (trained.append(key[:3]), original(*key))
    wider = run.run(QUIET)
    assert trained == [(m, s, 1e-4) for m in ("lora", "rlora") for s in (0, 1)]
    assert [r for r in wider["records"] if r["learning_rate"] != 1e-4] == result["records"]


def is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text()))
    except (OSError, ValueError):
        return False


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    what = ("tiny", "synthetic", ["rlora", "lora"])
    options = {"seeds": 1, "steps": 150, "batch": 4}
    whole = Quality(*what, **options, out=tmp_path / "whole.json").run(QUIET)

    arguments = ["quality", "--methods", "rlora,lora", "--steps", "150", "--batch", "4"]
    process = command(*arguments, "--out", "killed.json", cwd=tmp_path)
    checkpoint = tmp_path / "killed" / "lora-seed0-lr0.004" / "checkpoints" / "checkpoint-48"
    while not is_json(checkpoint / "trainer_state.json"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stopped = json.loads((tmp_path / "killed.json").read_text())
    assert not stopped["complete"] and [r["method"] for r in stopped["records"]] == ["rlora"]

    with pytest.raises(LabError, match="another batch"):  # its checkpoints would not fit
        Quality(*what, **options | {"batch": 8}, out=tmp_path / "killed.json")

    steps = []

    def watched(*args, on_step, **kwargs):
        return train(*args, on_step=lambda n: (steps.append(n), on_step(n)), **kwargs)

    monkeypatch.setattr("rlora_lab.runs.quality.train", watched)
    result = Quality(*what, **options, out=tmp_path / "killed.json").run(QUIET)
    assert steps[0] in (49, 97)  # the killed process may have come to the next checkpoint
    assert steps == list(range(steps[0], 151))  # of lora; rlora is done
    assert result["records"][0] | {"test": None} == stopped["records"][0]
    for record, expected in zip(result["records"], whole["records"], strict=True):
        assert record | {"seconds": 0} == expected | {"seconds": 0}


def test_another_run_in_the_same_file_is_refused(tmp_path: Path):
    out = tmp_path / "a.json"
    options = {"seeds": 1, "steps": 1, "batch": 4, "out": out}
    Quality("tiny", "synthetic", ["rlora"], **options).run(QUIET)
    before = out.read_bytes()
    with pytest.raises(LabError, match="another r, steps.*another --out"):
        Quality("tiny", "synthetic", ["rlora"], **options | {"steps": 2}, settings={"r": 2})
    assert out.read_bytes() == before
    out.write_text("{}")
    with pytest.raises(LabError, match="no result of this command"):
        Quality("tiny", "synthetic", ["rlora"], **options)


def test_an_adapter_that_is_gone(tmp_path: Path):
    out = tmp_path / "a.json"
    options = {"seeds": 1, "steps": 1, "batch": 4, "out": out}
    Quality("tiny", "synthetic", ["rlora"], **options).run(QUIET)
    for file in sorted((tmp_path / "a").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    Quality("tiny", "synthetic", ["rlora"], **options).run(QUIET)  # nothing left to do
    with pytest.raises(LabError, match="rlora, seed 0, lr 0.004.*is gone"):
        Quality("tiny", "synthetic", ["rlora"], lrs=[4e-3, 1e-3], **options).run(QUIET)


def test_six_methods_fit_a_terminal(tmp_path: Path):
    six = ["lora", "hydralora", "hydralora+dropout", "hydralora+init", "mlora", "rlora"]
    run = Quality("tiny", "synthetic", six, seeds=2, steps=1, out=tmp_path / "a.json")
    run.result["rlora_parameters"] = 230_000
    scores = {task: {"letters": 0.123, "exact": 0.0} for task in run.suite.tasks}
    for method in six:
        run.result["chosen"][method] = 4e-3
        for seed in run.seeds:
            record = {"method": method, "seed": seed, "learning_rate": 4e-3, "seconds": 12345.0}
            record |= {"adapter_parameters": 218_880, "other_parameters": 6545, "test": scores}
            record |= {"similarity": {"heads": 0.5, "change": -0.5}}
            run.result["records"].append(record)
    said = screen(run.result)
    assert "218,880" in said and "+dropout" in said and "12345" in said
    assert "…" not in said and max(map(len, said.splitlines())) <= 80
    assert [line.split()[0] for line in said.splitlines() if "12.3" in line][:2] == ["rotate"] * 2


def test_one_head_has_no_similarity(tmp_path: Path):
    options = {"seeds": 1, "steps": 1, "batch": 4, "out": tmp_path / "a.json"}
    settings = {"num_heads": 1, "r": 2, "lora_dropout": 0.0}
    result = Quality("tiny", "synthetic", ["rlora"], settings=settings, **options).run(QUIET)
    assert result["records"][0]["similarity"] is None and "–" in screen(result)
    assert result["command"].endswith("--batch 4 --r 2 --num-heads 1 --lora-dropout 0.0")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"methods": ["lora", "dora"]}, "'dora': allowed are lora, lora-classic"),
        ({"methods": []}, "at least one"),
        ({"methods": ["lora", "lora"]}, "each once"),
        ({"base": "nobody/nothing"}, "'nobody/nothing' could not be loaded"),
        ({"suite": "songs"}, "'songs': allowed are synthetic, sentences"),
        ({"base": "tiny", "suite": "sentences"}, "'sentences' does not fit base 'tiny'"),
        ({"base": "minilm", "suite": "synthetic"}, "'synthetic' does not fit base 'minilm'"),
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"batch": -1}, "--batch must be at least 1, got -1"),
        ({"lrs": [1e-3, 0.0]}, "--lr must be above 0, got 0.0"),
        ({"settings": {"r": 0}}, "r must be an integer >= 1"),
        ({"settings": {"lora_dropout": 1.0}}, r"lora_dropout must lie in \[0, 1\)"),
    ],
)
def test_bad_input(options: dict, message: str, tmp_path: Path):
    valid = {"base": "tiny", "suite": "synthetic", "methods": ["lora"], "seeds": 1, "steps": 1}
    with pytest.raises(LabError, match=message):
        Quality(**valid | options, out=tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_errors_on_the_screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    for arguments, message in [
        (["--methods", "dora"], "error: unknown method 'dora': allowed are lora, lora-classic"),
        (["--lr", "1e-3,fast"], "error: --lr must be one or several numbers"),
    ]:
        monkeypatch.setattr(sys, "argv", ["rlora_lab", "quality", *arguments])
        assert main() == 2
        said = capsys.readouterr()
        assert said.err.startswith(message) and not said.out


def test_help_says_each_option_and_its_default():
    said = CliRunner().invoke(app, ["quality", "--help"], env={"COLUMNS": "200"}).output
    options = "base suite methods seeds steps lr batch r num-heads lora-alpha lora-dropout threads"
    for option in [*options.split(), "out"]:
        assert f"--{option} " in said
    assert said.count("default:") == 13
    said = CliRunner().invoke(app, ["--help"]).output
    assert "quality" in said and "train-base" in said
