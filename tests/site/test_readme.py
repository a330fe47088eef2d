"""The README and the first page: lines run, and numbers and the picture are the recorded ones."""

import re
import runpy

import pytest
from project import ROOT

from rlora_lab.models.bases import load_base
from rlora_lab.report.loading import chosen_records, load_evidence
from rlora_lab.report.overview import overview
from rlora_lab.report.questions import relatedness, rlora_less

README = (ROOT / "README.md").read_text()


def test_its_lines_run(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    base, fresh_base = (load_base("tiny").model for _ in range(2))
    exec(code, {"base": base, "fresh_base": fresh_base})
    for folder in ("adapter", "plain"):
        assert (tmp_path / folder / "adapter_model.safetensors").stat().st_size > 0


NAMES = {
    "lora": "LoRA",
    "one-head": "one random head",
    "mlora": "M-LoRA",
    "hydralora": "HydraLoRA",
    "hydralora-classic": "HydraLoRA at alpha/r",
    "lora-rank": "LoRA of equal rank",
}
BLOCKS = ("language", "strings", "sentences")


def rows() -> list[str]:
    """The README's table of differences, from the records."""
    contrasts = [
        {c.name: c for c in rlora_less(load_evidence(block, say=False))} for block in BLOCKS
    ]
    lines = []
    for method, name in NAMES.items():
        cells = []
        for c in (found.get(method) for found in contrasts):
            star = "" if not c or c.verdict == "cannot tell" else " *"
            cells.append(f"{c.mean:+.1f} ({c.low:+.1f} to {c.high:+.1f}){star}" if c else "–")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def test_numbers_are_the_recorded_ones():
    assert re.findall(r"^\| .*\d\.\d.*\|$", README, re.M) == rows()


PICTURES = runpy.run_path(str(ROOT / "book" / "pictures.py"))


@pytest.mark.parametrize("page", ["README.md", "index.md"])
def test_the_first_sentence_has_the_recorded_number(page):
    text = " ".join((ROOT / page).read_text().split())
    first = " ".join(PICTURES["sentence"](PICTURES["main_lines"]()[0]).split())
    assert f"{first}. On five related tasks it is ahead, by a little, and one head" in text
    assert "In no other comparison is it better." in text
    ahead = [line.block for line in overview()[0] if line.verdict.startswith("better")]
    assert ahead == ["language-related", "language-related-again"]
    related = load_evidence("language-related-again", say=False)
    less = {c.name: c.verdict for c in rlora_less(related)}
    assert less == {"lora": "better", "one-head": "worse"}


@pytest.mark.parametrize("picture", ["PICTURE", "JAPANESE_PICTURE"])
def test_the_forest_plot_is_that_of_the_records(picture):
    numbers = PICTURES["numbers"](PICTURES["main_lines"]())
    assert numbers in PICTURES[picture].read_text("utf-8"), "python book/pictures.py"


def test_the_japanese_picture_has_words_for_every_row():
    blocks = {block for row in PICTURES["MAIN"] for block in row}
    assert blocks <= set(PICTURES["JAPANESE"])
    written = PICTURES["JAPANESE_PICTURE"].read_text("utf-8")
    for line in PICTURES["main_lines"]():
        assert PICTURES["JAPANESE"][line.block].split("\n")[0] in written
    assert "better" not in re.sub(r"<dc:description>.*?</dc:description>", "", written)


def test_the_last_row_is_smaller():
    assert "0.4 times as\nmany" in README
    for block in BLOCKS:
        record = load_evidence(block, say=False)
        size = chosen_records(record, "lora-rank")[0]["adapter_parameters"]
        assert round(size / record["rlora_parameters"], 1) == 0.4


def test_its_sentence_is_the_measured_one():
    model, strings, text = (
        {c.name: c for c in rlora_less(load_evidence(block, say=False))} for block in BLOCKS
    )
    assert (
        "far ahead of HydraLoRA as the released code scales it, and not of HydraLoRA at" in README
    )
    assert model["hydralora-classic"].verdict == "better" and model["hydralora-classic"].mean > 2
    assert model["hydralora"].verdict == "cannot tell"
    assert "no part of R-LoRA made a difference there that could be told" in README
    told = [name for name, c in model.items() if c.verdict != "cannot tell"]
    assert told == ["hydralora-classic"]
    strings, text = strings["lora"], text["lora"]
    words = " ".join(README.split())
    assert "**On five related language tasks it is, by a little, and in no other" in words
    assert strings.verdict == "cannot tell" and strings.mean < 0
    assert text.verdict == "worse" and text.mean > -1
    pairs = {
        f"{size} tasks": tuple(
            load_evidence(f"strings-{kind}-{size}", say=False) for kind in ("different", "related")
        )
        for size in (4, 8)
    }
    different = {c.name: c.verdict for c in relatedness(pairs)["different"]}
    assert {different[f"{name}: rlora"] for name in pairs} == {"worse"}
    assert "it is better on four and on eight string tasks that differ" in words
    model, strings, text = (load_evidence(block, say=False) for block in BLOCKS)
    controls = len(chosen_records(model, "mlora"))
    assert f"eight language tasks, {len(model['seeds'])} and {controls} seeds |" in README
    assert f"ten string tasks, no dropout, {len(strings['seeds'])} seeds |" in README
    assert f"five sentence tasks, {len(text['seeds'])} seeds |" in README
