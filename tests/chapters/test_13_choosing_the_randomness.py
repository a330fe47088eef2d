"""Chapter 13: a search that loses nothing, and its record."""

import json
from functools import partial

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from peft import LoraConfig, get_peft_model

from rlora_lab.chapters import ch13_choosing_the_randomness as chapter
from rlora_lab.models.bases import load_base
from rlora_lab.models.methods import count_trainable
from rlora_lab.report.loading import chosen_records, load_evidence, read_block, score_array
from rlora_lab.runs.one_run import do_run, setting_of
from rlora_lab.runs.plan import (
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
from rlora_lab.tasks.strings import Synthetic
from rlora_min import RLoraConfig

optuna.logging.set_verbosity(optuna.logging.WARNING)


def fake(trial: optuna.Trial, seed: int, suggest=chapter.suggest) -> float:
    """A trial without training: as good as its rate is close to 0.005, and a little luck."""
    settings = suggest(trial)
    value = -abs(np.log(settings["learning_rate"] / 0.005))
    for step in (1, 2):
        trial.report(value, step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return value + 0.01 * np.random.default_rng(seed).standard_normal()


# The space


def asked(suggest) -> list[optuna.trial.FrozenTrial]:
    """Three hundred random trials."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: suggest(trial)["r"], n_trials=300)
    return study.trials


def test_trials_go_up_to_the_size_of_the_defaults_and_no_further():
    ranks, sizes = {}, {}
    for trial in asked(chapter.suggest):
        shape = trial.params["placement"], trial.params["num_heads"]
        ranks[shape], sizes[shape] = trial.distributions["r"], partial(chapter.size, *shape)
    assert len(ranks) == 3 * 4
    for trial in asked(chapter.suggest_lora):
        place = trial.params["placement"]
        ranks[place], sizes[place] = trial.distributions["r"], partial(chapter.lora_size, place)
    assert len(ranks) == 3 * 4 + 3
    for shape, r in ranks.items():
        assert r.low == 1 and sizes[shape](r.high) <= chapter.LARGEST
        assert sizes[shape](r.high + 1) > chapter.LARGEST or r.high == 10


def test_plain_lora_is_asked_for_the_same_range_and_as_wide_a_scale():
    rlora, lora = (asked(s)[0].distributions for s in (chapter.suggest, chapter.suggest_lora))
    assert lora.keys() == LoraShape.model_fields.keys()
    for name in ("placement", "learning_rate", "dropout"):
        assert lora[name] == rlora[name]
    alpha, gamma = lora["lora_alpha"], rlora["gamma"]
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
    shared = {name: getattr(config, name) for name in ("r", "num_heads", "gamma")}
    shared |= {"dropout": config.lora_dropout, "learning_rate": Synthetic.default_lr}
    assert defaults == {"placement": "mlp"} | shared


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


def test_a_search_that_died_in_a_trial_goes_on_as_if_nothing_had_happened():
    def dies(trial, seed):
        if seed == 9:
            chapter.suggest(trial)
            raise SystemExit
        return fake(trial, seed)

    storage, other = (optuna.storages.InMemoryStorage() for _ in range(2))
    with pytest.raises(SystemExit):
        chapter.search(storage, 14, dies, startup=6)
    after = chapter.search(storage, 14, fake, startup=6)
    assert [t.number for t in after.trials if t.state == TrialState.FAIL] == [9]
    whole = outcome(chapter.search(other, 14, fake, startup=6))
    assert outcome(after) == whole
    assert {state for state, _, _ in whole} == {"COMPLETE", "PRUNED"}
    assert len({str(params) for _, params, _ in whole}) == 14  # nothing twice


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
    result, block = load_evidence(name), load_plan()[name]
    assert result["complete"] and result["config"]["defaults"] == block.defaults.model_dump()
    searched = [r for r in result["records"] if r["stage"] == "search"]
    assert [r["seed"] for r in searched] == list(range(result["config"]["trials"]))
    assert not {r["seed"] for r in searched} & set(result["seeds"])
    assert all(r["adapter_parameters"] <= chapter.LARGEST for r in searched)
    ladder = block.rungs(best_trials(searched)[0])
    for method in block.methods:
        settings = {str(r["settings"]) for r in chosen_records(result, method)}
        assert settings == {str(ladder[method])}


def test_both_searches_are_read_on_the_same_tasks():
    first, second = (load_evidence(name) for name in SEARCHES)
    for name in ("seeds", "tasks", "metrics"):
        assert first[name] == second[name]
    assert first["config"]["defaults"] == chapter.DEFAULTS
