"""The commands: what they say, what they refuse, and that reading is cheap."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lab_helpers import plan_file
from typer.testing import CliRunner

from rlora_lab.__main__ import app, main
from rlora_lab.names import SUITES
from rlora_lab.runs.record import read_records

SMALL = ["--steps", "2", "--batch", "4"]


@pytest.fixture
def command(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs a command in this process and an empty folder: (exit code, what it said, errors)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlora_lab", *arguments])
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_two_methods_on_two_seeds(command, here: Path):
    asked = ["run", "quality", "--methods", "lora,rlora", "--seeds", "2", *SMALL]
    code, said, _ = command(*asked, "--r", "2")
    assert code == 0 and "All that was asked for is done." in said
    assert "R-LoRA less LoRA" in said and "cannot tell" in said and "rotate back" in said
    file = here / "runs" / "quality-tiny-synthetic-2.jsonl"
    settings, records = read_records(file)
    (setting,) = settings.values()
    wanted = {"kind": "compare", "base": "tiny", "steps": 2, "batch": 4, "r": 2}
    assert wanted.items() <= setting.items()
    assert [(r["stage"], r["method"], r["seed"], r["learning_rate"]) for r in records] == [
        ("test", method, seed, SUITES["synthetic"][0])
        for seed in (0, 1)
        for method in ("lora", "rlora")
    ]
    before = file.read_bytes()
    assert command(*asked, "--r", "2")[0] == 0 and file.read_bytes() == before  # all was done
    code, _, error = command(*asked)
    assert code == 2 and "holds runs with another r than the plan has" in error
    assert file.read_bytes() == before


def test_a_rate_is_chosen_with_seeds_that_are_not_measured(command, here: Path):
    asked = ["--methods", "rlora", "--lr", "0.02,0.0001", "--sweep-seeds", "2"]
    code, said, _ = command("run", "quality", *asked, *SMALL[:1], "6", "--batch", "32")
    assert code == 0 and "One seed says nothing" in said
    _, records = read_records(here / "runs" / "quality-tiny-synthetic-6.jsonl")
    swept = [(r["learning_rate"], r["seed"]) for r in records if r["stage"] == "sweep"]
    assert swept == [(rate, seed) for rate in (0.0001, 0.02) for seed in (1000, 1001)]
    (test,) = [r for r in records if r["stage"] == "test"]
    sums = {0.0001: 0.0, 0.02: 0.0}
    for record in records[:4]:
        sums[record["learning_rate"]] += sum(record["validation"]["letters"])
    assert test["learning_rate"] == max(sums, key=sums.get) and test["seed"] == 0


@pytest.mark.parametrize("method", ["lora-rank", "one-head"])
def test_methods_without_several_heads_are_recorded(method: str, command, here: Path):
    code, said, _ = command("run", "quality", "--methods", f"{method},rlora", *SMALL)
    assert code == 0 and "–" in said  # their cosine
    text = (here / "runs" / "quality-tiny-synthetic-2.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    without = {line["method"]: line["similarity"] is None for line in lines[1:]}
    assert without == {method: True, "rlora": False}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--methods", "lora,dora"], "unknown method 'dora': allowed are .*lora, lora-classic"),
        (["--base", "nobody/nothing"], "'nobody/nothing' could not be loaded"),
        (["--suite", "sentences"], "'sentences' does not fit base 'tiny'"),
        (["--base", "minilm"], "'synthetic' does not fit base 'minilm'"),
        (["--steps", "0"], "steps: .*greater than or equal to 1, got 0"),
        (["--lr", "1e-3,fast"], "--lr must be one or several numbers"),
        (["--r", "0"], "settings.r: .*greater than or equal to 1, got 0"),
    ],
)
def test_bad_input(options: list[str], message: str, command, here: Path):
    code, said, error = command("run", "quality", *SMALL, *options)
    assert code == 2 and error.startswith("error: ")
    assert re.search(message, error) and not list(here.rglob("*.jsonl"))


@pytest.mark.parametrize("name", ["train", "compare"])
def test_files_that_are_wrong(name: str, command, here: Path):
    (here / "mine").mkdir()
    (here / "mine" / "sums.jsonl").write_text('{"question": "2 + 2", "answer": "4"}\n')
    code, said, error = command(name, "--base", "tiny", "--data", "mine")
    assert code == 2 and not said
    assert error == ("error: sums.jsonl, line 1 has no field 'prompt'; it has question, answer\n")
    assert not (here / "runs").exists()


def test_status_of_a_plan(command, here: Path):
    plan_file(here, a={"tasks": ["mirror"]})
    asked = ["run", "evidence", "--plan", "plan.toml", "--records", "records"]
    code, said, _ = command(*asked, "--status")
    assert code == 0 and "16" in said and "?" in said and "done." not in said
    assert not (here / "records").exists()
    code, _, error = command(*asked, "--only", "b")
    assert code == 2 and error.startswith("error: no block 'b' in the plan: it has a")


def test_the_recorded_chapters_have_nothing_left_to_do(command):
    for block in ("study", "scarce"):
        code, said, _ = command("run", block, "--status")
        assert code == 0 and all(line.split()[2] == "0" for line in said.splitlines()[3:-1])
        code, _, error = command("run", block, "--steps", "40")
        assert code == 2 and "another steps than the plan has: choose another --records" in error


HELP = {
    "": "train compare run report speed train-base serve",
    "train": "--base --data --out --method --steps --lr --batch --accumulate --blocks --chat "
    "--bf16 --train-rows --test-rows --r --num-heads --lora-alpha --lora-dropout --seed --threads",
    "compare": "--base --data --out --steps --lr --seeds --batch --blocks --chat --train-rows "
    "--test-rows --r --num-heads --lora-alpha --lora-dropout --workers",
    "run": "evidence quality study scarce",
    "run evidence": "--plan --records --only --methods --minutes --workers --status",
    "run quality": "--base --suite --methods --seeds --sweep-seeds --steps --lr --batch --r "
    "--num-heads --lora-alpha --lora-dropout --workers --minutes --records",
    "run study": "--trials --steps --seeds --records --minutes --workers --status",
    "run scarce": "--steps --seeds --records --minutes --workers --status",
    "report": "--plan --records --out",
    "speed": "--quick --device --threads --out",
    "train-base": "--seed --steps --threads --out",
    "serve": "--base --host --port --window-ms --max-batch --max-queue --timeout --threads",
}


@pytest.mark.parametrize("command_line", HELP)
def test_help_names_every_option(command_line: str):
    arguments = [*command_line.split(), "--help"]
    said = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}).output
    for name in HELP[command_line].split():
        assert f"{name} " in said


READING = """
import sys, time
start = time.process_time()
from rlora_lab.report import loading, pictures, published, questions, tables, verdict, write
from rlora_lab.runs import worker  # a plan's status; runs are done in processes of their own
loading.load_evidence("synthetic", say=False)
print(time.process_time() - start)
assert not {"torch", "transformers", "datasets", "peft"} & set(sys.modules)
"""


def test_reading_is_cheap():
    """Chapters that read records wait for no training library, and don't go stale with it."""
    done = subprocess.run([sys.executable, "-c", READING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 3
