"""What chapter 09 shows of a GPU's record, and what it says where there is none."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np

from .bars import beside, find, ratio, rlora_cases, times
from .cases import ALL, Case
from .tables import claims_table, kernels_table, shown

NONE_YET = "No GPU record yet: every measured number on this page is a CPU's."
NAMES = {
    "base": "frozen base",
    "lora": "LoRA, equal size",
    "rlora": "R-LoRA, packed",
    "published-rlora": "R-LoRA, loop",
    "published-hydralora": "HydraLoRA, loop",
}


def say_gpu(result: dict | None) -> None:
    """Print what a GPU's record says: the methods, other cases, kernels, the paper's claim."""
    if result is None:
        print(NONE_YET)
        return
    gpu = result["gpu"] or {}
    print(", ".join(f"{name} {value}" for name, value in gpu.items()))
    first = {method: find(result, method, study="bars") for method in ALL}
    first = {method: entry for method, entry in first.items() if entry}
    case = Case.of(first["base"])
    print("\n" + textwrap.fill(f"{case.words()}; {case.rounds} rounds", 78))
    print(f"{'':16} {'ms':>6}  {'over base':16} {'over LoRA':16}  GiB launches")
    for method, entry in first.items():
        memory = (entry["peak_bytes"] or 0) / 2**30
        print(
            f"{NAMES[method]:16} {1000 * np.median(times(entry)):6.1f}  "
            f"{shown(entry, first['base']):16} {shown(entry, first.get('lora')):16} "
            f"{memory:4.1f} {entry['launches'] or 0:8,}"
        )
    print("\nR-LoRA in other cases, over LoRA of equal size")
    for other, entry, of in rlora_cases(result):
        if other.study != "bars":
            lora = beside(result, entry, "lora")
            print(f"{other.words(case):48} {shown(entry, lora, of)}")
    print(f"\n{kernels_table(result).to_string()}")
    print(f"\n{claims_table(result).to_string()}")


def draw_gpu(result: dict | None) -> plt.Figure | None:
    """The time of a step over the base's, by method; nothing where there is no record."""
    if result is None:
        return None
    base = find(result, "base", study="bars")
    entries = {m: find(result, m, study="bars") for m in ALL if m != "base"}
    entries = {m: entry for m, entry in entries.items() if entry}
    fig, ax = plt.subplots(figsize=(6.4, 2.4))
    for place, entry in enumerate(entries.values()):
        value, low, high = ratio(entry, base)
        look = {"fmt": "o", "color": "black", "capsize": 3}
        ax.errorbar(value, place, xerr=[[value - low], [high - value]], **look)
    ax.axvline(1, color="grey", linestyle=":", marker="")
    ax.set_yticks(range(len(entries)), [NAMES[m] for m in entries])
    ax.set(xlabel="step, over the frozen base", ylim=(len(entries) - 0.4, -0.6))
    name = (result["gpu"] or {}).get("name", result["machine"])
    ax.set_title(f"A step on {name}", fontsize=10, loc="left")
    return fig
