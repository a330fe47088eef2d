"""Runs PEFT's own tests on the R-LoRA tuner: `python tests/peft_contracts.py [--peft 0.21.2]`.

PEFT's source distribution carries tests/test_custom_models.py, the contracts that each of its tuners
keeps. This command downloads that distribution, puts our configurations in place of PEFT's in a
temporary copy, and runs what is parametrized by them against the peft that is installed. Nothing of
PEFT's is kept. What holds, and why the rest does not apply, is recorded in tests/PEFT_CONTRACTS.md.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

# Our configurations in PEFT's format: (name, model, config class, settings).
# lora_alpha makes the scale 1, as PEFT's own cases have it: they train at a learning rate of 0.5.
CASES = """
from dataclasses import dataclass

import rlora_min


class _Name(str):
    value = property(str)  # some tests ask for the enum's value, and our type is a plain string


@dataclass
class RLoraConfig(rlora_min.RLoraConfig):
    lora_alpha: float = 2

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = _Name(self.peft_type)


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
ALL_PEFT_CONFIG_CLASSES = [RLoraConfig]


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peft", default=version("peft"), help="release whose tests to run")
    args, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
            + ["--no-build-isolation", "--dest", scratch, f"peft=={args.peft}"],
            check=True,
        )
        with tarfile.open(next(Path(scratch).glob("peft-*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        tests = Path(scratch, f"peft-{args.peft}", "tests")
        module = tests / "test_custom_models.py"
        before, marker, after = module.read_text().partition(
            "def _skip_tests_with_multiple_adapters_with_target_parameters("
        )
        if not marker:
            raise SystemExit(f"peft {args.peft}: test_custom_models.py has changed its form.")
        module.write_text(before + CASES + marker + after)
        (tests / "conftest.py").write_text(CONFTEST)
        (tests / "__init__.py").touch()
        (tests / "pytest.ini").write_text("[pytest]\n")  # in place of PEFT's, which wants plugins
        print(f"peft installed: {version('peft')}; tests of peft {args.peft}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-c", str(tests / "pytest.ini"), "-k", "RLoRA or RLoraConfig"]
        return subprocess.run([*command, *rest, str(module)]).returncode


if __name__ == "__main__":
    sys.exit(main())
