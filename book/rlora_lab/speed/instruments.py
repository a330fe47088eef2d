"""What measures: a clock that need not wait, counts of work and kernels, what a GPU says."""

import itertools
import os
import subprocess
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..models.answers import has_bf16


class Clock:
    """Reads the time where work is handed over: on a GPU by events, without waiting for it."""

    def __init__(self, device: str) -> None:
        self.cuda, self.marks = device == "cuda", []

    def mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next; waits for the GPU."""
        pairs = list(itertools.pairwise(self.marks))
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]


class Work(TorchDispatchMode):
    """Counts what is asked of the machine inside it, whatever its speed.

    `ops` holds for each operation (FLOPs of its products, bytes of the tensors that it reads and of
    those that it writes). Views move nothing. Caches are not in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        places = {t.untyped_storage()._cdata for t in read.values()}
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        if not func._schema.is_mutable:  # a view, a detached tensor: the same memory
            written = [t for t in written if t.untyped_storage()._cdata not in places]
        empty = "empty" in func.overloadpacket.__name__
        if written and not empty:
            self.ops.append((flops, sum(t.nbytes for t in [*read.values(), *written])))
        return out

    @property
    def flops(self) -> int:
        return sum(flops for flops, _ in self.ops)

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.ops)

    def floor(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Seconds, if each operation ran at the roof: the more of its arithmetic and its bytes."""
        return sum(max(f / flops_per_s, b / bytes_per_s) for f, b in self.ops)


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[int, int]:
    """What autograd keeps for the backward, each storage once: all, and all but the model's own
    parameters and buffers, which are in memory anyway."""
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no later one takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    del out
    new = sum(storage.nbytes() for place, storage in kept.items() if place not in known)
    return sum(storage.nbytes() for storage in kept.values()), new


# What a program calls to hand work to a GPU: kernels, whole graphs of them, copies and fills.
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
NO_KERNEL = ("Optimizer.", "ProfilerStep", "Torch-Compiled Region")  # names for a span of several


def profile_work(work: Callable[[], object], device: str) -> dict:
    """What `work` asks of the device, called once.

    Returns:
        `launches`, how often it was handed something (on a CPU: PyTorch's operations), and
        `kernels`, [name, how often, seconds] of all that ran, the longest first.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says on stderr that it begins and ends
    cuda = device == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        work()
        if cuda:
            torch.cuda.synchronize()
    launches = 0
    kernels: dict[str, list] = {}
    for event in seen.events():
        if event.name.startswith(NO_KERNEL):
            continue
        if cuda and event.device_type == DeviceType.CPU:
            launches += event.name.startswith(LAUNCHES)
            continue
        microseconds = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        entry = kernels.setdefault(event.name[:120], [0, 0.0])
        entry[0] += 1
        entry[1] += microseconds / 1e6
    if not launches:  # on a CPU, and where calls are not in the profile
        launches = sum(times for times, _ in kernels.values())
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])
    return {
        "launches": launches,
        "kernels": [[name, times, round(seconds, 7)] for name, (times, seconds) in longest],
    }


def ask_gpu(*names: str) -> dict[str, str]:
    """What `nvidia-smi` says of the GPU in use: `{name: value}`; nothing where it is not there."""
    if not torch.cuda.is_available():
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        command.append(f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}")
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, AttributeError, subprocess.SubprocessError):
        return {}
    values = said.stdout.strip().splitlines()[0].split(", ")
    return dict(zip(names, values, strict=True))


def measure_roof(device: str, dtype: torch.dtype, small: bool = False) -> dict[str, float]:
    """The best that a large product and a large copy reach here, in numbers a second; of `small`
    ones for a rehearsal."""
    n, repeats = (8192, 10) if device == "cuda" else (1536, 5)
    if device == "cpu" and dtype == torch.bfloat16 and not has_bf16():
        n = 512  # without units for it a CPU is a hundred times slower
    if small:
        n, repeats = 64, 2
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.empty(n * n if small else 2**26, device=device, dtype=dtype)
    c = torch.empty_like(b).copy_(b.fill_(1))

    def best(work: Callable[[], object]) -> float:
        clock = Clock(device)
        work()
        for _ in range(repeats + 1):
            clock.mark()
            work()
        return min(clock.seconds())

    return {
        "flops_per_s": 2 * n**3 / best(lambda: a @ a),
        "bytes_per_s": 2 * b.nbytes / best(lambda: c.copy_(b)),
    }
