"""Chapter 14: draws, weights, looks and augmentations, and its record."""

import json
import math
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch
from chapter_code import chapter_code
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from rlora_lab.chapters import ch14_scarce_tasks as chapter
from rlora_lab.errors import LabError
from rlora_lab.models.bases import load_base
from rlora_lab.models.methods import adapt
from rlora_lab.report.results import load_result, paired_difference, score_array
from rlora_lab.runs import scarce
from rlora_lab.tasks.strings import LENGTH, SUITE_TASKS, Synthetic, draw

CHAPTER = "14_scarce_tasks"
NAME = "practice/scarce-tiny"


# Drawing

sizes = st.dictionaries(st.sampled_from(sorted(SUITE_TASKS)), st.integers(1, 5000), min_size=2)


@given(sizes=sizes, T=st.floats(1, 50))
def test_shares_are_between_as_they_come_and_all_alike(sizes: dict, T: float):
    p = chapter.shares(sizes, T)
    n = torch.tensor(list(sizes.values()), dtype=torch.double)
    assert p.sum().item() == pytest.approx(1)
    torch.testing.assert_close(chapter.shares(sizes, 1), n / n.sum())
    torch.testing.assert_close(chapter.shares(sizes, math.inf), torch.full_like(n, 1 / len(n)))
    order = n.argsort()
    assert (p[order].diff() >= -1e-12).all()  # a larger task never gets less
    assert p[n.argmin()] >= (n / n.sum()).min() - 1e-12  # the smallest never less than as it comes


def test_draws_come_at_their_shares_and_from_the_pools_alone():
    suite = chapter.Skewed(chapter.SIZES, 3.0, seed=1)
    ids, which = suite.sample(20000, torch.Generator().manual_seed(0))
    counted = torch.bincount(which, minlength=5) / len(which)
    assert (counted - suite.p).abs().max() < 0.012
    for k, (task, n) in enumerate(chapter.SIZES.items()):
        assert len(suite.pools[task]) == n
        pool = {tuple(row) for row in suite.pools[task].tolist()}
        assert {tuple(row) for row in ids[which == k].tolist()} <= pool
    skewed = chapter.Skewed(chapter.SIZES, 1.0, seed=1)
    _, which = skewed.sample(20000, torch.Generator().manual_seed(0))
    assert (torch.bincount(which, minlength=5) / len(which) - suite.p).abs().max() > 0.1


def test_training_examples_are_no_test_questions():
    suite = chapter.Skewed(chapter.SIZES, seed=0)
    held_out = {tuple(q) for s in ("test", "validation") for q in draw_all(s)}
    for pool in suite.pools.values():
        assert not {tuple(row[1 : 1 + LENGTH]) for row in pool.tolist()} & held_out


def draw_all(split: str) -> list:
    return draw(10**9, torch.Generator().manual_seed(0), split).tolist()


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
    ],
)
def test_what_can_not_be_drawn_is_said(sizes, T, message):
    with pytest.raises(ValueError, match=message):
        chapter.Skewed(sizes, T)


def test_an_unknown_task_is_named():
    with pytest.raises(LabError, match="unknown task 'juggle'"):
        chapter.Skewed({"juggle": 5})


# Training


@pytest.fixture(scope="module")
def trained():
    suite = chapter.Skewed({"largest": 50, "cap": 5}, math.inf)
    model = adapt("rlora", load_base("tiny"), suite, seed=0)
    start = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    return model, suite, start, chapter.train_skewed(model, suite, 24, 4e-3, batch=16, every=8)


def test_the_looks_are_copies_that_can_be_gone_back_to(trained):
    model, suite, start, looks = trained
    assert [step for step, _, _ in looks] == [8, 16, 24]
    end = get_peft_model_state_dict(model)
    moved = [max((a[k] - end[k]).abs().max().item() for k in end) for _, _, a in looks]
    assert moved[0] > 0 and moved[1] > 0 and moved[2] == 0
    assert any(not torch.equal(start[k], looks[0][2][k]) for k in start)
    set_peft_model_state_dict(model, looks[0][2])
    assert chapter.right(model, suite) == looks[0][1]
    set_peft_model_state_dict(model, looks[-1][2])


def test_the_losses_are_the_model_s_own_example_by_example(trained):
    model, suite, _, _ = trained
    ids, _ = suite.sample(16, torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :8] = -100
    with torch.no_grad():
        ours = chapter.losses(model.eval(), ids)
        theirs = model(input_ids=ids, labels=labels).loss
        each = torch.stack(
            [
                model(input_ids=i[None], labels=j[None]).loss
                for i, j in zip(ids, labels, strict=True)
            ]
        )
    torch.testing.assert_close(ours.mean(), theirs)
    torch.testing.assert_close(ours, each)


def test_a_weight_of_nought_takes_a_task_out(trained):
    suite = chapter.Skewed({"largest": 50, "cap": 5}, math.inf)
    alone = chapter.Skewed({"largest": 50, "cap": 5}, math.inf)
    alone.pools["cap"] = alone.pools["cap"].flip(1)  # nonsense that must not matter
    ends = []
    for one in (suite, alone):
        model = adapt("lora", load_base("tiny"), one, seed=0, lora_dropout=0.0)
        chapter.train_skewed(model, one, 3, 4e-3, batch=16, weights=torch.tensor([1.0, 0.0]))
        ends.append(get_peft_model_state_dict(model))
    assert all(torch.allclose(ends[0][k], ends[1][k], atol=1e-7) for k in ends[0])
    chapter.train_skewed(model, alone, 3, 4e-3, batch=16)
    assert not all(
        torch.allclose(ends[0][k], v) for k, v in get_peft_model_state_dict(model).items()
    )


def test_the_best_look_is_that_of_the_worst_task():
    looks = [(1, {"a": 0.9, "b": 0.2}, "x"), (2, {"a": 0.6, "b": 0.5}, "y")]
    looks.append((3, {"a": 1.0, "b": 0.4}, "z"))
    assert chapter.best_look(looks)[2] == "y"
    assert chapter.best_look(looks, by=sum)[2] == "z"
    assert chapter.best_look([looks[0]])[2] == "x"


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


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), task=st.sampled_from(sorted(SUITE_TASKS)))
def test_an_augmentation_changes_letters_alone(seed: int, task: str):
    generator = torch.Generator().manual_seed(seed)
    rows = Synthetic([task]).rows(task, draw(8, generator, "train"))
    before = rows.clone()
    for name in KEPT:
        changed = getattr(SHOWN, name)(rows, generator)
        assert torch.equal(rows, before)  # in a copy
        assert changed.shape == rows.shape
        assert torch.equal(changed[:, [0, 7]], rows[:, [0, 7]])  # tag and "="
        assert (changed[:, 1:7] < 8).all() and (changed[:, 8:] < 8).all()


def test_a_suite_augments_the_task_that_asks_for_it_alone():
    def mark(rows, generator):
        return rows * 0

    suite = chapter.Skewed({"largest": 5, "cap": 5}, math.inf, augment={"cap": mark})
    ids, which = suite.sample(100, torch.Generator().manual_seed(0))
    assert (ids[which == 1] == 0).all() and (ids[which == 0][:, 0] > 0).all()
    assert (suite.pools["cap"][:, 0] > 0).all()  # the pool stays


# The record


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list:
    """Runs without training; the list of those that were made."""
    made = []

    def run(method, T, lr, seed, steps, test):
        made.append((method, T, lr, seed, test))
        if len(made) == 15:
            raise KeyboardInterrupt
        good = 0.5 + 0.1 * (lr == (0.005 if method == "lora" else 0.003))
        record = {"seed": seed, "learning_rate": lr, "seconds": 0.0}
        record["looks"] = [[steps, dict.fromkeys(chapter.SIZES, good)]]
        if test:
            score = {task: {"letters": good, "exact": 0.1} for task in chapter.SIZES}
            record |= {"test": score, "stopped": steps, "test_stopped": score}
        return record

    def run_alone(stage, method, task, n, seed):
        made.append((stage, method, task, n, seed))
        return {"learning_rate": 5e-3, "letters": 0.5}

    monkeypatch.setattr(scarce, "run", run)
    monkeypatch.setattr(scarce, "run_alone", run_alone)
    return made


def test_the_record_goes_on_where_it_was_stopped(quick, tmp_path):
    out, said = tmp_path / "runs" / "scarce.json", []
    with pytest.raises(KeyboardInterrupt):
        scarce.record_scarce(out, 2, 10, said.append)
    half = json.loads(out.read_text())
    assert not half["complete"] and len(half["records"]) == len(said) == 14
    result = scarce.record_scarce(out, 2, 10, said.append)
    assert result["complete"] and json.loads(out.read_text()) == result
    assert len(quick) == len(set(quick)) + 1  # only the one in the middle ran again
    stages = [record["stage"] for record in result["records"]]
    counted = [stages.count(stage) for stage in ("sweep", "test", "augment", "start")]
    assert counted == [2 * 3 * 2, 2 * 3 * 2, 3 * 4, 2 * 3 * 4]
    assert result["command"] == "python -m rlora_lab.runs.scarce --seeds 2 --steps 10"
    assert {m: lr for m, lr in result["chosen"].items() if m.endswith("T=1")} == {
        "lora T=1": 0.005,
        "rlora T=1": 0.003,
    }
    with pytest.raises(LabError, match="another config"):
        scarce.record_scarce(out, 2, 11, said.append)
    assert json.loads(out.read_text()) == result


def test_a_file_of_something_else_is_refused_and_kept(tmp_path):
    out = tmp_path / "other.json"
    for text in ("not JSON", '{"records": []}', "[]"):
        out.write_text(text)
        with pytest.raises(LabError, match="no result of this command"):
            scarce.record_scarce(out, 2, 5)
        assert out.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["other.json"]


@pytest.mark.parametrize("wrong", ["--seeds=1", "--steps=2", "--steps=few"])
def test_numbers_that_make_no_run_are_refused(wrong, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scarce", wrong])
    with pytest.raises(SystemExit) as end:
        scarce.main()
    assert end.value.code == 2 and wrong.split("=")[0] in capsys.readouterr().err


def test_one_run_of_the_record_is_what_it_says():
    record = scarce.run("rlora", 3.0, 5e-3, seed=1, steps=10, test=True)
    assert [step for step, _ in record["looks"]] == [2, 4, 6, 8, 10]
    assert record["stopped"] in (2, 4, 6, 8, 10)
    assert set(record["test"]) == set(record["test_stopped"]) == set(chapter.SIZES)
    if record["stopped"] == 10:
        assert record["test"] == record["test_stopped"]
    json.dumps(record, allow_nan=False)


def test_the_recorded_runs_are_whole(capsys):
    result = load_result(NAME)
    said = capsys.readouterr().out
    assert all(result[key] in said for key in ("date", "machine", "command"))
    text = (files("rlora_lab") / "records" / f"{NAME}.json").read_text()
    assert not any(f'"{root}/' in text or f" {root}/" in text for root in ("", "/home", "/root"))
    assert result["complete"] and result["command"].startswith("python -m rlora_lab.scarce")
    assert result["config"]["sizes"] == chapter.SIZES
    assert not set(result["seeds"]) & set(result["config"]["sweep_seeds"])
    of_mixtures = [r for r in result["records"] if r["stage"] in ("sweep", "test")]
    numbers = {r["method"].split()[0]: r["adapter_parameters"] for r in of_mixtures}
    assert abs(numbers["lora"] / numbers["rlora"] - 1) < 0.02
    for method in result["methods"]:
        scores = score_array(result, method)
        assert scores.shape == (len(result["seeds"]), 5)
        assert ((0 <= scores) & (scores <= 1)).all()
        name = method.split()[0]
        swept = [r for r in result["records"] if r["stage"] == "sweep"]
        swept = [r for r in swept if r["method"].split()[0] == name]
        means = {}
        for record in swept:
            last = np.mean(list(record["looks"][-1][1].values()))
            means.setdefault(record["learning_rate"], []).append(last)
        best = max(means, key=lambda lr: np.mean(means[lr]))
        assert result["chosen"][method] == best
    assert len(paired_difference(result, "rlora T=3", "lora T=3")) == 3
    alone = [r for r in result["records"] if r["stage"] in ("augment", "start")]
    heads = [{k: r[k] for k in ("stage", "method", "task", "n", "seed")} for r in alone]
    assert heads == scarce.tasks_alone()
    assert all(0 <= r["letters"] <= 1 for r in alone)
