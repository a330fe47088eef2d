"""What a record of speed says: ratios, the bars that they are held to, the paper's claim.

It needs numpy alone, so that a machine lent for minutes can say what it found.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from .cases import Case


def times(record: dict, phase: str = "step") -> np.ndarray:
    """Seconds of a phase in each round; the phase "step" is forward, backward and optimizer."""
    seconds = record["seconds"]
    return np.sum(list(seconds.values()), axis=0) if phase == "step" else np.array(seconds[phase])


def find(result: dict, method: str, **case) -> dict | None:
    """The first record of a method whose case is like this, such as `study="bars"` or
    `num_heads=32`, if it was measured."""
    wanted = {"method": method, "skipped": None, **case}
    usual = asdict(Case())  # what older records do not say
    for record in result["records"]:
        if all(record.get(key, usual.get(key)) == value for key, value in wanted.items()):
            return record
    return None


def beside(result: dict, record: dict, method: str) -> dict | None:
    """The record of another method in the same case, if it was measured."""
    return find(result, method, **asdict(Case.of(record)))


def rlora_cases(result: dict) -> Iterator[tuple[Case, dict, str]]:
    """Each case that R-LoRA was measured in: the case, its record, and what is timed in it, "step"
    or "token"."""
    for record in result["records"]:
        if record["method"] == "rlora" and not record["skipped"]:
            case = Case.of(record)
            yield case, record, "token" if case.generate else "step"


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
    low, high = median_interval(ratios)
    return float(np.median(ratios)), low, high


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a median from order statistics: as many values are left out at either
    end as a fair coin shows heads at most, with 2.5 %. With five or fewer, none is."""
    n, out, chance = len(values), 0, 0.0
    while True:
        chance += math.comb(n, out) / 2**n
        if chance > 0.025:
            break
        out += 1
    out = max(out - 1, 0)
    ordered = np.sort(values)
    return float(ordered[out]), float(ordered[n - 1 - out])


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
    in the last six."""
    said = []
    for of, against, limit, case in BARS:
        bar = {"of": of, "against": against, "case": case, "limit": limit}
        bar |= dict.fromkeys(("value", "low", "high", "rounds", "holds", "clear"))
        said.append(bar)
        one = find(result, "rlora", **case)
        other = beside(result, one, against) if one else None
        if other is None:
            continue
        value, low, high = ratio(one, other, of)
        holds = value <= limit
        clear = high <= limit if holds else low > limit
        bar |= {"value": value, "low": low, "high": high, "rounds": one["rounds"]}
        bar |= {"holds": holds, "clear": clear}
    return said


# As a secondary source has it, against the multi-head form before it: up to 20 % of the memory and
# 8 % of the time saved. We could not read either figure off the paper.
CLAIM = [("step", 0.92), ("memory", 0.80)]


def claims(result: dict, **case) -> list[dict]:
    """The paper's claim beside what was measured: R-LoRA as published over HydraLoRA as published.

    Of "step", and of "memory": the peak of a step with what the model itself takes, on a GPU, else
    what is kept for the backward, parameters included. Each: of, claimed, value, low, high, and a
    verdict. `case` picks another than the first, such as `lora_dropout=0.0`.
    """
    case = case or {"study": "bars"}
    one, other = (find(result, f"published-{m}", **case) for m in ("rlora", "hydralora"))
    said = []
    for of, claimed in CLAIM:
        row = {"of": of, "claimed": claimed, "value": None, "low": None, "high": None}
        row["verdict"] = "not measured"
        said.append(row)
        if one is None or other is None:
            continue
        if of == "step":
            value, low, high = ratio(one, other)
        else:
            value = low = high = memory(one) / memory(other)
        row |= {"value": value, "low": low, "high": high}
        if high <= claimed:
            row["verdict"] = "saves at least what is claimed"
        elif high < 1:
            row["verdict"] = "saves, within what is claimed"
        else:
            row["verdict"] = "no saving to be seen"
    return said


def memory(record: dict) -> int:
    """Bytes in use at a step's peak on a GPU; on a CPU what autograd keeps, with parameters."""
    if record.get("peak_bytes") is not None:
        return record["peak_bytes"] + record["model_bytes"]
    return record["kept_bytes"]


# Of a kernel's name, in this order: what it does.
KINDS = {
    "optimizer": ("multi_tensor", "fused_adam", "_foreach"),
    "attention": ("flash", "fmha", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "wgmma", "matmul", "::mm", "addmm", "::bmm", "splitk"),
    "softmax and masks": ("softmax", "dropout", "bernoulli"),
    "stacking": ("catarray", "::cat"),
    "copies and casts": ("memcpy", "copy", "memset", "_to_copy", "::to", "fill"),
    "sums and norms": ("reduce", "::sum", "::mean", "norm"),
    "elementwise": ("elementwise", "::mul", "::add", "::sub", "::silu", "triton", "::div"),
}


def time_by_kind(record: dict) -> dict[str, tuple[int, float]]:
    """Of a record with kernels: {what they do: (how many ran, seconds)}, of one step."""
    found = {kind: [0, 0.0] for kind in [*KINDS, "other"]}
    for name, times_, seconds in record["kernels"]:
        lower = name.lower()
        kinds = (kind for kind, parts in KINDS.items() if any(part in lower for part in parts))
        entry = found[next(kinds, "other")]
        entry[0] += times_
        entry[1] += seconds
    return {kind: (n, seconds) for kind, (n, seconds) in found.items() if n}
