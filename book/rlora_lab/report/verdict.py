"""LoRA against R-LoRA on one's own files, in the words of the page for people who decide.

The rules are that page's: the mean over tasks, the worst task, the time. `verdict` applies them to
a block that both methods were run in; `verdict_text` says it in lines.
"""

from dataclasses import dataclass

import numpy as np

from .loading import chosen_records, score_array
from .questions import interval
from .rows import contrast

GO, NO_GO, OPEN = "go", "no-go", "cannot tell"
WORST = (-2.0, -5.0)  # points against LoRA's worst task: go from the first, no-go below the second
TIME = (1.2, 1.5)  # times LoRA's: go up to the first, no-go above the second
ENOUGH = 5  # seeds
ADVICE = {
    GO: "R-LoRA holds every rule here. Measure what an export loses, if you need one, and begin "
    "with a small share of the users.",
    NO_GO: "Take plain LoRA.",
    OPEN: "Take plain LoRA: it is simpler, and every tool knows it.",
}


@dataclass(frozen=True)
class Rule:
    """One rule: what it asks, what was measured, and what follows."""

    name: str
    measured: str
    verdict: str


def verdict(result: dict) -> tuple[str, list[Rule]]:
    """Over all rules, and rule by rule: "go" if all say so, "no-go" if one does."""
    rules = [_mean(result), _worst(result), _time(result)]
    words = {rule.verdict for rule in rules}
    if NO_GO in words:
        return NO_GO, rules
    return (GO if words == {GO} and len(result["seeds"]) >= ENOUGH else OPEN), rules


def _mean(result: dict) -> Rule:
    """Paired by seed and by test row, over both."""
    found = contrast(result, "rlora", "lora")
    low, high = found.interval()
    word = GO if low > 0 else NO_GO if high < 0 else OPEN
    measured = f"{found.mean:+.1f} points, 95 % interval from {low:+.1f} to {high:+.1f}"
    return Rule("mean over tasks, R-LoRA less LoRA", measured, word)


def _worst(result: dict) -> Rule:
    """Of the means over seeds; the interval is of the worst task of each seed, paired."""
    lora, rlora = (100 * score_array(result, method) for method in ("lora", "rlora"))
    of_lora, of_rlora = (int(scores.mean(0).argmin()) for scores in (lora, rlora))
    less = rlora.mean(0)[of_rlora] - lora.mean(0)[of_lora]
    _, low, high = interval(rlora.min(1) - lora.min(1))
    word = GO if less >= WORST[0] else NO_GO if less < WORST[1] else OPEN
    measured = (
        f"{less:+.1f} points: R-LoRA {rlora.mean(0)[of_rlora]:.1f} % ({result['tasks'][of_rlora]}),"
        f" LoRA {lora.mean(0)[of_lora]:.1f} % ({result['tasks'][of_lora]}); seed by seed from "
        f"{low:+.1f} to {high:+.1f}"
    )
    return Rule("worst task, R-LoRA less LoRA", measured, word)


def _time(result: dict) -> Rule:
    seconds = {
        method: float(np.median([r["seconds"] for r in chosen_records(result, method)]))
        for method in ("lora", "rlora")
    }
    times = seconds["rlora"] / max(seconds["lora"], 0.1)
    word = GO if times <= TIME[0] else NO_GO if times > TIME[1] else OPEN
    return Rule("time of training, R-LoRA's over LoRA's", f"{times:.2f}", word)


def verdict_text(result: dict) -> str:
    """The rules with what was measured, then the verdict and what to do."""
    word, rules = verdict(result)
    sizes = [
        f"{name} {chosen_records(result, method)[0]['adapter_parameters']:,} at a rate of "
        f"{result['chosen'][method]:g}"
        for method, name in (("lora", "LoRA"), ("rlora", "R-LoRA"))
    ]
    lines = [
        f"{len(result['seeds'])} seeds, {len(result['tasks'])} tasks. Trained numbers, router "
        f"counted: {', '.join(sizes)}"
    ]
    lines += [f"{rule.name}: {rule.measured} -> {rule.verdict}" for rule in rules]
    if len(result["seeds"]) < ENOUGH:
        lines.append(f"Fewer than {ENOUGH} seeds are too few for a go.")
    return "\n".join([*lines, f"Verdict: {word}. {ADVICE[word]}"])
