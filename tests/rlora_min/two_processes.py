"""Two processes on this machine that talk by gloo, which never outlive their test."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from one_step import LR, Step, trains
from rlora_helpers import output
from torch import Tensor, nn

HERE = Path(__file__).parent
QUIET = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
}
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run_two(
    script: Path, *arguments: str | Path, folder: Path, launcher=TORCHRUN, limit=180, **environment
) -> str:
    """Run a script in two processes that find the tests' helpers; what they wrote.

    AssertionError: they failed. TimeoutExpired: they took longer than `limit` seconds.
    """
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, script, *map(str, arguments)],
        cwd=folder,
        env=os.environ | QUIET | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        written, _ = process.communicate(timeout=limit)
    except BaseException:
        # The launcher's children are in sessions of their own.
        started = psutil.Process(process.pid).children(recursive=True)
        for each in (process, *started):
            each.kill()
        raise
    assert process.returncode == 0, written
    return written


def shares(inputs: dict) -> list[dict]:
    """The batch of each rank."""
    return [{key: value[i : i + 2] for key, value in inputs.items()} for i in (0, 2)]


def in_shares(model: nn.Module, inputs: dict) -> Tensor:
    """The output of one process, computed in the ranks' shares: as they round, it rounds."""
    return torch.cat([output(model, share) for share in shares(inputs)])


def step_of_both(out: Tensor, before: dict[str, Tensor], after: dict[str, Tensor]) -> Step:
    """Their outputs, and the whole adapter before and after: it moved by LR times the gradient."""
    outputs = [torch.empty_like(out) for _ in range(2)]
    dist.all_gather(outputs, out.detach().contiguous())
    moved = {name: p - before[name] for name, p in after.items()}
    gradients = {name: -p / LR for name, p in moved.items() if trains(name)}
    return Step(torch.cat(outputs), gradients, moved)
