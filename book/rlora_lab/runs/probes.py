"""What is looked at in an adapter, as records hold it: scores, heads, routing, memory."""

import math

import numpy as np
import torch
from peft import PeftModel

from rlora_min import head_similarity, record_routing

from ..speed.instruments import kept_bytes
from ..tasks.suite import Suite

PROBE = 64  # validation examples of each task that the routing is looked at on


def rounded(value: float, digits: int = 4) -> float | None:
    """A number for a record; None where it is not finite."""
    return round(value, digits) if math.isfinite(value) else None


def by_metric(scores: dict[str, dict[str, float]], suite: Suite) -> dict[str, list[float]]:
    """Scores of a suite as records hold them: a list over tasks for each metric, None where a task
    does not have it."""
    return {
        metric: [rounded(scores[task].get(metric, math.nan), 5) for task in suite.tasks]
        for metric in suite.metrics
    }


def row_strings(
    results: dict[str, dict[str, list[bool]]], suite: Suite
) -> dict[str, list[str | None]]:
    """Each row's result as records hold it: for each metric a text of 0 and 1 a task, None where a
    task does not have the metric."""
    texts = {
        task: {metric: "".join(str(int(row)) for row in rows) for metric, rows in own.items()}
        for task, own in results.items()
    }
    return {metric: [texts[task].get(metric) for task in suite.tasks] for metric in suite.metrics}


def mean_similarity(model: PeftModel, initial: dict | None = None) -> float:
    """Mean cosine over all pairs of heads and all modules; see `head_similarity`."""
    cosines = head_similarity(model, initial=initial).values()
    pairs = torch.triu_indices(*next(iter(cosines)).shape, offset=1).unbind()
    return torch.stack([c[pairs].mean() for c in cosines]).mean().item()


def similarity(model: PeftModel, initial: dict) -> dict | None:
    """Mean cosine of the heads and of their change from `initial`; None without several heads."""
    if getattr(model.peft_config["default"], "num_heads", 1) == 1:
        return None
    return {
        "heads": rounded(mean_similarity(model)),
        "change": rounded(mean_similarity(model, initial)),
    }


def routing_entropy(model: PeftModel, suite: Suite) -> list[float | None] | None:
    """Entropy of the routing on validation examples of each task, a mean over modules; 1 means
    uniform. None without several heads and a router."""
    config = model.peft_config["default"]
    if getattr(config, "num_heads", 1) == 1 or config.router != "softmax":
        return None
    device = next(model.parameters()).device
    with record_routing(model) as log, torch.no_grad():
        for task in suite.tasks:
            batch = {k: v.to(device) for k, v in suite.probe(task, PROBE).items() if k != "labels"}
            log.task, log.mask = task, batch.get("attention_mask")
            model(**batch)
    means = [float(np.mean([*log.entropy[task].values()])) for task in suite.tasks]
    return [rounded(mean / math.log(config.num_heads)) for mean in means]


def training_bytes(model: PeftModel, suite: Suite, batch: int) -> int:
    """What autograd keeps for the backward of a training batch, beside parameters."""
    rows = suite.training_set(batch, 0)
    rows = suite.collate(rows) if suite.collate else torch.utils.data.default_collate(rows)
    device = next(model.parameters()).device
    rows = {k: v.to(device) for k, v in rows.items()}
    model.train()
    kept = kept_bytes(model, lambda: model(**rows)["loss"])[1]
    model.eval()
    return kept
