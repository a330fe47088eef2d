"""Training by transformers' `Trainer`, in one call."""

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..tasks.suite import Suite


class _Report(TrainerCallback):
    """Says after each step how far training is."""

    def __init__(self, on_step: Callable[[int], None]) -> None:
        self.on_step = on_step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.on_step(state.global_step)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole: the Trainer writes its state last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def train(
    model: nn.Module,
    suite: Suite,
    *,
    steps: int,
    lr: float | None = None,
    batch: int | None = None,
    accumulate: int = 1,
    seed: int = 0,
    folder: Path | None = None,
    save_steps: int = 50,
    on_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train what is trainable in `model` on fresh examples of a suite, its tasks mixed.

    AdamW without weight decay, cosine schedule after a warm-up of 3 % of the steps, gradients
    clipped at norm 1. The examples and their order come from `seed`.

    Args:
        lr, batch: the suite's defaults, where None.
        accumulate: batches whose mean gradient makes a step, where one of them is all that fits.
        folder: keeps a checkpoint about each `save_steps` steps, and the next call with the same
            folder goes on from the last of them. None keeps nothing.
        on_step: called with the number of steps done.

    Returns:
        The training loss at 50 points, or at each step if they are fewer.
    """
    lr = suite.default_lr if lr is None else lr
    batch = suite.default_batch if batch is None else batch
    report = max(1, steps // 50)
    # A checkpoint between two reports would lose a part of the loss of the second.
    save_steps = max(report, save_steps - save_steps % report)
    with tempfile.TemporaryDirectory() as nothing:
        trainer = Trainer(
            model,
            TrainingArguments(
                str(folder or nothing),
                max_steps=steps,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulate,
                learning_rate=lr,
                lr_scheduler_type="cosine",
                warmup_steps=math.ceil(0.03 * steps),
                weight_decay=0.0,
                seed=seed,
                save_strategy="steps" if folder else "no",
                save_steps=save_steps,
                save_total_limit=1,
                logging_steps=report,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                disable_tqdm=True,
                report_to="none",
            ),
            train_dataset=suite.training_set(steps * batch * accumulate, seed),
            data_collator=suite.collate,
            callbacks=[_Report(on_step)] if on_step else None,
        )
        trainer.pop_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder) if folder else None)
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
