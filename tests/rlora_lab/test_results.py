"""Recorded results: how chapters read them, and the statistics said of them."""

import json
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlora_lab.errors import LabError
from rlora_lab.report.results import interval, load_result, paired_difference, score_array
from rlora_lab.report.tables import table
from rlora_lab.runs.record import write_result

RECORDED = sorted(
    file.name.removesuffix(".json")
    for file in (files("rlora_lab") / "records").iterdir()
    if file.name.endswith(".json")
)


def made_up(scores: dict[str, list[list[float]]]) -> dict:
    records = [
        {
            "method": method,
            "seed": seed,
            "learning_rate": lr,
            "test": {t: {"accuracy": v} for t, v in zip("ab", row, strict=True)} if lr else None,
        }
        for method, rows in scores.items()
        for seed, row in enumerate(rows)
        for lr in (0.0, 1e-3)
    ]
    return {
        "methods": list(scores),
        "seeds": list(range(len(next(iter(scores.values()))))),
        "tasks": ["a", "b"],
        "metrics": ["accuracy"],
        "chosen": dict.fromkeys(scores, 1e-3),
        "records": records[::-1],
    }


values = st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=2), min_size=4, max_size=4)


@given(a=values, b=values)
def test_paired_difference_is_the_paired_t_interval(a: list, b: list):
    result = made_up({"one": a, "two": b})
    assert np.array_equal(score_array(result, "two"), np.array(b))
    mean, low, high = paired_difference(result, "two", "one")
    differences = np.mean(b, 1) - np.mean(a, 1)
    assert mean == pytest.approx(differences.mean())
    if differences.std() > 1e-9:
        reference = stats.ttest_rel(np.mean(b, 1), np.mean(a, 1)).confidence_interval(0.95)
        assert (low, high) == (pytest.approx(reference.low), pytest.approx(reference.high))


def test_what_can_not_be_said():
    result = made_up({"one": [[0.5, 0.5]], "two": [[0.6, 0.6]]})
    with pytest.raises(LabError, match="at least two"):
        paired_difference(result, "two", "one")
    with pytest.raises(LabError, match="'three' here: there are one, two"):
        score_array(result, "three")
    with pytest.raises(LabError, match="at least two"):
        interval(np.array([1.0]))
    result["records"] = [r for r in result["records"] if r["method"] == "one" or r["seed"]]
    with pytest.raises(LabError, match="same seeds"):
        paired_difference(result, "two", "one")


def test_load_result_names_what_there_is():
    with pytest.raises(LabError, match=f"'nothing': there are {', '.join(RECORDED) or 'none'}"):
        load_result("nothing")


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_results_are_whole(name: str, capsys: pytest.CaptureFixture):
    result = load_result(name)
    said = capsys.readouterr().out
    for part in (f"{name}.json", result["date"], result["machine"], result["command"]):
        assert part in said
    load_result(name, say=False)
    assert not capsys.readouterr().out
    assert result["complete"]
    text = (files("rlora_lab") / "records" / f"{name}.json").read_text()
    assert result["command"].startswith("python -m rlora_lab")
    assert all(
        f'"{root}/' not in text and f" {root}/" not in text for root in ("", "/home", "/root")
    )


@pytest.mark.parametrize("name", [name for name in RECORDED if name.startswith("quality")])
def test_recorded_comparisons_have_every_score(name: str):
    result = load_result(name)
    assert result["command"].startswith("python -m rlora_lab quality --base ")
    for method in result["methods"]:
        scores = score_array(result, method)
        assert scores.shape == (len(result["seeds"]), len(result["tasks"]))
        assert ((0 <= scores) & (scores <= 1)).all()
    assert table(result).row_count > len(result["tasks"])


def test_a_result_is_written_whole_or_not_at_all(tmp_path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "deep" / "a.json"
    result = {"complete": True, "records": [{"seed": 0}, {"seed": 1}]}
    write_result(file, result)
    assert json.loads(file.read_text()) == result
    write_result(tmp_path / "empty.json", {"records": []})
    assert json.loads((tmp_path / "empty.json").read_text()) == {"records": []}
    monkeypatch.setattr("rlora_lab.runs.record.os.replace", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_result(file, {"records": []})
    assert json.loads(file.read_text()) == result
    assert [p.name for p in file.parent.iterdir()] == ["a.json"]
