"""What a record of speed says: ratios, the bars that they are held to, and tables of both."""

from dataclasses import asdict

import numpy as np
import pandas as pd
from scipy import stats

from .cases import Case


def times(record: dict, phase: str = "step") -> np.ndarray:
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


def beside(result: dict, record: dict, method: str) -> dict | None:
    """The record of another method in the same case, if it was measured."""
    return find(result, method, **asdict(Case.of(record)))


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


def tables(result: dict) -> str:
    """A complete run on the screen: the methods side by side, all cases, and the bars."""
    parts = {
        f"First case: {Case.of(result['records'][0]).words()}": _methods_table(result),
        "R-LoRA in every case. The floor: what arithmetic and bytes allow at this machine's roof": (
            _studies_table(result)
        ),
        "The bars: R-LoRA over another method": _bars_table(result),
    }
    return "\n\n".join(f"{title}\n{table.to_string()}" for title, table in parts.items())


def _value(one: dict | None, other: dict | None, of: str, digits: int = 2) -> str:
    """One over the other, with its interval where it has one."""
    if one is None or other is None or (of in one and None in (one[of], other[of])):
        return "–"
    value, low, high = ratio(one, other, of)
    if low == high:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _methods_table(result: dict) -> pd.DataFrame:
    base, lora = (find(result, method, study="bars") for method in ("base", "lora"))
    columns = {}
    for record in result["records"]:
        if record["study"] != "bars" or record["skipped"]:
            continue
        step, optimizer = times(record), times(record, "optimizer")
        rows = {
            "step, ms": f"{1000 * np.median(step):.1f}",
            "step over base": _value(record, base, "step"),
            "step over LoRA": _value(record, lora, "step"),
            "forward over base": _value(record, base, "forward"),
            "backward over base": _value(record, base, "backward"),
            "optimizer's share": f"{np.median(optimizer / step):.1%}",
            "kept, MiB": f"{record['kept_bytes'] / 2**20:.1f}",
            "  not parameters": f"{record['kept_own_bytes'] / 2**20:.1f}",
            "FLOPs over base": _value(record, base, "flops", 3),
            "bytes over base": _value(record, base, "bytes", 3),
            "floor over base": _value(record, base, "floor_s", 3),
            "trainable": f"{record['trainable']:,}",
        }
        if record["peak_bytes"] is not None:
            rows["peak, MiB"] = f"{record['peak_bytes'] / 2**20:.0f}"
        columns[record["method"]] = rows
    return pd.DataFrame(columns)


def _studies_table(result: dict) -> pd.DataFrame:
    first = Case.of(result["records"][0])
    rows = {}
    for record in result["records"]:
        if record["method"] != "rlora" or record["skipped"]:
            continue
        case = Case.of(record)
        base, lora = (beside(result, record, method) for method in ("base", "lora"))
        of = "token" if case.generate else "step"
        rows[case.words(first) or "(first)"] = {
            "steps": case.rounds,
            "over base": _value(record, base, of),
            "over LoRA": _value(record, lora, of),
            "floor over base": _value(record, base, "floor_s"),
            "LoRA's": _value(lora, base, "floor_s"),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _bars_table(result: dict) -> pd.DataFrame:
    words = {"kept_bytes": "kept", "token": "time a token"}
    rows = []
    for bar in result["bars"]:
        what = words.get(bar["of"], bar["of"])
        if "study" not in bar["case"]:
            what += f" ({Case(**bar['case']).words(Case())})"
        verdict = "holds" if bar["holds"] else "missed"
        if bar["value"] is None:
            value, verdict = "–", "not measured"
        elif bar["low"] == bar["high"]:
            value = f"{bar['value']:.3f}"
        else:
            value = f"{bar['value']:.3f} ({bar['low']:.3f}-{bar['high']:.3f})"
        if bar["clear"] is False:
            verdict += ", not clearly"
        rows.append((what, bar["against"], bar["limit"], value, verdict))
    columns = ["what", "over", "at most", "is", "verdict"]
    return pd.DataFrame(rows, columns=columns).set_index("what")
