"""LoRA against R-LoRA on one's own files: the rules, the words, and the one command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from lab_helpers import letter_rows, write_rows

from rlora_lab.__main__ import main
from rlora_lab.errors import LabError
from rlora_lab.report.verdict import verdict, verdict_text
from rlora_lab.runs import one_run
from rlora_lab.runs.comparison import compare_files

TASKS = ("easy", "hard")
ROWS = 200


def result(rlora: dict[str, float], lora: dict[str, float], seconds=(100, 100), seeds=5) -> dict:
    """Records of both methods whose share of right rows in a task is as given, in any order."""
    generator = np.random.default_rng(0)
    records = []
    for seed in range(seeds):
        for (method, shares), time in zip((("rlora", rlora), ("lora", lora)), seconds, strict=True):
            rows = {t: generator.permutation(ROWS) < share * ROWS for t, share in shares.items()}
            records.append(
                {
                    "stage": "test",
                    "method": method,
                    "seed": seed,
                    "learning_rate": 1e-3,
                    "seconds": time,
                    "adapter_parameters": 1000,
                    "test": {t: {"exact": own.mean()} for t, own in rows.items()},
                    "rows": {
                        "exact": ["".join(map(str, own.astype(int))) for own in rows.values()]
                    },
                }
            )
    return {
        "tasks": TASKS,
        "metrics": ["exact"],
        "methods": ["lora", "rlora"],
        "seeds": list(range(seeds)),
        "chosen": {"lora": 1e-3, "rlora": 1e-3},
        "records": records,
    }


HALF = {"easy": 0.9, "hard": 0.5}
CASES = {
    "better everywhere": (result({"easy": 1.0, "hard": 0.8}, HALF), "go", ["go", "go", "go"]),
    "the same": (result(HALF, HALF), "cannot tell", ["cannot tell", "go", "go"]),
    "worse": (result({"easy": 0.7, "hard": 0.3}, HALF), "no-go", ["no-go", "no-go", "go"]),
    "better, but the worst task": (
        result({"easy": 1.0, "hard": 0.4}, {"easy": 0.6, "hard": 0.5}),
        "no-go",
        ["go", "no-go", "go"],
    ),
    "better, but the worst task a little": (
        result({"easy": 1.0, "hard": 0.47}, {"easy": 0.6, "hard": 0.5}),
        "cannot tell",
        ["go", "cannot tell", "go"],
    ),
    "better, but slow": (
        result({"easy": 1.0, "hard": 0.8}, HALF, (140, 100)),
        "cannot tell",
        ["go", "go", "cannot tell"],
    ),
    "better, but far too slow": (
        result({"easy": 1.0, "hard": 0.8}, HALF, (160, 100)),
        "no-go",
        ["go", "go", "no-go"],
    ),
    "too few seeds": (
        result({"easy": 1.0, "hard": 0.8}, HALF, seeds=3),
        "cannot tell",
        ["go", "go", "go"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_rules_of_the_deciders_page(case: str):
    records, expected, rules = CASES[case]
    word, found = verdict(records)
    assert (word, [rule.verdict for rule in found]) == (expected, rules)
    text = verdict_text(records)
    assert f"Verdict: {expected}." in text and "router counted" in text
    assert ("Fewer than 5 seeds" in text) == (case == "too few seeds")
    assert ("Take plain LoRA" in text) == (expected != "go")


@pytest.mark.parametrize("page", ["for_deciders.md", "for_deciders.ja.md"])
def test_the_page_has_the_rules_that_the_command_applies(page: str):
    text = (Path(__file__).parents[2] / "book" / page).read_text()
    assert "python -m rlora_lab compare --base" in text
    rules = [line for line in text.splitlines() if line.startswith("|")]
    numbers = [[n for n in ("2", "5", "1.2", "1.5") if n in line] for line in rules]
    assert ["2", "5"] in numbers and any({"1.2", "1.5"} <= set(own) for own in numbers)


def letters(folder: Path) -> Path:
    for task in ("largest", "mirror"):
        write_rows(folder / f"{task}.jsonl", letter_rows(task))
    return folder


def test_one_command_gives_a_verdict(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    data = letters(here / "mine")
    arguments = ["--base", "tiny", "--data", str(data), "--steps", "2", "--batch", "4"]
    arguments += ["--seeds", "2", "--lr", "0.001,0.004", "--test-rows", "6"]
    monkeypatch.setattr(sys, "argv", ["rlora_lab", "compare", *arguments])
    monkeypatch.setenv("RLORA_FILES", "elsewhere")
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().out
    assert end.value.code in (0, None)
    assert "8 trainings, foretold" in said and "Verdict: " in said and "mirror" in said
    assert "Fewer than 5 seeds" in said and "95 % interval" in said
    (file,) = (here / "runs" / "compare").glob("compare-*-2.jsonl")
    lines = file.read_text().splitlines()
    runs = [json.loads(line) for line in lines if '"id"' not in line]
    assert len(runs) == 8
    tested = {(run["method"], run["seed"]) for run in runs if run["stage"] == "test"}
    assert tested == {(method, seed) for method in ("lora", "rlora") for seed in (0, 1)}
    swept = {(r["method"], r["learning_rate"]) for r in runs if r["stage"] == "sweep"}
    assert swept == {(method, rate) for method in ("lora", "rlora") for rate in (0.001, 0.004)}
    settings = [json.loads(line) for line in lines if '"id"' in line]
    assert settings[0]["suite"] == "files" and settings[0]["source"] == "mine"
    (data / "mirror.jsonl").write_text((data / "largest.jsonl").read_text())
    settings = {"steps": 2, "batch": 4, "seeds": 2, "rates": [0.001], "test_rows": 6}
    one_run._suite.cache_clear()  # workers of their own have none
    compare_files("tiny", data, here / "runs" / "compare", say=str, **settings)
    assert len([*(here / "runs" / "compare").glob("compare-*-2.jsonl")]) == 2  # not mixed


def test_one_seed_is_refused(here: Path):
    with pytest.raises(LabError, match="needs two seeds or more, got 1; take five"):
        compare_files("tiny", letters(here / "mine"), seeds=1, say=str)
