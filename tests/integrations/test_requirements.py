"""The environment of these tests: every pinned package, and the torch of .venv as it is."""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

pytestmark = pytest.mark.integrations
ROOT = Path(__file__).parents[2]


def pins(file: Path) -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def test_the_packages_are_those_pinned():
    for pin in pins(Path(__file__).parent / "requirements.txt"):
        assert pin.specifier.contains(version(pin.name)), pin


def test_torch_is_the_shared_one():
    (pin,) = [pin for pin in pins(ROOT / "constraints.txt") if pin.name == "torch"]
    assert pin.specifier.contains(torch.__version__.partition("+")[0])
    assert not Path(torch.__file__).resolve().is_relative_to(Path(sys.prefix).resolve())
