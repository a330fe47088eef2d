"""The module is one short file that needs torch and peft alone."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

from rlora_helpers import STRICT, adapt, layers_of
from torch import nn

import rlora_min
from rlora_min import rlora

pytestmark = STRICT
SOURCE = Path(rlora.__file__)


def test_the_file_is_of_ordinary_density():
    """As dense as other libraries' LoRA layers: a line does one thing."""
    source = SOURCE.read_text()
    nodes = list(ast.walk(ast.parse(source)))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    prose = set()
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            prose.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = []
    for number, line in enumerate(source.splitlines(), 1):
        if line.strip() and not line.strip().startswith("#") and number not in prose:
            code.append(len(line))
    assert sum(code) / len(code) <= 50
    assert sum(length > 90 for length in code) <= 0.1 * len(code)
    assert len(nodes) / len(code) <= 10.5
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 45


def test_the_method_comes_first_needs_torch_alone_and_fits_into_a_cell():
    source = SOURCE.read_text()
    method = source[source.index("# ---") : source.index("# ---", source.index("def draw_table_1"))]
    lines = method.splitlines()
    assert "the method" in lines[0]
    assert len(lines) <= 130 and max(map(len, lines)) <= 85
    assert not any(re.match(r"\s*(from|import) ", line) for line in lines)
    names = {node.id for node in ast.walk(ast.parse(method)) if isinstance(node, ast.Name)}
    code = f"""
import math
from collections.abc import Callable
import torch
import torch.nn.functional as F
from torch import Tensor
{method}
x, W_r = torch.randn(2, 5, 6), torch.randn(3, 6)
A, B = torch.empty(4, 6), torch.empty(7, 12)
draw_table_1(A, B, 64)
rlora_update(x, A, B, 8, W_r, A.clone(), mean_head(B, 4))
lora_of_fixed_weights(A, B, torch.ones(3), 8)
"""
    assert not names & {"peft", "nn", "safetensors"}
    exec(compile(code, "the method alone", "exec"), {})


def test_it_is_the_only_module_beside_the_one_that_names_its_public_parts():
    assert {path.name for path in SOURCE.parent.glob("*.py")} == {"__init__.py", "rlora.py"}
    public = "RLoraConfig RLoraLayer RLoraModel export_lora head_similarity record_routing"
    assert sorted(rlora_min.__all__) == public.split()


def test_it_imports_torch_and_peft_and_what_these_bring():
    nodes = list(ast.walk(ast.parse(SOURCE.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.partition(".")[0] for name in names}
    assert packages - sys.stdlib_module_names <= {"torch", "peft", "transformers", "safetensors"}


def test_in_a_new_process_importing_it_is_enough_and_a_seed_draws_the_same_adapter():
    code = """
import sys
import rlora_min
from peft import get_peft_model
from torch import nn
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
