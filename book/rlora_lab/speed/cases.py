"""What is measured: shapes, methods, and the settings that methods are compared in.

| method | what |
| --- | --- |
| `base` | the frozen model, gradients for its input alone |
| `lora` | PEFT's LoRA, at the one rank whose size comes closest to that of `rlora` |
| `rlora` | `rlora_min` |
| `published-rlora`, `published-hydralora` | `rlora_lab.models.published_loops`: a loop over heads |
| `exported` | in generation: `rlora` as `export_lora` writes it, loaded as PEFT's LoRA |
"""

from dataclasses import dataclass, fields, replace
from functools import partial

# From the models' public configurations.
SHAPES = {
    "Qwen2.5-0.5B": {"hidden": 896, "mlp": 4864, "heads": 14, "kv_heads": 2, "layers": 24},
    "Qwen2.5-1.5B": {"hidden": 1536, "mlp": 8960, "heads": 12, "kv_heads": 2, "layers": 28},
    "Qwen2.5-7B": {"hidden": 3584, "mlp": 18944, "heads": 28, "kv_heads": 4, "layers": 28},
}
PAIR = ("base", "lora", "rlora")
ALL = (*PAIR, "published-rlora", "published-hydralora")


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

    @classmethod
    def of(cls, record: dict) -> "Case":
        """The case that a record was measured in."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})

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
            (("compiled",), "compiled" if self.compiled else "eager"),
            (("generate",), f"{self.generate} tokens generated" if self.generate else "trained"),
        ]

        def differs(names: tuple[str, ...]) -> bool:
            return any(getattr(self, name) != getattr(other, name) for name in names)

        return ", ".join(text for names, text in parts if other is None or differs(names))


def _several(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def cases(device: str, quick: bool) -> dict[Case, tuple[str, ...]]:
    """What the command runs: `{case: methods}`. The first case holds most of the bars."""
    gpu = device == "cuda"
    few, some, many = (4, 6, 6) if quick else (12, 24, 40)
    first = Case(rounds=many)
    if gpu:  # the whole model
        first = Case(rounds=many, batch=6, tokens=512, dtype="bf16", layers=24)
    vary = partial(replace, first)
    if gpu:
        other_dtype = vary(study="dtype", rounds=some, dtype="fp32")
    else:  # most CPUs have no units for bf16, and are a hundred times slower
        small = {"layers": 1, "batch": 1, "tokens": 32}
        other_dtype = vary(study="dtype", rounds=some, dtype="bf16", **small)
    # One block is compiled as well as two, in half the time.
    layers = first.layers if gpu else 1
    runs = {
        first: ALL,
        vary(study="heads", rounds=some, num_heads=32): PAIR,
        vary(study="checkpointing", rounds=some, checkpointing=True): PAIR,
        vary(study="generation", rounds=some, generate=8): (*PAIR, "exported"),
        other_dtype: PAIR,
        vary(study="compiled", rounds=some, compiled=True, layers=layers): PAIR,
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
    for shape, on_cpu in (("Qwen2.5-1.5B", 2), ("Qwen2.5-7B", 1)):
        layers = SHAPES[shape]["layers"] if gpu else on_cpu
        rounds = few if gpu else 8  # seconds each
        runs[vary(study="width", rounds=rounds, shape=shape, layers=layers)] = PAIR
    return runs
