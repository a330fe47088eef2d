"""Chapter 14: draws, weights, looks and augmentations, and its record."""

import json
import math

import numpy as np
import pytest
import torch
from chapter_code import chapter_code
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from rlora_lab.chapters import ch14_scarce_tasks as chapter
from rlora_lab.errors import LabError
from rlora_lab.models.bases import load_base
from rlora_lab.models.methods import adapt
from rlora_lab.report.loading import chosen_records, load_evidence
from rlora_lab.runs import scarce
from rlora_lab.runs.one_run import do_run, setting_of
from rlora_lab.runs.plan import Run, load_plan, make_block, missing
from rlora_lab.tasks.strings import LENGTH, SUITE_TASKS, Synthetic, draw

CHAPTER = "14_scarce_tasks"


# Drawing


def test_draws_come_at_their_shares_and_from_the_pools_alone():
    suite = chapter.Skewed(chapter.SIZES, 3.0, seed=1)
    ids, which = suite.sample(20000, torch.Generator().manual_seed(0))
    counted = torch.bincount(which, minlength=5) / len(which)
    assert (counted - chapter.shares(chapter.SIZES, 3.0)).abs().max() < 0.012
    for k, (task, n) in enumerate(chapter.SIZES.items()):
        assert len(suite.pools[task]) == n
        pool = {tuple(row) for row in suite.pools[task].tolist()}
        assert {tuple(row) for row in ids[which == k].tolist()} <= pool


def test_training_examples_are_no_test_questions():
    splits = [draw(10**9, torch.Generator(), split).tolist() for split in ("test", "validation")]
    held_out = {tuple(question) for split in splits for question in split}
    for pool in chapter.Skewed(chapter.SIZES, seed=0).pools.values():
        assert not {tuple(row[1 : 1 + LENGTH]) for row in pool.tolist()} & held_out


def test_a_seed_gives_the_same_draws_to_both_methods():
    first, again, other = (chapter.Skewed(chapter.SIZES, 3.0, seed=s) for s in (1, 1, 2))
    ids = [s.sample(64, torch.Generator().manual_seed(3))[0] for s in (first, again, other)]
    assert torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])


@pytest.mark.parametrize(
    ("sizes", "T", "message"),
    [
        ({"largest": 0, "cap": 4}, 1.0, "without examples: largest"),
        ({"largest": 4, "cap": -1}, 1.0, "without examples: cap"),
        ({"largest": 4}, 0.0, "T must be above 0, got 0.0"),
        ({"largest": 4}, math.nan, "T must be above 0, got nan"),
        ({"juggle": 5}, 1.0, "unknown task 'juggle'"),
    ],
)
def test_what_can_not_be_drawn_is_said(sizes, T, message):
    with pytest.raises((ValueError, LabError), match=message):
        chapter.Skewed(sizes, T)


# Training


SMALL = {"largest": 50, "cap": 5}


@pytest.fixture(scope="module")
def trained():
    suite = chapter.Skewed(SMALL, math.inf)
    model = adapt("rlora", load_base("tiny"), suite, seed=0)
    return model, suite, chapter.train_skewed(model, suite, 24, 4e-3, batch=16, every=8)


def test_the_looks_are_copies_that_can_be_gone_back_to(trained):
    model, suite, looks = trained
    assert [step for step, _, _ in looks] == [8, 16, 24]
    for step, scores, adapter in reversed(looks):
        now = get_peft_model_state_dict(model)
        assert all(adapter[k].equal(now[k]) for k in now) == (step == 24)
        set_peft_model_state_dict(model, adapter)
        assert chapter.right(model, suite) == scores


def test_the_losses_are_the_model_s_own_example_by_example(trained):
    model, suite, _ = trained
    ids, _ = suite.sample(16, torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :8] = -100
    with torch.no_grad():
        ours = chapter.losses(model.eval(), ids)
        pairs = zip(ids[:, None], labels[:, None], strict=True)
        each = torch.stack([model(input_ids=i, labels=j).loss for i, j in pairs])
    torch.testing.assert_close(ours, each)


def test_a_weight_of_nought_takes_a_task_out():
    ends = []
    for weights, changed in (([1.0, 0.0], False), ([1.0, 0.0], True), ([1.0, 1.0], True)):
        suite = chapter.Skewed(SMALL, math.inf)
        if changed:
            suite.pools["cap"] = suite.pools["cap"].flip(1)  # nonsense that must not matter
        model = adapt("lora", load_base("tiny"), suite, seed=0, lora_dropout=0.0)
        chapter.train_skewed(model, suite, 3, 4e-3, batch=16, weights=torch.tensor(weights))
        state = get_peft_model_state_dict(model)
        ends.append(torch.cat([tensor.flatten() for tensor in state.values()]))
    without, nonsense, counted = ends
    torch.testing.assert_close(without, nonsense, atol=1e-7, rtol=0)
    assert (counted - without).abs().max() > 1e-5


def test_the_best_look_is_that_of_the_worst_task():
    looks = [(1, {"a": 0.9, "b": 0.2}, "x"), (2, {"a": 0.6, "b": 0.5}, "y")]
    looks.append((3, {"a": 1.0, "b": 0.4}, "z"))
    assert chapter.best_look(looks)[2] == "y"
    assert chapter.best_look(looks, by=sum)[2] == "z"


# Augmentation

SHOWN = chapter_code(CHAPTER)
# What each keeps: tasks that move letters, that rank them, that replace each on its own.
MOVE = {"rotate back", "rotate 2", "rotate 3", "repeat last", "first half twice"}
KEPT = {"rename": MOVE, "shuffle": {"largest", "sort down"}, "move": {"largest", "cap", "mirror"}}


@pytest.mark.parametrize("name", KEPT)
def test_an_augmentation_keeps_the_labels_of_its_tasks_and_of_no_other(name: str):
    augment = getattr(SHOWN, name)
    kept = {task for task in SUITE_TASKS if SHOWN.kept(task, augment, 2000) == 1}
    assert kept == KEPT[name]


@pytest.mark.parametrize("name", KEPT)
def test_an_augmentation_changes_letters_alone_and_each_row_in_its_own_way(name: str):
    augment, generator = getattr(SHOWN, name), torch.Generator().manual_seed(0)
    rows = [Synthetic([task]).rows(task, draw(20, generator, "train")) for task in SUITE_TASKS]
    rows = torch.cat(rows)
    before, changed = rows.clone(), augment(rows, generator)
    assert torch.equal(rows, before)  # in a copy
    assert torch.equal(changed[:, [0, 7]], rows[:, [0, 7]])  # tag and "="
    assert (changed[:, 1:7] < 8).all() and (changed[:, 8:] < 8).all()
    row = Synthetic(["mirror"]).rows("mirror", torch.arange(LENGTH)[None])
    assert len(augment(row.repeat(20, 1), generator).unique(dim=0)) > 10


def test_a_suite_augments_the_task_that_asks_for_it_alone():
    def mark(rows, generator):
        return rows * 0

    suite = chapter.Skewed({"largest": 5, "cap": 5}, math.inf, augment={"cap": mark})
    ids, which = suite.sample(100, torch.Generator().manual_seed(0))
    assert (ids[which == 1] == 0).all() and (ids[which == 0][:, 0] > 0).all()
    assert (suite.pools["cap"][:, 0] > 0).all()  # the pool stays


# The record


def test_one_run_of_the_record_is_what_it_says(monkeypatch: pytest.MonkeyPatch):
    block = make_block("scarce-3", load_plan()["scarce-3"].model_dump() | {"steps": 10}, "")
    record = do_run(Run(block, "test", "rlora", 5e-3, 1))
    assert [step for step, _ in record["looks"]] == [2, 4, 6, 8, 10]
    assert all(len(record["test"][m]) == len(chapter.SIZES) for m in ("letters", "exact"))
    assert setting_of(block, 1)["tasks"] == list(chapter.SIZES)
    swept = do_run(Run(block, "sweep", "lora", 5e-3, 100))
    assert swept["validation"] == swept["looks"][-1][1] and "test" not in swept
    json.dumps([record, swept], allow_nan=False)
    monkeypatch.setattr(chapter, "best_look", lambda looks: looks[0])
    record = do_run(Run(block, "test", "rlora", 5e-3, 1))
    assert record["stopped"] == 2 and record["test_stopped"] != record["test"]


def test_ways_to_learn_a_task_alone(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def alone(task, n, seed, augment=None, start=None, steps=120, lr=5e-3):
        asked.append((task, n, seed, augment, start, steps, lr))
        return load_base("tiny").model

    monkeypatch.setattr(scarce.chapter, "alone", alone)
    monkeypatch.setattr(scarce, "lender", lambda task: f"from {task}")
    plan = load_plan()
    for name in ("scarce-augment", "scarce-start-min"):
        for run in missing(plan, plan[name], {name: []})[0][:3]:
            assert len(do_run(run)["test"]["letters"]) == 1
    assert asked == [
        ("rotate 2", 20, 0, None, None, 120, 5e-3),
        ("rotate 2", 20, 0, chapter.rename, None, 120, 5e-3),
        ("rotate 2", 20, 0, chapter.shuffle, None, 120, 5e-3),
        ("running min", 20, 0, None, None, 120, 5e-3),
        ("running min", 20, 0, None, "from largest", 120, 5e-3),
        ("running min", 20, 0, None, "from rotate back", 120, 5e-3),
    ]
    assert scarce.LENDERS_SEED not in plan["scarce-start-min"].seeds


def test_the_recorded_runs_are_whole():
    plan = load_plan()
    middle = load_evidence("scarce-3")
    sweep = middle["sweeps"].items()
    means = {m: {rate: np.mean([*v.values()]) for rate, v in rates.items()} for m, rates in sweep}
    best = {m: max(rates, key=rates.get).learning_rate for m, rates in means.items()}
    assert middle["chosen"] == best
    for T in ("1", "3", "inf"):
        result = load_evidence(f"scarce-{T}")
        assert result["complete"] and result["config"]["sizes"] == chapter.SIZES
        assert result["chosen"] == middle["chosen"]
        assert not set(result["seeds"]) & set(plan["scarce-3"].sweep_seeds)
        numbers = [chosen_records(result, m)[0]["adapter_parameters"] for m in ("lora", "rlora")]
        assert abs(numbers[0] / numbers[1] - 1) < 0.02
        for r in result["records"]:
            if r["stage"] == "test":
                worst = {step: min(scores["letters"]) for step, scores in r["looks"]}
                assert worst[r["stopped"]] == max(worst.values())
