"""From a model's folder and a person's files to an adapter that is trained, scored and saved.

`train_adapter(base, data)` does all of it, and `python -m rlora_lab train` calls it:

    OUT/data/           the splits that were made of the files
    OUT/adapter/        the adapter, adapter_model.safetensors and adapter_config.json
    OUT/exported/       the same as a plain LoRA, for stock PEFT and servers
    OUT/answers.jsonl   each test row, with what was written before, after, and by the export
    OUT/record.json     settings, seeds, scores, what was foretold and what was measured

A run that is stopped goes on from its last checkpoint when it is started again.
"""

import copy
import gc
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from rlora_min import export_lora

from ..chapters.ch16_shipping import ends_of, generate
from ..errors import LabError
from ..models.answers import AnswerModel, as_matrix, has_bf16
from ..models.bases import Base, load_base
from ..models.methods import adapt, count_trainable
from ..speed.instruments import kept_bytes
from ..tasks.characters import Characters
from ..tasks.files import Files, Rows, lay_out
from .plan import make_settings
from .probes import rounded
from .record import environment, write_whole
from .training import train

SHAPE = ("r", "num_heads", "lora_alpha", "lora_dropout")
TRAINABLE = ("rlora", "lora", "mlora", "hydralora")
ROWS = 32  # that are written at once
PROBE = 4  # rows of each task, to compare outputs on
PULSE = 20  # seconds between two signs of life


class Pulse:
    """Says something now and then, and nothing more often than that."""

    def __init__(self, say: Callable[[str], None], every: float = PULSE) -> None:
        self.say, self.every, self.last = say, every, time.monotonic()

    def __call__(self, words: str) -> None:
        if time.monotonic() - self.last >= self.every:
            self.say(words)
            self.last = time.monotonic()


def peak_bytes() -> int:
    """The most memory that this process, or its GPU, has held so far."""
    import resource  # not on Windows

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _held_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def foretell(
    model: nn.Module, suite: Files, steps: int, batch: int, accumulate: int = 1
) -> dict[str, float]:
    """What a training will take, from a trial of three batches and a count of what they keep.

    Returns:
        `seconds` of the training, and `bytes`, the most that will be held: what is held now or was
        before; the gradient and AdamW's two numbers for each that is trained, in fp32; and what
        autograd keeps of the longest rows.
    """
    device = next(model.parameters()).device

    def loss(rows: list[dict]) -> Tensor:
        inputs = {name: value.to(device) for name, value in suite.collate(rows).items()}
        return model(**inputs)["loss"]

    model.train()
    rows = suite.training_set(3 * batch, seed=0)
    seconds = []
    for first in range(0, len(rows), batch):
        start = time.monotonic()
        found = loss(rows[first : first + batch])
        found.backward()
        found.item()  # waits for a GPU
        seconds.append(time.monotonic() - start)
        model.zero_grad()
    longest = sorted(suite.training_rows(), key=lambda row: -len(row["ids"]))[:batch]
    kept = kept_bytes(model, lambda: loss(longest))[1]
    model.eval()
    held = _held_bytes() + kept + 12 * sum(count_trainable(model))
    return {
        "seconds": steps * accumulate * float(np.mean(seconds[1:])),  # the first one warms up
        "bytes": max(held, peak_bytes()),
    }


def write_answers(
    model: nn.Module, suite: Files, split: str = "test", pulse: Callable[[str], None] = str
) -> dict[str, list[str]]:
    """What a whole causal model writes after each prompt, greedily, `{task: [text]}`.

    Nothing of the model's `generation_config` counts but its end tokens. An answer ends after as
    many tokens as the task's longest answer has.
    """
    tokenizer = suite.tokenizer
    written = {}
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=suite.bf16):
        for task in suite.tasks:
            rows = suite.asked(task, split)
            most = max(len(row["ids"]) - row["answer"] for row in rows)
            order = sorted(range(len(rows)), key=lambda i: rows[i]["answer"])  # little padding
            texts = [""] * len(rows)
            for first in range(0, len(order), ROWS):
                part = order[first : first + ROWS]
                prompts = [(rows[i]["ids"][: rows[i]["answer"]], most) for i in part]
                for i, new in zip(part, generate(model, tokenizer, prompts), strict=True):
                    ended = new and new[-1] in ends_of(model)
                    texts[i] = tokenizer.decode(new[:-1] if ended else new).strip()
                pulse(f"  {task}: {first + len(part)} of {len(rows)} answers written")
            written[task] = texts
    return written


def judge(texts: list[str], rows: list[dict]) -> dict[str, float | None]:
    """The share of texts that are the answer, and of those that are no option at all; this is None
    where no options are known."""
    exact = [text == row["answer"].strip() for text, row in zip(texts, rows, strict=True)]
    found = {"exact": rounded(float(np.mean(exact))), "no_option": None}
    if rows[0]["options"]:
        none = [
            text not in [option.strip() for option in row["options"]]
            for text, row in zip(texts, rows, strict=True)
        ]
        found["no_option"] = rounded(float(np.mean(none)))
    return found


def chance(rows: dict[str, list[dict]]) -> float:
    """What can be had without reading a test prompt: of options, any; else the answer that is the
    commonest in training, for all."""
    if rows["test"][0]["options"]:
        return rounded(float(np.mean([1 / len(row["options"]) for row in rows["test"]])))
    (commonest, _), *_ = Counter(row["answer"] for row in rows["train"]).most_common(1)
    return rounded(float(np.mean([row["answer"] == commonest for row in rows["test"]])))


def train_adapter(
    base: str,
    data: str | Path,
    out: str | Path = "runs/adapter",
    *,
    method: str = "rlora",
    steps: int = 300,
    lr: float = Files.default_lr,
    batch: int = Files.default_batch,
    accumulate: int = 1,
    blocks: int | None = None,
    chat: bool = False,
    bf16: bool | None = None,
    train_rows: int | None = None,
    test_rows: int = 300,
    r: int = 4,
    num_heads: int = 3,
    lora_alpha: float = 32,
    lora_dropout: float = 0.1,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict:
    """Train an adapter on a person's files; score it before and after; save, check, export it.

    Args:
        base: a folder, "smollm2", "tiny", or a hub id.
        data: a folder of .jsonl files, or one such file, as `rlora_lab.tasks.files` says.
        out: a folder for what is made.
        method: out of `TRAINABLE`; all have R-LoRA's size, router counted.
        batch, accumulate: rows of a batch, and batches of a step.
        blocks: adapt the upper so many blocks alone, over outputs of the lower ones that are
            computed once, on CPUs. None: all.
        chat: put prompts into the tokenizer's chat template.
        bf16: products in bf16; None: where this machine has units for it.
        train_rows, test_rows: at most so many of a task.
        say: called with lines about what is done, at least every half minute.

    Returns:
        what stands in record.json.

    Raises:
        LabError: what is wrong with the base, the data or the settings.
    """
    out, data = Path(out), Path(data)
    settings = {
        "method": method,
        "steps": steps,
        "lr": lr,
        "batch": batch,
        "accumulate": accumulate,
        "blocks": blocks,
        "chat": chat,
        "bf16": has_bf16() if bf16 is None else bf16,
        "train_rows": train_rows,
        "test_rows": test_rows,
        "r": r,
        "num_heads": num_heads,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "seed": seed,
    }
    if method not in TRAINABLE:
        raise LabError(f"no method {method!r} to train: allowed are {', '.join(TRAINABLE)}")
    make_settings({name: settings[name] for name in SHAPE}, "")  # only to check them
    rows, notes = _begin(base, data, out, settings)
    for task, splits in rows.items():
        say(f"{task}: " + ", ".join(f"{len(splits[s])} {s}" for s in splits) + " rows")
    for note in notes:
        say(note)
    run = _Run(base, out, settings, rows, say)
    before = run.before()
    trained = run.train()
    after = run.after()
    texts = {"before": before["texts"], "after": after["texts"]}
    if "exported" in after:
        texts["exported"] = after["exported"]
    choices = dict(zip(texts, trained["choice"], strict=False))  # of the export none
    found = {}
    for task, splits in rows.items():
        own = {"rows": {split: len(part) for split, part in splits.items()}}
        own["chance"] = chance(splits)
        for when, written in texts.items():
            own[when] = judge(written[task], splits["test"])
            if when in choices:
                own[when]["choice"] = choices[when].get(task)
        found[task] = own
    record = {
        "command": run.command(data),
        **environment(),
        "base": run.base_name,
        "base_source": run.source,
        **run.suite.provenance,
        "notes": notes,
        "settings": settings,
        "parameters": trained["parameters"],
        "adapter_bytes": sum(path.stat().st_size for path in (out / "adapter").iterdir()),
        "foretold": {k: round(v) for k, v in trained["foretold"].items()},
        "measured": {
            "seconds": round(trained["seconds"]),
            "from_step": trained["from_step"],  # above 0 in a run that went on
            "bytes": trained["bytes"],
            "seconds_scoring": round(before["seconds"] + after["seconds"]),
        },
        "loss": trained["loss"],
        "reloaded_off": after["reloaded_off"],
        "exported_off": after.get("exported_off"),
        "tasks": found,
    }
    _write_answers(out / "answers.jsonl", rows, texts)
    write_whole(out / "record.json", json.dumps(record, indent=1) + "\n")
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    say(scores_text(record))
    say(f"kept in {out.name}: " + ", ".join(sorted(path.name for path in out.iterdir())))
    return record


def _begin(base: str, data: Path, out: Path, settings: dict) -> tuple[Rows, list[str]]:
    """Check the files and lay their rows out, unless there is another run in the folder."""
    if (out / "record.json").exists():
        raise LabError(f"{out.name} holds a run that is finished: choose another --out")
    begun = out / "settings.json"
    asked = {"base": base, **settings}
    if begun.exists() and (before := json.loads(begun.read_text())) != asked:
        other = sorted(name for name in asked if before.get(name) != asked[name])
        raise LabError(f"{out.name} holds a run with another {', '.join(other)}: choose another")
    rows, notes = lay_out(
        data,
        out / "data",
        seed=settings["seed"],
        chat=settings["chat"],
        train_rows=settings["train_rows"],
        test_rows=settings["test_rows"],
    )
    write_whole(begun, json.dumps(asked, indent=1) + "\n")
    return rows, notes


class _Run:
    """The parts of `train_adapter`; one model is in memory at a time."""

    def __init__(
        self, base: str, out: Path, settings: dict, rows: Rows, say: Callable[[str], None]
    ) -> None:
        self.base, self.out, self.settings, self.rows = base, out, settings, rows
        self.say, self.pulse = say, Pulse(say)
        self.loaded = self._load()
        self.base_name, self.source = self.loaded.name, self.loaded.source
        if settings["blocks"]:
            say("the blocks below are computed once, unless they were before")
        self.suite = Files(
            self.loaded, blocks=settings["blocks"], bf16=settings["bf16"], folder=out / "data"
        )
        self.whole = copy.copy(self.suite)  # the same rows, for all blocks
        self.whole.lower, self.whole.outputs = 0, None
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.loaded.model.to(self.device)
        self.probe = [row for task in rows for row in self.suite.asked(task, "validation")[:PROBE]]

    def _load(self) -> Base:
        loaded = load_base(self.base)
        tokenizer = loaded.tokenizer or Characters()
        if loaded.model.get_output_embeddings() is None:
            return loaded  # the suite says what is wrong
        as_matrix(loaded.model.get_output_embeddings())
        ends = {*ends_of(loaded.model), tokenizer.eos_token_id} - {None}
        loaded.model.generation_config.eos_token_id = sorted(ends)
        return loaded

    def command(self, data: Path) -> str:
        words = ["python -m rlora_lab train", f"--base {self.base_name}", f"--data {data.name}"]
        usual = train_adapter.__kwdefaults__
        for name, value in self.settings.items():
            if name != "bf16" and value != usual[name]:
                option = f"--{name.replace('_', '-')}"
                words.append(option if value is True else f"{option} {value}")
        return " ".join(words)

    def before(self) -> dict:
        count = sum(len(splits["test"]) for splits in self.rows.values())
        self.say(f"{self.base_name} writes {count} answers, before training")
        start = time.monotonic()
        texts = write_answers(self.loaded.model, self.suite, pulse=self.pulse)
        self.scoring = time.monotonic() - start
        return {"texts": texts, "seconds": self.scoring}

    def train(self) -> dict:
        own = self.settings
        shape = {name: own[name] for name in SHAPE}
        model = adapt(own["method"], self.loaded, self.suite, seed=own["seed"], **shape)
        model.to(self.device)
        parameters = count_trainable(model)[0]
        choice = [self._choices(model)]
        foretold = foretell(model, self.suite, own["steps"], own["batch"], own["accumulate"])
        self.say(
            f"{own['method']} trains {parameters:,} numbers in {own['steps']} steps. Foretold: "
            f"{_minutes(foretold['seconds'])} of training, then about "
            f"{_minutes(2 * self.scoring)} of scoring; at most {foretold['bytes'] / 1e9:.1f} GB"
        )
        start = time.monotonic()
        first: list[tuple[int, float]] = []  # the step that is done first, and when

        def on_step(step: int) -> None:
            if not first:
                first.append((step, time.monotonic()))
                return
            done, spent = step - first[0][0], time.monotonic() - first[0][1]
            left = _minutes(spent / done * (own["steps"] - step))
            self.pulse(f"  step {step} of {own['steps']}, {left} left")

        loss = train(
            model,
            self.suite,
            steps=own["steps"],
            lr=own["lr"],
            batch=own["batch"],
            accumulate=own["accumulate"],
            seed=own["seed"],
            folder=self.out / "checkpoints",
            on_step=on_step,
        )
        seconds, peak = time.monotonic() - start, peak_bytes()
        self.logits = self._logits(model, self.suite)
        if not self.logits.isfinite().all():  # Trainer's losses hide it
            raise LabError(f"the model gives no numbers any more: lower the rate of {own['lr']}")
        choice.append(self._choices(model))
        self._save(model)
        self.loaded = model = None  # what was loaded goes before it is loaded again
        gc.collect()
        return {
            "parameters": parameters,
            "choice": choice,
            "foretold": foretold,
            "seconds": seconds,
            "bytes": peak,
            "from_step": first[0][0] - 1 if first else own["steps"],
            "loss": [rounded(part.mean()) for part in np.array_split(loss, min(10, len(loss)))],
        }

    def _choices(self, model: nn.Module) -> dict[str, float]:
        """How often the right option is the likeliest, in tasks with options: a format that is fair
        to a model that was not told how to answer."""
        tasks = [task for task, splits in self.rows.items() if splits["test"][0]["options"]]
        found = self.suite.results(model, "test", tasks)
        return {task: rounded(float(np.mean(own["choice"]))) for task, own in found.items()}

    @torch.no_grad()
    def _logits(self, model: nn.Module, suite: Files) -> Tensor:
        batch = {name: value.to(self.device) for name, value in suite.collate(self.probe).items()}
        return model(**batch)["logits"].cpu()

    def _save(self, model: PeftModel) -> None:
        """The adapter, whole or not at all, and as PEFT finds it for a causal model."""
        config = model.peft_config["default"]
        config.base_model_name_or_path, config.task_type = self.base_name, "CAUSAL_LM"
        folder, unfinished = self.out / "adapter", self.out / ".adapter"
        for path in (folder, unfinished):
            shutil.rmtree(path, ignore_errors=True)
        model.save_pretrained(unfinished, save_embedding_layers=False)
        unfinished.rename(folder)
        saved = load_file(folder / "adapter_model.safetensors")
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        if not all(torch.equal(saved[name], value.cpu()) for name, value in state.items()):
            raise LabError(f"{folder} does not hold what was trained")

    def after(self) -> dict:
        """Of the adapter that was saved, on the whole base, loaded anew; and of its export."""
        start = time.monotonic()
        loaded = self._load()
        model = PeftModel.from_pretrained(loaded.model, self.out / "adapter").to(self.device).eval()
        logits = self._logits(AnswerModel(loaded.model, self.suite.bf16).eval(), self.whole)
        off = float((logits - self.logits).norm() / self.logits.norm())
        # Relative, as the logits of models differ in size. Blocks that were computed apart have
        # other roundings.
        if off > (0.1 if self.suite.bf16 else 1e-3):
            raise LabError(f"the adapter that was loaded again is off by {off:.1%} of the logits")
        self.say(f"saved and loaded again: off by {off:.1e} of the logits")
        found = {
            "reloaded_off": off,
            "texts": write_answers(model, self.suite, pulse=self.pulse),
        }
        if isinstance(model.peft_config["default"], LoraConfig):  # it is one already
            return found | {"seconds": time.monotonic() - start}
        batch = self.whole.collate(self.probe[::PROBE][:PROBE])  # the logits of all its places
        batch = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}
        largest, relative = self._export(model, batch)
        self.say(f"exported as plain LoRA: off by {relative:.1%} of the logits")
        model = loaded = None
        gc.collect()
        loaded = self._load()
        plain = PeftModel.from_pretrained(loaded.model, self.out / "exported").to(self.device)
        return found | {
            "exported_off": {"largest": largest, "relative": relative},
            "exported": write_answers(plain.eval(), self.suite, pulse=self.pulse),
            "seconds": time.monotonic() - start,
        }

    def _export(self, model: PeftModel, batch: dict[str, Tensor]) -> tuple[float, float]:
        """As a plain LoRA. The base is named afterwards, or PEFT asks the hub for one so named."""
        model.peft_config["default"].base_model_name_or_path = None
        off = export_lora(model, self.out / "exported", batch=batch)
        config = LoraConfig.from_pretrained(self.out / "exported")
        config.base_model_name_or_path = self.base_name
        config.save_pretrained(self.out / "exported")
        return off


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _write_answers(path: Path, rows: Rows, texts: dict[str, dict[str, list[str]]]) -> None:
    lines = []
    for task, splits in rows.items():
        for i, row in enumerate(splits["test"]):
            said = {when: own[task][i] for when, own in texts.items()}
            lines.append({"task": task, **row, **said})
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def scores_text(record: dict) -> str:
    """The scores of a record as lines: per cent of test rows, for each task."""
    columns = [("before", "exact"), ("before", "no_option"), ("before", "choice")]
    columns += [("after", "exact"), ("after", "no_option"), ("after", "choice")]
    columns += [("exported", "exact")]
    words = {"exact": "exact", "no_option": "no option", "choice": "choice"}
    wide = {"exact": 10, "no_option": 10, "choice": 7}
    width = max(map(len, record["tasks"]))
    lines = [
        " " * width + "  rows chance" + "".join(f"{when:>{wide[what]}}" for when, what in columns),
        " " * (width + 13) + "".join(f"{words[what]:>{wide[what]}}" for _, what in columns),
    ]
    for task, own in record["tasks"].items():
        line = f"{task:{width}}{own['rows']['test']:6}{own['chance']:7.0%}"
        for when, what in columns:
            share = own.get(when, {}).get(what)
            line += f"{'–' if share is None else f'{share:.0%}':>{wide[what]}}"
        lines.append(line)
    return "\n".join(lines)
