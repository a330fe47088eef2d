"""Chapter 12: killed, or on a full disk, a run loses nothing and goes on to the same bits."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from chapter_code import chapter_code
from peft import PeftModel, get_peft_model

from rlora_lab.models.bases import load_base
from rlora_min import RLoraConfig

KILLS = ["adapter", "seal"]

# A process that forks one child for each case; each trains, and is killed while it saves step 10.
KILLER = '''
import os, signal, sys
from pathlib import Path
from chapter_code import chapter_code

chapter = chapter_code("12_runs_that_repeat", "suite")
chapter.torch.set_num_threads(1)


def half(path, content):
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


class Arm(chapter.TrainerCallback):
    """From step 10 on, the process dies in the middle of a file."""

    def __init__(self, case):
        self.case = case

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != 10:
            return
        if self.case == "seal":
            chapter.write_whole = lambda file, text: half(file.with_name(".new"), text.encode())
            return
        import peft.peft_model, safetensors.torch
        peft.peft_model.safe_save_file = lambda tensors, path, metadata=None: half(
            path, safetensors.torch.save(tensors, metadata)
        )


for case in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        callbacks = [chapter.Seal(), Arm(case)]
        chapter.make_trainer(chapter.fresh(), Path(case), callbacks=callbacks).train()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, case
'''


@pytest.fixture(scope="module")
def chapter(tmp_path_factory):
    return chapter_code("12_runs_that_repeat", "suite", work=tmp_path_factory.mktemp("chapter"))


@pytest.fixture(scope="module")
def through(chapter, tmp_path_factory):
    """What the run ends at that nobody stops, and its folder, sealed."""
    folder = tmp_path_factory.mktemp("through")
    model = chapter.fresh()
    chapter.go_on(model, folder)
    return chapter.adapter(model), folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder with those of the runs, by case."""
    root = tmp_path_factory.mktemp("killed")
    run = subprocess.run(
        [sys.executable, "-c", KILLER, *KILLS],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return root


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("case", KILLS)
def test_after_a_kill_the_last_whole_checkpoint_leads_to_the_same_bits(
    case, killed, chapter, through
):
    folder = killed / case
    assert (folder / "checkpoint-10").is_dir()  # it was killed while it wrote this one
    assert chapter.last_whole(folder).name == "checkpoint-5"
    model = chapter.fresh(init_seed=7)  # other heads, which must not matter
    trainer = chapter.go_on(model, folder)
    assert equal(chapter.adapter(model), through[0])
    assert len(chapter.losses(trainer)) == chapter.STEPS
    assert chapter.last_whole(folder).name == f"checkpoint-{chapter.STEPS}"


def test_a_run_without_checkpoints_starts_at_the_start(chapter, tmp_path):
    assert chapter.last_whole(tmp_path) is None
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert chapter.last_whole(tmp_path) is None


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_seal_sees_every_file(chapter, through):
    checkpoint = chapter.last_whole(through[1])
    whole = files(checkpoint)
    names = {path.name for path in whole}
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "seal.json"} <= names
    for path, content in whole.items():
        for spoilt in (content[:-1], content[::-1]):
            path.write_bytes(spoilt)
            assert not chapter.is_whole(checkpoint), path.name
        path.unlink()
        assert not chapter.is_whole(checkpoint), path.name
        path.write_bytes(content)
    (checkpoint / "more.txt").write_text("x")
    assert not chapter.is_whole(checkpoint)
    (checkpoint / "more.txt").unlink()
    assert chapter.is_whole(checkpoint)


# A full disk.


def adapted():
    """With an adapter whose name gives it a folder of its own."""
    config = RLoraConfig(target_modules=["up_proj", "down_proj"])
    return get_peft_model(load_base("tiny").model, config, adapter_name="mine")


def test_save_whole_keeps_the_old_files_where_the_disk_is_full_at_the_flush(
    chapter, tmp_path, monkeypatch
):
    chapter.save_whole(adapted(), tmp_path)
    old, model = files(tmp_path), adapted()
    assert len(old) >= 2
    with monkeypatch.context() as full, pytest.raises(OSError, match="No space"):
        full.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
        chapter.save_whole(model, tmp_path)
    assert files(tmp_path) == old and not list(tmp_path.glob(".new*"))
    chapter.save_whole(model, tmp_path)  # and with room again
    loaded = PeftModel.from_pretrained(load_base("tiny").model, tmp_path / "mine")
    assert equal(chapter.adapter(loaded), chapter.get_peft_model_state_dict(model, None, "mine"))


def test_write_whole_keeps_the_old_file(chapter, tmp_path):
    file = tmp_path / "run.json"
    chapter.write_whole(file, "old")
    with pytest.raises(OSError), chapter.small_disk(3):
        chapter.write_whole(file, "longer")
    assert files(tmp_path) == {file: b"old"}


# Comparing.


def run(folder, **changes):
    folder.mkdir()
    entry = {"date": "1", "settings": {"seed": 0}, "end": "a", "loss": [3.0, 2.0]} | changes
    (folder / "run.json").write_text(json.dumps(entry))
    return folder


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"date": "2"}, []),
        ({"settings": {"seed": 1}}, ["settings.seed: 0 / 1"]),
        ({"threads": 2}, ["threads: None / 2"]),
        ({"loss": [3.0, 1.5]}, ["the loss parts at step 2: 2.000000 / 1.500000"]),
        ({"loss": [3.0]}, ["losses logged: 2 / 1"]),
        ({"end": "b"}, ["the ends differ: a / b"]),
    ],
)
def test_compare_runs_names_what_differs(changes, expected, chapter, tmp_path):
    found = chapter.compare_runs(run(tmp_path / "a"), run(tmp_path / "b", **changes))
    assert found == expected


def test_a_fingerprint_sees_one_bit(chapter):
    x = torch.randn(3, 4)
    moved = x.clone()
    moved[2, 3] = torch.nextafter(moved[2, 3], torch.tensor(9.0))
    others = [{"a": moved}, {"b": x}, {"a": x.view(4, 3)}, {"a": x.view(torch.int32)}, {}]
    others += [{"a": x, "b": x}, {"a": x.bfloat16()}, {"a": torch.tensor(1.0)}]
    prints = {chapter.fingerprint(tensors) for tensors in [{"a": x}, *others]}
    assert len(prints) == 9
    assert chapter.fingerprint({"a": x.T.contiguous().T}) == chapter.fingerprint({"a": x})
