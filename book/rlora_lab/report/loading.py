"""Reading what was recorded: `load_evidence(block)`, and `load_result(name)` for the speed record.

A block comes as a dictionary, which tables, pictures and questions take:

    command, date, machine, threads, versions
    config          what all of its runs share: base, suite, steps, batch, settings, where the data
                    came from
    tasks, metrics  those that a task has; the first metric is the one to choose by
    methods         those that were scored on test data, controls once all of their seeds are run
    seeds           those that all but the controls were scored on; sweep_seeds
    chosen          the learning rate of each method
    tuned           {method: settings chosen beside it}
    sweeps          {method: {choice: {seed: mean score over tasks on validation data}}}, a choice
                    being a rate with what else was tried
    at_end          the methods whose rate is the last that was tried
    complete        whether nothing of the plan is missing
    rlora_parameters    of R-LoRA's adapter, or None
    records         the runs, as `rlora_lab.runs.record` describes them, but for their scores:
                    {task: {metric: value}}
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import LabError
from ..names import LAB
from ..runs.choice import Choice, choice_of, sweep, sweep_scores
from ..runs.plan import PLAN, RECORDS, Block, load_plan, missing, read_all

SCORES = ("validation", "test", "test_stopped")


def load_result(name: str, *, say: bool = True, optional: bool = False) -> dict | None:
    """A recorded result that is a file of its own, such as "speed-cpu".

    Says (unless `say` is off) from which file, machine and date its numbers come. One that is
    `optional` is None where there is no such file.

    Raises:
        LabError: there is no such file.
    """
    folder = LAB / "records"
    file = folder / f"{name}.json"
    if optional and not file.is_file():
        return None
    if not file.is_file():
        known = sorted(path.stem for path in folder.glob("*.json"))
        raise LabError(f"no recorded result {name!r}: there are {', '.join(known) or 'none'}")
    result = json.loads(file.read_text())
    if say:
        print(
            f"records/{name}.json: {result['date']}, {result['machine']}, "
            f"{_versions(result, 'torch', 'peft')}\n"
            f"made by: {result['command']}"
        )
    return result


def load_evidence(
    block: str, *, say: bool = True, plan: Path = PLAN, records: Path = RECORDS
) -> dict:
    """A block of the evidence, such as "synthetic", in the form that this module describes.

    Says (unless `say` is off) from which file, machine and date its numbers come.

    Raises:
        LabError: no such block, none of its runs on test data done, or test data that was scored at
            another rate than the sweep chooses.
    """
    blocks = load_plan(plan)
    if block not in blocks:
        raise LabError(f"no block {block!r} in the plan: it has {', '.join(blocks)}")
    result = read_block(blocks, block, records)
    if say:
        print(provenance(result))
    return result


def read_block(plan: dict[str, Block], name: str, records: Path) -> dict:
    """The same for a block of a plan that is loaded already."""
    block = plan[name]
    plan = _with_sources(plan, name)
    all_records, settings = read_all(plan, records)
    tested = [r for r in all_records[name] if r["stage"] == "test"]
    done = {m: {r["seed"] for r in tested if r["method"] == m} for m in block.methods}
    methods = [  # a control comes when all of its seeds are run
        m
        for m, seeds in done.items()
        if seeds and (m not in block.like or set(block.seeds_of(m)) <= seeds)
    ]
    if set(methods) <= block.like.keys():
        raise LabError(f"{name}: nothing has been scored on test data yet")
    choices = {m: _tested_choice(plan, block, m, all_records) for m in methods}
    chosen = {m: choice.learning_rate for m, choice in choices.items()}
    setting = settings[name][0]
    todo, later = missing(plan, block, all_records)
    sweeps = {m: sweep_scores(all_records[name], m) for m in methods}
    seeds = [done[m] for m in methods if m not in block.like]
    sizes = [
        r["adapter_parameters"]
        for r in tested
        if r["method"] == "rlora" and "adapter_parameters" in r
    ]
    dates = sorted({record["date"] for record in all_records[name]})
    return {
        "command": f"python -m rlora_lab run evidence --only {name}",
        "date": dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
        "machine": "; ".join(dict.fromkeys(s["machine"] for s in settings[name])),
        "threads": setting["threads"],
        "versions": setting["versions"],
        "config": {k: v for k, v in setting.items() if k not in ("machine", "threads", "versions")},
        "tasks": setting["tasks"],
        "metrics": [m for m in setting["metrics"] if set(tested[0]["test"][m]) != {None}],
        "methods": methods,
        "seeds": [s for s in block.seeds if all(s in known for known in seeds)],
        "sweep_seeds": list(block.sweep_seeds),
        "chosen": chosen,
        "tuned": {m: dict(choice.tuned) for m, choice in choices.items()},
        "sweeps": sweeps,
        "at_end": [
            m
            for m in methods
            if len(rates := sorted({choice.learning_rate for choice in sweeps[m]})) > 1
            and chosen[m] in (rates[0], rates[-1])
        ],
        "complete": not todo and not later,
        "rlora_parameters": sizes[0] if sizes else None,
        "records": [_by_task(record, setting["tasks"]) for record in all_records[name]],
    }


def _with_sources(plan: dict[str, Block], name: str | None) -> dict[str, Block]:
    """A block, and those that its rates come from."""
    found = {}
    while name:
        found[name] = plan[name]
        name = plan[name].rates_from
    return found


def _tested_choice(
    plan: dict[str, Block], block: Block, method: str, records: dict[str, list[dict]]
) -> Choice:
    """What a method is measured at, if it is what was chosen."""
    choices = {
        choice_of(record)
        for record in records[block.name]
        if (record["method"], record["stage"]) == (method, "test")
    }
    if block.kind == "study":  # the search chose it
        return choices.pop()
    _, best = sweep(plan, block, method, records)
    others = choices - {best}
    if others and not block.chosen:
        raise LabError(
            f"{block.name}: {method} was scored on test data at {_words(others)}, but its sweep "
            f"chooses {_words({best})}. It must not be chosen anew after test data was seen."
        )
    return best


def _words(choices: set[Choice | None]) -> str:
    return ", ".join(
        "nothing yet" if c is None else " ".join([f"{c.learning_rate:g}", *map(str, c.tuned)])
        for c in choices
    )


def _by_task(record: dict, tasks: Sequence[str]) -> dict:
    """A record whose scores are `{task: {metric: value}}`."""
    changed = dict.fromkeys(("validation", "test"))
    for split in SCORES:
        if record.get(split):
            scores = record[split].items()
            changed[split] = {t: {m: v[i] for m, v in scores} for i, t in enumerate(tasks)}
    return record | changed


def provenance(result: dict) -> str:
    """Where the numbers of a block come from: command, seeds, date, machine, versions."""
    chosen = "as the plan says"
    if result["sweep_seeds"]:
        chosen = f"chosen on validation data with seeds {_span(result['sweep_seeds'])}"
    state = "" if result["complete"] else ", not all of the plan yet"
    return (
        f"records/evidence/{result['config']['block']}.jsonl: {result['date']}, "
        f"{result['machine']}, {_versions(result, 'torch', 'transformers', 'peft')}\n"
        f"made by: {result['command']}{state}\n"
        f"seeds on test data: {_span(result['seeds'])}; learning rates {chosen}"
    )


def _versions(result: dict, *names: str) -> str:
    return ", ".join(f"{name} {result['versions'][name]}" for name in names)


def _span(seeds: Sequence[int]) -> str:
    whole = len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(str, seeds))


def chosen_records(result: dict, method: str) -> list[dict]:
    """The records of a method on test data, at its chosen learning rate, by seed."""
    if method not in result["methods"]:
        raise LabError(f"no method {method!r} here: there are {', '.join(result['methods'])}")
    records = [
        r
        for r in result["records"]
        if (r["stage"], r["method"]) == ("test", method)
        and r["learning_rate"] == result["chosen"][method]
        and r["seed"] in result["seeds"]
    ]
    return sorted(records, key=lambda r: r["seed"])


def tasks_with(result: dict, metric: str) -> list[str]:
    """The tasks that have a metric: not all have options to choose from."""
    scores = next(r["test"] for r in result["records"] if r["test"])
    return [task for task in result["tasks"] if scores[task][metric] is not None]


def score_array(result: dict, method: str, metric: str | None = None) -> np.ndarray:
    """Scores on test data, (seeds, tasks with the metric), the suite's first unless named."""
    metric = metric or result["metrics"][0]
    tasks = tasks_with(result, metric)
    records = chosen_records(result, method)
    return np.array([[record["test"][task][metric] for task in tasks] for record in records])
