"""Evidence: its statistics against SciPy, on stored records too, and the tables and pictures."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest
from chapter_code import BOOK
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lab_helpers import SETTING, plan_file, swept
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from scipy import stats

from rlora_lab.errors import LabError
from rlora_lab.report import write
from rlora_lab.report.loading import (
    chosen_records,
    load_evidence,
    load_result,
    provenance,
    score_array,
)
from rlora_lab.report.overview import overview
from rlora_lab.report.pictures import forest, overview_plot, related_plot
from rlora_lab.report.published import (
    PAIR,
    PUBLISHED,
    deviation,
    leads,
    leads_by_place,
    leads_plot,
    published,
    scatter,
    scatter_table,
    shown_table,
)
from rlora_lab.report.questions import (
    IDEAS,
    SIMPLEST_FIRST,
    Contrast,
    advise,
    correlation,
    detectable,
    differences,
    family,
    holm,
    ideas,
    interval,
    relatedness,
    rlora_less,
    similarity_points,
)
from rlora_lab.report.tables import (
    BY_ALGEBRA,
    advice_table,
    contrast_table,
    correlation_table,
    label,
    rates_table,
    scores_table,
    shown,
    tasks_table,
    text,
)
from rlora_lab.report.write import write_report
from rlora_lab.runs.choice import Choice
from rlora_lab.runs.plan import RECORDS, load_plan, missing, read_all
from rlora_lab.runs.record import add_record, read_records, write_result

sys.path.insert(0, str(BOOK))

import execute  # noqa: E402

matplotlib.use("Agg")
PLANNED = load_plan()
RECORDED = read_all(PLANNED, RECORDS)[0]
# Others are not begun, or in progress.
STORED = [name for name, block in PLANNED.items() if missing(PLANNED, block, RECORDED) == ([], 0)]
METHODS = ["rlora", "lora", "mlora", "hydralora"]
OTHER_SIZE = ("lora-rank", "lora-rank+init", "none")  # than R-LoRA's


def make_up(folder: Path, seeds: int = 6, **blocks: dict[str, float]) -> Path:
    """Records of blocks whose methods differ by what is said, and their plan."""
    tasks = {"letters": ["rotate 2", "mirror"]}
    everything = dict.fromkeys(METHODS, 0.0)
    plan = plan_file(
        folder,
        **{
            name: {
                "tasks": tasks["letters"],
                "methods": list(everything | gains),
                "seeds": list(range(seeds)),
            }
            for name, gains in blocks.items()
        },
    )
    generator = np.random.default_rng(0)
    for name, gains in blocks.items():
        luck = generator.normal(0.5, 0.1, (seeds, 2))  # of a seed, for all methods
        for method, gain in (everything | gains).items():
            records = swept(method, {0.001: 0.3, 0.002: 0.5, 0.004: 0.3})
            for seed in range(seeds):
                own = (luck[seed] + gain + generator.normal(0, 0.01, 2)).round(5).tolist()
                heads = method != "lora"
                records.append(
                    {
                        "stage": "test",
                        "method": method,
                        "learning_rate": 0.002,
                        "seed": seed,
                        "test": {"letters": own, "exact": [v / 2 for v in own]},
                        "adapter_parameters": 100 + len(method),
                        "other_parameters": 0,
                        "kept_bytes": 2**20,
                        "seconds": 1.5,
                        "similarity": {"heads": own[0] / 2, "change": own[1]} if heads else None,
                        "entropy": [0.9, 0.8] if method in ("rlora", "hydralora") else None,
                    }
                )
            for record in records:
                setting = SETTING | {"block": name, "tasks": tasks["letters"]}
                add_record(folder / f"{name}.jsonl", setting, {"date": "2026-01-01"} | record)
    return plan


def evidence(folder: Path, plan: Path, name: str = "a") -> dict:
    return load_evidence(name, say=False, plan=plan, records=folder)


def check_contrast(c: Contrast, scores: np.ndarray, others: np.ndarray) -> float:
    """A paired difference of scores, one a seed, against SciPy; gives SciPy's p."""
    reference = stats.ttest_rel(scores, others)
    low, high = reference.confidence_interval(0.95)
    assert c.mean == pytest.approx((scores - others).mean())
    assert (c.low, c.high) == (pytest.approx(low), pytest.approx(high))
    assert c.p == pytest.approx(reference.pvalue)
    return reference.pvalue


def check_against_scipy(result: dict) -> None:
    """All that is said of a block's paired differences, against SciPy on its raw scores."""
    for metric in result["metrics"]:
        scores = {m: 100 * score_array(result, m, metric).mean(1) for m in result["methods"]}
        contrasts = rlora_less(result, metric)
        assert [c.name for c in contrasts] == [m for m in result["methods"] if m != "rlora"]
        p = []
        for c in contrasts:
            if np.ptp(c.values) == 0:
                p.append(float(not c.values.any()))
                continue
            p.append(check_contrast(c, scores["rlora"], scores[c.name]))
        order = np.argsort(p)
        so_far = 0.0
        for rank, i in enumerate(order):
            so_far = max(so_far, min(1.0, p[i] * (len(p) - rank)))
            assert contrasts[i].holm == pytest.approx(so_far)
            assert (contrasts[i].verdict == "cannot tell") == (so_far >= 0.05)


def test_made_up_records_against_scipy(tmp_path: Path):
    plan = make_up(tmp_path, a={"lora": 0.001, "mlora": -0.2, "hydralora": 0.2})
    result = evidence(tmp_path, plan)
    check_against_scipy(result)
    verdicts = {c.name: c.verdict for c in rlora_less(result)}
    assert verdicts == {"lora": "cannot tell", "mlora": "better", "hydralora": "worse"}


@pytest.mark.parametrize("block", STORED)
def test_stored_records_are_what_their_plan_says(block: str, capsys: pytest.CaptureFixture):
    result = load_evidence(block)
    said = capsys.readouterr().out
    for part in (f"{block}.jsonl", result["date"], result["machine"], result["command"]):
        assert part in said
    asked = PLANNED[block]
    assert result["complete"] and result["methods"] == list(asked.methods)
    for method in result["methods"]:
        scores = score_array(result, method)
        assert scores.shape == (len(asked.seeds_of(method)), len(result["tasks"]))
        assert ((0 <= scores) & (scores <= 1)).all()
        sizes = {r.get("adapter_parameters") for r in chosen_records(result, method)}
        assert len(sizes) == 1
        off = 0.03
        if block.startswith("chapter-07"):  # M-LoRA had one rank for all modules
            off = 0.1
        if asked.suite == "language" and method in ("mlora", "oracle"):  # a rank is a large step
            off = 0.12
        if method not in OTHER_SIZE and result["rlora_parameters"]:
            assert abs(sizes.pop() / result["rlora_parameters"] - 1) < off
    for record in result["records"]:
        if record["stage"] in ("sweep", "test"):
            assert (record["test"] is None) == (record["stage"] == "sweep")
            assert (record["validation"] is None) == (record["stage"] == "test")
    text = (RECORDS / f"{block}.jsonl").read_text()
    assert all(f'"{root}/' not in text and f" {root}/" not in text for root in ("", "/home"))


# Of these each row's result is kept, and test_rows.py has their intervals.
WITH_ROWS = [name for name, block in PLANNED.items() if block.suite == "language"]
COMPARED = [name for name in STORED if PLANNED[name].kind == "compare" and name not in WITH_ROWS]


@pytest.mark.parametrize("block", WITH_ROWS)
def test_stored_rows_make_the_scores(block: str):
    for record in RECORDED[block]:
        scores = record["test" if record["stage"] == "test" else "validation"]
        for metric, by_task in record["rows"].items():
            for share, rows in zip(scores[metric], by_task, strict=True):
                assert (share is None) == (rows is None)
                assert share is None or share == round(rows.count("1") / len(rows), 5)


@pytest.mark.parametrize("block", [name for name in COMPARED if name != "chapter-07-text"])
def test_stored_records_against_scipy(block: str):
    """The intervals of the recorded results."""
    result = load_evidence(block, say=False)
    if "rlora" in result["methods"]:
        check_against_scipy(result)
        for sigma, low, high in scatter(result).values():
            assert 0 < low < sigma < high
    for c, (_, method, against) in zip(
        ideas(result),
        [idea for idea in IDEAS if {*idea[1:]} <= {*result["methods"]}],
        strict=True,
    ):
        check_contrast(c, *(100 * score_array(result, m).mean(1) for m in (method, against)))


def test_stored_records_are_small():
    assert sum(path.stat().st_size for path in RECORDS.iterdir()) < 2 * 2**20


probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@settings(max_examples=30)  # statsmodels collects garbage at each call
@given(probabilities)
def test_holm(p: list[float]):
    corrected = holm(p)
    assert (corrected >= np.array(p) - 1e-15).all() and (corrected <= 1).all()
    assert corrected.min() == pytest.approx(min(1, min(p) * len(p)))
    order = np.argsort(p)
    assert (np.diff(corrected[order]) >= 0).all()


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.04, 0.9, 0.01]) == pytest.approx([0.08, 0.9, 0.03])


@pytest.mark.parametrize("n", [2, 5, 20])
def test_detectable_is_found_in_four_of_five(n: int):
    generator = np.random.default_rng(n)
    for level in (0.05, 0.05 / 7):
        size = detectable(3.0, n, level=level)
        drawn = generator.normal(size, 3.0, (20000, n))
        found = (stats.ttest_1samp(drawn, 0, axis=1).pvalue < level).mean()
        assert found == pytest.approx(0.8, abs=0.01)
        assert detectable(6.0, n, level=level) == pytest.approx(2 * size)


def test_what_could_have_been_seen_is_at_the_level_of_the_verdicts():
    generator = np.random.default_rng(0)
    contrasts = family({str(i): generator.normal(0, 3.0, 12) for i in range(7)})
    for c in contrasts:  # Holm multiplies the smallest p by the number of questions
        spread = np.std(c.values, ddof=1)
        assert c.detectable == pytest.approx(detectable(spread, 12, level=0.05 / 7))


def test_equal_differences_need_no_test():
    none, some = family({"none": np.zeros(3), "some": np.full(3, 2.0)})
    assert (none.p, none.verdict) == (1, "cannot tell") and (some.p, some.verdict) == (0, "better")
    with pytest.raises(LabError, match="at least two"):
        family({"one": np.array([1.0])})


values = st.lists(st.floats(-1, 1), min_size=5, max_size=20)


@given(values, values)
def test_correlation_is_scipys(x: list[float], y: list[float]):
    n = min(len(x), len(y))
    x, y = np.array(x[:n]), np.array(y[:n])
    assume(np.std(x) > 1e-3 and np.std(y) > 1e-3)
    reference = stats.pearsonr(x, y)
    assume(abs(reference.statistic) < 0.999)
    low, high = reference.confidence_interval(0.95)
    assert correlation(x, y) == pytest.approx((reference.statistic, low, high), abs=1e-7)


def test_correlation_within_groups():
    """Between the groups x and y rise together, and within each they fall."""
    x = np.array([1, 2, 3, 11, 12, 13.0])
    y = np.array([3, 2, 1.2, 13, 12, 11.0])
    groups = ["a"] * 3 + ["b"] * 3
    assert correlation(x, y)[0] > 0.9 and correlation(x, y, groups)[0] < -0.9
    r, low, high = correlation(x, y, groups)
    assert (low, high) == pytest.approx(
        np.tanh(np.arctanh(r) + np.array([-1, 1]) * 1.959964 / 2**0.5)
    )
    with pytest.raises(LabError, match="at least four"):
        correlation(x[:3], y[:3])
    for flat in ((x, np.ones(6)), (np.full(6, 0.1), y)):
        with pytest.raises(LabError, match="that differ"):
            correlation(*flat)


def test_evidence_as_a_result(tmp_path: Path, capsys: pytest.CaptureFixture):
    plan = make_up(tmp_path, a={})
    result = load_evidence("a", plan=plan, records=tmp_path)
    said = capsys.readouterr().out
    assert said.strip() == provenance(result)
    for part in ("a.jsonl: 2026-01-01, a machine, torch 2", "--only a\n", "0 to 5", "10, 11"):
        assert part in said
    assert result["complete"] and result["seeds"] == [0, 1, 2, 3, 4, 5]
    assert result["chosen"] == dict.fromkeys(METHODS, 0.002) and not result["at_end"]
    swept_at = result["sweeps"]["rlora"][Choice(0.002)]
    assert swept_at == {10: pytest.approx(0.505), 11: pytest.approx(0.49)}
    first = next(r for r in read_records(tmp_path / "a.jsonl")[1] if r["stage"] == "test")
    assert score_array(result, "rlora")[0].tolist() == first["test"]["letters"]
    assert score_array(result, "rlora", "exact")[0].tolist() == first["test"]["exact"]
    own = differences(result, "lora", "rlora", tasks=["mirror"])
    both = score_array(result, "lora") - score_array(result, "rlora")
    assert own == pytest.approx(100 * both[:, 1])
    assert len(similarity_points(result)) == 3 * 6
    assert {c.name for c in ideas(result)} == {
        f"{idea}: {a} less {b}" for idea, a, b in IDEAS if {a, b} <= set(METHODS)
    }


def test_evidence_of_a_part(tmp_path: Path):
    plan = make_up(tmp_path, a={})
    file = tmp_path / "a.jsonl"
    lines = file.read_text().splitlines()
    late = [line for line in lines if '"stage":"test"' in line and '"method":"lora"' in line]
    file.write_text("\n".join(line for line in lines if line not in late[2:]) + "\n")
    result = evidence(tmp_path, plan)
    assert result["seeds"] == [0, 1] and not result["complete"]
    assert "not all of the plan yet" in provenance(result)
    assert score_array(result, "rlora").shape == (2, 2)
    file.write_text("\n".join(line for line in lines if line not in late) + "\n")
    assert evidence(tmp_path, plan)["methods"] == ["rlora", "mlora", "hydralora"]
    with pytest.raises(LabError, match="no block 'b' in the plan: it has a"):
        evidence(tmp_path, plan, "b")
    file.unlink()
    with pytest.raises(LabError, match="nothing has been scored"):
        evidence(tmp_path, plan)


def test_a_rate_is_not_chosen_anew(tmp_path: Path):
    plan = make_up(tmp_path, a={})
    record = {"stage": "test", "method": "lora", "learning_rate": 0.004, "seed": 9}
    setting = SETTING | {"block": "a", "tasks": ["rotate 2", "mirror"]}
    add_record(tmp_path / "a.jsonl", setting, {"date": "2026-01-01", "test": None} | record)
    with pytest.raises(LabError, match="lora was scored on test data at 0.004, .* chooses 0.002"):
        evidence(tmp_path, plan)


@pytest.mark.parametrize("rates", [[0.001, 0.002, 0.004], [0.002, 0.004], [0.001, 0.002]])
def test_a_rate_at_an_end_of_its_sweep_is_told(rates: list[float], tmp_path: Path):
    plan = make_up(tmp_path, a={})
    those = "rates = [0.001, 0.002, 0.004]"
    plan.write_text(plan.read_text().replace(those, f"extend = 0\nrates = {rates}"))
    file = tmp_path / "a.jsonl"
    lines = file.read_text().splitlines()
    others = [f'"learning_rate":{rate},' for rate in {0.001, 0.004} - {*rates}]
    kept = [line for line in lines if not any(other in line for other in others)]
    file.write_text("\n".join(kept) + "\n")
    result = evidence(tmp_path, plan)
    assert result["chosen"]["lora"] == 0.002
    assert result["at_end"] == ([] if len(rates) == 3 else METHODS)


def test_scores_come_by_seed_wherever_their_records_stand(tmp_path: Path):
    result = evidence(tmp_path, make_up(tmp_path, a={}))
    scores = score_array(result, "rlora")
    result["records"] = result["records"][::-1]
    assert np.array_equal(score_array(result, "rlora"), scores)


def test_gains_on_related_and_different_tasks(tmp_path: Path):
    plan = make_up(tmp_path, far={"rlora": 0.2}, near={"rlora": 0.05})
    far, near = (evidence(tmp_path, plan, name) for name in ("far", "near"))
    found = relatedness({"2 tasks": (far, near)})
    assert set(found) == {"different", "related", "interaction"}
    by_name = {kind: {c.name: c for c in family} for kind, family in found.items()}
    assert set(by_name["related"]) == {f"2 tasks: {m}" for m in METHODS if m != "lora"}
    gains = [c["2 tasks: rlora"].mean for c in by_name.values()]
    assert gains == pytest.approx([20, 5, 15], abs=1.5)
    assert by_name["interaction"]["2 tasks: rlora"].verdict == "better"
    assert by_name["interaction"]["2 tasks: mlora"].verdict == "cannot tell"
    near["seeds"] = near["seeds"][2:]  # only seeds that both have
    fewer = relatedness({"2 tasks": (far, near)}, tasks=["mirror"])["interaction"][0]
    far_gain, near_gain = (
        differences(result, "rlora", "lora", tasks=["mirror"]) for result in (far, near)
    )
    assert len(near_gain) == 4 and fewer.values == pytest.approx(far_gain[2:] - near_gain)


def test_the_first_picture_has_the_comparisons_that_are_run(tmp_path: Path):
    plan = make_up(tmp_path, **{"sentences": {"rlora": 0.2}, "sentences-related": {}})
    lines, waiting = overview(plan, tmp_path)
    assert [line.block for line in lines] == ["sentences", "sentences-related"] and not waiting
    assert [line.verdict for line in lines] == ["better", "cannot tell"]
    for line in lines:
        gains = differences(evidence(tmp_path, plan, line.block), "rlora", "lora")
        assert (line.mean, line.low, line.high) == pytest.approx(interval(gains))
    file = tmp_path / "sentences-related.jsonl"
    rows = file.read_text().splitlines()
    last = [row for row in rows if '"stage":"test"' in row and '"method":"lora"' in row][-1]
    file.write_text("\n".join(row for row in rows if row != last) + "\n")
    lines, waiting = overview(plan, tmp_path)
    assert [line.block for line in lines] == ["sentences"]
    assert waiting == ["MiniLM, 3 real tasks of sentiment"]


def intervals_of(figure: Figure) -> list[list]:
    """Of each interval in a picture from, to, its point, and whether that is hollow."""
    bars = [c for c in figure.axes[0].containers if isinstance(c, ErrorbarContainer)]
    return [
        [
            *bar.get_segments()[0][:, 0],
            *point.get_xdata(),
            point.get_markerfacecolor() == "white",
        ]
        for point, _, (bar,) in (c.lines for c in bars)
    ]


def test_pictures_have_the_intervals_and_are_hollow_where_nothing_can_be_told(tmp_path: Path):
    gains = {"rlora": 0.2, "mlora": 0.1}
    plan = make_up(tmp_path, **{"sentences": gains, "sentences-related": {}})
    lines, _ = overview(plan, tmp_path)
    pair = [evidence(tmp_path, plan, line.block) for line in lines]
    contrasts = [c for result in pair for c in rlora_less(result)]
    assert {c.verdict for c in contrasts} == {"better", "cannot tell"}
    related = relatedness({"text": tuple(pair)})
    for figure, told, hollow in (
        (overview_plot(lines), lines, "cannot tell"),
        (forest(contrasts), contrasts, "cannot tell"),
        (related_plot(related), [*related["different"], *related["related"]], None),
    ):
        expected = [[c.low, c.high, c.mean, c.verdict == hollow] for c in told]
        assert intervals_of(figure) == [pytest.approx(row) for row in expected]
        matplotlib.pyplot.close(figure)


drawn = st.lists(st.floats(-100, 100), min_size=2, max_size=20)


@given(drawn)
def test_a_deviation_and_its_interval_are_scipys(values: list[float]):
    assume(np.std(values) > 1e-3)
    sigma, low, high = deviation(values)
    assert sigma == pytest.approx(np.std(values, ddof=1))
    reference = stats.mvsdist(values)[2]  # flat priors: the same interval as by chi squared
    assert (low, high) == pytest.approx(reference.interval(0.95), rel=1e-6)


def test_scatter_and_what_one_run_shows(tmp_path: Path):
    plan = make_up(tmp_path, a={"rlora": 0.1})
    result = evidence(tmp_path, plan)
    found = scatter(result)
    scores = {m: 100 * score_array(result, m).mean(1) for m in PAIR}
    for m in PAIR:
        assert found[m] == deviation(scores[m])
    assert found["paired"] == pytest.approx(deviation(scores["rlora"] - scores["lora"]))
    assert found["paired"][0] < found["lora"][0] / 2  # their luck is shared
    table = scatter_table({"words": result})
    assert [*table.index] == ["words: LoRA", "words: R-LoRA", "words: their difference"]
    row = table.loc["words: R-LoRA"]
    assert row["one run each shows"] == pytest.approx(8**0.5 * found["rlora"][0])
    assert tuple(row[["sigma", "sigma from", "sigma to"]]) == found["rlora"] and row["seeds"] == 6
    row = table.loc["words: their difference"]
    assert row["one run each shows"] == pytest.approx(2 * found["paired"][0])
    independent = (found["lora"][0] ** 2 + found["rlora"][0] ** 2) ** 0.5
    assert row["if independent"] == pytest.approx(independent)


def test_published_leads():
    averages, ahead = published(), leads()
    assert averages.shape == (len(PUBLISHED), 6) and not averages["R-LoRA"].isna().any()
    row = "8 tasks, Qwen2.5-0.5B (v1, Table 5)"
    assert ahead.loc[row, "HydraLoRA"] == pytest.approx(67.31 - 64.13)
    assert (ahead.isna() == averages[ahead.columns].isna()).all(axis=None)
    first = ahead.index.str.contains("v1")
    assert (ahead[first].min() > 0).all()  # R-LoRA stands at the top of each table of v1
    said = [line.split() for line in text(ahead, "{:+.2f}").splitlines() if line.startswith(row)]
    assert said[0][-5:] == ["–", "–", "+3.18", "+1.09", "+1.00"]


def test_published_rows_of_equal_size():
    """v1 has one, and all of the later paper's are; there R-LoRA leads in domain alone."""
    places = leads_by_place()
    assert sum(len(own) for own in places.values()) == leads().notna().sum().sum()
    inside = places["LoRA, equal size", "in domain"]
    assert inside["a single domain (v1, Table 2)"] == pytest.approx(37.13 - 34.79)
    assert places["LoRA, smaller", "in domain"].to_list() == pytest.approx([37.13 - 32.82])
    outside = places["LoRA, equal size", "on BBH"]
    assert inside.min() > 1 and outside.abs().max() < 0.8 and outside.mean() < 0
    equal = published()["LoRA, equal size"].dropna()
    later = equal.index.str.contains("later")
    assert len(equal[~later]) == 1 and len(equal[later]) == 9
    expected = [0, 54.08 - 54.23, 42.24 - 42.21, 44.96 - 45.02]
    expected += [48.32 - 48.36, 45.01 - 44.89, 52.21 - 52.93]
    assert outside.to_list() == pytest.approx(expected)


def with_scatter(result: dict, sigma: float) -> dict:
    """Two seeds of each method that scatter by sigma points, R-LoRA's by half of that."""
    for record in result["records"]:
        if record["test"]:
            own = sigma / (2 if record["method"] == "rlora" else 1)
            at = 0.5 + own / 100 * (record["seed"] - 0.5) * 2**0.5
            record["test"] = {t: {"letters": at} for t in record["test"]}
    return result


# Leads above sqrt(8) sigma: 20 are positive, four above 2.83 (3.18, 4.31, 5.1, 4.5).
@pytest.mark.parametrize("sigma, count", [(0.0001, 20), (1.0, 4), (2.0, 0)])
def test_how_many_leads_are_shown(sigma: float, count: int, tmp_path: Path):
    """Against a scatter that is known: the larger one counts."""
    result = with_scatter(evidence(tmp_path, make_up(tmp_path, seeds=2, a={})), sigma)
    assert scatter(result)["lora"][0] == pytest.approx(sigma)
    row = shown_table({"words": result}).loc["words"]
    assert row["sigma"] == pytest.approx(sigma)
    assert row["one run each shows"] == pytest.approx(8**0.5 * sigma)
    assert (row["leads shown"], row["published leads"]) == (count, 20)


def test_the_picture_of_the_leads(tmp_path: Path):
    """Each lead is a mark, filled where the narrow band leaves it out; each record is a band."""
    plan = make_up(tmp_path, seeds=2, a={})
    wide, narrow = (with_scatter(evidence(tmp_path, plan), sigma) for sigma in (10.0, 0.5))
    ax = leads_plot({"narrow": narrow, "wide": wide}).axes[0]
    drawn = {fill: [] for fill in ("full", "none")}
    for line in ax.lines:
        drawn[line.get_fillstyle()] += line.get_xdata().tolist()
    every = leads().stack().dropna()
    outside = every[every.abs() > 2**0.5]
    assert sorted(drawn["full"]) == pytest.approx(sorted(outside)) and len(outside) == 7
    assert len(drawn["none"]) == len(every) - 7
    edges = [(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches]
    assert edges == [pytest.approx(ax.get_xlim()), pytest.approx((-(2**0.5), 2**0.5))]
    said = {note.get_text().strip() for note in ax.texts}
    assert said == {"narrow: ±1.4", "wide: ±28.3"}
    assert "Of 20 published leads" in ax.get_title()
    assert "7 with the luck of our narrow, 0 with the luck of our wide" in ax.get_title()


@pytest.mark.parametrize(
    "gains, use",
    [
        ({}, "lora"),
        ({"mlora": 0.2}, "mlora"),
        ({"mlora": 0.2, "rlora": 0.2}, "mlora"),
        ({"mlora": 0.1, "rlora": 0.2}, "rlora"),
        ({"lora": 0.2}, "lora"),
        ({"lora": -0.1, "rlora": 0.1}, "rlora"),
    ],
)
def test_the_simplest_that_is_not_beaten(gains: dict, use: str, tmp_path: Path):
    plan = make_up(tmp_path, a=gains)
    result = evidence(tmp_path, plan)
    found, contrasts = advise(result)
    assert found == use and len(contrasts) == 3
    table = advice_table({"here": result}, result)
    assert table.loc["here", "use"] == label(use)
    numbers = table.loc["here", ["R-LoRA less LoRA", "from", "to"]]
    assert [*numbers] == [contrasts[1].mean, contrasts[1].low, contrasts[1].high]
    assert contrasts[1].values == pytest.approx(differences(result, "rlora", "lora"))
    assert [*table.index][-len(BY_ALGEBRA) :] == [*BY_ALGEBRA]


def test_advice_where_time_is_short(tmp_path: Path):
    plan = make_up(tmp_path, a={"one-head": 0.3})
    result = evidence(tmp_path, plan)
    row = "time or memory are what is short"
    table = advice_table({"here": result}, result)
    assert table.loc[row, "use"].startswith("no reason")
    for record in result["records"]:
        if record["method"] == "rlora" and record["stage"] == "test":
            record["seconds"], record["kept_bytes"] = 3.0, 2**21
    table = advice_table({"here": result}, result)
    assert table.loc[row, "use"] == "plain LoRA"
    assert "2.00 times LoRA's time and kept 2.00 times" in table.loc[row, "because"]
    assert set(SIMPLEST_FIRST) <= set(result["methods"])


@pytest.mark.parametrize("chapter", ["08_does_it_help", "10_paper_and_code"])
def test_the_report_makes_what_the_chapters_show(chapter: str):
    """Each table and picture that a chapter takes from the lab is one of the report's."""
    makers = [f"rlora_lab.report.{name}" for name in ("tables", "pictures", "published")]
    notebook = nbformat.read(BOOK / f"{chapter}.ipynb", as_version=4)
    trees = [execute.parse_cell(source) for source in execute.code_of(notebook)]
    shown = {
        alias.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in makers
        for alias in node.names
        if alias.name.endswith(("_table", "_plot", "_dots", "_curves", "forest"))
    }
    assert len(shown) >= 3
    made = {n.id for n in ast.walk(ast.parse(inspect.getsource(write))) if isinstance(n, ast.Name)}
    assert shown <= made


def test_tables_say_what_was_measured(tmp_path: Path):
    plan = make_up(tmp_path, a={"mlora": -0.2})
    result = evidence(tmp_path, plan)
    result["at_end"] = ["lora"]
    scores = scores_table(result)
    assert scores.loc["R-LoRA", "learning rate"] == 0.002
    assert scores["at an end of its sweep"].tolist() == [False, True, False, False]
    of_seeds = 100 * score_array(result, "mlora").mean(1)
    assert tuple(scores.loc["M-LoRA", ["letters", "letters from", "letters to"]]) == (
        pytest.approx(interval(of_seeds))
    )
    assert scores.loc["M-LoRA", "spread over seeds"] == pytest.approx(of_seeds.std(ddof=1))
    of_tasks = 100 * score_array(result, "mlora").mean(0)
    assert scores.loc["M-LoRA", "spread over tasks"] == pytest.approx(of_tasks.std(ddof=1))
    cosines = scores.loc["M-LoRA", ["cosine of heads", "cosine of change"]]
    assert [*cosines] == pytest.approx(of_tasks / [200, 100])  # as `make_up` has them
    assert scores["routing entropy / ln N"].isna().tolist() == [False, True, True, False]
    assert scores.loc["R-LoRA", "routing entropy / ln N"] == pytest.approx(0.85)
    assert np.isnan(scores.loc["LoRA", "cosine of heads"])
    assert scores.loc["HydraLoRA", "to R-LoRA's"] == pytest.approx(109 / 105 - 1)
    assert scores.loc["LoRA", "kept MiB"] == 1.0 and scores.loc["LoRA", "seconds"] == 1.5
    column = 100 * score_array(result, "rlora")[:, 1]
    found = tasks_table(result)["R-LoRA"].loc["mirror"]
    assert tuple(found) == pytest.approx((column.mean(), column.std(ddof=1)))
    rates = {"0.001": 29.75, "0.002": 49.75, "0.004": 29.75, "chosen": 0.002}
    assert rates_table(result).loc["LoRA"].to_dict() == pytest.approx(rates)
    names = [*contrast_table(ideas(result)).index]
    assert names[0] == "several heads and a router, zero start: HydraLoRA less LoRA"
    contrasts = contrast_table(rlora_less(result))
    c = next(c for c in rlora_less(result) if c.name == "mlora")
    numbers = [c.mean, c.low, c.high, 6, c.p, c.holm, c.detectable]
    assert [*contrasts.loc["M-LoRA"]] == [*numbers, "better"] and len(contrasts) == 3
    assert "cosine of change, within methods" in correlation_table(result).index


def test_tables_become_text_when_they_are_shown(tmp_path: Path):
    plan = make_up(tmp_path, a={})
    result = evidence(tmp_path, plan)
    scores = scores_table(result)
    columns = ["learning rate", "parameters", "to R-LoRA's", "letters", "cosine of heads"]
    scores.loc["LoRA", "parameters"] = 15360
    words = text(scores[columns]).splitlines()[2].split()
    letters = f"{scores.loc['LoRA', 'letters']:.1f}"
    assert words == ["LoRA", "0.002", "15,360", "-1.0%", letters, "–"]
    page = shown(scores).to_html()
    assert ">15,360<" in page and ">–<" in page and 'class="dataframe"' in page
    assert page == shown(scores_table(result).replace(104, 15360)).to_html()  # no random names
    assert max(map(len, text(scores, width=100).splitlines())) <= 102


def test_a_single_seed_has_scores_and_no_interval(tmp_path: Path):
    result = evidence(tmp_path, make_up(tmp_path, seeds=1, a={}))
    row = scores_table(result).loc["R-LoRA"]
    assert row["letters"] == pytest.approx(100 * score_array(result, "rlora").mean())
    assert row[["letters from", "letters to", "spread over seeds"]].isna().all()
    assert np.isnan(tasks_table(result).loc["mirror", ("R-LoRA", "±")])
    said = write_report(tmp_path / "out", tmp_path / "plan.toml", tmp_path)
    assert "Too few seeds for an interval yet." in said


def test_the_report(tmp_path: Path):
    blocks = ("related-2", "different-2", "sentences", "sentences-related")
    plan = make_up(tmp_path, seeds=3, **{name: {} for name in blocks}, empty={})
    (tmp_path / "empty.jsonl").unlink()
    said = write_report(tmp_path / "out", plan, tmp_path)
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "report.md").read_text() == said
    assert "empty: nothing has been scored on test data yet" in said
    tables = ["scores", "tasks", "rates", "letters-rlora-less", "ideas", "correlation"]
    pictures = ["rates", "exact-rlora-less", "ideas", "tasks", "similarity-heads"]
    for block in blocks:
        assert {f"{block}-{name}.csv" for name in tables} <= files
        for name in (*pictures, "similarity-change"):
            assert {f"{block}-{name}.png", f"{block}-{name}.svg"} <= files
            assert f"({block}-{name}.png)" in said
    for name in ("advice", "published", "published-leads", "scatter", "scatter-leads"):
        assert f"{name}.csv" in files
    assert "(scatter-leads.png)" in said
    for name in ("relatedness", "relatedness-sentences"):
        assert {f"{name}.png", f"{name}.svg", f"{name}-interaction.csv"} <= files
    assert not any(name.startswith(".") for name in files)


def test_the_command(tmp_path: Path):
    plan = make_up(tmp_path, a={})
    command = [sys.executable, "-m", "rlora_lab", "report", "--plan", str(plan)]
    command += ["--records", ".", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "cannot tell" in done.stdout
    # the same records give the same files, with no date in them
    assert write_report(tmp_path / "again", plan, tmp_path) in done.stdout
    for name in ("a-scores.csv", "a-rates.svg", "a-tasks.svg"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_what_can_not_be_said(tmp_path: Path):
    result = evidence(tmp_path, make_up(tmp_path, seeds=2, a={}))
    with pytest.raises(LabError, match="'three' here: there are rlora, lora"):
        score_array(result, "three")
    with pytest.raises(LabError, match="at least two"):
        interval(np.array([1.0]))
    gone = [r for r in result["records"] if (r["method"], r["seed"]) == ("lora", 1)]
    result["records"] = [r for r in result["records"] if r not in gone]
    assert len(differences(result, "lora", "rlora")) == 1  # the seed that both have
    gone = [r for r in result["records"] if (r["method"], r["seed"]) == ("rlora", 0)]
    result["records"] = [r for r in result["records"] if r not in gone]
    with pytest.raises(LabError, match="same seeds"):
        differences(result, "lora", "rlora")


def test_a_result_of_its_own(capsys: pytest.CaptureFixture):
    with pytest.raises(LabError, match="'nothing': there are .*, speed-cpu"):
        load_result("nothing")
    result = load_result("speed-cpu")
    said = capsys.readouterr().out
    for part in ("speed-cpu.json", result["date"], result["machine"], result["command"]):
        assert part in said
    load_result("speed-cpu", say=False)
    assert not capsys.readouterr().out and result["complete"]


def test_a_result_is_written_whole_or_not_at_all(tmp_path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "deep" / "a.json"
    result = {"complete": True, "records": [{"seed": 0}, {"seed": 1}]}
    write_result(file, result)
    assert json.loads(file.read_text()) == result
    monkeypatch.setattr("rlora_lab.runs.record.os.replace", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_result(file, {"records": []})
    assert json.loads(file.read_text()) == result
    assert [p.name for p in file.parent.iterdir()] == ["a.json"]
