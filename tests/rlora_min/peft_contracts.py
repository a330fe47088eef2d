"""Runs PEFT's own tests on the R-LoRA tuner: `python tests/rlora_min/peft_contracts.py [--record]`.

PEFT's source distribution carries tests/test_custom_models.py, the contracts that each of its
tuners keeps. This command downloads that of the peft that is installed, puts our configurations in
place of PEFT's in a temporary copy, and runs what is parametrized by them. Nothing of PEFT's is
kept. With --record, the row of that release in PEFT_CONTRACTS.md is written anew. Other
options go to pytest. PEFT's tests need `pip install diffusers parameterized`.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

RECORD = Path(__file__).with_name("PEFT_CONTRACTS.md")

# Our configurations in PEFT's format: (name, model, config class, settings).
# lora_alpha makes the scale 1, as PEFT's own cases have it: they train at a learning rate of 0.5.
# Two tests make their configuration themselves and ask a gradient of every parameter. The frozen
# pair of random heads has none, so these run with centred heads, which store no pair.
CASES = """
from dataclasses import dataclass

import rlora_min


@dataclass
class RLoraConfig(rlora_min.RLoraConfig):
    lora_alpha: float = 2


@dataclass
class CenteredRLoraConfig(RLoraConfig):
    init_heads: str = "centered"


_variants = {
    "routed": {},
    "mean": {"router": "mean"},
    "hydra": {"init_heads": "zeros", "dropout_on": "input", "router_init": "kaiming"},
    "centered": {"init_heads": "centered", "router": "mean"},
    "lora": {"num_heads": 1, "init_heads": "zeros", "dropout_on": "input", "router": "mean"},
}
_targets = [
    ("MLP", "lin0"),
    ("MLP", ["lin0"]),
    ("MLP", ["lin1"]),
    ("MLP", ["lin0", "lin1"]),
    ("EmbConv1D", ["conv1d"]),
]
TEST_CASES = [
    (f"RLoRA {name} {model} {targets}", model, RLoraConfig, {"target_modules": targets} | settings)
    for name, settings in _variants.items()
    for model, targets in _targets
]
TEST_CASES.append(
    (
        "RLoRA modules_to_save",
        "MLP",
        RLoraConfig,
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "router": "mean"},
    )
)
_mean = {"router": "mean", "init_weights": False, "lora_dropout": 0.0}
MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [
    ("RLoRA same", "rlora", RLoraConfig, *[{"target_modules": ["lin0"]} | _mean] * 2),
    (
        "RLoRA different",
        "rlora",
        RLoraConfig,
        {"target_modules": ["lin0"]} | _mean,
        {"target_modules": ["lin1"]} | _mean,
    ),
]
ALL_PEFT_CONFIG_CLASSES = [CenteredRLoraConfig]


"""

# A softmax router refuses to merge by design, so a merge contract can't apply to it.
CONFTEST = """
import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except ValueError as error:
        if "can't be merged: its softmax router" not in str(error):
            raise
        pytest.skip("softmax router: no merge")
"""


def record(report: Path, release: str) -> None:
    """Writes the row of a release: how many cases of a JUnit report held, failed, don't apply."""
    suite = ElementTree.parse(report).find("testsuite")
    total, failures, errors, skipped = (
        int(suite.get(count)) for count in ("tests", "failures", "errors", "skipped")
    )
    held = total - failures - errors - skipped
    row = f"| {release} | {held} | {failures + errors} | {skipped} |\n"
    lines = RECORD.read_text().splitlines(keepends=True)
    others = [line for line in lines if not line.startswith(f"| {release} |")]
    RECORD.write_text("".join([*others, row]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    args, rest = parser.parse_known_args()
    release = version("peft")
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
            + ["--no-build-isolation", "--dest", scratch, f"peft=={release}"],
            check=True,
        )
        with tarfile.open(next(Path(scratch).glob("peft-*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        tests = Path(scratch, f"peft-{release}", "tests")
        module = tests / "test_custom_models.py"
        before, marker, after = module.read_text().partition(
            "def _skip_tests_with_multiple_adapters_with_target_parameters("
        )
        if not marker:
            raise SystemExit(f"peft {release}: test_custom_models.py has changed its form.")
        module.write_text(before + CASES + marker + after)
        (tests / "conftest.py").write_text(CONFTEST)
        (tests / "__init__.py").touch()
        (tests / "pytest.ini").write_text("[pytest]\n")  # in place of PEFT's, which wants plugins
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
        command += ["-c", str(tests / "pytest.ini"), "-k", "RLoRA or RLoraConfig"]
        done = subprocess.run([*command, f"--junitxml={report}", *rest, str(module)])
        if args.record:
            record(report, release)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
