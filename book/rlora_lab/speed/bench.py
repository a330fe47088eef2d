"""`python -m rlora_lab speed`: what a step costs with each adapter, in time, memory and arithmetic.

Methods run in turn, one step each, in an order that is drawn anew each round, so whatever else the
machine does falls on all of them. A ratio is the median over rounds of the ratio within the round.

Models are the blocks of Qwen2.5 with random weights, shared by all methods, and get embeddings;
vocabulary and head, which no adapter here touches, are left out. Adapters sit on the MLP
projections.

A result, one JSON file a run:

    command, date, machine, threads, versions, complete
    config      device, quick, rehearsal (in miniature, which measures nothing)
    gpu         what nvidia-smi says of it: name, driver, memory, power, clocks; null on a CPU
    roof        {dtype: {"flops_per_s", "bytes_per_s"}}: the best of a large product and a copy
    records     one for each case and method: study, shape, layers, batch, tokens, dtype, r,
                num_heads, lora_dropout, checkpointing, compiled, rounds, generate (the case; see
                `Case`), method, trainable (parameters), rank (of `lora`), skipped (why, or null),
                seconds ({"forward", "backward", "optimizer"} or {"token"}: a number each round, in
                rounds that the methods of a case share), kept_bytes (by autograd for the backward),
                kept_own_bytes (of these, not parameters; both null if checkpointing or compiled),
                flops and bytes (of a forward and backward: see `Work`), floor_s (what the roof
                allows for these), model_bytes (parameters, gradients, the optimizer's state),
                peak_bytes (CUDA: most memory in use in a step, above what stands before it),
                launches (how often a step or a round of tokens hands work to the GPU), kernels (of
                the first case: [name, times, seconds], the longest first), clock (the GPU's, right
                after its rounds); these three are null on a CPU
    bars        one for each bar: see `rlora_lab.speed.bars.verdicts`
"""

import copy
import gc
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, Qwen2Config, Qwen2Model

from rlora_min import RLoraConfig, export_lora

from ..errors import LabError
from ..models.answers import has_bf16
from ..models.bases import TARGETS
from ..models.methods import rlora_size
from ..models.published_loops import publish
from ..runs.record import environment, write_result
from .bars import verdicts
from .cases import ALL, SHAPES, Case, Cases, cases, estimate, rehearsal
from .counts import PUBLISHED
from .forms import FORMS, use_form
from .instruments import Clock, Work, ask_gpu, kept_bytes, measure_roof, profile_work

MLP = TARGETS["gate_proj"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}
WARM_UP = 2  # rounds that are not counted
SLACK = 20  # seconds of a budget that go by before the first case and after the last
GPU = ("name", "driver_version", "memory.total", "power.limit")
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")


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
    if case.dtype == "nf4":
        in_4_bits(base)
    if case.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return base.train()


def in_4_bits(base: Qwen2Model) -> None:
    """Put its linear layers in 4 bits (nf4), in place; it needs bitsandbytes."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for path, linear in list(base.named_modules()):
        if type(linear) is nn.Linear:
            parent, _, name = path.rpartition(".")
            how = {"compute_dtype": torch.bfloat16, "quant_type": "nf4"}
            bias = linear.bias is not None
            made = Linear4bit(linear.in_features, linear.out_features, bias, **how, device="cpu")
            weight = linear.weight.data.cpu()
            made.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
            if bias:
                made.bias = linear.bias
            setattr(base.get_submodule(parent), name, made.to(base.device))  # which quantizes
    base.is_loaded_in_4bit = True  # PEFT asks


def equal_rank(case: Case) -> int:
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
    if method == "lora":
        config = LoraConfig(r=equal_rank(case), use_rslora=True, **settings)
        model = get_peft_model(model, config)
    elif method == "rlora" or method in FORMS:
        config = RLoraConfig(r=case.r, num_heads=case.num_heads, init_seed=0, **settings)
        model = get_peft_model(model, config)
        if method in FORMS:
            use_form(model, FORMS[method])
    elif method == "exported":
        with tempfile.TemporaryDirectory() as folder:
            export_lora(make_model("rlora", base, replace(case, compiled=False)), folder)
            model = PeftModel.from_pretrained(model, folder)
    elif method in PUBLISHED:
        sizes = {"r": case.r, "num_heads": case.num_heads, "alpha": 32}
        with torch.device(base.device):
            publish(model, PUBLISHED[method], MLP, dropout=case.lora_dropout, **sizes)
    elif method != "base":
        known = ", ".join([*ALL, "exported", *FORMS])
        raise LabError(f"unknown method {method!r}: allowed are {known}")
    if not case.compiled:
        return model
    if case.in_miniature:  # it traces, and leaves out the minute of a C++ compiler
        return torch.compile(model, backend="aot_eager")
    return torch.compile(model, mode=case.mode)


class Runner:
    """One method of one case: its model, its input, and its record."""

    def __init__(self, method: str, base: Qwen2Model, case: Case, device: str) -> None:
        self.case = case
        self.device = device
        self.model = make_model(method, base, case)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        generator = torch.Generator().manual_seed(0)
        size = (case.batch, case.tokens, base.config.hidden_size)
        x = torch.randn(size, generator=generator)
        self.x = x.to(device, DTYPES[case.dtype]).requires_grad_(not case.generate)
        self.autocast = nullcontext
        if case.dtype != "fp32":
            self.autocast = partial(torch.autocast, device, torch.bfloat16)
        size = sum(p.numel() for p in trained)
        held = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))
        self.record = asdict(case) | {
            "method": method,
            "trainable": size,
            "model_bytes": held + 3 * 4 * size,  # a gradient, and AdamW's two numbers
            "rank": equal_rank(case) if method == "lora" else None,
            "skipped": None,
            "seconds": {},
            **dict.fromkeys(("kept_bytes", "kept_own_bytes")),
            **dict.fromkeys(("flops", "bytes", "floor_s", "peak_bytes")),
            **dict.fromkeys(("launches", "kernels", "clock")),
        }

    def loss(self) -> Tensor:
        with self.autocast():
            out = self.model(inputs_embeds=self.x, use_cache=False).last_hidden_state
        return out.float().square().mean()

    def step(self) -> dict[str, float]:
        """One training step, in seconds."""
        clock = Clock(self.device)
        self.x.grad = None
        if self.case.compiled:
            torch.compiler.cudagraph_mark_step_begin()
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
        if case.compiled or case.generate or case.dtype == "nf4":
            return
        with Work() as work:
            self.loss().backward()
        self.record |= {"flops": work.flops, "bytes": work.bytes, "floor_s": work.floor(**roof)}
        if not case.checkpointing:
            kept, own = kept_bytes(self.model, self.loss)
            self.record |= {"kept_bytes": kept, "kept_own_bytes": own}
        self.model.zero_grad()

    def look(self) -> None:
        """What a step hands to the device, once the rounds are done."""
        seen = profile_work(self.turn, self.device)
        self.record["launches"] = seen["launches"]
        if self.case.study == "bars":
            self.record["kernels"] = seen["kernels"]
        self.record["clock"] = ask_gpu("clocks.sm").get("clocks.sm")


def failures(device: str) -> tuple[type[Exception], ...]:
    """What a method may fail of without ending the run."""
    return (Exception,) if device == "cuda" else (torch.cuda.OutOfMemoryError,)


def why(error: Exception) -> str:
    """In a few words for a record."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def run_case(
    case: Case,
    methods: Iterable[str],
    device: str,
    roof: dict[str, float],
    on_round: Callable[[], None] = lambda: None,
) -> list[dict]:
    """Measure methods in turn; their records.

    One that finds no memory, or fails on a GPU, is skipped, and its record says so: minutes on a
    GPU are too dear for the others to go down with it.
    """
    torch.manual_seed(0)
    runners, skipped = [], []
    base = None
    for method in methods:
        try:
            base = base or make_base(case, device)
            runner = Runner(method, base, case, device)
            runner.count(roof)
            for _ in range(WARM_UP):
                runner.turn()
        except failures(device) as error:
            skipped.append(asdict(case) | {"method": method, "skipped": why(error)})
        else:
            runners.append(runner)
        runner = None  # and so is its memory
    order = random.Random(0)
    gc.collect()
    gc.freeze()  # what stands now need not be looked at in each round
    for _ in range(case.rounds):
        gc.collect()
        gc.disable()
        for runner in order.sample(runners, len(runners)):
            for phase, seconds in runner.turn().items():
                runner.record["seconds"].setdefault(phase, []).append(round(seconds, 7))
        gc.enable()
        on_round()
    gc.unfreeze()
    looked_at = device == "cuda" or case.in_miniature  # on a CPU, in a rehearsal alone
    for runner in runners if looked_at else ():
        try:
            runner.look()
        except failures(device) as error:  # its times are good
            runner.record["kernels"] = why(error)
    return [runner.record for runner in runners] + skipped


class Speed:
    """One run of the command. `out` is written whole after every case; a run that was stopped goes
    on with the next one.

    Args:
        device: "cpu" or "cuda"; None is a GPU where there is one.
        quick: few rounds, and the cases of the bars alone.
        rehearse: the cases of `device` in miniature, on the CPU.
        out: file of the result; None is a name in `runs/`.
        wanted: `{case: methods}`; None is `cases(device, quick)`.
        kind: of the cases: "speed", or "speed-forms" for other forms of R-LoRA.
        minutes: start no case that would end later, going by its estimate.
    """

    def __init__(
        self,
        device: str | None = None,
        *,
        quick: bool = False,
        kind: str = "speed",
        rehearse: bool = False,
        out: Path | None = None,
        wanted: Cases | None = None,
        minutes: float = float("inf"),
    ) -> None:
        self.start = time.monotonic()
        self.minutes = minutes
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device not in ("cpu", "cuda"):
            raise LabError(f"--device must be cpu or cuda, got {device!r}")
        if device == "cuda" and not rehearse and not torch.cuda.is_available():
            raise LabError("--device cuda: PyTorch finds no GPU here")
        self.wanted = wanted or cases(device, quick, bf16=has_bf16())
        self.device = device
        options = "--other-forms " * (kind == "speed-forms")
        command = f"python -m rlora_lab speed {options}--device {device}{' --quick' * quick}"
        name = f"{kind}-{device}{'-quick' * quick}.json"
        if rehearse:
            self.wanted, self.device = rehearsal(self.wanted), "cpu"
            command, name = f"{command} --rehearse", f"rehearsed-{name}"
        self.out = out or Path("runs") / name
        self.result = {
            "command": command,
            **environment(),
            "config": {"device": device, "quick": quick, "rehearsal": rehearse},
            "gpu": None,
            "roof": {},
            "complete": False,
            "bars": [],
            "records": [],
        }
        if self.device == "cuda":
            cuda = torch.version.cuda
            self.result["gpu"] = {"cuda": cuda} | ask_gpu(*GPU) | ask_gpu(*CLOCKS)
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

    def _missing(self, say: Callable[[str], None]) -> list[Case]:
        """What is not done yet and can be done here."""
        done = {Case.of(record) for record in self.result["records"]}
        missing = [case for case in self.wanted if case not in done]
        if not shutil.which("c++") and any(case.compiled for case in missing):
            say("no C++ compiler here: torch.compile is not measured")
            missing = [case for case in missing if not case.compiled]
        if not find_spec("bitsandbytes") and any(case.dtype == "nf4" for case in missing):
            say("no bitsandbytes here: a base in 4 bits is not measured")
            missing = [case for case in missing if case.dtype != "nf4"]
        return missing

    def run(self, say: Callable[[str], None] = print, show: bool = True) -> dict:
        """Do what is not done yet, as long as there is time, and return the result.

        A line for each case goes to `say`, and with `show` a progress bar to a terminal.
        """
        missing = self._missing(say)
        write_result(self.out, self.result)
        first = next(iter(self.wanted))
        for dtype in dict.fromkeys(case.dtype for case in missing):
            if dtype not in self.result["roof"]:
                small = self.result["config"]["rehearsal"]
                self.result["roof"][dtype] = measure_roof(self.device, DTYPES[dtype], small)
        left = 0
        pace = expected = 0.0  # seconds that cases took here, and should have taken
        rounds = sum(case.rounds for case in missing)
        with tqdm(total=rounds, disable=None if show else True) as progress:
            for case in missing:
                about = estimate(case, self.wanted[case], self.device)
                slower = max(1.0, pace / expected) if expected else 1.0
                if self.elapsed + SLACK / 2 + about * slower > 60 * self.minutes:
                    left += 1
                    continue
                begin = time.monotonic()
                progress.set_description(case.study)
                self.result["records"] += run_case(
                    case,
                    self.wanted[case],
                    self.device,
                    self.result["roof"][case.dtype],
                    partial(progress.update, 1),
                )
                write_result(self.out, self.result)
                took = time.monotonic() - begin
                pace, expected = pace + took, expected + about
                words = case.words(first) if case != first else case.words()
                say(f"{self.elapsed:5.0f} s  {case.study}: {words} ({took:.0f} s, of {about:.0f})")
        if left:
            say(f"{left} cases would end after {self.minutes:g} minutes: run it again for them")
        self.result["bars"] = verdicts(self.result)
        self.result |= {"complete": not left, **environment()}
        write_result(self.out, self.result)
        return self.result

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start + SLACK / 2
