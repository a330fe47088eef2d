"""Chapter 17's scripts, as a reader sees them: what its own asserts do not say.

The chapter proves in two processes that DDP through accelerate and torch's `fully_shard` end with
the weights of one process. Here: what it says was seen in a test, what its scripts refuse, and that
accelerate reads its configurations.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from chapter_code import chapter_code, write_files
from two_processes import QUIET

from rlora_lab.models.bases import load_base

CHAPTER = "17_many_devices"
SAID = """
import torch
from peft import get_peft_model
from rlora_lab.models.bases import load_base
from rlora_lab.tasks.strings import Synthetic
from rlora_min import RLoraConfig
from sharded import train_sharded
from torch.distributed.device_mesh import init_device_mesh
from train import make_accelerator

accelerator = make_accelerator()
model = accelerator.prepare(torch.nn.Linear(2, 2))
print(f"<{accelerator.distributed_type.value} {type(model).__name__}>")

base, examples = load_base("tiny"), Synthetic().training_set(32, 0)
config = RLoraConfig(init_seed=0, target_modules=base.targets)
model = get_peft_model(base.model.bfloat16(), config)
before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
model = train_sharded(model, init_device_mesh("cpu", (2,)), examples, 16)
after = [p.full_tensor() for p in model.parameters() if p.requires_grad]
moved = all((a != b).any().item() for a, b in zip(after, before, strict=True))
kinds = sorted({(str(p.dtype), p.requires_grad) for p in model.parameters()})
print(f"<moved: {moved}, {kinds}>")
accelerator.end_training()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The chapter's files."""
    folder = tmp_path_factory.mktemp("devices")
    write_files(CHAPTER, folder)
    return folder


def launch(folder: Path, *arguments: str, **environment: str) -> tuple[int, float, str]:
    """The chapter's own `launch`, in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in (QUIET | {"ACCELERATE_USE_CPU": "true"} | environment).items():
            patch.setenv(name, value)
        return chapter_code(CHAPTER).launch(*arguments)


def test_accelerate_stays_with_ddp_on_cpus_and_a_base_in_bf16_is_sharded(folder):
    (folder / "said.py").write_text(SAID)
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # and is not heard
    code, _, written = launch(folder, "said.py", **asked)
    assert code == 0, written
    assert written.count("<MULTI_CPU DistributedDataParallel>") == 2, written
    kinds = [("torch.bfloat16", False), ("torch.float32", False), ("torch.float32", True)]
    assert written.count(f"<moved: True, {kinds}>") == 2, written


def test_a_worker_that_is_stuck_ends_the_run(folder):
    code, seconds, written = launch(folder, "die.py", "stuck")
    assert code != 0 and seconds < 60
    assert "die.py FAILED" in written and "imed out" in written, written


def test_processes_that_do_not_know_of_each_other_are_refused(folder):
    (folder / "unaware.py").write_text("from train import make_accelerator\nmake_accelerator()\n")
    code, _, written = launch(folder, "unaware.py", ACCELERATE_USE_CPU="false")
    assert code != 0
    assert "2 processes were started, but accelerate sees 1" in written, written


def test_shares_that_are_not_even_are_refused(folder):
    train = runpy.run_path(str(folder / "train.py"))["train"]
    for processes, batch, examples in ((3, 16, 32), (2, 16, 40)):
        with pytest.raises(ValueError, match=f"{processes} processes must divide"):
            train(SimpleNamespace(num_processes=processes), None, range(examples), batch)


def test_a_model_without_blocks_is_not_cut(folder):
    base = SimpleNamespace(_no_split_modules={"LlamaDecoderLayer"})
    model = SimpleNamespace(get_base_model=lambda: base, modules=lambda: [torch.nn.Linear(1, 1)])
    with pytest.raises(ValueError, match="no block named ..LlamaDecoderLayer"):
        runpy.run_path(str(folder / "sharded.py"))["shard"](model, None)


def read_by_accelerate(name: str, folder: Path) -> SimpleNamespace:
    (folder / name).write_text(chapter_code(CHAPTER).CONFIGS[name])
    command = ["--config_file", str(folder / name), "train.py"]
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


@pytest.mark.parametrize("name", ["ddp.yaml", "two_nodes.yaml", "fsdp.yaml", "zero3.yaml"])
def test_accelerate_reads_the_configurations(name, tmp_path):
    arguments = read_by_accelerate(name, tmp_path)
    assert arguments.use_fsdp == (name == "fsdp.yaml")
    assert arguments.use_deepspeed == (name == "zero3.yaml")
    assert arguments.num_processes == (16 if name == "two_nodes.yaml" else 8)


def test_accelerates_fsdp_plugin_takes_the_values(tmp_path, monkeypatch):
    # As far as it goes without an accelerator: the values reach its plugin, and mean FSDP2.
    arguments = read_by_accelerate("fsdp.yaml", tmp_path)
    arguments.main_process_port = 0  # any that is free
    for key, value in prepare_multi_gpu_env(arguments).items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    blocks = load_base("tiny").model._no_split_modules
    assert set(plugin.transformer_cls_names_to_wrap) == set(blocks)
    assert str(plugin.state_dict_type).endswith("FULL_STATE_DICT")
