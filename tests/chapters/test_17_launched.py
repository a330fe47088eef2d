"""Chapter 17's configurations, run by `accelerate launch` in two processes on CPUs.

accelerate starts FSDP and DeepSpeed on accelerators only; `on_cpus.py` tells it that gloo is one.
All else is as the reader has it: the text of the files is the notebook's, but for the model, which
is in fp32, as the chapter says it should be for real training.
"""

import runpy
from pathlib import Path

import pytest
import torch
from chapter_code import chapter_code, write_files
from one_step import far
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity
from torch.optim import SGD
from torch.utils.data import default_collate
from two_processes import run_two

from rlora_lab.models.bases import load_base

CHAPTER = "17_many_devices"
ON_CPUS = """
import os, runpy, sys
from accelerate import state
from accelerate.utils import DistributedType

def backend(self, *arguments, **settings):
    return "gloo", DistributedType.MULTI_GPU

state.PartialState._prepare_backend = backend
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
os._exit(0)  # DeepSpeed on CPUs now and then aborts as the interpreter ends
"""
# One step of plain gradient descent, because AdamW hides a wrong factor.
ONE_STEP = """
from common import BATCH, make_examples, make_model
from torch.optim import SGD
from train import make_accelerator, save, train

accelerator = make_accelerator()
model = train(accelerator, make_model(), make_examples()[:BATCH], BATCH, 1.0, SGD)
save(accelerator, model, "one-step")
accelerator.end_training()
"""
LAUNCH = ("accelerate.commands.launch", "--num_processes=2", "--main_process_port=0")
CONFIGS = [
    "fsdp.yaml",
    pytest.param("zero3.yaml", marks=pytest.mark.integrations),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The chapter's files."""
    folder = tmp_path_factory.mktemp("launched")
    write_files(CHAPTER, folder)
    common = (folder / "common.py").read_text()
    # In bf16, and so not as far off the start as in float64: the sum would be rounding.
    for old, new in ((".double()", ""), ("moved=0.1", "moved=0.01")):
        assert common.count(old) == 1
        common = common.replace(old, new)
    (folder / "common.py").write_text(common)
    for name, text in chapter_code(CHAPTER).CONFIGS.items():
        (folder / name).write_text(text)
    (folder / "on_cpus.py").write_text(ON_CPUS)
    (folder / "one_step_of_it.py").write_text(ONE_STEP)
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def launched(request, written) -> Path:
    """The folder, after both scripts ran under a configuration."""
    for script in ("train.py", "one_step_of_it.py"):
        run_two(
            Path("on_cpus.py"),
            script,
            folder=written,
            launcher=(*LAUNCH, "--config_file", request.param),
            ACCELERATE_TORCH_DEVICE="cpu",
            DS_ACCELERATOR="cpu",
        )
    return written


@pytest.fixture
def files(launched, monkeypatch) -> dict:
    """What the chapter's files define, imported here: one process, which has the whole batch."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    common, train = (runpy.run_path(str(launched / name)) for name in ("common.py", "train.py"))
    return common | train


def trained_in(adapter: dict) -> list[str]:
    return [name for name in adapter if ".rlora_A0." not in name and ".rlora_B0." not in name]


def test_a_step_is_that_of_one_process(launched, files):
    model = files["make_model"]()
    start = {k: t.clone() for k, t in get_peft_model_state_dict(model).items()}
    rows = default_collate(files["make_examples"]()[: files["BATCH"]])
    model(**rows).loss.backward()
    SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    plain = get_peft_model_state_dict(model)
    saved = load_file(launched / "one-step" / "adapter_model.safetensors")
    assert saved.keys() == plain.keys()
    for name in plain.keys() - trained_in(plain):
        assert saved[name].equal(start[name]), name
    for name in trained_in(plain):
        # A step in bf16, of 8 bits, through two blocks; the plain one is in fp32.
        assert far(saved[name].float() - start[name], plain[name] - start[name]) < 0.15, name


def test_training_leaves_an_adapter_that_loads(launched, files):
    start = get_peft_model_state_dict(files["make_model"]())
    model = files["train"](
        files["make_accelerator"](), files["make_model"](), files["make_examples"](), files["BATCH"]
    )
    plain = get_peft_model_state_dict(model)
    saved = load_file(launched / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == plain.keys()
    ours, theirs = (
        torch.cat([(state[name] - start[name]).flatten() for name in trained_in(plain)])
        for state in (saved, plain)
    )
    # Five steps of AdamW go the same way, each as long as the rate says.
    assert cosine_similarity(ours, theirs, 0) > 0.98
    assert ours.norm() / theirs.norm() == pytest.approx(1, abs=0.05)
    loaded = PeftModel.from_pretrained(load_base("tiny").model, launched / "adapter").eval()
    batch = default_collate(files["make_examples"]()[:16])
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        assert far(loaded(**batch).logits, expected) < 0.03
        with loaded.disable_adapter():
            assert far(loaded(**batch).logits, expected) > 0.1
