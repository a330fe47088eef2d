"""`python -m rlora_lab quality`: trains methods on a suite and measures them on its test data."""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlora_min import RLoraConfig, head_similarity

from ..errors import LabError
from ..models.bases import Base, load_base
from ..models.methods import METHODS, adapt, count_trainable, rlora_size, target_shapes
from ..tasks.sentences import Sentences
from ..tasks.strings import Synthetic
from .record import environment, write_result
from .training import Suite, train

SUITES = ("synthetic", "sentences")


def load_suite(name: str, base: Base, tasks: Sequence[str] | None = None) -> Suite:
    """The suite by name, for a base that fits it; of all its tasks, or of those named."""
    if name not in SUITES:
        raise LabError(f"unknown suite {name!r}: allowed are {', '.join(SUITES)}")
    if (name == "synthetic") != (base.name == "tiny"):
        raise LabError(
            f"suite {name!r} does not fit base {base.name!r}: synthetic needs the base tiny, which "
            "knows its characters; sentences needs a base with a tokenizer, such as minilm"
        )
    if name == "sentences":
        return Sentences(base, tasks)
    return Synthetic() if tasks is None else Synthetic(tasks)


def mean_similarity(model: PeftModel, initial: dict | None = None) -> float:
    """Mean cosine over all pairs of heads and all modules; see `head_similarity`."""
    cosines = head_similarity(model, initial=initial).values()
    pairs = torch.triu_indices(*next(iter(cosines)).shape, offset=1).unbind()
    return torch.stack([c[pairs].mean() for c in cosines]).mean().item()


DEFAULTS = {"r": 4, "num_heads": 3, "lora_alpha": 32.0, "lora_dropout": 0.1}


class Quality:
    """One run of the command: what is asked for, what is done, and where it is kept.

    `out` is written whole after every step that took time: an adapter trained, an adapter scored.
    The folder beside it, named like it, keeps each adapter and the checkpoints of one in training.

    Args:
        methods: names out of `METHODS`.
        seeds: how many, counted from 0.
        lrs: with several, each method's is chosen on validation data; None is the suite's default.
        settings: r, num_heads, lora_alpha, lora_dropout.
        out: file of the result; None is a name in `runs/`.
    """

    def __init__(
        self,
        base: str,
        suite: str,
        methods: Sequence[str],
        *,
        seeds: int,
        steps: int,
        lrs: Sequence[float] | None = None,
        batch: int | None = None,
        settings: dict | None = None,
        out: Path | None = None,
    ) -> None:
        self.settings = DEFAULTS | (settings or {})
        _check(methods, seeds, steps, lrs, batch, self.settings)
        self.base_name = base
        loaded = load_base(base)
        self.suite = load_suite(suite, loaded)
        self.methods, self.seeds, self.steps = tuple(methods), range(seeds), steps
        self.lrs = tuple(lrs or [self.suite.default_lr])
        self.batch = batch or self.suite.default_batch
        config = {
            "base": loaded.name,
            "base_source": loaded.source,
            "suite": suite,
            **self.suite.provenance,
            "steps": steps,
            "batch": self.batch,
            **self.settings,
        }
        sizes = [
            rlora_size(*shape, self.settings["r"], self.settings["num_heads"])
            for shape in target_shapes(loaded).values()
        ]
        name = f"quality-{loaded.name.replace('/', '--')}-{suite}-{steps}.json"
        self.out = out or Path("runs") / name
        self.result = {
            "command": self._command(loaded.name, suite),
            **environment(),
            "config": config,
            "tasks": list(self.suite.tasks),
            "metrics": list(self.suite.metrics),
            "methods": list(methods),
            "seeds": list(self.seeds),
            "rlora_parameters": sum(sizes),
            "chosen": {},
            "complete": False,
            "records": self._earlier_records(config),
        }

    def _command(self, base: str, suite: str) -> str:
        """The command as a reader would type it: without paths, and without what is default."""
        options = {
            "base": base,
            "suite": suite,
            "methods": ",".join(self.methods),
            "seeds": len(self.seeds),
            "steps": self.steps,
        }
        if self.lrs != (self.suite.default_lr,):
            options["lr"] = ",".join(f"{lr:g}" for lr in self.lrs)
        if self.batch != self.suite.default_batch:
            options["batch"] = self.batch
        options |= {k: v for k, v in self.settings.items() if v != DEFAULTS[k]}
        parts = [f"--{name.replace('_', '-')} {value}" for name, value in options.items()]
        return " ".join(["python -m rlora_lab quality", *parts])

    def _earlier_records(self, config: dict) -> list[dict]:
        if not self.out.exists():
            return []
        try:
            earlier = json.loads(self.out.read_text())
            before, records = earlier["config"], earlier["records"]
        except (ValueError, KeyError, TypeError) as error:
            raise LabError(
                f"{self.out} is no result of this command: choose another --out"
            ) from error
        if other := sorted(k for k in {*before, *config} if before.get(k) != config.get(k)):
            raise LabError(
                f"{self.out} holds a run with another {', '.join(other)}: choose another --out to "
                "keep it, or delete it"
            )
        return records

    def _record(self, method: str, seed: int, lr: float) -> dict | None:
        for record in self.result["records"]:
            if (record["method"], record["seed"], record["learning_rate"]) == (method, seed, lr):
                return record
        return None

    def _folder(self, method: str, seed: int, lr: float) -> Path:
        return self.out.with_suffix("") / f"{method}-seed{seed}-lr{lr:g}"

    def _train(self, method: str, seed: int, lr: float, on_step: Callable[[int], None]) -> None:
        """Train one adapter, keep it, and record it."""
        model = adapt(method, load_base(self.base_name), self.suite, seed=seed, **self.settings)
        initial = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
        folder = self._folder(method, seed, lr)
        start = time.monotonic()
        loss = train(
            model,
            self.suite,
            steps=self.steps,
            lr=lr,
            batch=self.batch,
            seed=seed,
            folder=folder / "checkpoints",
            on_step=on_step,
        )
        seconds = time.monotonic() - start
        similarity = None
        if method != "lora" and self.settings["num_heads"] > 1:
            similarity = {
                "heads": mean_similarity(model),
                "change": mean_similarity(model, initial),
            }
        adapter, other = count_trainable(model)
        model.save_pretrained(folder / "adapter")
        self.result["records"].append(
            {
                "method": method,
                "seed": seed,
                "learning_rate": lr,
                "adapter_parameters": adapter,
                "other_parameters": other,
                "seconds": round(seconds, 1),
                "loss": [round(value, 4) for value in loss],
                "similarity": similarity,
                "validation": None,
                "test": None,
            }
        )
        write_result(self.out, self.result)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def _score(self, method: str, seed: int, lr: float, split: str) -> dict:
        """The scores of a recorded adapter on a split: loaded into a fresh base, if not done."""
        record = self._record(method, seed, lr)
        if record[split] is None:
            folder = self._folder(method, seed, lr) / "adapter"
            if not folder.is_dir():
                raise LabError(
                    f"{self.out} records {method}, seed {seed}, lr {lr:g}, but its adapter "
                    f"{folder} is gone, so it can't be scored: delete {self.out} to begin anew"
                )
            fresh = self.suite.model(load_base(self.base_name))
            model = PeftModel.from_pretrained(fresh, folder)
            record[split] = self.suite.score(model, split)
            write_result(self.out, self.result)
        return record[split]

    def _choose(self, method: str) -> float:
        """The learning rate with the best validation score, a mean over seeds and tasks."""
        if len(self.lrs) == 1:
            return self.lrs[0]
        metric = self.suite.metrics[0]
        means = {}
        for lr in self.lrs:
            scores = [self._score(method, seed, lr, "validation") for seed in self.seeds]
            means[lr] = np.mean([[t[metric] for t in score.values()] for score in scores])
        return max(means, key=means.get)

    def run(self, console: Console) -> dict:
        """Do what is not done yet, and return the result, complete."""
        wanted = [(m, s, lr) for m in self.methods for lr in self.lrs for s in self.seeds]
        missing = [key for key in wanted if self._record(*key) is None]
        write_result(self.out, self.result)  # from now on no other run may use the file
        columns = TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            bar = progress.add_task("training", total=len(missing) * self.steps)
            for i, (method, seed, lr) in enumerate(missing):
                progress.update(bar, description=f"{method}, seed {seed}, lr {lr:g}")
                done = i * self.steps
                self._train(
                    method, seed, lr, lambda n, done=done: progress.update(bar, completed=done + n)
                )
            for method in self.methods:
                progress.update(bar, description=f"{method}, scoring")
                lr = self.result["chosen"][method] = self._choose(method)
                for seed in self.seeds:
                    self._score(method, seed, lr, "test")
        self.result |= {"complete": True, **environment()}
        write_result(self.out, self.result)
        return self.result


def _check(
    methods: Sequence[str],
    seeds: int,
    steps: int,
    lrs: Sequence[float] | None,
    batch: int | None,
    settings: dict,
) -> None:
    for method in methods:
        if method not in METHODS:
            raise LabError(f"unknown method {method!r}: allowed are {', '.join(METHODS)}")
    if not methods or len(set(methods)) < len(methods):
        raise LabError(f"--methods must name at least one, and each once: {','.join(methods)!r}")
    for name, value in {"seeds": seeds, "steps": steps, "batch": batch}.items():
        if value is not None and value < 1:
            raise LabError(f"--{name} must be at least 1, got {value}")
    for lr in lrs or []:
        if not 0 < lr < math.inf:
            raise LabError(f"--lr must be above 0, got {lr}")
    try:
        RLoraConfig(**settings)
    except ValueError as error:
        raise LabError(str(error)) from error
