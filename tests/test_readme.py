"""The README: its lines run, its links lead somewhere, its numbers are the recorded ones."""

import re
from pathlib import Path

import pytest

from rlora_lab.bases import load_base
from rlora_lab.results import chosen_records, load_result, score_array

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_its_lines_run(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    base, fresh_base = (load_base("tiny").model for _ in range(2))
    exec(code, {"base": base, "fresh_base": fresh_base})
    for folder in ("adapter", "plain"):
        assert (tmp_path / folder / "adapter_model.safetensors").stat().st_size > 0


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?://)([^)#]+)", README))
def test_links_lead_to_files(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("command", re.findall(r"^    make (\S+)", README, re.M))
def test_commands_are_targets(command):
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.M)


def test_address_is_that_of_the_configuration():
    url = re.search(r"^  url: (\S+)", (ROOT / "_config.yml").read_text(), re.M).group(1)
    assert set(re.findall(r"https://github\.com/[\w-]+/rlora-book", README)) == {url}


def table() -> dict[str, list[str]]:
    """The rows of the README's table of measurements, by method."""
    rows = re.findall(r"^\| ([\w -]+) \| ([\d.| ]+) \|$", README, re.M)
    return {name.strip(): [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_numbers_are_the_recorded_ones():
    result = load_result("quality-minilm-sentences-200", say=False)
    names = {"lora": "LoRA", "hydralora": "HydraLoRA", "mlora": "M-LoRA", "rlora": "R-LoRA"}
    expected = {}
    for method, name in names.items():
        scores = 100 * score_array(result, method)[0]
        size = chosen_records(result, method)[0]["adapter_parameters"]
        expected[name] = [f"{value:.1f}" for value in (*scores, scores.mean())] + [f"{size}"]
    assert table() == expected
