"""LoRA and R-LoRA of one size on a person's files: `python -m rlora_lab compare`.

It is a block of a plan like any other: the same rates for both, each at its best on validation data
with seeds that are not measured; then the same seeds for both on test data, where each row's result
is kept. What they say is in `rlora_lab.report.verdict`.
"""

import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from ..errors import LabError
from ..models.bases import load_base
from ..models.methods import adapt
from ..report.loading import read_block
from ..tasks.files import Files, lay_out
from .adapter import foretell
from .plan import Settings, make_block, make_settings
from .worker import work

METHODS = ("lora", "rlora")
RATES = (5e-4, 1e-3, 2e-3)
SWEEP_SEEDS = (1000,)


def compare_files(
    base: str,
    data: str | Path,
    out: str | Path = "runs/compare",
    *,
    steps: int = 300,
    rates: Sequence[float] = RATES,
    seeds: int = 5,
    batch: int = Files.default_batch,
    blocks: int | None = None,
    chat: bool = False,
    train_rows: int | None = None,
    test_rows: int = 300,
    settings: dict | None = None,
    workers: int = 1,
    say: Callable[[str], None] = print,
) -> dict:
    """Run what is missing of the comparison and return its records, as `read_block` does.

    Args:
        base, data, blocks, chat, train_rows, test_rows: as for `train_adapter`.
        out: a folder for the splits and the records; a comparison that was stopped goes on there.
        rates: learning rates that each method is tried at, if there are several.
        seeds: how many, on test data; they count from 0.
        settings: r, num_heads, lora_alpha and lora_dropout, where not the usual ones.

    Raises:
        LabError: what is wrong with the base, the data or the settings.
    """
    data, folder = Path(data), Path(out)
    if seeds < 2:
        raise LabError(f"an interval needs two seeds or more, got {seeds}; take five")
    _, notes = lay_out(
        data,
        folder / "data",
        chat=chat,
        train_rows=train_rows,
        test_rows=test_rows,
    )
    for note in notes:
        say(note)
    rates = sorted(rates)
    shape = make_settings(settings or {}, "")
    digest, seconds = _try(base, folder / "data", steps, batch, blocks, shape)
    # Checkpoints are found by this name: other data must not go on from them.
    name = f"compare-{digest[:8]}-{steps}{'-chat' * chat}"
    values = {
        "why": "asked for by options",
        "base": base,
        "suite": "files",
        "methods": METHODS,
        "steps": steps,
        "batch": batch,
        "blocks": blocks,
        "rates": rates,
        "extend": 0,
        "sweep_seeds": SWEEP_SEEDS if len(rates) > 1 else (),
        "seeds": range(seeds),
        "settings": shape,
    }
    plan = {name: make_block(name, values, "")}
    runs = len(METHODS) * (seeds + len(rates) * len(plan[name].sweep_seeds))
    say(
        f"{runs} trainings, foretold: {runs * seconds / workers / 60:.0f} minutes, and scoring. "
        "What is done is kept; the same command goes on with what is missing."
    )
    before = os.environ.get("RLORA_FILES")
    os.environ["RLORA_FILES"] = str((folder / "data").resolve())  # for the workers
    try:
        work(plan, folder, Console(), workers=workers)
    finally:
        os.environ.pop("RLORA_FILES")
        if before is not None:
            os.environ["RLORA_FILES"] = before
    return read_block(plan, name, folder)


def _try(
    base: str, folder: Path, steps: int, batch: int, blocks: int | None, shape: Settings
) -> tuple[str, float]:
    """The digest of the data, and the seconds of a training; it also says what is wrong with base
    or rows before any worker starts."""
    loaded = load_base(base)
    suite = Files(loaded, blocks=blocks, folder=folder)
    model = adapt("rlora", loaded, suite, seed=0, **shape.model_dump())
    seconds = foretell(model, suite, steps, batch)["seconds"]
    del loaded, model
    gc.collect()
    return suite.provenance["data_sha256"], seconds
