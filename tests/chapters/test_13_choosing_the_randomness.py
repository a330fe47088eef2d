"""Chapter 13: a search that loses nothing, and its record."""

import json
import os
import signal
import subprocess
import sys
import threading
from importlib.resources import files

import numpy as np
import optuna
import pytest
import search_worker
from chapter_code import chapter_code
from optuna.trial import TrialState
from peft import get_peft_model
from search_worker import fake

from rlora_lab.chapters import ch13_choosing_the_randomness as chapter
from rlora_lab.errors import LabError
from rlora_lab.models.bases import load_base
from rlora_lab.models.methods import count_trainable
from rlora_lab.report.results import load_result, paired_difference, score_array
from rlora_lab.runs import study
from rlora_min import RLoraConfig

CHAPTER = "13_choosing_the_randomness"
NAME = "practice/study-tiny"
optuna.logging.set_verbosity(optuna.logging.WARNING)


# The space


def test_no_trial_is_larger_than_the_defaults():
    seen = {}
    for seed in range(300):
        sampler = optuna.samplers.RandomSampler(seed=seed)
        trial = optuna.create_study(sampler=sampler).ask()
        settings = chapter.suggest(trial)
        seen.setdefault((settings["placement"], settings["num_heads"]), set()).add(settings["r"])
    assert len(seen) == 3 * 4
    for (placement, N), ranks in seen.items():
        assert chapter.size(placement, N, max(ranks)) <= chapter.LARGEST
        assert chapter.size(placement, N, max(ranks) + 1) > chapter.LARGEST or max(ranks) == 10
        assert min(ranks) == 1


@pytest.mark.parametrize("placement", chapter.PLACEMENTS)
def test_the_formula_counts_what_is_trained(placement: str):
    config = RLoraConfig(r=3, num_heads=2, target_modules=chapter.PLACEMENTS[placement])
    model = get_peft_model(load_base("tiny").model, config)
    assert count_trainable(model) == (chapter.size(placement, 2, 3), 0)


def test_the_defaults_are_those_of_the_module_and_the_suite():
    config, defaults = RLoraConfig(), chapter.DEFAULTS
    assert (config.r, config.num_heads, config.gamma) == tuple(
        defaults[name] for name in ("r", "num_heads", "gamma")
    )
    assert config.lora_dropout == defaults["dropout"]
    assert defaults["learning_rate"] == study.Synthetic.default_lr


def test_each_rung_changes_its_own_settings_alone():
    best = {"placement": "both", "num_heads": 2, "r": 3, "learning_rate": 0.01}
    best |= {"gamma": 16.0, "dropout": 0.3, "placebo": 0.5}
    ladder = list(study.rungs(best).values())
    changed = [
        {name for name in low if low[name] != high[name]}
        for low, high in zip(ladder, ladder[1:], strict=False)
    ]
    assert changed == [{"learning_rate"}, {"placement", "num_heads", "r"}, {"gamma", "dropout"}]
    assert ladder[0] == chapter.DEFAULTS
    assert ladder[-1] == {name: best[name] for name in chapter.DEFAULTS}


# The search


def outcome(found: optuna.Study) -> list:
    return [(t.state.name, t.params, t.value) for t in chapter.finished(found)]


def test_a_killed_worker_loses_no_finished_trial(tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    command = [sys.executable, search_worker.__file__, storage]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    limit = threading.Timer(60, worker.kill)
    limit.start()
    try:
        assert worker.stdout.readline() == "in the middle\n"
    finally:
        limit.cancel()
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait(timeout=30)
    before = optuna.load_study(study_name="rlora", storage=storage)
    assert [t.state for t in before.trials][-1] == TrialState.RUNNING
    kept = outcome(before)
    assert len(kept) == 9
    after = chapter.search(storage, 14, fake, startup=6)
    assert outcome(after)[:9] == kept
    assert [t.number for t in after.trials if t.state == TrialState.FAIL] == [9]
    whole = chapter.search(f"sqlite:///{tmp_path / 'whole.db'}", 14, fake, startup=6)
    assert outcome(after) == outcome(whole)  # as if nothing had happened
    assert {t.state for t in chapter.finished(whole)} == {TrialState.COMPLETE, TrialState.PRUNED}


def stopped(storage, after: int):
    def stop(trial, seed):
        if seed == after:
            raise KeyboardInterrupt
        return fake(trial, seed)

    with pytest.raises(KeyboardInterrupt):
        chapter.search(storage, 9, stop, startup=9)
    return chapter.search(storage, 9, fake, startup=9)


def test_stopped_by_hand_it_draws_nothing_twice(monkeypatch: pytest.MonkeyPatch):
    rates = [
        p["learning_rate"] for _, p, _ in outcome(stopped(optuna.storages.InMemoryStorage(), 4))
    ]
    assert len(set(rates)) == 9
    once = optuna.samplers.TPESampler
    monkeypatch.setattr(optuna.samplers, "TPESampler", lambda seed=None, **k: once(seed=0, **k))
    rates = [
        p["learning_rate"] for _, p, _ in outcome(stopped(optuna.storages.InMemoryStorage(), 4))
    ]
    assert len(set(rates)) < 9  # what the seed for each trial is for


def test_asked_for_what_is_done_it_runs_nothing():
    storage = optuna.storages.InMemoryStorage()
    first = outcome(chapter.search(storage, 5, fake))
    assert outcome(chapter.search(storage, 5, lambda *a: 1 / 0)) == first
    with pytest.raises(ZeroDivisionError):
        chapter.search(storage, 6, lambda *a: 1 / 0)
    assert outcome(chapter.search(storage, 5, fake)) == first


def test_a_trial_that_lies_behind_is_stopped_at_a_look(monkeypatch: pytest.MonkeyPatch):
    steps_run = []

    def train_with(settings, seed, steps, look):
        for step in range(1, steps + 1):
            steps_run.append(step)
            look(seed, step)
        return seed

    monkeypatch.setattr(chapter, "train_with", train_with)
    monkeypatch.setattr(chapter, "letters", lambda seed: 0.1 if seed == 5 else 0.5 + seed / 100)
    found = chapter.search(
        optuna.storages.InMemoryStorage(), 6, lambda t, s: chapter.objective(t, s, 9, 3), startup=10
    )
    *ran, behind = found.trials
    assert [t.state for t in ran] == [TrialState.COMPLETE] * 5
    assert [t.value for t in ran] == [0.5, 0.51, 0.52, 0.53, 0.54]
    assert behind.state == TrialState.PRUNED and list(behind.intermediate_values) == [3]
    assert all(list(t.intermediate_values) == [3, 6] for t in ran)
    assert len(steps_run) == 5 * 9 + 3


# The record


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list:
    """Runs without training; the list of those that were made."""
    made = []

    def run_record(stage, name, settings, seed, steps):
        made.append((name, seed))
        if len(made) == 6:
            raise KeyboardInterrupt
        scores = {task: {"letters": 0.5, "exact": 0.1} for task in study.Synthetic().tasks}
        return {
            "stage": stage,
            "method": name,
            "seed": seed,
            "learning_rate": settings["learning_rate"],
            "value": 0.5,
            "test": scores,
        }

    monkeypatch.setattr(study, "run_record", run_record)
    monkeypatch.setattr(study, "objective", lambda trial, seed, *steps: fake(trial, seed))
    return made


def test_the_record_goes_on_where_it_was_stopped(quick, tmp_path):
    out = tmp_path / "runs" / "study.json"
    said = []
    with pytest.raises(KeyboardInterrupt):
        study.record_study(out, 20, 12, 3, said.append)
    half = json.loads(out.read_text())
    assert not half["complete"] and len(said) == 5
    result = study.record_study(out, 20, 12, 3, said.append)
    assert result["complete"] and json.loads(out.read_text()) == result
    assert len(quick) == len(set(quick)) + 1  # only the one in the middle ran again
    stages = [record["stage"] for record in result["records"]]
    counted = [stages.count(s) for s in ("search", "retest", "again", "runner-up")]
    assert counted == [20, 12, 1, 4]
    assert result["command"] == "python -m rlora_lab.runs.study --trials 20 --steps 12 --seeds 3"
    assert score_array(result, "best").shape == (3, 10)
    with pytest.raises(LabError, match="another config"):
        study.record_study(out, 21, 12, 3, said.append)
    assert json.loads(out.read_text()) == result


def test_a_file_of_something_else_is_refused_and_kept(tmp_path):
    out = tmp_path / "other.json"
    for text in ("not JSON", '{"records": []}', "[]"):
        out.write_text(text)
        with pytest.raises(LabError, match="no result of this command"):
            study.record_study(out, 5, 6, 2)
        assert out.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["other.json"]


@pytest.mark.parametrize("wrong", ["--trials=2", "--steps=1", "--seeds=1", "--seeds=many"])
def test_numbers_that_make_no_study_are_refused(wrong, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study", wrong])
    with pytest.raises(SystemExit) as end:
        study.main()
    assert end.value.code == 2 and wrong.split("=")[0] in capsys.readouterr().err


def test_the_recorded_study_is_whole(capsys):
    result = load_result(NAME)
    said = capsys.readouterr().out
    assert all(result[key] in said for key in ("date", "machine", "command"))
    text = (files("rlora_lab") / "records" / f"{NAME}.json").read_text()
    assert not any(f'"{root}/' in text or f" {root}/" in text for root in ("", "/home", "/root"))
    assert result["complete"] and result["command"].startswith("python -m rlora_lab.study")
    assert result["config"]["defaults"] == chapter.DEFAULTS
    searched = [r for r in result["records"] if r["stage"] == "search"]
    assert [r["seed"] for r in searched] == list(range(result["config"]["trials"]))
    assert not {r["seed"] for r in searched} & set(result["seeds"])
    assert all(r["adapter_parameters"] <= chapter.LARGEST for r in searched)
    values = {r["trial"]: r["value"] for r in searched if r["state"] == "complete"}
    assert result["best"] == {"trial": max(values, key=values.get), "value": max(values.values())}
    best = next(r for r in searched if r["trial"] == result["best"]["trial"])
    assert result["settings"] == study.rungs(best)
    assert result["methods"] == list(study.rungs(best))
    for method in result["methods"]:
        scores = score_array(result, method)
        assert scores.shape == (len(result["seeds"]), 10)
        assert ((0 <= scores) & (scores <= 1)).all()
    assert len(paired_difference(result, "best", "defaults")) == 3
    (again,) = (r for r in result["records"] if r["stage"] == "again")
    assert again["seed"] == best["seed"] and again["value"] == best["value"]  # it repeats


# What the chapter builds by hand


@pytest.fixture(scope="module")
def by_hand():
    return chapter_code(CHAPTER)


def test_the_bumps_sum_to_a_density(by_hand):
    x = np.linspace(0, 1, 4001)
    for points in (np.array([]), np.array([0.3]), np.array([0.1, 0.11, 0.9])):
        assert np.trapezoid(by_hand.density(x, points), x) == pytest.approx(1, abs=1e-3)


def test_what_is_drawn_has_the_density(by_hand):
    points, rng = np.array([0.1, 0.11, 0.9]), np.random.default_rng(0)
    drawn = by_hand.draw(points, (20000,), rng)
    counts, edges = np.histogram(drawn, 10, (0, 1), density=True)
    fine = (edges[:-1, None] + np.linspace(0.005, 0.095, 10)).clip(0, 1)
    np.testing.assert_allclose(counts, by_hand.density(fine, points).mean(1), atol=0.12)
    assert 0 <= drawn.min() and drawn.max() <= 1


def test_the_next_trial_goes_where_the_good_ones_are(by_hand):
    good, bad = np.array([0.7, 0.75]), np.linspace(0, 0.6, 10)
    picks = by_hand.next_trials(good, bad, np.random.default_rng(0), 200)
    assert 0.6 < picks.min() and picks.max() <= 1
    one = by_hand.next_trials(good, bad, np.random.default_rng(0), 200, candidates=1)
    assert one.min() < 0.6  # a single candidate is a draw from l, and l is broad
