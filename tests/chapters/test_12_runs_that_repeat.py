"""Chapter 12: killed, or on a full disk, a run loses nothing and goes on to the same bits."""

import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from chapter_code import chapter_code
from peft import PeftModel, get_peft_model

from rlora_lab.models.bases import load_base
from rlora_min import RLoraConfig

NOTEBOOK, SUITE = "12_runs_that_repeat", "suite"
KILLS = ["adapter", "in the seal", "from outside"]
SIGKILLED = -signal.SIGKILL

# A process that forks one child for each case; each trains, and is killed while it saves step 10.
KILLER = '''
import os, signal, sys, time
from pathlib import Path
from chapter_code import chapter_code

chapter = chapter_code("12_runs_that_repeat", "suite")
chapter.torch.set_num_threads(1)


def half(path, content):
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def arm(case):
    """From now on, the process dies at its place in the next save."""
    import peft.peft_model

    def save_file(tensors, path, metadata=None):
        import safetensors.torch
        half(path, safetensors.torch.save(tensors, metadata))

    if case == "adapter":
        peft.peft_model.safe_save_file = save_file
    elif case == "in the seal":
        chapter.write_whole = lambda file, text: half(file.with_name(".new"), text.encode())


class Arm(chapter.TrainerCallback):
    def __init__(self, case):
        self.case = case

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 10:
            arm(self.case)


for case, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    child = os.fork()
    if child == 0:
        callbacks = [chapter.Seal(), Arm(case)]
        chapter.make_trainer(chapter.fresh(), Path(folder), callbacks=callbacks).train()
        os._exit(0)
    if case == "from outside":
        while not os.path.exists(f"{folder}/checkpoint-10/optimizer.pt"):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
    print(case, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sep="\\t")
'''


@pytest.fixture(scope="module")
def chapter(tmp_path_factory):
    return chapter_code(NOTEBOOK, SUITE, work=tmp_path_factory.mktemp("chapter"))


@pytest.fixture(scope="module")
def through(chapter, tmp_path_factory):
    """What the run ends at that nobody stops, and its folder, sealed."""
    folder = tmp_path_factory.mktemp("through")
    model = chapter.fresh()
    chapter.go_on(model, folder)
    return chapter.adapter(model), folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """`{case: (how the process ended, its folder)}`."""
    root = tmp_path_factory.mktemp("killed")
    folders = {case: root / str(i) for i, case in enumerate(KILLS)}
    arguments = [str(part) for pair in folders.items() for part in pair]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", KILLER, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    ends = dict(line.split("\t") for line in run.stdout.splitlines() if "\t" in line)
    return {case: (int(ends[case]), folders[case]) for case in KILLS}


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("case", KILLS)
def test_after_a_kill_the_last_whole_checkpoint_leads_to_the_same_bits(
    case, killed, chapter, through
):
    end, folder = killed[case]
    assert end == SIGKILLED
    last, half = chapter.last_whole(folder), folder / "checkpoint-10"
    assert half.is_dir(), "it was killed before it wrote anything"
    if case != "from outside":
        assert not chapter.is_whole(half)
        assert last.name == "checkpoint-5"
    assert last.name in ("checkpoint-5", "checkpoint-10")
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
    return [p for p in sorted(folder.rglob("*")) if p.is_file()]


def test_a_seal_sees_every_file(chapter, through):
    checkpoint = chapter.last_whole(through[1])
    assert chapter.is_whole(checkpoint)
    names = {p.name for p in files(checkpoint)}
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "seal.json"} <= names
    for path in files(checkpoint):
        content = path.read_bytes()
        for spoilt in (content[:-1], content + b"x", content[:50] + b"\0" + content[51:]):
            if spoilt != content:
                path.write_bytes(spoilt)
                # a seal may end in white space or not
                assert not chapter.is_whole(checkpoint) or path.name == "seal.json"
        path.unlink()
        assert not chapter.is_whole(checkpoint), path.name
        path.write_bytes(content)
    (checkpoint / "more.txt").write_text("x")
    assert not chapter.is_whole(checkpoint)
    (checkpoint / "more.txt").unlink()
    assert chapter.is_whole(checkpoint)


# A full disk.


def adapted(name: str):
    config = RLoraConfig(target_modules=["up_proj", "down_proj"])
    return get_peft_model(load_base("tiny").model, config, adapter_name=name)


@contextmanager
def no_flush():
    """The disk is found to be full only when the file should reach it."""

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


DISKS = {
    "some bytes": lambda chapter: chapter.small_disk(600),
    "full at the configuration": lambda chapter: chapter.full_at_config(),
    "full at the flush": lambda chapter: no_flush(),
}


@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("name", ["default", "mine"])
def test_save_whole_keeps_the_old_files_on_a_full_disk(name, disk, chapter, tmp_path):
    chapter.save_whole(adapted(name), tmp_path)
    old = {path: path.read_bytes() for path in files(tmp_path)}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {p.name for p in old}
    model = adapted(name)
    with pytest.raises(Exception), DISKS[disk](chapter):  # noqa: B017 (each library has its own)
        chapter.save_whole(model, tmp_path)
    assert {path: path.read_bytes() for path in files(tmp_path)} == old
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".new")]
    chapter.save_whole(model, tmp_path)  # and with room again
    assert {path.name for path in files(tmp_path)} == {path.name for path in old}
    where = tmp_path if name == "default" else tmp_path / name
    loaded = PeftModel.from_pretrained(load_base("tiny").model, where)
    assert equal(chapter.adapter(loaded), chapter.get_peft_model_state_dict(model, None, name))


def test_write_whole_keeps_the_old_file(chapter, tmp_path):
    file = tmp_path / "run.json"
    chapter.write_whole(file, "old")
    with pytest.raises(OSError), chapter.small_disk(3):
        chapter.write_whole(file, "longer")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


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
    prints = [chapter.fingerprint(tensors) for tensors in [{"a": x}, *others]]
    assert len(set(prints)) == len(prints)
    assert chapter.fingerprint({"a": x.clone()}) == prints[0]
    assert chapter.fingerprint({"a": x.T.contiguous().T}) == prints[0]
