"""`python -m rlora_lab quality|evidence|report|speed|train-base`; each takes --help."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from .errors import LabError
from .models.bases import TINY
from .models.methods import METHODS
from .models.train_base import train_base
from .report.tables import table
from .runs.evidence import status_table, work
from .runs.plan import PLAN, RECORDS, load_plan
from .runs.quality import DEFAULTS, SUITES, Quality
from .speed.bars import tables
from .speed.bench import Speed
from .tasks.sentences import Sentences
from .tasks.strings import Synthetic

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Threads = Annotated[
    int | None, typer.Option(help="CPU threads", min=1, show_default="PyTorch's own choice")
]


def _numbers(text: str | None) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise LabError(f"--lr must be one or several numbers, with commas, got {text!r}") from None


@app.command()
def quality(
    base: Annotated[str, typer.Option(help="tiny, minilm, a folder, or a hub id")] = "tiny",
    suite: Annotated[str, typer.Option(help=f"{' or '.join(SUITES)}")] = "synthetic",
    methods: Annotated[
        str, typer.Option(help=f"names out of {', '.join(METHODS)}, with commas")
    ] = "lora,hydralora,mlora,rlora",
    seeds: Annotated[int, typer.Option(help="how many seeds, counted from 0")] = 1,
    steps: Annotated[int, typer.Option(help="training steps")] = 400,
    lr: Annotated[
        str | None,
        typer.Option(
            help="learning rate; with several, with commas, each method's is chosen on validation "
            "data",
            show_default=f"{Sentences.default_lr} for sentences, {Synthetic.default_lr} for "
            "synthetic",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="examples a step",
            show_default=f"{Sentences.default_batch} for sentences, {Synthetic.default_batch} for "
            "synthetic",
        ),
    ] = None,
    r: Annotated[int, typer.Option(help="rank of A and of each head")] = DEFAULTS["r"],
    num_heads: Annotated[int, typer.Option(help="heads N")] = DEFAULTS["num_heads"],
    lora_alpha: Annotated[float, typer.Option(help="scale alpha / sqrt(r)")] = DEFAULTS[
        "lora_alpha"
    ],
    lora_dropout: Annotated[float, typer.Option(help="dropout")] = DEFAULTS["lora_dropout"],
    threads: Threads = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file of the result  [default: runs/quality-BASE-SUITE-STEPS.json]"),
    ] = None,
) -> None:
    """Train methods of equal size on a suite's mixed tasks and measure them on its test data.

    Adapters sit on the MLP projections. R-LoRA's size at --r and --num-heads is the measure; LoRA
    and M-LoRA take the ranks that come closest to it. The suite synthetic needs the base tiny.


    The suite sentences reads the hub, or the folder in the environment variable RLORA_DATA.
    A run that was stopped goes on where it stopped when it is started again.
    """
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    run = Quality(
        base,
        suite,
        [name for name in methods.split(",") if name],
        seeds=seeds,
        steps=steps,
        lrs=_numbers(lr),
        batch=batch,
        settings={
            "r": r,
            "num_heads": num_heads,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
        },
        out=out,
    )
    for key in ("data", "data_notes"):
        if run.result["config"].get(key):
            console.print(f"{key}: {run.result['config'][key]}")
    result = run.run(console)
    console.print(table(result))
    if seeds == 1:
        console.print("One seed says nothing about which method is better: see --seeds.")
    console.print(f"{result['machine']}, {result['date']}; kept in {run.out}")


Plan = Annotated[
    Path, typer.Option(help="TOML file of the grid", show_default="the plan of this package")
]
Records = Annotated[
    Path,
    typer.Option(help="folder of the records", show_default="records/evidence of this package"),
]


@app.command()
def evidence(
    plan: Plan = PLAN,
    records: Records = RECORDS,
    only: Annotated[
        str, typer.Option(help="blocks of the plan, with commas", show_default="all")
    ] = "",
    methods: Annotated[
        str, typer.Option(help="methods of the plan, with commas", show_default="all")
    ] = "",
    minutes: Annotated[
        float, typer.Option(help="start no run that would end later", show_default="no end")
    ] = float("inf"),
    workers: Annotated[int, typer.Option(help="processes, of one thread each", min=1)] = 2,
    show: Annotated[
        bool, typer.Option("--status", help="only say what is done and what is missing")
    ] = False,
) -> None:
    """Run what is missing of a plan of runs, and add each that ends to the records.

    It can be stopped at any time, and started again. Several machines may share a plan: give each
    its own --only or --methods, and merge their records with git.


    Blocks of the suite sentences read the hub, or the folder in the environment variable
    RLORA_DATA.
    """
    console, blocks = Console(), load_plan(plan)
    done = None
    if not show:
        done = work(
            blocks,
            records,
            console,
            only=[name for name in only.split(",") if name],
            methods=[name for name in methods.split(",") if name],
            minutes=minutes,
            workers=workers,
        )
    console.print(status_table(blocks, records))
    if done is not None:
        console.print("All that was asked for is done." if done else "There is more to do.")


@app.command()
def report(
    plan: Plan = PLAN,
    records: Records = RECORDS,
    out: Annotated[Path, typer.Option(help="folder for tables and pictures")] = Path("runs/report"),
) -> None:
    """Make the tables and pictures of chapters 08 and 10 from the records."""
    from .report.report import write_report  # pandas and matplotlib are for this command alone

    print(write_report(out, plan, records))
    print(f"Written to {out}: report.md, tables as CSV, pictures as PNG and SVG.")


@app.command()
def speed(
    quick: Annotated[
        bool, typer.Option("--quick", help="few steps, and the cases of the bars alone")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda", show_default="a GPU where there is one")
    ] = None,
    threads: Threads = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file of the result", show_default="runs/speed-DEVICE[-quick].json"),
    ] = None,
) -> None:
    """Measure time, memory and arithmetic of a step with each adapter, and say which bars hold.

    The shapes are those of Qwen2.5, the weights random: blocks alone, a few on a CPU, all on a GPU.
    Times are good for comparison only while the machine has nothing else to do.


    A run that was stopped goes on with the case that it stopped in when it is started again.
    """
    if threads:
        torch.set_num_threads(threads)
    console = Console(width=None if sys.stdout.isatty() else 100)
    run = Speed(device, quick=quick, out=out)
    result = run.run(console)
    for each in tables(result):
        console.print(each)
    if quick:
        console.print("A quick look, from few steps: leave --quick out for a measurement.")
    console.print(f"{result['machine']}, {result['date']}; kept in {run.out}")


@app.command(name="train-base")
def train_base_command(
    seed: Annotated[int, typer.Option(help="seed of weights and examples")] = 0,
    steps: Annotated[int, typer.Option(help="training steps of 128 examples", min=1)] = 1000,
    threads: Threads = None,
    out: Annotated[
        Path | None, typer.Option(help="folder", show_default="the tiny base of this package")
    ] = None,
) -> None:
    """Train the tiny base on its string tasks (about a minute on one core) and keep it."""
    if threads:
        torch.set_num_threads(threads)
    command = f"python -m rlora_lab train-base --seed {seed} --steps {steps}"
    record = train_base(out or TINY, seed=seed, steps=steps, command=command)
    for task, score in record["test"].items():
        print(f"{task:16} {score['letters']:.1%} of letters, {score['exact']:.1%} exact")
    print(f"{record['parameters']:,} parameters, {record['seconds']} s; kept in {out or TINY}")


def main() -> int:
    try:
        app(prog_name="python -m rlora_lab", standalone_mode=True)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
