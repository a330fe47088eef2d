"""`python -m rlora_lab speed`: what a step costs with each adapter, in time, memory and arithmetic.

Methods run in turn, one step each, in an order that is drawn anew each round, so whatever else the
machine does falls on all of them. A ratio is the median over rounds of the ratio within the round.

| method | what |
| --- | --- |
| `base` | the frozen model, gradients for its input alone |
| `lora` | PEFT's LoRA, at the one rank whose size comes closest to that of `rlora` |
| `rlora` | `rlora_min` |
| `published-rlora`, `published-hydralora` | `rlora_lab.models.published_loops`: a loop over heads |
| `exported` | in generation: `rlora` as `export_lora` writes it, loaded as PEFT's LoRA |

Models are the blocks of Qwen2.5 with random weights, shared by all methods, and get embeddings;
vocabulary and head, which no adapter here touches, are left out. Adapters sit on the MLP
projections.

A result, one JSON file a run:

    command, date, machine, threads, versions, complete
    config      device, quick
    roof        {dtype: {"flops_per_s", "bytes_per_s"}}: the best of a large product and a copy
    records     one for each case and method: study, shape, layers, batch, tokens, dtype, r,
                num_heads, lora_dropout, checkpointing, compiled, rounds, generate (the case; see
                `Case`), method, trainable (parameters), rank (of `lora`), skipped (why, or null),
                seconds ({"forward", "backward", "optimizer"} or {"token"}: a number each round, in
                rounds that the methods of a case share), kept_bytes (by autograd for the backward),
                kept_own_bytes (of these, not parameters; both null if checkpointing or compiled),
                flops and bytes (of a forward and backward: see `Work`), floor_s (what the roof
                allows for these), peak_bytes (CUDA: most memory in use in a step, above what
                stands before it)
    bars        one for each bar: see `verdicts`
"""

import copy
import gc
import itertools
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from scipy import stats
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import DynamicCache, Qwen2Config, Qwen2Model

from rlora_min import RLoraConfig, export_lora

from ..errors import LabError
from ..models.bases import TARGETS
from ..models.methods import rlora_size
from ..models.published_loops import PublishedHydraLora, PublishedRLora, publish
from ..runs.record import environment, write_result

# From the models' public configurations.
SHAPES = {
    "Qwen2.5-0.5B": {"hidden": 896, "mlp": 4864, "heads": 14, "kv_heads": 2, "layers": 24},
    "Qwen2.5-1.5B": {"hidden": 1536, "mlp": 8960, "heads": 12, "kv_heads": 2, "layers": 28},
    "Qwen2.5-7B": {"hidden": 3584, "mlp": 18944, "heads": 28, "kv_heads": 4, "layers": 28},
}
MLP = TARGETS["gate_proj"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PUBLISHED = {"published-rlora": PublishedRLora, "published-hydralora": PublishedHydraLora}
PAIR = ("base", "lora", "rlora")
ALL = (*PAIR, *PUBLISHED)
WARM_UP = 2  # rounds that are not counted


@dataclass(frozen=True)
class Case:
    """One setting that methods are compared in. `study` names what it is measured for."""

    study: str = "bars"
    shape: str = "Qwen2.5-0.5B"
    layers: int = 2
    batch: int = 4
    tokens: int = 128
    dtype: str = "fp32"  # or "bf16": the base in bf16, adapters in fp32, under autocast
    r: int = 4
    num_heads: int = 5
    lora_dropout: float = 0.1
    checkpointing: bool = False
    compiled: bool = False
    rounds: int = 40
    generate: int = 0  # tokens a round, after a prompt of `tokens`; 0: training steps

    def words(self, other: "Case | None" = None) -> str:
        """The case in words; with `other`, only what differs from that one."""
        words = {
            self.shape: "shape",
            f"{self.layers} layer{'s' * (self.layers > 1)}": "layers",
            f"{self.batch} x {self.tokens} tokens": ("batch", "tokens"),
            self.dtype: "dtype",
            f"r {self.r}": "r",
            f"{self.num_heads} head{'s' * (self.num_heads > 1)}": "num_heads",
            f"dropout {self.lora_dropout:g}": "lora_dropout",
            ("" if self.checkpointing else "no ") + "checkpointing": "checkpointing",
            "compiled" if self.compiled else "eager": "compiled",
            f"{self.generate} tokens generated" if self.generate else "trained": "generate",
        }

        def differs(names: str | tuple[str, ...]) -> bool:
            names = (names,) if isinstance(names, str) else names
            return other is None or any(getattr(self, n) != getattr(other, n) for n in names)

        return ", ".join(text for text, names in words.items() if differs(names))


def cases(device: str, quick: bool) -> dict[Case, tuple[str, ...]]:
    """What the command runs: `{case: methods}`. The first case holds most of the bars."""
    if device == "cuda":  # whole models
        first = Case(batch=6, tokens=512, dtype="bf16", layers=24)
    else:
        first = Case()
    few, some = (4, 6) if quick else (12, 24)
    first = replace(first, rounds=some if quick else 40)
    vary = partial(replace, first)
    half = vary(study="dtype", dtype="fp32", rounds=some)
    if device == "cpu":  # most CPUs have no units for bf16, and are a hundred times slower
        half = replace(half, dtype="bf16", layers=1, batch=1, tokens=32)
    runs = {
        first: ALL,
        vary(study="heads", num_heads=32, rounds=some): PAIR,
        vary(study="checkpointing", checkpointing=True, rounds=some): PAIR,
        vary(study="generation", rounds=some, generate=8): (
            *PAIR,
            "exported",
        ),
        half: PAIR,
        # one block is compiled as well as two, in half the time
        vary(
            study="compiled",
            compiled=True,
            rounds=some,
            layers=first.layers if device == "cuda" else 1,
        ): PAIR,
    }
    if quick:
        return runs
    for N in (1, 2, 8, 16):
        runs[vary(study="heads", num_heads=N, rounds=few)] = (*PAIR, "published-rlora")
    for r in (1, 16, 64):
        runs[vary(study="rank", r=r, rounds=few)] = PAIR
    runs[vary(study="dropout", lora_dropout=0.0, rounds=few)] = ALL
    for batch, tokens in ((1, 32), (1, 128), (4, 512)):
        runs[vary(study="tokens", batch=batch, tokens=tokens, rounds=few)] = PAIR
    for shape, on_cpu in (("Qwen2.5-1.5B", 2), ("Qwen2.5-7B", 1)):
        layers = SHAPES[shape]["layers"] if device == "cuda" else on_cpu
        rounds = few if device == "cuda" else 8  # seconds each
        runs[vary(study="width", shape=shape, layers=layers, rounds=rounds)] = PAIR
    return runs


def make_base(case: Case, device: str) -> Qwen2Model:
    """The blocks with random weights, frozen, ready to train."""
    shape = SHAPES[case.shape]
    config = Qwen2Config(
        hidden_size=shape["hidden"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=case.layers,
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        vocab_size=1,  # it is given embeddings
    )
    with torch.device(device):
        base = Qwen2Model(config).requires_grad_(False).to(DTYPES[case.dtype])
    if case.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return base.train()


def equal_rank(base: nn.Module, case: Case) -> int:
    """The one LoRA rank for all MLP projections that comes closest to R-LoRA's size, router
    counted."""
    shape = SHAPES[case.shape]
    ways = [(shape["hidden"], shape["mlp"])] * 2 + [(shape["mlp"], shape["hidden"])]
    wanted = sum(rlora_size(*way, case.r, case.num_heads) for way in ways)
    return max(1, round(wanted / sum(i + o for i, o in ways)))


def make_model(method: str, base: Qwen2Model, case: Case) -> nn.Module:
    """The base with an adapter; it shares the base's weights, and the base stays as it is."""
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    settings = {"lora_alpha": 32, "lora_dropout": case.lora_dropout, "target_modules": MLP}
    rlora = RLoraConfig(r=case.r, num_heads=case.num_heads, init_seed=0, **settings)
    if method == "lora":
        rank = equal_rank(base, case)
        model = get_peft_model(model, LoraConfig(r=rank, use_rslora=True, **settings))
    elif method == "rlora":
        model = get_peft_model(model, rlora)
    elif method == "exported":
        with tempfile.TemporaryDirectory() as folder:
            export_lora(make_model("rlora", base, replace(case, compiled=False)), folder)
            model = PeftModel.from_pretrained(model, folder)
    elif method in PUBLISHED:
        sizes = {"r": case.r, "num_heads": case.num_heads, "alpha": 32}
        with torch.device(base.device):
            publish(model, PUBLISHED[method], MLP, dropout=case.lora_dropout, **sizes)
    elif method != "base":
        raise LabError(f"unknown method {method!r}: allowed are {', '.join([*ALL, 'exported'])}")
    return torch.compile(model) if case.compiled else model


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


def measure_roof(device: str, dtype: torch.dtype) -> dict[str, float]:
    """The best that a large product and a large copy reach here, in numbers a second."""
    n, repeats = (8192, 10) if device == "cuda" else (1536, 5)
    if device == "cpu" and dtype == torch.bfloat16:
        n = 512  # most CPUs have no units for it, and are a hundred times slower
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.empty(2**26, device=device, dtype=dtype)
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


class Runner:
    """One method of one case: its model, its input, and its record."""

    def __init__(self, method: str, base: Qwen2Model, case: Case, device: str) -> None:
        self.case, self.device, self.hidden = case, device, base.config.hidden_size
        self.model = make_model(method, base, case)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(case.batch, case.tokens, self.hidden, generator=generator)
        self.x = x.to(device, DTYPES[case.dtype]).requires_grad_(not case.generate)
        self.autocast = nullcontext
        if case.dtype == "bf16":
            self.autocast = partial(torch.autocast, device, torch.bfloat16)
        self.record = asdict(case) | {
            "method": method,
            "trainable": sum(p.numel() for p in trained),
            "rank": equal_rank(base, case) if method == "lora" else None,
            "skipped": None,
            "seconds": {},
            **dict.fromkeys(("kept_bytes", "kept_own_bytes")),
            **dict.fromkeys(("flops", "bytes", "floor_s", "peak_bytes")),
        }

    def loss(self) -> Tensor:
        with self.autocast():
            out = self.model(inputs_embeds=self.x, use_cache=False).last_hidden_state
        return out.float().square().mean()

    def step(self) -> dict[str, float]:
        """One training step, in seconds."""
        clock = Clock(self.device)
        self.x.grad = None
        clock.mark()
        loss = self.loss()
        clock.mark()
        loss.backward()
        clock.mark()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()
        clock.mark()
        return dict(zip(("forward", "backward", "optimizer"), clock.seconds(), strict=True))

    @torch.no_grad()
    def generate(self) -> dict[str, float]:
        """Token after token with a cache, in seconds a token."""
        clock = Clock(self.device)
        self.model.eval()
        cache, x = DynamicCache(), self.x
        for i in range(self.case.generate + 1):  # the first call reads the prompt
            with self.autocast():
                out = self.model(inputs_embeds=x, past_key_values=cache, use_cache=True)
            x = out.last_hidden_state[:, -1:].to(self.x.dtype)
            if i in (0, self.case.generate):
                clock.mark()
        return {"token": clock.seconds()[0] / self.case.generate}

    def turn(self) -> dict[str, float]:
        return self.generate() if self.case.generate else self.step()

    def count(self, roof: dict[str, float]) -> None:
        """Record what does not depend on the time of day; counts as warm-up."""
        case = self.case
        if self.device == "cuda":
            self.turn()  # makes the optimizer's state
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.turn()
            self.record["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        if case.compiled or case.generate:
            return
        with Work() as work:
            self.loss().backward()
        self.record |= {"flops": work.flops, "bytes": work.bytes, "floor_s": work.floor(**roof)}
        if not case.checkpointing:
            kept, own = kept_bytes(self.model, self.loss)
            self.record |= {"kept_bytes": kept, "kept_own_bytes": own}
        self.model.zero_grad()


def run_case(
    case: Case,
    methods: Iterable[str],
    device: str,
    roof: dict[str, float],
    on_round: Callable[[], None] = lambda: None,
) -> list[dict]:
    """Measure methods in turn; their records. One that finds no memory is skipped, and says so."""
    torch.manual_seed(0)
    base, runners, skipped = make_base(case, device), [], []
    for method in methods:
        runner = Runner(method, base, case, device)
        try:
            runner.count(roof)
            for _ in range(WARM_UP):
                runner.turn()
        except torch.cuda.OutOfMemoryError:
            runner.model.zero_grad()
            skipped.append(runner.record | {"skipped": "out of memory"})
        else:
            runners.append(runner)
    order = random.Random(0)
    for _ in range(case.rounds):
        gc.collect()
        gc.disable()
        for runner in order.sample(runners, len(runners)):
            for phase, seconds in runner.turn().items():
                runner.record["seconds"].setdefault(phase, []).append(round(seconds, 7))
        gc.enable()
        on_round()
    return [runner.record for runner in runners] + skipped


def times(record: dict, phase: str) -> np.ndarray:
    """Seconds of a phase in each round; the phase "step" is forward, backward and optimizer."""
    seconds = record["seconds"]
    return np.sum(list(seconds.values()), axis=0) if phase == "step" else np.array(seconds[phase])


def find(result: dict, method: str, **case) -> dict | None:
    """The first record of a method whose case is like this, such as `study="bars"` or
    `num_heads=32`, if it was measured."""
    wanted = {"method": method, "skipped": None, **case}
    for record in result["records"]:
        if all(record[key] == value for key, value in wanted.items()):
            return record
    return None


def ratio(record: dict, against: dict, of: str = "step") -> tuple[float, float, float]:
    """`record` over `against`, of one case: (value, low, high).

    Of a phase: the median over rounds of the ratio within the round, with the 95 % interval of a
    median (from order statistics, so of six rounds at least; else the whole range). Of a count,
    such as "kept_bytes" or "floor_s": exact.
    """
    if of in record:
        value = record[of] / against[of]
        return value, value, value
    ratios = times(record, of) / times(against, of)
    found = stats.quantile_test(ratios, p=0.5).confidence_interval(0.95)
    low, high = (found.low, found.high) if len(ratios) > 5 else (ratios.min(), ratios.max())
    return float(np.median(ratios)), float(low), float(high)


# What is held to: (of what, R-LoRA against which method, at most, in the first case like this).
BARS = [
    ("step", "base", 1.08, {"study": "bars"}),
    ("step", "lora", 0.98, {"study": "bars"}),
    ("step", "published-rlora", 0.75, {"study": "bars"}),
    ("step", "published-hydralora", 0.55, {"study": "bars"}),
    ("kept_bytes", "lora", 0.92, {"study": "bars"}),
    ("kept_bytes", "published-rlora", 0.55, {"study": "bars"}),
    ("kept_bytes", "published-hydralora", 0.35, {"study": "bars"}),
    ("step", "base", 1.22, {"num_heads": 32}),
    ("step", "lora", 1.0, {"compiled": True}),
    ("step", "lora", 1.0, {"dtype": "bf16"}),
    ("step", "lora", 1.0, {"checkpointing": True}),
    ("token", "lora", 1.0, {"study": "generation"}),
]


def verdicts(result: dict) -> list[dict]:
    """Each bar: of, against, case, limit, value, low, high, rounds, holds (the value is
    within the limit), clear (so is, or is not, the whole interval). What was not measured has None
    in these five."""
    said = []
    for of, against, limit, case in BARS:
        bar = {"of": of, "against": against, "case": case, "limit": limit}
        bar |= dict.fromkeys(("value", "low", "high", "rounds", "holds", "clear"))
        one = find(result, "rlora", **case)
        other = find(result, against, **_case(one)) if one else None
        if other:
            value, low, high = ratio(one, other, of)
            holds = value <= limit
            clear = high <= limit if holds else low > limit
            bar |= {"value": value, "low": low, "high": high, "rounds": one["rounds"]}
            bar |= {"holds": holds, "clear": clear}
        said.append(bar)
    return said


def _table(title: str, *columns: str, left: int, caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.pad_edge = False
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    return table


def _ratio(one: dict, other: dict | None, of: str, digits: int = 2) -> tuple[str, str]:
    """The ratio, and its interval where it has one."""
    if other is None or (of in one and None in (one[of], other[of])):
        return "–", ""
    value, low, high = (f"{number:.{digits}f}" for number in ratio(one, other, of))
    return value, "" if of in one else f"{low}-{high}"


def _methods_table(result: dict) -> Table:
    records = [r for r in result["records"] if r["study"] == "bars" and not r["skipped"]]
    names = [r["method"].replace("-", "\n") for r in records]
    table = _table(Case(**_case(records[0])).words(), "", *names, left=1)
    base, lora = (find(result, method, study="bars") for method in ("base", "lora"))

    def row(name: str, value: Callable[[dict], str], **kwargs) -> None:
        table.add_row(name, *(value(record) for record in records), **kwargs)

    row("step, ms", lambda r: f"{1000 * np.median(times(r, 'step')):.1f}")
    for name, against in (("base", base), ("LoRA", lora)):
        row(f"  over {name}", lambda r, a=against: _ratio(r, a, "step")[0])
        row("    95 %", lambda r, a=against: "" if r is a else _ratio(r, a, "step")[1])
    row("forward over base", lambda r: _ratio(r, base, "forward")[0])
    row("backward over base", lambda r: _ratio(r, base, "backward")[0])
    share = "optimizer's share"
    row(share, lambda r: f"{np.median(times(r, 'optimizer') / times(r, 'step')):.1%}")
    row("kept, MiB", lambda r: f"{r['kept_bytes'] / 2**20:.1f}")
    row("  not parameters", lambda r: f"{r['kept_own_bytes'] / 2**20:.1f}")
    if result["config"]["device"] == "cuda":
        row("peak, MiB", lambda r: f"{r['peak_bytes'] / 2**20:.0f}")
    row("FLOPs over base", lambda r: _ratio(r, base, "flops", 3)[0])
    row("bytes over base", lambda r: _ratio(r, base, "bytes", 3)[0])
    row("floor over base", lambda r: _ratio(r, base, "floor_s", 3)[0])
    row("trainable", lambda r: f"{r['trainable']:,}")
    return table


def _studies_table(result: dict) -> Table:
    table = _table(
        "R-LoRA in every case",
        *("what differs from the first case", "steps", "over base", "95 %", "over LoRA", "95 %"),
        *("floor", "LoRA's"),
        caption="floor: what arithmetic and bytes allow at this machine's roof, over base",
        left=1,
    )
    first = None
    for record in result["records"]:
        if record["method"] == "rlora" and not record["skipped"]:
            case = Case(**_case(record))
            base, lora = (find(result, method, **asdict(case)) for method in ("base", "lora"))
            of = "token" if case.generate else "step"
            table.add_row(
                case.words(first) if first else "(first)",
                str(case.rounds),
                *_ratio(record, base, of),
                *_ratio(record, lora, of),
                *(_ratio(each, base, "floor_s")[0] for each in (record, lora) if each),
            )
            first = first or case
    return table


def _bars_table(result: dict) -> Table:
    table = _table("The bars", "R-LoRA's", "over", "at most", "", "95 %", "", left=2)
    words = {"kept_bytes": "kept", "token": "time a token"}
    for bar in result["bars"]:
        measured, spread, verdict = "–", "", "not measured"
        if bar["value"] is not None:
            measured = f"{bar['value']:.3f}"
            if bar["low"] < bar["high"]:
                spread = f"{bar['low']:.3f}-{bar['high']:.3f}"
            verdict = ("holds" if bar["holds"] else "missed") + ", not clearly" * (not bar["clear"])
        what = words.get(bar["of"], bar["of"])
        if "study" not in bar["case"]:
            what += f" ({Case(**bar['case']).words(Case())})"
        table.add_row(what, bar["against"], f"{bar['limit']:.2f}", measured, spread, verdict)
    return table


def tables(result: dict) -> list[Table]:
    """A complete run on the screen: the methods side by side, all cases, and the bars."""
    return [_methods_table(result), _studies_table(result), _bars_table(result)]


def _case(record: dict) -> dict:
    return {key: record[key] for key in asdict(Case())}


class Speed:
    """One run of the command. `out` is written whole after every case; a run that was stopped goes
    on with the next one.

    Args:
        device: "cpu" or "cuda"; None is a GPU where there is one.
        quick: few rounds, and the cases of the bars alone.
        out: file of the result; None is a name in `runs/`.
        wanted: `{case: methods}`; None is `cases(device, quick)`.
    """

    def __init__(
        self,
        device: str | None = None,
        *,
        quick: bool = False,
        out: Path | None = None,
        wanted: dict[Case, tuple[str, ...]] | None = None,
    ) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device not in ("cpu", "cuda"):
            raise LabError(f"--device must be cpu or cuda, got {device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise LabError("--device cuda: PyTorch finds no GPU here")
        self.wanted = wanted or cases(self.device, quick)
        self.out = out or Path("runs") / f"speed-{self.device}{'-quick' * quick}.json"
        command = f"python -m rlora_lab speed --device {self.device}{' --quick' * quick}"
        self.result = {
            "command": command,
            **environment(),
            "config": {"device": self.device, "quick": quick},
            "roof": {},
            "complete": False,
            "bars": [],
            "records": [],
        }
        if self.out.exists():
            self._take_up()

    def _take_up(self) -> None:
        try:
            earlier = json.loads(self.out.read_text())
            earlier = {key: earlier[key] for key in self.result}
        except (ValueError, KeyError, TypeError) as error:
            message = f"{self.out} is no result of this command: choose another --out"
            raise LabError(message) from error
        for key in ("config", "machine", "threads", "versions"):
            if earlier[key] != self.result[key]:
                raise LabError(
                    f"{self.out} holds a run with another {key}, {earlier[key]}: choose another "
                    "--out to keep it, or delete it"
                )
        self.result |= {key: earlier[key] for key in ("roof", "records")}

    def _done(self, case: Case) -> bool:
        return any(_case(record) == asdict(case) for record in self.result["records"])

    def run(self, console: Console) -> dict:
        """Do what is not done yet, and return the result, complete."""
        missing = [case for case in self.wanted if not self._done(case)]
        if not shutil.which("c++") and any(case.compiled for case in missing):
            console.print("no C++ compiler here: torch.compile is not measured")
            missing = [case for case in missing if not case.compiled]
        write_result(self.out, self.result)
        first = next(iter(self.wanted))
        for dtype in {case.dtype for case in missing} - self.result["roof"].keys():
            self.result["roof"][dtype] = measure_roof(self.device, DTYPES[dtype])
        columns = TextColumn("{task.description:52}"), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            bar = progress.add_task("", total=sum(case.rounds for case in missing))
            for case in missing:
                progress.update(bar, description=f"{case.study}: {case.words(first)}")
                self.result["records"] += run_case(
                    case,
                    self.wanted[case],
                    self.device,
                    self.result["roof"][case.dtype],
                    partial(progress.advance, bar),
                )
                write_result(self.out, self.result)
        self.result["bars"] = verdicts(self.result)
        self.result |= {"complete": True, **environment()}
        write_result(self.out, self.result)
        return self.result
