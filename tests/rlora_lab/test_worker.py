"""The worker: what a run records, and that a plan goes on where it stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_helpers import plan_file
from rich.console import Console

from rlora_lab.errors import LabError
from rlora_lab.models.bases import load_base
from rlora_lab.models.methods import adapt
from rlora_lab.report.loading import load_evidence
from rlora_lab.runs import one_run, worker
from rlora_lab.runs.one_run import do_run
from rlora_lab.runs.plan import Run, load_plan
from rlora_lab.runs.probes import routing_entropy
from rlora_lab.runs.record import read_records
from rlora_lab.runs.worker import work
from rlora_lab.tasks.strings import SUITE_TASKS, Synthetic

QUIET = Console(quiet=True)
SMALL = {"tasks": ["rotate 2", "mirror"], "rates": [0.001, 0.002], "extend": 0}


def test_a_run_of_the_test(tmp_path: Path):
    block = load_plan(plan_file(tmp_path, a={"steps": 12}))["a"]
    record = do_run(Run(block, "test", "rlora", 0.004, 3))
    assert json.loads(json.dumps(record)) == record
    assert [record[k] for k in ("stage", "method", "learning_rate", "seed")] == [
        "test",
        "rlora",
        0.004,
        3,
    ]
    assert record["adapter_parameters"] == 15232 and record["other_parameters"] == 0
    assert "validation" not in record
    assert len(record["test"]["letters"]) == len(record["test"]["exact"]) == len(SUITE_TASKS)
    assert len(record["loss"]) == 10 and record["seconds"] > 0
    assert -1 <= record["similarity"]["heads"] < record["similarity"]["change"] <= 1
    assert len(record["entropy"]) == len(SUITE_TASKS) and 0 < max(record["entropy"]) <= 1
    # the same run again gives the same record, and nothing that was looked at changed it
    again = do_run(Run(block, "test", "rlora", 0.004, 3))
    assert again | {"seconds": 0} == record | {"seconds": 0}
    swept = do_run(Run(block, "sweep", "rlora", 0.004, 3))
    assert swept["loss"] == record["loss"] and "test" not in swept
    assert not {"similarity", "entropy", "kept_bytes"} & set(swept)


def test_the_splits_are_what_they_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A sweep never sees test data, and a test is scored on test data once."""
    block = load_plan(plan_file(tmp_path, a=SMALL))["a"]
    asked = []
    original = Synthetic.score

    def score(self, model, split="test", size=500):
        asked.append(split)
        return original(self, model, split, 20)

    monkeypatch.setattr(Synthetic, "score", score)
    do_run(Run(block, "sweep", "lora", 0.001, 10))
    do_run(Run(block, "test", "lora", 0.001, 0))
    assert asked == ["validation", "test"]


@pytest.mark.parametrize(
    "method, heads, router",
    [
        ("lora", False, False),
        ("lora-rank", False, False),
        ("one-head", False, False),
        ("mlora-nodropout", True, False),
        ("hydralora-own", True, True),
    ],
)
def test_what_methods_without_heads_or_router_record(
    method: str, heads: bool, router: bool, tmp_path: Path
):
    block = load_plan(plan_file(tmp_path, a=SMALL | {"methods": [method]}))["a"]
    record = do_run(Run(block, "test", method, 0.001, 0))
    assert (record["similarity"] is not None, record["entropy"] is not None) == (heads, router)
    json.dumps(record, allow_nan=False)


def test_what_is_kept_for_the_backward(tmp_path: Path):
    block = load_plan(plan_file(tmp_path, a=SMALL | {"methods": ["hydralora", "hydralora-own"]}))
    shared, own = (
        do_run(Run(block["a"], "test", method, 0.001, 0))["kept_bytes"]
        for method in ("hydralora", "hydralora-own")
    )
    # a masked copy of x for each head: N times 4 bytes a number, for 4 x 14 tokens and two blocks
    widths = 2 * (64 + 64 + 192)
    assert own - shared > 0.9 * (3 - 1) * 4 * 4 * 14 * widths


def test_entropy_of_the_routing():
    suite = Synthetic(["mirror", "cap"])
    model = adapt("rlora", load_base("tiny"), suite, seed=0).eval()
    assert routing_entropy(model, suite) == pytest.approx([1, 1])
    for name, parameter in model.named_parameters():
        if "rlora_router" in name:
            torch.nn.init.normal_(parameter, std=30.0)
    assert max(routing_entropy(model, suite)) < 0.5


ONE = {"sweep_seeds": None, "seeds": [0]}


def test_sentences(bert_folder: Path, sentences_folder: Path, here: Path):
    text = {"base": str(bert_folder), "suite": "sentences", "tasks": ["time", "mood"]}
    blocks = {"a": text | {"rates": [0.001, 0.002], "extend": 0, "sweep_seeds": [10]}}
    plan = load_plan(plan_file(here, **blocks))
    assert work(plan, here / "records", QUIET)
    settings, records = read_records(here / "records" / "a.jsonl")
    (setting,) = settings.values()
    assert setting["tasks"] == ["time", "mood"] and setting["metrics"] == ["accuracy"]
    assert setting["data"] == "folder in RLORA_DATA" and len(setting["data_sha256"]) == 16
    tested = [r for r in records if r["stage"] == "test"]
    assert len(tested) == 4 and len(records) == 8
    assert all(0 <= v <= 1 for r in tested for v in r["test"]["accuracy"])
    assert all(r["other_parameters"] == 4 * 32 + 4 for r in tested)
    heads = load_plan(plan_file(here, a=text | {"methods": ["heads"], "rates": [0.1]} | ONE))["a"]
    record = do_run(Run(heads, "test", "heads", 0.1, 0))
    assert (record["adapter_parameters"], record["other_parameters"]) == (0, 4 * 32 + 4)
    assert record["entropy"] is None and record["similarity"] is None and record["loss"]
    text = (here / "records" / "a.jsonl").read_text()
    for path in (sentences_folder, here, Path.home()):
        assert str(path) not in text
    assert not list((here / "runs").rglob("checkpoint-*"))  # none is left


def test_a_grid_is_worked_off_in_pieces(here: Path, monkeypatch: pytest.MonkeyPatch):
    later = SMALL | {"rates": None, "rates_from": "a", "sweep_seeds": None}
    plan = load_plan(plan_file(here, a=SMALL, b=later))
    records = here / "records"
    done = []
    original = one_run.do_run

    def watched(run: Run, folder: Path | None = None) -> dict:
        assert folder is None
        done.append((run.block.name, run.stage, run.method, run.learning_rate, run.seed))
        if len(done) == stop_after:
            raise KeyboardInterrupt
        return original(run)

    monkeypatch.setattr(one_run, "do_run", watched)
    stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        work(plan, records, QUIET, workers=1)
    assert len(read_records(records / "a.jsonl")[1]) == 4
    stop_after = None
    assert work(plan, records, QUIET, only=["a"], methods=["lora"])
    assert all(key[:3:2] == ("a", "lora") for key in done[5:])
    before = (records / "a.jsonl").read_text()
    assert not work(plan, records, QUIET, minutes=0)  # no time for another run
    assert (records / "a.jsonl").read_text() == before
    assert work(plan, records, QUIET)
    assert (records / "a.jsonl").read_text().startswith(before)
    runs = done[:4] + done[5:]
    assert len(set(runs)) == len(runs)  # none was done twice
    # two methods: two rates of two seeds and two tests, and two tests at the same rates
    assert len(runs) == 2 * (2 * 2 + 2) + 2 * 2
    whole = len(done)
    assert work(plan, records, QUIET) and len(done) == whole

    result = load_evidence("b", say=False, plan=here / "plan.toml", records=records)
    assert result["complete"] and result["seeds"] == [0, 1]
    with pytest.raises(LabError, match="no block 'c' in the plan: it has a, b"):
        work(plan, records, QUIET, only=["c"])
    with pytest.raises(LabError, match="no method 'mlora' in the plan: it has lora, rlora"):
        work(plan, records, QUIET, methods=["mlora"])


def test_a_killed_command_goes_on(tmp_path: Path):
    """A process of its own: runs that ended are kept, and what was killed runs again."""
    plan_file(tmp_path, a=SMALL | {"steps": 30, "seeds": [0], "sweep_seeds": [10]})
    command = [sys.executable, "-m", "rlora_lab", "run", "evidence", "--plan", "plan.toml"]
    command += ["--records", "records", "--workers", "1"]
    options = {"cwd": tmp_path, "env": os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}}
    process = subprocess.Popen(command, **options, start_new_session=True)
    file = tmp_path / "records" / "a.jsonl"
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = file.read_text()
    assert 1 <= len(read_records(file)[1]) < 6
    done = subprocess.run(command, **options, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "All that was asked for is done." in done.stdout
    assert file.read_text().startswith(before)
    records = read_records(file)[1]
    assert len(records) == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.toml", "records"]
    # a worker's record is what this process gets
    first = next(r for r in records if r["stage"] == "sweep")
    block = load_plan(tmp_path / "plan.toml")["a"]
    again = do_run(Run(block, "sweep", first["method"], first["learning_rate"], first["seed"]))
    assert np.allclose(again["loss"], first["loss"], atol=2e-3)


def without_times(file: Path) -> list[dict]:
    """A file's records in the order of their names, without what differs from run to run."""
    records = [r | {"seconds": 0, "date": "", "setting": ""} for r in read_records(file)[1]]
    return sorted(records, key=lambda r: (r["stage"], r["method"], r["learning_rate"], r["seed"]))


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not here: the extra serve brings it")
def test_two_workers_on_ray_give_the_records_of_one(here: Path):
    plan = load_plan(plan_file(here, a=SMALL | {"methods": ["rlora"], "sweep_seeds": [10]}))
    assert work(plan, here / "alone", QUIET, workers=1)
    command = [sys.executable, "-m", "rlora_lab", "run", "evidence", "--plan", "plan.toml"]
    command += ["--records", "on-ray", "--ray", "local", "--workers", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=here, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    alone, on_ray = (here / folder / "a.jsonl" for folder in ("alone", "on-ray"))
    assert len(without_times(alone)) == 4 and without_times(on_ray) == without_times(alone)
    (one,), (two,) = (read_records(file)[0].values() for file in (alone, on_ray))
    assert two == one | {"workers": 2}


def test_ray_that_is_not_here(here: Path, monkeypatch: pytest.MonkeyPatch):
    plan = load_plan(plan_file(here, a=SMALL))
    monkeypatch.setattr(worker, "find_spec", lambda name: None)
    with pytest.raises(LabError, match=r'--ray needs the extra serve: pip install "rlora-min'):
        work(plan, here / "records", QUIET, ray="local")
    assert not (here / "records").exists()
