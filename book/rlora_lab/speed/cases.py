"""What is measured: shapes, methods, and the settings that methods are compared in.

| method | what |
| --- | --- |
| `base` | the frozen model, gradients for its input alone |
| `lora` | PEFT's LoRA, at the one rank whose size comes closest to that of `rlora` |
| `rlora` | `rlora_min` |
| `published-rlora`, `published-hydralora` | `rlora_lab.models.published_loops`: a loop over heads |
| `exported` | in generation: `rlora` as `export_lora` writes it, loaded as PEFT's LoRA |
| `rlora-apart`, `rlora-folded` | the same function in other forms: `rlora_lab.speed.forms` |
"""

from dataclasses import dataclass, fields, replace
from functools import partial

# From the models' public configurations.
SHAPES = {
    "Qwen2.5-0.5B": {"hidden": 896, "mlp": 4864, "heads": 14, "kv_heads": 2, "layers": 24},
    "Qwen2.5-1.5B": {"hidden": 1536, "mlp": 8960, "heads": 12, "kv_heads": 2, "layers": 28},
    "Qwen2.5-7B": {"hidden": 3584, "mlp": 18944, "heads": 28, "kv_heads": 4, "layers": 28},
    "tiny": {"hidden": 64, "mlp": 128, "heads": 2, "kv_heads": 1, "layers": 2},  # of a rehearsal
}
PAIR = ("base", "lora", "rlora")
ALL = (*PAIR, "published-rlora", "published-hydralora")
WRITTEN = (*PAIR, "exported")  # in generation
FORMS = (*PAIR, "rlora-apart", "rlora-folded")
MODES = {"default": "compiled", "reduce-overhead": "compiled, as CUDA graphs"}


@dataclass(frozen=True)
class Case:
    """One setting that methods are compared in. `study` names what it is measured for."""

    study: str = "bars"
    shape: str = "Qwen2.5-0.5B"
    layers: int = 2
    batch: int = 4
    tokens: int = 128
    dtype: str = "fp32"  # or "bf16" or "nf4": the base; adapters in fp32, under autocast to bf16
    r: int = 4
    num_heads: int = 5
    lora_dropout: float = 0.1
    checkpointing: bool = False
    compiled: bool = False
    mode: str = "default"  # of torch.compile
    rounds: int = 40
    generate: int = 0  # tokens a round, after a prompt of `tokens`; 0: training steps

    @classmethod
    def of(cls, record: dict) -> "Case":
        """The case that a record was measured in; records of before `mode` had the default."""
        known = {field.name for field in fields(cls)} & record.keys()
        return cls(**{name: record[name] for name in known})

    @property
    def in_miniature(self) -> bool:
        """Whether it is one of a rehearsal, which measures nothing."""
        return self.shape == "tiny"

    def words(self, other: "Case | None" = None) -> str:
        """The case in words; with `other`, only what differs from that one."""
        parts = [
            (("shape",), self.shape),
            (("layers",), _several(self.layers, "layer")),
            (("batch", "tokens"), f"{self.batch} x {self.tokens} tokens"),
            (("dtype",), self.dtype),
            (("r",), f"r {self.r}"),
            (("num_heads",), _several(self.num_heads, "head")),
            (("lora_dropout",), f"dropout {self.lora_dropout:g}"),
            (("checkpointing",), "checkpointing" if self.checkpointing else "no checkpointing"),
            (("compiled", "mode"), MODES[self.mode] if self.compiled else "eager"),
            (("generate",), f"{self.generate} tokens generated" if self.generate else "trained"),
        ]

        def differs(names: tuple[str, ...]) -> bool:
            return any(getattr(self, name) != getattr(other, name) for name in names)

        return ", ".join(text for names, text in parts if other is None or differs(names))


def _several(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


Cases = dict[Case, tuple[str, ...]]


def cases(device: str, quick: bool, bf16: bool = False) -> Cases:
    """What the command runs, the most important first: `{case: methods}`.

    The first case holds most of the bars. `bf16`: this CPU has units for it.
    """
    return _on_gpu(quick) if device == "cuda" else _on_cpu(quick, bf16)


def _on_cpu(quick: bool, bf16: bool) -> Cases:
    few, some, many = (4, 6, 6) if quick else (12, 24, 40)
    first = Case(rounds=many)
    vary = partial(replace, first)
    # Without units for it bf16 is a hundred times slower: a glance is all that there is time for.
    other_dtype = vary(study="dtype", rounds=some, dtype="bf16")
    if not bf16:
        other_dtype = replace(other_dtype, layers=1, batch=1, tokens=32)
    runs = {
        first: ALL,
        vary(study="heads", rounds=some, num_heads=32): PAIR,
        vary(study="checkpointing", rounds=some, checkpointing=True): PAIR,
        vary(study="generation", rounds=some, generate=8): WRITTEN,
        other_dtype: PAIR,
        # One block is compiled as well as two, in half the time.
        vary(study="compiled", rounds=some, compiled=True, layers=1): PAIR,
    }
    if quick:
        return runs
    for N in (1, 2, 8, 16):
        runs[vary(study="heads", rounds=few, num_heads=N)] = (*PAIR, "published-rlora")
    for r in (1, 16, 64):
        runs[vary(study="rank", rounds=few, r=r)] = PAIR
    runs[vary(study="dropout", rounds=few, lora_dropout=0.0)] = ALL
    for batch, tokens in ((1, 32), (1, 128), (4, 512)):
        runs[vary(study="tokens", rounds=few, batch=batch, tokens=tokens)] = PAIR
    for shape, layers in (("Qwen2.5-1.5B", 2), ("Qwen2.5-7B", 1)):
        runs[vary(study="width", rounds=8, shape=shape, layers=layers)] = PAIR
    return runs


def _on_gpu(quick: bool) -> Cases:
    """The whole model, as it is trained; eight minutes on a recent GPU of a data centre."""
    few, some, many = (4, 6, 6) if quick else (10, 20, 40)
    first = Case(rounds=many, batch=6, tokens=512, dtype="bf16", layers=24)
    vary = partial(replace, first)
    prompt = {"study": "generation", "generate": 8, "tokens": 128}
    compiled = {"study": "compiled", "compiled": True, "layers": 4}  # a minute more for 24
    runs = {
        first: ALL,
        vary(study="dropout", rounds=few, lora_dropout=0.0): ALL,
        vary(**prompt, rounds=some, batch=1): WRITTEN,
        vary(study="heads", rounds=some, num_heads=32): PAIR,
        vary(study="checkpointing", rounds=some, checkpointing=True): PAIR,
        vary(**compiled, rounds=some): PAIR,
    }
    if quick:
        return runs
    runs[vary(**prompt, rounds=few, batch=32)] = WRITTEN
    for N in (1, 2, 8, 16):
        runs[vary(study="heads", rounds=few, num_heads=N)] = (*PAIR, "published-rlora")
    for batch, tokens in ((1, 128), (1, 512), (4, 512), (32, 512)):
        runs[vary(study="tokens", rounds=few, batch=batch, tokens=tokens)] = PAIR
    for shape in ("Qwen2.5-1.5B", "Qwen2.5-7B"):
        layers = SHAPES[shape]["layers"]
        runs[vary(study="width", rounds=few, shape=shape, layers=layers)] = PAIR
    runs[vary(**compiled, rounds=some, mode="reduce-overhead")] = PAIR
    for r in (1, 16, 64):
        runs[vary(study="rank", rounds=few, r=r)] = PAIR
    runs[vary(study="dtype", rounds=few, dtype="nf4")] = PAIR
    runs[vary(study="dtype", rounds=few, dtype="fp32")] = PAIR
    return runs


def forms(bf16: bool) -> Cases:
    """R-LoRA in other forms of the same function, where a bar was missed on CPUs."""
    first = Case(study="forms", layers=1, rounds=12)
    vary = partial(replace, first)
    runs = {
        vary(generate=8, batch=1): FORMS,
        vary(generate=8): FORMS,
        first: FORMS,
    }
    if bf16:
        runs[vary(dtype="bf16")] = FORMS
    return runs | {vary(num_heads=32): FORMS}


# Rough, of an H100 and of two cores: operations a second by dtype, and seconds to start one.
_RATES = {
    "cuda": ({"bf16": 3e14, "nf4": 2e14, "fp32": 4e13}, 1e-5),
    "cpu": ({"bf16": 1.5e11, "fp32": 1.2e11}, 2e-5),
}
# What is started in a training step of one block; the loops' number is that of five heads.
_STARTED = {"base": 130, "lora": 230, "exported": 230}
_RLORA, _LOOP_HEAD = 320, 110
_COMPILING = {"cuda": 22, "cpu": 18}  # seconds a method, for up to four blocks


def estimate(case: Case, methods: tuple[str, ...], device: str) -> float:
    """Seconds that a case takes, about: what `--plan` says and a budget goes by."""
    shape = SHAPES[case.shape]
    hidden = shape["hidden"]
    kv = hidden * shape["kv_heads"] / shape["heads"]
    weights = case.layers * hidden * (2 * hidden + 2 * kv + 3 * shape["mlp"])
    flops, start = _RATES[device]
    rate = flops[case.dtype]
    passes = 4 + 2 * case.checkpointing  # FLOPs a weight and token: forward, and to the input
    seconds = 2.0
    for method in methods:
        started = _STARTED.get(method, _RLORA)
        if method.startswith("published"):
            started = _STARTED["base"] + _LOOP_HEAD * case.num_heads
        started *= case.layers * start
        if case.generate:
            steps = case.generate + 1
            one = steps * max(started / 2, 2 * weights * case.batch / rate)
        else:
            one = max(started * passes / 4, passes * weights * case.batch * case.tokens / rate)
        seconds += 1.0 + (case.rounds + 5) * one  # 5: warm-up, counts, a profile
        seconds += _COMPILING[device] * case.compiled
    return seconds


def rehearsal(wanted: Cases) -> Cases:
    """Every case in miniature, for a CPU: a tiny model, few tokens and rounds, the settings as they
    are. To trace takes seconds at any size: R-LoRA alone is."""
    small = {"shape": "tiny", "layers": 1, "rounds": 2, "tokens": 8}
    runs: Cases = {}
    for case, methods in wanted.items():
        mini = replace(case, **small, batch=min(case.batch, 2), generate=min(case.generate, 2))
        while mini in runs:  # cases that differ in size alone
            mini = replace(mini, tokens=mini.tokens + 1)
        runs[mini] = ("rlora",) if case.compiled else methods
    return runs


def plan_table(wanted: Cases, device: str) -> str:
    """The cases in their order, each with its methods and an estimate, and their sum."""
    first = next(iter(wanted))
    lines = []
    for case, methods in wanted.items():
        seconds = estimate(case, methods, device)
        words = case.words(first) if case != first else case.words()
        lines.append(f"{seconds:5.0f} s  {case.study}: {words or '(as the first)'}")
        lines.append(f"         {', '.join(methods)}; {case.rounds} rounds")
    total = sum(estimate(case, methods, device) for case, methods in wanted.items())
    kind = "a recent GPU of a data centre" if device == "cuda" else "two CPU cores"
    return "\n".join([*lines, f"{total:5.0f} s  in all ({total / 60:.1f} minutes), on {kind}"])
