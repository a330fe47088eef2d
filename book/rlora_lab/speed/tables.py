"""A record of speed on the screen and on chapter 09's page: tables of pandas."""

import numpy as np
import pandas as pd

from .bars import beside, claims, find, ratio, rlora_cases, time_by_kind, times
from .cases import Case
from .forms import FORMS


def tables(result: dict) -> str:
    """A complete run on the screen: the methods side by side, all cases, and the bars."""
    if result["records"][0]["study"] == "forms":
        return f"Other forms over the packed one\n{forms_table(result).to_string()}"
    parts = {
        f"First case: {Case.of(result['records'][0]).words()}": _methods_table(result),
        "R-LoRA in every case. The floor: what arithmetic and bytes allow at this machine's roof": (
            _studies_table(result)
        ),
        "The bars: R-LoRA over another method": bars_table(result),
        "The paper's claim: R-LoRA over HydraLoRA, both as published": claims_table(result),
    }
    if isinstance((find(result, "rlora", study="bars") or {}).get("kernels"), list):
        parts["Where a step's time goes, by kernel: ms (how many)"] = kernels_table(result)
    return "\n\n".join(f"{title}\n{table.to_string()}" for title, table in parts.items())


def shown(one: dict | None, other: dict | None, of: str = "step", digits: int = 2) -> str:
    """One over the other, with its interval where it has one; a dash where one is missing."""
    if one is None or other is None or (of in one and None in (one[of], other[of])):
        return "–"
    return _with_interval(*ratio(one, other, of), digits)


def _with_interval(value: float | None, low: float, high: float, digits: int) -> str:
    """A dash for None; no interval where it is a point."""
    if value is None:
        return "–"
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
            "step over base": shown(record, base, "step"),
            "step over LoRA": shown(record, lora, "step"),
            "forward over base": shown(record, base, "forward"),
            "backward over base": shown(record, base, "backward"),
            "optimizer's share": f"{np.median(optimizer / step):.1%}",
            "kept, MiB": f"{record['kept_bytes'] / 2**20:.1f}",
            "  not parameters": f"{record['kept_own_bytes'] / 2**20:.1f}",
            "FLOPs over base": shown(record, base, "flops", 3),
            "bytes over base": shown(record, base, "bytes", 3),
            "floor over base": shown(record, base, "floor_s", 3),
            "trainable": f"{record['trainable']:,}",
        }
        if record["peak_bytes"] is not None:
            rows["peak, MiB"] = f"{record['peak_bytes'] / 2**20:.0f}"
        if record.get("launches") is not None:
            rows["launches"] = f"{record['launches']:,}"
        columns[record["method"]] = rows
    return pd.DataFrame(columns)


def _studies_table(result: dict) -> pd.DataFrame:
    first = Case.of(result["records"][0])
    rows = {}
    for case, record, of in rlora_cases(result):
        base, lora = (beside(result, record, method) for method in ("base", "lora"))
        rows[case.words(first) or "(first)"] = {
            "steps": case.rounds,
            "over base": shown(record, base, of),
            "over LoRA": shown(record, lora, of),
            "floor over base": shown(record, base, "floor_s"),
            "LoRA's": shown(lora, base, "floor_s"),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def bars_table(result: dict) -> pd.DataFrame:
    """The bars, each with what was measured and its verdict."""
    words = {"kept_bytes": "kept", "token": "time a token"}
    rows = []
    for bar in result["bars"]:
        what = words.get(bar["of"], bar["of"])
        if "study" not in bar["case"]:
            what += f" ({Case(**bar['case']).words(Case())})"
        verdict = "holds" if bar["holds"] else "missed"
        if bar["value"] is None:
            verdict = "not measured"
        if bar["clear"] is False:
            verdict += ", not clearly"
        value = _with_interval(bar["value"], bar["low"], bar["high"], 3)
        rows.append((what, bar["against"], bar["limit"], value, verdict))
    columns = ["what", "over", "at most", "is", "verdict"]
    return pd.DataFrame(rows, columns=columns).set_index("what")


def forms_table(result: dict) -> pd.DataFrame:
    """R-LoRA in other forms over the packed one, and that over LoRA and the base, by case."""
    first = Case.of(result["records"][0])
    rows = {}
    for case, record, of in rlora_cases(result):
        row = {}
        for form in FORMS:
            row[form.removeprefix("rlora-")] = shown(beside(result, record, form), record, of)
        for method in ("lora", "base"):
            row[f"packed over {method}"] = shown(record, beside(result, record, method), of)
        rows[case.words(first) or "(first)"] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def claims_table(result: dict, **case) -> pd.DataFrame:
    """The paper's claim, a row for time and one for memory, each with its verdict."""
    rows = []
    for row in claims(result, **case):
        value = _with_interval(row["value"], row["low"], row["high"], 2)
        rows.append((row["of"], f"{row['claimed']:.2f}", value, row["verdict"]))
    columns = ["R-LoRA over HydraLoRA", "claimed: down to", "is", "verdict"]
    return pd.DataFrame(rows, columns=columns).set_index(columns[0])


def kernels_table(result: dict) -> pd.DataFrame:
    """Milliseconds of a step by what its kernels do, and how many there are, by method."""
    columns = {}
    for record in result["records"]:
        if record["study"] == "bars" and isinstance(record.get("kernels"), list):
            kinds = time_by_kind(record)
            kinds["all"] = tuple(map(sum, zip(*kinds.values(), strict=True)))
            columns[record["method"]] = {
                kind: f"{1000 * seconds:.2f} ({n:,})" for kind, (n, seconds) in kinds.items()
            }
    return pd.DataFrame(columns).fillna("–")
