"""The report on a language model: stages of tuning, controls, rows, and what is not done yet."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from lab_helpers import SETTING, STAGED, plan_file

from rlora_lab.errors import LabError
from rlora_lab.report.loading import chosen_records, load_evidence, score_array, tasks_with
from rlora_lab.report.overview import overview
from rlora_lab.report.questions import by_task, differences, ideas, rlora_less
from rlora_lab.report.rows import both_ways, chances_table, chosen_spread, contrast, row_differences
from rlora_lab.report.tables import looks_table, scores_table, tasks_table, tuning_table
from rlora_lab.report.write import write_report
from rlora_lab.runs.plan import Run, load_plan, missing, read_all
from rlora_lab.runs.record import add_record

SKILL = {"lora": 0.5, "rlora": 0.6, "mlora": 0.6, "none": 0.05}
ROWS = {"validation": 40, "test": 60}
OWN = SETTING | {
    "block": "language",
    "suite": "language",
    "tasks": ["copy", "choose"],
    "metrics": ["exact", "choice"],
    "steps": 4,
    "blocks": 1,
}


LANGUAGE = {"suite": "language", "tasks": ["copy", "choose"], "blocks": 1, "steps": 4}
SEEDS = [0, 1, 2, 3, 4, 5]


def plan_of(folder: Path, **more: dict) -> Path:
    own = STAGED | LANGUAGE | {"seeds": SEEDS, "control_seeds": 2, "margin": 30.0}
    return plan_file(folder, language=own, **more)


def record_of(run: Run, generator: np.random.Generator) -> dict:
    """A made-up run: a rate of 0.002 and no dropout are best, and methods have their skill."""
    split = "test" if run.stage == "test" else "validation"
    tuned = dict(run.tuned)
    skill = SKILL[run.method]
    if split == "validation":
        skill -= 0.1 * abs(np.log(run.learning_rate / 0.002)) + tuned["lora_dropout"]
    drawn = generator.random((2, ROWS[split])) < skill
    exact = ["".join("01"[int(right)] for right in task) for task in drawn]
    shares = drawn.mean(1).round(5).tolist()
    record = {
        "stage": run.stage,
        "method": run.method,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        split: {"exact": shares, "choice": [None, shares[1]]},
        "rows": {"exact": exact, "choice": [None, exact[1]]},
    }
    if tuned:
        record["tuned"] = tuned
    if split == "test":
        record |= {"adapter_parameters": 0 if run.method == "none" else 100}
        record |= {"other_parameters": 0, "similarity": None, "entropy": None}
        if run.method != "none":
            looks = [[step, {"exact": [0.1, 0.3], "choice": [None, 0.3]}] for step in (1, 2)]
            record |= {"seconds": 2.0, "kept_bytes": 2**20, "looks": looks}
    return record


def make_up(folder: Path, rounds: int = 99) -> Path:
    """Records of the plan, as many rounds of what it asks for as are named."""
    plan = plan_of(folder)
    blocks = load_plan(plan)
    generator = np.random.default_rng(0)
    for _ in range(rounds):
        todo, _ = missing(blocks, blocks["language"], read_all(blocks, folder)[0])
        if not todo:
            break
        for run in todo:
            record = {"date": "2026-01-01"} | record_of(run, generator)
            add_record(folder / "language.jsonl", OWN, record)
    return plan


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    make_up(folder)
    return folder


def result_of(folder: Path) -> dict:
    return load_evidence("language", say=False, plan=folder / "plan.toml", records=folder)


def test_controls_have_seeds_of_their_own(made_up: Path):
    result = result_of(made_up)
    assert result["complete"] and result["seeds"] == [0, 1, 2, 3, 4, 5]
    assert [len(score_array(result, m)) for m in ("lora", "rlora", "mlora")] == [6, 6, 2]
    assert result["tuned"]["mlora"] == result["tuned"]["rlora"]
    assert (result["chosen"]["none"], result["tuned"]["none"]) == (None, {})
    assert len(score_array(result, "none")) == 1
    assert {c.name for c in rlora_less(result)} == {"lora", "mlora"}  # a single seed has no error
    assert tasks_with(result, "choice") == ["choose"]
    assert score_array(result, "lora", "choice").shape == (6, 1)
    assert len(tasks_table(result, "choice")) == 1


def test_intervals_are_over_rows_too(made_up: Path):
    result = result_of(made_up)
    for metric in ("exact", "choice"):
        c = next(c for c in rlora_less(result, metric) if c.name == "lora")
        own = contrast(result, "rlora", "lora", metric)
        assert (c.mean, c.low, c.high, c.p) == (own.mean, *own.interval(), own.p)
        assert c.mean == pytest.approx(
            differences(result, "rlora", "lora", metric).mean(), abs=0.01
        )
        assert c.detectable > 0 and c.p <= c.holm
    (router,) = [c for c in ideas(result) if c.name.startswith("the router")]
    assert router.mean == pytest.approx(contrast(result, "rlora", "mlora").mean)


def test_tasks_one_by_one(made_up: Path):
    result = result_of(made_up)
    pair = [chosen_records(result, method) for method in ("rlora", "lora")]
    found = by_task(result, "rlora", "lora")
    assert [c.name for c in found] == result["tasks"]
    for c, d in zip(found, row_differences(*pair, tasks=2), strict=True):
        alone = both_ways([d])
        assert (c.mean, c.low, c.high, c.p) == (alone.mean, *alone.interval(), alone.p)
        assert c.mean == pytest.approx(c.values.mean(), abs=0.01) and len(c.values) == 6
    assert sum(c.mean for c in found) / 2 == pytest.approx(
        contrast(result, "rlora", "lora").mean, abs=0.01
    )
    (choose,) = by_task(result, "rlora", "lora", "choice")
    assert choose.name == "choose" and choose.holm == choose.p


def test_a_control_comes_when_all_of_its_seeds_are_run(tmp_path: Path):
    make_up(tmp_path)
    file = tmp_path / "language.jsonl"
    lines = file.read_text().splitlines()
    late = [x for x in lines if '"stage":"test"' in x and '"method":"mlora"' in x]
    assert len(late) == 2 and "mlora" in result_of(tmp_path)["methods"]
    file.write_text("\n".join(x for x in lines if x != late[1]) + "\n")
    assert result_of(tmp_path)["methods"] == ["lora", "rlora", "none"]


def test_tables(made_up: Path):
    result = result_of(made_up)
    tried = tuning_table(result)
    assert set(tried.index) == {"LoRA", "R-LoRA"}
    chosen = tried[tried["chosen"] == "x"]
    assert len(chosen) == 2 and chosen["mean"].notna().all()
    assert chosen["learning rate"].to_dict() == {
        "LoRA": result["chosen"]["lora"],
        "R-LoRA": result["chosen"]["rlora"],
    }
    looks = looks_table(result)
    assert [*looks.columns] == ["1 steps", "2 steps", "at the end, test"]
    assert looks.loc["M-LoRA", "1 steps"] == pytest.approx(20)
    scores = scores_table(result)
    assert np.isnan(scores.loc["no adapter", "learning rate"])
    assert np.isnan(scores.loc["no adapter", "seconds"])


def test_what_is_planned_and_not_done(tmp_path: Path):
    make_up(tmp_path, rounds=1)
    plan = tmp_path / "plan.toml"
    assert overview(plan, tmp_path) == ([], ["SmolLM2, 8 different tasks"])
    blocks = load_plan(plan)
    with pytest.raises(LabError, match="the sweep of rlora is not done"):
        chosen_spread(blocks, "language", read_all(blocks, tmp_path)[0])
    said = write_report(tmp_path / "out", plan, tmp_path)
    assert "Planned and not done yet: SmolLM2, 8 different tasks." in said
    assert "the sweep of rlora is not done" in said


def test_the_report(made_up: Path, tmp_path: Path):
    said = write_report(tmp_path, made_up / "plan.toml", made_up)
    (line,), waiting = overview(made_up / "plan.toml", made_up)
    assert line.sentence() in said and not waiting
    assert line.verdict in ("equivalent", "better", "better, by less than the margin")
    files = {path.name for path in tmp_path.iterdir()}
    assert {"overview.png", "language-tuning.csv", "language-looks.csv"} <= files
    assert "language-chances.csv" in files and "language-rates.csv" not in files
    assert {"language-exact-rlora-less.csv", "language-choice-rlora-less.csv"} <= files


def test_the_report_of_tasks_without_options_at_the_settings_of_another_block(
    made_up: Path, tmp_path: Path
):
    shutil.copy(made_up / "language.jsonl", tmp_path)
    taken = {"rates": None, "rates_from": "language", "sweep_seeds": None, "seeds": SEEDS}
    related = LANGUAGE | taken | {"tasks": ["copy"]}
    plan = plan_of(tmp_path, **{"language-related": related})
    blocks = load_plan(plan)
    setting = OWN | {"block": "language-related", "tasks": ["copy"]}
    generator = np.random.default_rng(1)
    todo, _ = missing(blocks, blocks["language-related"], read_all(blocks, tmp_path)[0])
    for run in todo:
        record = {"date": "2026-01-01"} | record_of(run, generator)
        for kind in ("test", "rows"):
            record[kind] = {"exact": record[kind]["exact"][:1], "choice": [None]}
        add_record(tmp_path / "language-related.jsonl", setting, record)
    said = write_report(tmp_path / "out", plan, tmp_path)
    assert "SmolLM2: R-LoRA" in said
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"language-related-looks.csv", "language-related-exact-rlora-less.csv"} <= files
    assert {"relatedness-interaction.csv", "advice.csv"} <= files
    assert not {"language-related-tuning.csv", "language-related-choice-rlora-less.csv"} & files


def test_chances_grow_with_seeds_and_margin(made_up: Path):
    blocks = load_plan(made_up / "plan.toml")
    spread = chosen_spread(blocks, "language", read_all(blocks, made_up)[0])
    table = chances_table(spread)
    assert (table.diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    assert table.iloc[-1].sum() >= table.iloc[0].sum()
