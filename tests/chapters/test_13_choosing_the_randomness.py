"""Chapter 13: a search that loses nothing, and its record."""

import json
import os
import signal
import subprocess
import sys
import threading

import optuna
import pytest
import search_worker
from optuna.trial import TrialState
from peft import LoraConfig, get_peft_model
from search_worker import fake

from rlora_lab.chapters import ch13_choosing_the_randomness as chapter
from rlora_lab.models.bases import load_base
from rlora_lab.models.methods import count_trainable
from rlora_lab.report.loading import chosen_records, load_evidence, read_block, score_array
from rlora_lab.runs.plan import (
    RUNGS,
    LoraShape,
    Run,
    Settings,
    Study,
    best_trials,
    load_plan,
    make_block,
    missing,
)
from rlora_lab.runs.record import add_record
from rlora_lab.runs.worker import do_run, setting_of
from rlora_lab.tasks.strings import Synthetic
from rlora_min import RLoraConfig

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


def test_nor_is_any_of_plain_lora():
    seen = {}
    for seed in range(300):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        trial, other = study.ask(), study.ask()
        settings = chapter.suggest_lora(trial)
        seen.setdefault(settings["placement"], set()).add(settings["r"])
    assert settings.keys() == LoraShape.model_fields.keys() == trial.params.keys()
    chapter.suggest(other)
    for name in ("placement", "learning_rate", "dropout"):
        assert trial.distributions[name] == other.distributions[name]
    for placement, ranks in seen.items():
        assert chapter.lora_size(placement, max(ranks)) <= chapter.LARGEST
        assert chapter.lora_size(placement, max(ranks) + 1) > chapter.LARGEST
        assert min(ranks) == 1
    assert seen.keys() == chapter.PLACEMENTS.keys()
    alpha, gamma = trial.distributions["lora_alpha"], other.distributions["gamma"]
    assert alpha.log and alpha.high / alpha.low == gamma.high / gamma.low  # as wide in effect


@pytest.mark.parametrize("placement", chapter.PLACEMENTS)
def test_the_formula_counts_what_is_trained(placement: str):
    rlora = chapter.DEFAULTS | {"placement": placement, "num_heads": 2, "r": 3}
    lora = load_plan()["study-lora"].defaults.model_dump() | {"placement": placement, "r": 3}
    sizes = chapter.size(placement, 2, 3), chapter.lora_size(placement, 3)
    for settings, size in zip((rlora, lora), sizes, strict=True):
        model = get_peft_model(load_base("tiny").model, chapter.adapter(settings, 0))
        assert count_trainable(model) == (size, 0)


def test_the_defaults_are_those_of_the_module_and_the_suite():
    config, defaults = RLoraConfig(), chapter.DEFAULTS
    assert (config.r, config.num_heads, config.gamma) == tuple(
        defaults[name] for name in ("r", "num_heads", "gamma")
    )
    assert config.lora_dropout == defaults["dropout"]
    assert defaults["learning_rate"] == Synthetic.default_lr


def test_plain_lora_is_searched_as_rlora_was():
    plan = load_plan()
    rlora, lora = plan["study"], plan["study-lora"]
    changed = {name for name in Study.model_fields if getattr(rlora, name) != getattr(lora, name)}
    assert changed == {"name", "why", "defaults", "methods"}
    shared = {name: getattr(lora.defaults, name) for name in ("placement", "dropout")}
    assert shared == {name: chapter.DEFAULTS[name] for name in shared}
    assert lora.defaults.learning_rate == plan["synthetic"].chosen["lora"]
    assert lora.defaults.lora_alpha == Settings().lora_alpha
    assert lora.defaults.r == chapter.LARGEST // chapter.lora_size("mlp", 1)
    config = chapter.adapter(lora.defaults.model_dump(), 0)
    assert type(config) is LoraConfig and config.use_rslora  # scaled as R-LoRA is
    assert (config.r, config.lora_alpha, config.lora_dropout) == (9, 32, 0.1)


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
    drawn = [tuple(params.values()) for _, params, _ in outcome(after)]
    assert len(set(drawn)) == 14  # nothing twice


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
    """Trials and runs without training; the seeds of the runs that were made."""
    made = []

    def train_with(settings, seed, steps):
        made.append((settings["learning_rate"], seed))
        return load_base("tiny").model

    def objective(trial, seed, steps, every, suggest):
        return fake(trial, seed, suggest)

    monkeypatch.setattr(chapter, "objective", objective)
    monkeypatch.setattr(chapter, "train_with", train_with)
    return made


SEARCHES = {"study": chapter.suggest, "study-lora": chapter.suggest_lora}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_goes_on_from_its_records(name: str, quick):
    """As if it had been one: same draws, same values, same trials given up."""
    block, suggest = load_plan()[name], SEARCHES[name]
    storage = optuna.storages.InMemoryStorage()
    whole = outcome(chapter.search(storage, 20, lambda trial, seed: fake(trial, seed, suggest)))
    assert {state for state, _, _ in whole} == {"COMPLETE", "PRUNED"}
    records = []
    for seed, (state, params, value) in enumerate(whole):
        found = {"trials": json.loads(json.dumps(records))}
        run = Run(block, "search", "search", None, seed, given=found)
        record = do_run(run)
        assert record["state"].upper() == state
        assert record["value"] == (value if state == "COMPLETE" else None)
        assert params.items() <= record.items() and record["trial"] == record["seed"] == seed
        records.append(record)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_study_from_its_first_trial_to_its_last_run(name: str, quick, tmp_path):
    values = load_plan()[name].model_dump() | {"trials": 6, "steps": 4, "seeds": [1000, 1001]}
    plan = {name: make_block(name, values, "")}
    done = []
    while todo := missing(plan, plan[name], {name: done})[0]:
        done.append(do_run(todo[0]))
        add_record(tmp_path / f"{name}.jsonl", setting_of(plan[name], 1), done[-1])
        assert len(done) < 40
    stages = [record["stage"] for record in done]
    counted = [stages.count(stage) for stage in ("search", "test", "again")]
    rungs = len(plan[name].methods)
    assert counted == [6, 2 * rungs, name == "study"] and len(quick) == len(done) - 6
    result = read_block(plan, name, tmp_path)
    assert result["complete"] and score_array(result, "best").shape == (2, 10)
    best = best_trials(done)[0]
    assert result["chosen"]["best"] == best["learning_rate"]
    assert result["chosen"]["defaults"] == chapter.DEFAULTS["learning_rate"]


@pytest.mark.parametrize("name", SEARCHES)
def test_the_recorded_study_is_whole(name: str):
    result = load_evidence(name)
    assert result["complete"]
    assert result["config"]["defaults"] == load_plan()[name].defaults.model_dump()
    searched = [r for r in result["records"] if r["stage"] == "search"]
    assert [r["seed"] for r in searched] == list(range(result["config"]["trials"]))
    assert not {r["seed"] for r in searched} & set(result["seeds"])
    assert all(r["adapter_parameters"] <= chapter.LARGEST for r in searched)
    best = best_trials(searched)[0]
    block = load_plan()[name]
    ladder = block.rungs(best)
    assert result["methods"] == list(block.methods)
    for method in block.methods:
        settings = {str(r["settings"]) for r in chosen_records(result, method)}
        assert settings == {str(ladder[method])}
    if block.methods != RUNGS:
        return
    (again,) = (r for r in result["records"] if r["stage"] == "again")
    assert again["seed"] == best["seed"] and again["value"] == best["value"]  # it repeats


def test_both_searches_are_read_on_the_same_seeds():
    first, second = (load_evidence("study"), load_evidence("study-lora"))
    for name in ("seeds", "tasks", "metrics"):
        assert first[name] == second[name]
    assert first["config"]["defaults"] == chapter.DEFAULTS
