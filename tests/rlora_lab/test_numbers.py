"""What chapters 07 to 14 say is what it was: every number of theirs, from records and questions.

`tests/fixtures/numbers.json` was written from the records before they had one schema. A number that
is in the book can only change on purpose, with its line there.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from rlora_lab.report import published
from rlora_lab.report.loading import chosen_records, load_evidence, score_array
from rlora_lab.report.questions import (
    SIMPLEST_FIRST,
    Contrast,
    advise,
    correlation,
    detectable,
    differences,
    ideas,
    interval,
    relatedness,
    rlora_less,
    similarity_points,
)
from rlora_lab.runs.plan import best_trials, load_plan

NUMBERS = json.loads((Path(__file__).parents[1] / "fixtures" / "numbers.json").read_text())
# What was recorded later is no number of those pages.
NAMES = [name for name in load_plan() if any(key.split("/")[0] == name for key in NUMBERS)]
BLOCKS = {name: load_evidence(name, say=False) for name in NAMES}
SHAPE = ("placement", "num_heads", "r", "learning_rate", "gamma", "dropout", "placebo")


def digest(values: list) -> str:
    """Of many numbers, what tells whether any of them has changed."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def said(c: Contrast) -> list:
    """As the numbers have it, which were written when what could be seen was said at 5 %."""
    could = detectable(np.std(c.values, ddof=1), len(c.values))
    return [c.mean, c.low, c.high, c.p, c.holm, could, c.verdict]


OTHER_WORD = {"better": "worse", "worse": "better", "cannot tell": "cannot tell"}


def turned(c: Contrast) -> list:
    """The same from the other side, which the numbers are from."""
    mean, low, high, *p, verdict = said(c)
    return [-mean, -high, -low, *p, OTHER_WORD[verdict]]


def paired(result: dict, *names: str) -> list[float]:
    return [value / 100 for value in interval(differences(result, *names))]


def of_comparison(name: str, result: dict) -> dict:
    found = {key: result[key] for key in ("seeds", "tasks", "methods", "chosen")}
    for m in result["methods"]:
        records = chosen_records(result, m)
        found[f"{m}/size"] = records[0]["adapter_parameters"]
        found[f"{m}/seconds"] = float(np.median([r["seconds"] for r in records]))
        for metric in result["metrics"]:
            scores = score_array(result, m, metric)
            found[f"{m}/{metric}/scores"] = digest(scores.tolist())
            if len(scores) > 1:
                found[f"{m}/{metric}/interval"] = list(interval(scores.mean(1)))
    if name == "chapter-07":
        for m in result["methods"]:
            sweep = result["sweeps"][m].items()
            found[f"{m}/sweep"] = [
                [choice.learning_rate, float(np.mean([*v.values()]))] for choice, v in sweep
            ]
            if m != "rlora":
                for metric in result["metrics"]:
                    less = paired(result, m, "rlora", metric)
                    found[f"{m}/{metric}/less rlora"] = less
    if name == "chapter-07-fresh":
        for m in result["methods"]:
            found[f"{m}/loss"] = digest([r["loss"] for r in chosen_records(result, m)])
    return found


def of_evidence(name: str, result: dict) -> dict:
    found = {"at end": result["at_end"]}
    found |= {key: result[key] for key in ("complete", "rlora_parameters")}
    for m in result["methods"]:
        records = chosen_records(result, m)
        found[f"{m}/kept"] = float(np.mean([r["kept_bytes"] for r in records]))
        found[f"{m}/other"] = records[0]["other_parameters"]
        for key in ("similarity", "entropy", "loss"):
            found[f"{m}/{key}"] = digest([r[key] for r in records])
        if result["sweep_seeds"]:
            sweep = result["sweeps"][m].items()
            found[f"{m}/sweep"] = [
                [choice.learning_rate, [list(i) for i in sorted(v.items())]] for choice, v in sweep
            ]
    if "rlora" in result["methods"]:
        for metric in result["metrics"]:
            for c in rlora_less(result, metric):
                found[f"{metric}/less rlora/{c.name}"] = turned(c)
    found |= {f"ideas/{c.name}": said(c) for c in ideas(result)}
    for kind in ("heads", "change"):
        points = similarity_points(result, kind)
        if points:
            methods, x, y = zip(*points, strict=True)
            found[f"correlation/{kind}/all runs"] = list(correlation(x, y))
            if len(set(methods)) > 1:
                within = list(correlation(x, y, methods))
                found[f"correlation/{kind}/within methods"] = within
    if set(SIMPLEST_FIRST) <= set(result["methods"]):
        use, contrasts = advise(result)
        found["advice"] = [use, *map(said, contrasts)]
    if name in ("synthetic", "sentences"):
        scatter = published.scatter(result).items()
        found |= {f"scatter/{key}": list(values) for key, values in scatter}
    return found


def of_study(name: str, result: dict) -> dict:
    search = [r for r in result["records"] if r["stage"] == "search"]
    best = best_trials(search)[0]
    found = {key: result[key] for key in ("methods", "seeds", "chosen")}
    found["best"] = {key: best[key] for key in ("trial", "value")}
    found["settings"] = {m: chosen_records(result, m)[0]["settings"] for m in result["methods"]}
    names = ("trial", "seed", "state", "shape", "values", "value", "adapter_parameters", "seconds")
    trials = [r | {"shape": [r[key] for key in SHAPE]} for r in search]
    found["search"] = digest([[r[key] for key in names] for r in trials])
    for stage in ("test", "runner-up", "again"):
        runs = [r for r in result["records"] if r["stage"] == stage]
        found[stage] = sorted([r["method"], r["seed"], r["value"]] for r in runs)
    for m in result["methods"]:
        for metric in result["metrics"]:
            found[f"{m}/{metric}/scores"] = digest(score_array(result, m, metric).tolist())
        if m != "defaults":
            found[f"{m}/less defaults"] = paired(result, m, "defaults")
    return found


def of_skewed(name: str, result: dict) -> dict:
    found = {"rlora less lora": paired(result, "rlora", "lora")}
    for m in result["methods"]:
        runs = chosen_records(result, m)
        found[f"{m}/rate"] = result["chosen"][m]
        for metric in result["metrics"]:
            found[f"{m}/{metric}/scores"] = digest(score_array(result, m, metric).tolist())
        looks = [[[step, scores["letters"]] for step, scores in r["looks"]] for r in runs]
        found[f"{m}/looks"] = digest(looks)
        found[f"{m}/stopped"] = [r["stopped"] for r in runs]
        stopped = [r["test_stopped"].values() for r in runs]
        by_metric = [[[v[k] for v in s] for k in ("letters", "exact")] for s in stopped]
        found[f"{m}/test_stopped"] = digest(by_metric)
    for r in result["records"]:
        if r["stage"] == "sweep":
            letters = [scores["letters"] for scores in r["validation"].values()]
            found[f"{r['method']}/sweep/{r['learning_rate']}/{r['seed']}"] = letters
    return found


def of_alone(name: str, result: dict) -> dict:
    (task,) = result["tasks"]
    return {f"{r['method']}/{r['seed']}": r["test"][task]["letters"] for r in result["records"]}


KINDS = {"study": of_study, "skewed": of_skewed, "alone": of_alone}


def of_block(name: str, result: dict) -> dict:
    kind = result["config"]["kind"]
    if kind in KINDS:
        return KINDS[kind](name, result)
    found = of_comparison(name, result)
    return found if name.startswith("chapter") else found | of_evidence(name, result)


def near(value):
    """Text and whole numbers equal, others to the last digits; but for `detectable`, which was
    solved for with both tails."""
    if isinstance(value, float):
        return pytest.approx(value, rel=1e-9, abs=1e-12)
    if isinstance(value, dict):
        return {key: near(one) for key, one in value.items()}
    if isinstance(value, list):
        contrast = len(value) == 7 and value[-1] in ("better", "worse", "cannot tell")
        solved = {5: pytest.approx(value[5], rel=2e-6)} if contrast else {}
        return [solved.get(i, near(one)) for i, one in enumerate(value)]
    return value


def between_blocks() -> dict:
    """What is said of several blocks together."""
    pairs = {f"{n} tasks": (BLOCKS[f"different-{n}"], BLOCKS[f"related-{n}"]) for n in (2, 4, 8)}
    text = {"real text": (BLOCKS["sentences"], BLOCKS["sentences-related"])}
    tasks = BLOCKS["sentences-related"]["tasks"]
    found = {}
    for families in (relatedness(pairs), relatedness(text, tasks=tasks)):
        for kind, contrasts in families.items():
            found |= {f"relatedness/{kind}/{c.name}": said(c) for c in contrasts}
    leads = published.leads().to_numpy().ravel().tolist()
    found["leads"] = [None if np.isnan(lead) else lead for lead in leads]
    records = {"string tasks": BLOCKS["synthetic"], "real text": BLOCKS["sentences"]}
    found["leads shown"] = [int(n) for n in published.shown_table(records)["leads shown"]]
    return found


@pytest.fixture(scope="module")
def found() -> dict:
    blocks = {f"{n}/{key}": v for n, r in BLOCKS.items() for key, v in of_block(n, r).items()}
    return json.loads(json.dumps(blocks | between_blocks()))


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in NUMBERS}))
def test_numbers_are_what_they_were(name: str, found: dict):
    for key in [key for key in NUMBERS if key.split("/")[0] == name]:
        assert found[key] == near(NUMBERS[key]), key


def test_every_number_is_looked_at(found: dict):
    assert found.keys() == NUMBERS.keys()
