"""The table of a run on the screen."""

from collections.abc import Callable

import numpy as np
from rich import box
from rich.table import Table

from .results import chosen_records, paired_difference, score_array


def table(result: dict) -> Table:
    """The result, a column for each method: scores in per cent, means over seeds."""
    seeds = len(result["seeds"])
    table = Table(
        title=f"test {result['metrics'][0]} in %, {seeds} seed{'s' * (seeds > 1)}",
        caption="spread: standard deviation; cosine: mean over pairs of heads and modules",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    values, records = {}, {}
    for method in result["methods"]:
        table.add_column(method.replace("+", "\n+"), justify="right", no_wrap=True)
        values[method] = 100 * score_array(result, method)
        records[method] = chosen_records(result, method)

    def row(name: str, value: Callable[[str], str], **kwargs) -> None:
        table.add_row(name, *(value(method) for method in result["methods"]), **kwargs)

    def similarity(kind: str) -> Callable[[str], str]:
        def mean(method: str) -> str:
            cosines = [r["similarity"] and r["similarity"][kind] for r in records[method]]
            return "–" if None in cosines else f"{np.mean(cosines):.3f}"

        return mean

    def difference(method: str, against: str, which: int) -> str:
        return f"{100 * paired_difference(result, method, against)[which]:+.2f}"

    for i, task in enumerate(result["tasks"]):
        last = i == len(result["tasks"]) - 1
        row(task, lambda m, i=i: f"{values[m][:, i].mean():.1f}", end_section=last)
    row("mean", lambda m: f"{values[m].mean():.2f}")
    row("spread over tasks", lambda m: f"{values[m].mean(0).std(ddof=1):.1f}")
    if seeds > 1:
        row("spread over seeds", lambda m: f"{values[m].mean(1).std(ddof=1):.2f}")
        first = result["methods"][0]
        for name, end in ((f"less {first}", 0), ("  95 % from", 1), ("  to", 2)):
            row(name, lambda m, end=end: "" if m == first else difference(m, first, end))
    row("cosine of heads", similarity("heads"))
    row("cosine of change", similarity("change"), end_section=True)
    row("learning rate", lambda m: f"{result['chosen'][m]:g}")
    size = result["rlora_parameters"]
    row("adapter size", lambda m: f"{records[m][0]['adapter_parameters']:,}")
    row("against R-LoRA", lambda m: f"{records[m][0]['adapter_parameters'] / size - 1:+.1%}")
    row("task heads", lambda m: f"{records[m][0]['other_parameters']:,}")
    row("seconds a seed", lambda m: f"{np.mean([r['seconds'] for r in records[m]]):.0f}")
    return table
