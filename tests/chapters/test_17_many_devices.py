"""Chapter 17's scripts, as a reader sees them, in one process and in two.

Two processes on CPUs, by torchrun and gloo, each run within a minute: DDP through accelerate and
torch's `fully_shard` end with the weights of one process that has the whole batch, and what was
made wrong on purpose does not. A run whose worker is killed or stuck ends with an error.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chapter_code import cell_code, chapter_values, write_files
from peft import PeftModel
from safetensors.torch import load_file

from rlora_lab.models.bases import load_base
from rlora_lab.tasks.strings import Synthetic

CHAPTER = "17_many_devices"
ENVIRONMENT = os.environ | {
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
}
# The one process to compare with: the same files, imported.
ALONE = """
import json
from common import BATCH, make_examples, make_model
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch.optim import SGD, AdamW
from train import make_accelerator, train
alone = make_accelerator()
save_file(get_peft_model_state_dict(make_model()), "start.safetensors")
for optimizer, lr in ((AdamW, 1e-3), (SGD, 1e-2)):
    model = train(alone, make_model(), make_examples(), BATCH, lr, optimizer)
    save_file(get_peft_model_state_dict(model), f"{optimizer.__name__}.safetensors")
"""
# Two things that the chapter says were seen in a test, in two processes.
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


def launch(folder: Path, *arguments: str, **environment: str) -> tuple[int, float, str]:
    """The chapter's own `launch`, in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in (ENVIRONMENT | environment).items():
            patch.setenv(name, value)
        return cell_code(CHAPTER, "launch").launch(*arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The chapter's files, after `prove.py` in two processes and its references in one."""
    folder = tmp_path_factory.mktemp("devices")
    write_files(CHAPTER, folder)
    code, _, written = launch(folder, "prove.py")
    assert code == 0, written
    run = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return folder


def largest(a: Path, b: Path) -> float:
    one, other = load_file(a), load_file(b)
    assert one.keys() == other.keys() and one
    assert {t.dtype for t in one.values()} == {torch.float64}
    return max((one[key] - other[key]).abs().max().item() for key in one)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_two_processes_give_the_weights_of_one(folder, optimizer):
    alone = folder / f"{optimizer}.safetensors"
    for rank in (0, 1):
        assert largest(folder / f"{optimizer}-nothing-{rank}.safetensors", alone) < 1e-6
    assert largest(folder / "start.safetensors", alone) > 1e-4  # it was trained


def test_every_trained_tensor_has_left_its_start(folder):
    start, end = (load_file(folder / f"{n}.safetensors") for n in ("start", "AdamW"))
    trained = [key for key in end if not re.search("rlora_[AB]0", key)]
    assert len(trained) == 3 * 6  # A, heads and router of six layers
    assert all((start[key] - end[key]).abs().max() > 1e-4 for key in trained)


@pytest.mark.parametrize(
    ("optimizer", "wrong"), [("AdamW", "half"), ("SGD", "half"), ("SGD", "sum")]
)
def test_what_was_made_wrong_is_seen(folder, optimizer, wrong):
    ranks = [folder / f"{optimizer}-{wrong}-{rank}.safetensors" for rank in (0, 1)]
    assert largest(ranks[0], folder / f"{optimizer}.safetensors") > 1e-5
    assert largest(*ranks) == 0  # the ranks agree with each other all the same


def test_adamw_hides_a_wrong_factor(folder):
    # What the chapter says: the reason why the proof has a second optimizer.
    sum_, half = (folder / f"AdamW-{wrong}-0.safetensors" for wrong in ("sum", "half"))
    alone = folder / "AdamW.safetensors"
    assert largest(sum_, alone) < largest(half, alone) / 10


def test_fully_shard_trains_saves_and_reloads_the_same_adapter(folder):
    saved = folder / "sharded" / "adapter_model.safetensors"
    assert largest(saved, folder / "AdamW.safetensors") < 1e-6
    batch = Synthetic().batch(16, seed=5, split="test")
    models = [load_base("tiny").model.double() for _ in range(2)]
    models[0] = PeftModel.from_pretrained(models[0], folder / "sharded")
    unlike = (models[1](**batch).logits - models[0].eval()(**batch).logits).abs().max()
    config = json.loads((folder / "sharded" / "adapter_config.json").read_text())
    assert config["peft_type"] == "RLORA" and config["init_seed"] == 0
    assert unlike > 0.1  # the adapter does something
    (folder / "plain").mkdir()
    (folder / "plain" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "plain" / "adapter_model.safetensors").write_bytes(
        (folder / "AdamW.safetensors").read_bytes()
    )
    plain = PeftModel.from_pretrained(load_base("tiny").model.double(), folder / "plain").eval()
    difference = plain(**batch).logits - models[0](**batch).logits
    assert difference.abs().max() < 1e-6


def facts_of(folder: Path) -> list[dict]:
    return [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in (0, 1)]


def test_a_cut_at_each_A_gives_the_same_output(folder):
    for facts in facts_of(folder):
        assert facts["cut at A"] < 1e-10


@pytest.mark.parametrize("way", ["DDP", "fully_shard"])
@pytest.mark.parametrize("init_seed", [None, 0])
def test_every_rank_starts_at_the_base(folder, way, init_seed):
    """Without a seed the ranks draw different numbers; the pair goes where A and the heads go."""
    for facts in facts_of(folder):
        assert facts[f"{way}, init_seed={init_seed}"] < 1e-5


def test_only_the_adapters_gradients_are_sent(folder):
    base = load_base("tiny").model
    everything = 4 * sum(p.numel() for p in base.parameters())
    trained = sum(
        t.numel()
        for k, t in load_file(folder / "AdamW.safetensors").items()
        if not re.search("rlora_[AB]0", k)
    )
    for facts in facts_of(folder):
        assert facts["bytes"] == 4 * trained < everything / 5


@pytest.mark.parametrize("how", ["killed", "stuck"])
def test_a_worker_that_fails_ends_the_run(folder, how):
    code, seconds, written = launch(folder, "die.py", *(["stuck"] if how == "stuck" else []))
    assert code != 0 and seconds < 60
    assert "ChildFailedError" in written and "die.py FAILED" in written
    assert ("SIGKILL" if how == "killed" else "imed out") in written, written


def test_processes_that_do_not_know_of_each_other_are_refused(folder):
    (folder / "unaware.py").write_text("from train import make_accelerator\nmake_accelerator()\n")
    code, _, written = launch(folder, "unaware.py", ACCELERATE_USE_CPU="false")
    assert code != 0
    assert "2 processes were started, but accelerate sees 1" in written, written


def test_shares_that_are_not_even_are_refused(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "train", raising=False)
    from train import train

    monkeypatch.delitem(sys.modules, "train")  # others may have a file of this name
    for processes, batch, examples in ((3, 16, 32), (2, 16, 40)):
        with pytest.raises(ValueError, match=f"{processes} processes must divide"):
            train(SimpleNamespace(num_processes=processes), None, range(examples), batch)


@pytest.fixture(scope="module")
def said(folder) -> str:
    (folder / "said.py").write_text(SAID)
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    code, _, written = launch(folder, "said.py", **asked)
    assert code == 0, written
    return written


def test_on_cpus_accelerate_stays_with_ddp_even_if_fsdp_is_asked_for(said):
    assert said.count("<MULTI_CPU DistributedDataParallel>") == 2, said


def test_a_frozen_base_in_bf16_is_sharded_with_its_adapter_in_fp32(said):
    kinds = [("torch.bfloat16", False), ("torch.float32", False), ("torch.float32", True)]
    assert said.count(f"<moved: True, {kinds}>") == 2, said


def test_a_model_without_blocks_is_not_cut(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    from sharded import shard

    monkeypatch.delitem(sys.modules, "sharded")
    base = SimpleNamespace(_no_split_modules={"LlamaDecoderLayer"})
    model = SimpleNamespace(get_base_model=lambda: base, modules=lambda: [torch.nn.Linear(1, 1)])
    with pytest.raises(ValueError, match="no block named ..LlamaDecoderLayer"):
        shard(model, None)


@pytest.mark.parametrize("name", ["ddp.yaml", "two_nodes.yaml", "fsdp.yaml", "zero3.yaml"])
def test_accelerate_reads_the_configurations(name, tmp_path, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = tmp_path / name
    path.write_text(chapter_values(CHAPTER, "CONFIGS")[name])
    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(path), "train.py"])
    arguments, config, _ = _validate_launch_command(arguments)
    assert arguments.use_fsdp == (name == "fsdp.yaml")
    assert arguments.use_deepspeed == (name == "zero3.yaml")
    assert arguments.num_processes == (16 if name == "two_nodes.yaml" else 8)
    known = {action.dest for action in parser._actions}
    assert (config.fsdp_config | config.deepspeed_config).keys() <= known
    path.write_text(path.read_text() + "number_of_gpus: 8\n")
    with pytest.raises(ValueError, match="number_of_gpus"):
        load_config_from_file(str(path))


def test_accelerates_fsdp_plugin_takes_the_values(tmp_path, monkeypatch):
    # As far as it goes without an accelerator: the values reach its plugin, and mean FSDP2.
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = tmp_path / "fsdp.yaml"
    path.write_text(chapter_values(CHAPTER, "CONFIGS")["fsdp.yaml"])
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    arguments.main_process_port = 0  # any that is free
    for key, value in prepare_multi_gpu_env(arguments).items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    assert set(plugin.transformer_cls_names_to_wrap) == set(
        load_base("tiny").model._no_split_modules
    )
    assert str(plugin.state_dict_type).endswith("FULL_STATE_DICT")
