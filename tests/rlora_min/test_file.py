"""The module is one short file that needs torch and peft alone."""

import ast
import json
import subprocess
import sys
from pathlib import Path

from rlora_helpers import STRICT, adapt, layers_of
from torch import nn

import rlora_min
from rlora_min import rlora

pytestmark = STRICT
SOURCE = Path(rlora.__file__)
# torch and peft, and what peft itself requires and is built on.
ALLOWED = {"torch", "peft", "transformers", "safetensors"}


def test_the_file_has_fewer_than_500_lines_of_at_most_100_columns():
    lines = SOURCE.read_text().splitlines()
    assert len(lines) < 500
    assert max(map(len, lines)) <= 100


def test_it_is_the_only_module_beside_the_one_that_names_its_public_parts():
    assert {path.name for path in SOURCE.parent.glob("*.py")} == {"__init__.py", "rlora.py"}
    public = {
        "RLoraConfig",
        "RLoraLayer",
        "RLoraModel",
        "export_lora",
        "head_similarity",
        "record_routing",
    }
    assert set(rlora_min.__all__) == public
    assert all(hasattr(rlora_min, name) for name in public)


def test_it_imports_torch_and_peft_and_what_these_bring():
    nodes = list(ast.walk(ast.parse(SOURCE.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.partition(".")[0] for name in names}
    assert packages - sys.stdlib_module_names <= ALLOWED


def test_in_a_new_process_importing_it_is_enough_and_a_seed_draws_the_same_adapter():
    code = """
import sys
import rlora_min
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, get_peft_model
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn
assert PEFT_TYPE_TO_CONFIG_MAPPING["RLORA"] is rlora_min.RLoraConfig
assert PEFT_TYPE_TO_TUNER_MAPPING["RLORA"] is rlora_min.RLoraModel
assert PEFT_TYPE_TO_PREFIX_MAPPING["RLORA"] == "rlora_"
assert not {"rlora_lab", "matplotlib"} & sys.modules.keys()
config = rlora_min.RLoraConfig(target_modules=["0"], init_seed=7)
model = get_peft_model(nn.Sequential(nn.Linear(3, 4)), config)
print(model.base_model.model[0].rlora_A["default"].weight.tolist())
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    model = adapt(nn.Sequential(nn.Linear(3, 4)), ["0"], init_seed=7)
    assert json.loads(run.stdout) == layers_of(model)[0].rlora_A["default"].weight.tolist()


def test_every_public_name_says_what_it_is():
    for name in rlora_min.__all__:
        assert getattr(rlora_min, name).__doc__, name
    for name in ("forward", "merge", "unmerge", "routing", "lora_pair", "get_delta_weight"):
        assert getattr(rlora_min.RLoraLayer, name).__doc__, name
    for function in (rlora_min.head_similarity, rlora_min.record_routing, rlora_min.export_lora):
        assert "ValueError" in function.__doc__
