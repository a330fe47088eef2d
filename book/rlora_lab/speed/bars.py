"""What a record of speed says: ratios, the bars that they are held to, and tables of both."""

from dataclasses import asdict

import numpy as np
from rich import box
from rich.table import Table
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


def tables(result: dict) -> list[Table]:
    """A complete run on the screen: the methods side by side, all cases, and the bars."""
    return [_methods_table(result), _studies_table(result), _bars_table(result)]


def _table(title: str, columns: list[str], left: int, caption: str | None = None) -> Table:
    """An empty table, whose first `left` columns are words."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.pad_edge = False
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    return table


def _value(one: dict, other: dict | None, of: str, digits: int = 2) -> str:
    if other is None or (of in one and None in (one[of], other[of])):
        return "–"
    return f"{ratio(one, other, of)[0]:.{digits}f}"


def _interval(one: dict, other: dict | None, of: str) -> str:
    if other is None or one is other:
        return ""
    _, low, high = ratio(one, other, of)
    return f"{low:.2f}-{high:.2f}"


def _methods_table(result: dict) -> Table:
    records = [r for r in result["records"] if r["study"] == "bars" and not r["skipped"]]
    base, lora = (find(result, method, study="bars") for method in ("base", "lora"))
    rows = [
        ("step, ms", lambda r: f"{1000 * np.median(times(r, 'step')):.1f}"),
        ("  over base", lambda r: _value(r, base, "step")),
        ("    95 %", lambda r: _interval(r, base, "step")),
        ("  over LoRA", lambda r: _value(r, lora, "step")),
        ("    95 %", lambda r: _interval(r, lora, "step")),
        ("forward over base", lambda r: _value(r, base, "forward")),
        ("backward over base", lambda r: _value(r, base, "backward")),
        ("optimizer's share", lambda r: f"{np.median(times(r, 'optimizer') / times(r)):.1%}"),
        ("kept, MiB", lambda r: f"{r['kept_bytes'] / 2**20:.1f}"),
        ("  not parameters", lambda r: f"{r['kept_own_bytes'] / 2**20:.1f}"),
        ("FLOPs over base", lambda r: _value(r, base, "flops", 3)),
        ("bytes over base", lambda r: _value(r, base, "bytes", 3)),
        ("floor over base", lambda r: _value(r, base, "floor_s", 3)),
        ("trainable", lambda r: f"{r['trainable']:,}"),
    ]
    if result["config"]["device"] == "cuda":
        rows.insert(10, ("peak, MiB", lambda r: f"{r['peak_bytes'] / 2**20:.0f}"))
    names = [r["method"].replace("-", "\n") for r in records]
    table = _table(Case.of(records[0]).words(), ["", *names], left=1)
    for name, value in rows:
        table.add_row(name, *map(value, records))
    return table


def _studies_table(result: dict) -> Table:
    columns = ["what differs from the first case", "steps", "over base", "95 %", "over LoRA"]
    table = _table(
        "R-LoRA in every case",
        [*columns, "95 %", "floor", "LoRA's"],
        left=1,
        caption="floor: what arithmetic and bytes allow at this machine's roof, over base",
    )
    records = [r for r in result["records"] if r["method"] == "rlora" and not r["skipped"]]
    for record in records:
        case = Case.of(record)
        base, lora = (beside(result, record, method) for method in ("base", "lora"))
        of = "token" if case.generate else "step"
        table.add_row(
            "(first)" if record is records[0] else case.words(Case.of(records[0])),
            str(case.rounds),
            _value(record, base, of),
            _interval(record, base, of),
            _value(record, lora, of),
            _interval(record, lora, of),
            _value(record, base, "floor_s"),
            _value(lora, base, "floor_s") if lora else "–",
        )
    return table


def _bars_table(result: dict) -> Table:
    columns = ["R-LoRA's", "over", "at most", "", "95 %", ""]
    table = _table("The bars", columns, left=2)
    words = {"kept_bytes": "kept", "token": "time a token"}
    for bar in result["bars"]:
        what = words.get(bar["of"], bar["of"])
        if "study" not in bar["case"]:
            what += f" ({Case(**bar['case']).words(Case())})"
        row = [what, bar["against"], f"{bar['limit']:.2f}"]
        if bar["value"] is None:
            table.add_row(*row, "–", "", "not measured")
            continue
        exact = bar["low"] == bar["high"]
        spread = "" if exact else f"{bar['low']:.3f}-{bar['high']:.3f}"
        verdict = "holds" if bar["holds"] else "missed"
        if not bar["clear"]:
            verdict += ", not clearly"
        table.add_row(*row, f"{bar['value']:.3f}", spread, verdict)
    return table
