"""Plans: what they refuse, how a learning rate is chosen, and what there is still to do."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from lab_helpers import STAGED, plan_file, swept

from rlora_lab.errors import LabError
from rlora_lab.names import METHODS
from rlora_lab.runs.choice import Choice, sweep
from rlora_lab.runs.plan import PLAN, load_plan, missing, read_all
from rlora_lab.runs.record import add_record, read_records
from rlora_lab.tasks.strings import Synthetic


def test_the_plan_of_the_book():
    plan = load_plan()
    assert set(plan["synthetic"].methods) < set(METHODS)
    assert len(plan["synthetic"].seeds) >= 10 and len(plan["sentences"].seeds) >= 5
    for size in (2, 4, 8):
        for kind in ("related", "different"):
            block = plan[f"{kind}-{size}"]
            assert len(Synthetic(block.tasks).tasks) == size
            assert {"lora", "mlora", "rlora", "one-head"} <= set(block.methods)
            for smaller in (2, 4, 8):  # each suite holds the smaller ones of its kind
                tasks = plan[f"{kind}-{smaller}"].tasks
                assert set(tasks) <= set(block.tasks) or smaller > size
        pair = plan[f"related-{size}"], plan[f"different-{size}"]
        for name in ("methods", "steps", "batch", "seeds", "sweep_seeds", "settings"):
            assert getattr(pair[0], name) == getattr(pair[1], name)
    assert set(plan["sentences-related"].tasks) < set(plan["sentences"].tasks)
    evidence = [name for name in plan if name.startswith(("synth", "rel", "diff", "sent"))]
    for block in (plan[name] for name in evidence):
        assert not set(block.seeds) & set(block.sweep_seeds), block.name
        one_task = block.steps / len(block.tasks) if block.tasks else 40
        assert one_task == (40 if block.base == "tiny" else 32)
    (first, *others) = [block for block in plan.values() if block.kind == "skewed"]
    assert all(block.sizes == first.sizes and block.rates_from == first.name for block in others)


def test_the_quick_plan_is_the_same_path():
    quick = load_plan(PLAN.with_name("quick.toml"))
    assert {"synthetic", "related-2", "different-2", "sentences"} == set(quick)
    assert any(block.rates_from for block in quick.values())


STUDY = {"kind": "study", "methods": None, "rates": None, "sweep_seeds": None, "trials": 5}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"methods": ["dora"]}, "'a': unknown method 'dora': allowed are none, heads, lora"),
        ({"suite": "songs"}, "unknown suite 'songs': allowed are synthetic"),
        ({"seeds": [1, 1]}, "seeds must hold each once"),
        ({"methods": []}, "methods: .*at least 1 item"),
        ({"sweep_seeds": []}, "sweep_seeds are needed with two rates"),
        ({"seeds": [0, 11]}, r"seeds \[11\] stand in seeds and in sweep_seeds"),
        ({"steps": 0}, "steps: .*greater than or equal to 1, got 0"),
        ({"rates": None}, "one of rates, rates_from and chosen"),
        ({"rates_from": "a"}, "one of rates, rates_from and chosen"),
        ({"rates": [0.001]}, "sweep_seeds are needed with two rates or more, and only there"),
        ({"rates": [0.001, 0.0]}, "rates.1: .*greater than 0, got 0.0"),
        ({"rates": [0.001, 0.002, 0.008]}, "rise by one ratio"),
        ({"rates": [0.002, 0.001]}, "rates must rise"),
        ({"rates": None, "rates_from": "b", "sweep_seeds": None}, "must name an earlier block"),
        ({"rates": None, "chosen": {"lora": 0.1}}, "a rate for each of rlora, lora"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted, got 'red'"),
        ({"batch": None}, "batch: Field required"),
        ({"kind": "song"}, "'song' found using 'kind' does not match .*'compare', 'skewed'"),
        ({"kind": "skewed", "temperature": "2", "sizes": {}}, "temperature: .*'1', '3' or 'inf'"),
        ({"kind": "alone", "tasks": ["cap"], "examples": 2, "batch": 4}, "batch: .* be 32, got 4"),
        (STUDY | {"trials": 2}, "trials: .*equal to 5, got 2; defaults: Field required"),
        (STUDY | {"defaults": {"r": 9, "lora_alpha": 8.0}}, "LoraShape.placement: Field required"),
    ],
)
def test_bad_plans(changes: dict, message: str, tmp_path: Path):
    with pytest.raises(LabError, match=message):
        load_plan(plan_file(tmp_path, a=changes))


def test_bad_files(tmp_path: Path):
    with pytest.raises(LabError, match="plan, settings: q: Extra inputs are not permitted"):
        load_plan(plan_file(tmp_path, settings={"q": 1}, a={}))
    with pytest.raises(LabError, match="lora_dropout: .*less than 1, got 1.0"):
        load_plan(plan_file(tmp_path, settings={"lora_dropout": 1.0}, a={}))
    (tmp_path / "plan.toml").write_text("[a")
    with pytest.raises(LabError, match="no readable TOML"):
        load_plan(tmp_path / "plan.toml")
    with pytest.raises(LabError, match="no readable TOML"):
        load_plan(tmp_path / "nowhere.toml")


def chosen(tmp_path: Path, means: dict[float, float], **changes) -> tuple:
    plan = load_plan(plan_file(tmp_path, a=changes))
    asked, choice = sweep(plan, plan["a"], "rlora", {"a": swept("rlora", means)})
    rates = tuple(dict.fromkeys(asked_for.learning_rate for asked_for, _ in asked))
    return rates, choice and choice.learning_rate


def test_the_rate_with_the_best_mean_is_chosen(tmp_path: Path):
    rates = {"rates": [0.001, 0.002, 0.004, 0.008, 0.016]}
    means = {0.001: 0.5, 0.002: 0.7, 0.004: 0.7, 0.008: 0.75, 0.016: 0.2}
    assert chosen(tmp_path, means, **rates) == (tuple(rates["rates"]), 0.008)


def test_a_best_rate_at_an_end_extends_the_grid(tmp_path: Path):
    means = {0.001: 0.5, 0.002: 0.6, 0.004: 0.7}
    assert chosen(tmp_path, means) == ((0.001, 0.002, 0.004, 0.008), None)
    assert chosen(tmp_path, means | {0.008: 0.1}) == ((0.001, 0.002, 0.004, 0.008), 0.004)
    falling = {0.001: 0.7, 0.002: 0.6, 0.004: 0.2}
    assert chosen(tmp_path, falling) == ((0.0005, 0.001, 0.002, 0.004), None)
    both = falling | {0.0005: 0.5}
    assert chosen(tmp_path, both)[1] == 0.001
    # as far as the plan allows
    assert chosen(tmp_path, means, extend=0) == ((0.001, 0.002, 0.004), 0.004)
    assert chosen(tmp_path, means | {0.008: 0.9}, extend=1)[1] == 0.008


def test_a_sweep_waits_for_all_its_seeds(tmp_path: Path):
    plan = load_plan(plan_file(tmp_path, a={}))
    records = swept("rlora", {0.001: 0.5, 0.002: 0.9, 0.004: 0.5})
    best = Choice(0.002)
    assert sweep(plan, plan["a"], "rlora", {"a": records})[1] == best
    assert sweep(plan, plan["a"], "rlora", {"a": records[:-1]})[1] is None
    assert sweep(plan, plan["a"], "lora", {"a": records})[1] is None
    # what was scored on test data, or with other seeds, takes no part
    other = [r | {"seed": 99, "validation": {"letters": [5.0, 5.0]}} for r in records]
    tested = [r | {"stage": "test", "validation": None} for r in records]
    assert sweep(plan, plan["a"], "rlora", {"a": other + tested + records})[1] == best


def test_rates_that_need_no_sweep(tmp_path: Path):
    other = {"rates": None, "rates_from": "a", "sweep_seeds": None}
    single = {"rates": [0.3], "sweep_seeds": None}
    given = {"rates": None, "chosen": {"rlora": 0.1, "lora": 0.2}, "seeds": [10]}
    plan = load_plan(plan_file(tmp_path, a={}, b=other, c=single, d=given))
    none = {name: [] for name in plan}
    first = none | {"a": swept("rlora", {0.001: 0.5, 0.002: 0.9, 0.004: 0.5})}
    found = {name: sweep(plan, plan[name], "rlora", first) for name in ("b", "c", "d")}
    assert found == {"b": ([], Choice(0.002)), "c": ([], Choice(0.3)), "d": ([], Choice(0.1))}
    assert sweep(plan, plan["b"], "rlora", none) == ([], None)
    todo, later = missing(plan, plan["d"], none)
    assert [(run.stage, run.learning_rate) for run in todo] == [("test", 0.1), ("test", 0.2)]
    assert missing(plan, plan["b"], none) == ([], 4)


def run_stages(plan: dict, score: Callable[[str, dict, int], float]) -> tuple[list[list], list]:
    """What a staged sweep asks for, round by round, where each run scores as `score` says; and the
    runs on test data that follow."""
    block, records, rounds = plan["a"], [], []
    while True:
        todo, _ = missing(plan, block, {"a": records})
        if {run.stage for run in todo} == {"test"}:
            return rounds, todo
        sweeps = [run for run in todo if run.stage == "sweep"]
        rounds.append(
            [(run.method, run.learning_rate, dict(run.tuned), run.seed) for run in sweeps]
        )
        for run in sweeps:
            settings = {"rate": run.learning_rate, "lora_alpha": 32.0, "gamma": 64.0}
            value = score(run.method, settings | dict(run.tuned), run.seed)
            records.append(
                {"stage": "sweep", "method": run.method, "seed": run.seed}
                | {"learning_rate": run.learning_rate, "tuned": dict(run.tuned)}
                | {"validation": {"letters": [value, value]}}
            )


def test_settings_are_chosen_in_stages(tmp_path: Path):
    def score(method: str, at: dict, seed: int) -> float:
        peak = {"lora": 0.002, "rlora": 0.008}[method]  # of R-LoRA beyond the grid's end
        value = -abs(math.log(at["rate"] / peak)) - at["lora_dropout"]
        if method == "rlora":
            value -= 0.01 * abs(math.log(at["gamma"] / 16.0))
        if at["lora_alpha"] == 16.0:
            value += 0.1 if seed == 10 else -0.1  # luck of the first seed
        return value

    plan = load_plan(plan_file(tmp_path, a=STAGED))
    rounds, tests = run_stages(plan, score)
    grid = [(rate, drop) for rate in (0.001, 0.002, 0.004) for drop in (0.0, 0.1)]
    first = [(m, r, {"lora_dropout": d}, 10) for m in ("lora", "rlora") for r, d in grid]
    assert rounds[0] == first
    # LoRA's finalists on the seeds that are left; R-LoRA's grid goes on
    finalists = [("lora", 0.002, {"lora_dropout": d}, s) for d in (0.0, 0.1) for s in (11, 12)]
    assert rounds[1][:4] == finalists
    further = [("rlora", 0.008, {"lora_dropout": d}, 10) for d in (0.0, 0.1)]
    assert rounds[1][4:] == further
    # the scales at LoRA's best, one changed at a time; then the lucky one on every seed
    scales = [dict(lora_alpha=a, lora_dropout=0.0) for a in (8.0, 16.0, 64.0)]
    assert rounds[2][:3] == [("lora", 0.002, own, 10) for own in scales]
    assert rounds[3][:2] == [("lora", 0.002, scales[1], seed) for seed in (11, 12)]
    counts = Counter(method for asked in rounds for method, *_ in asked)
    assert counts == {"lora": 6 + 4 + 3 + 2, "rlora": 6 + 2 + 2 + 4 + 3 + 2}
    found = {run.method: (run.learning_rate, dict(run.tuned)) for run in tests}
    assert found["lora"] == (0.002, {"lora_dropout": 0.0})
    assert found["rlora"][0] == 0.008
    # controls take what their relative has, on their own seeds, after the others
    assert found["mlora"] == found["rlora"] and found["none"] == (None, {})
    order = [(run.method, run.seed) for run in tests]
    assert order == [(m, s) for s in (0, 1) for m in ("lora", "rlora")] + [
        ("mlora", 0),
        ("none", 0),
    ]


def test_nothing_is_tested_before_the_margin_is_set(tmp_path: Path):
    other = {"rates": None, "rates_from": "a", "sweep_seeds": None, "methods": ["none"]}
    plan = load_plan(plan_file(tmp_path, a=STAGED | {"margin": None}, b=other))
    none = {"a": [], "b": []}
    todo, later = missing(plan, plan["a"], none)
    assert {run.stage for run in todo} == {"sweep"} and later == 2 + 2 + 1 + 1
    assert missing(plan, plan["b"], none) == ([], 1)


def test_a_scale_at_an_end_is_gone_beyond(tmp_path: Path):
    plan = load_plan(plan_file(tmp_path, a=STAGED | {"extend": 1}))
    rounds, tests = run_stages(plan, lambda method, at, seed: -at["gamma"] + at["lora_alpha"])
    alphas = [own["lora_alpha"] for _, _, own, _ in sum(rounds, []) if "lora_alpha" in own]
    assert max(alphas) == 128.0
    found = {run.method: dict(run.tuned) for run in tests}
    assert found["lora"]["lora_alpha"] == 128.0
    assert found["rlora"] == {"lora_dropout": 0.0, "gamma": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": {"lora": {}}}, "scales must name each method that is not in like"),
        ({"like": {"mlora": "cake"}}, "unknown method in like 'cake': allowed are lora, rlora"),
        ({"like": {"cake": "lora"}}, "unknown method in like 'cake'"),
        ({"scales": {"lora": {}, "rlora": {"gamma": [16.0, 64.0]}}}, "equally many scales"),
        (
            {"scales": {m: {"lora_alpha": [16.0, 64.0]} for m in ("lora", "rlora")}},
            "lora_alpha of lora must rise and hold 32.0",
        ),
        ({"dropouts": None}, "scales are tried in stages, which need dropouts"),
    ],
)
def test_bad_stages(changes: dict, message: str, tmp_path: Path):
    with pytest.raises(LabError, match=message):
        load_plan(plan_file(tmp_path, a=STAGED | changes))


def test_a_study_goes_from_trial_to_trial(tmp_path: Path):
    shape = {"placement": "mlp", "num_heads": 3, "r": 4, "gamma": 64.0, "dropout": 0.1}
    defaults = shape | {"learning_rate": 0.004}
    plan = load_plan(plan_file(tmp_path, a=STUDY | {"defaults": defaults}))
    trials = []
    for seed, value in enumerate((0.1, 0.5, None, 0.3, 0.2)):
        (run,), later = missing(plan, plan["a"], {"a": trials})
        assert (run.stage, run.seed, run.given) == ("search", seed, {"trials": trials})
        assert later == (4 - seed) + 4 * 2 + 1 + 4
        found = {"stage": "search", "method": "search", "seed": seed, "trial": 10 + seed}
        found |= {"placement": "both", "num_heads": 2, "r": 2, "gamma": 9.0, "dropout": 0.5}
        found |= {"learning_rate": 0.01 + seed / 1000, "value": value}
        trials = [*trials, found | {"state": "complete" if value else "pruned"}]
    todo, later = missing(plan, plan["a"], {"a": trials})
    assert later == 0 and len(todo) == 4 * 2 + 1 + 3  # a pruned trial is no runner-up
    assert todo[0].given == defaults
    ladder = [run.given for run in todo[:4]]
    changed = [
        {name for name in low if low[name] != high[name]}
        for low, high in zip(ladder, ladder[1:], strict=False)
    ]
    assert changed == [{"learning_rate"}, {"placement", "num_heads", "r"}, {"gamma", "dropout"}]
    assert ladder[-1] == {name: trials[1][name] for name in defaults}  # the best trial's
    again = todo[8]
    assert (again.stage, again.method, again.seed) == ("again", "best", 1)
    assert [run.method for run in todo[9:]] == ["trial 13", "trial 14", "trial 10"]
    done = {"stage": "test", "method": "defaults", "learning_rate": 0.004, "seed": 0}
    assert len(missing(plan, plan["a"], {"a": [*trials, done]})[0]) == len(todo) - 1


def test_a_study_of_lora_has_the_rungs_that_it_asks_for(tmp_path: Path):
    lora = {"placement": "mlp", "r": 9, "learning_rate": 0.004, "lora_alpha": 32.0, "dropout": 0.1}
    asked = STUDY | {"defaults": lora, "methods": ["defaults", "best"]}
    plan = load_plan(plan_file(tmp_path, a=asked))
    best = {"placement": "both", "r": 2, "learning_rate": 0.01, "lora_alpha": 5.0, "dropout": 0.5}
    found = {"stage": "search", "method": "search", "state": "complete", **best}
    trials = [found | {"seed": n, "trial": n, "value": 0.1 * (n == 3)} for n in range(5)]
    (_,), later = missing(plan, plan["a"], {"a": trials[:4]})
    assert later == 2 * 2
    todo, later = missing(plan, plan["a"], {"a": trials})
    assert [(run.method, run.seed) for run in todo] == [
        (method, seed) for seed in (0, 1) for method in ("defaults", "best")
    ]
    assert [run.given for run in todo[:2]] == [lora, best] and later == 0
    below = plan["a"].rungs(best)["and its shape"]
    assert below == lora | {"learning_rate": 0.01, "placement": "both", "r": 2}


def test_what_is_missing(tmp_path: Path):
    plan = load_plan(plan_file(tmp_path, a={}))
    todo, later = missing(plan, plan["a"], {"a": []})
    assert len(todo) == 2 * 3 * 2 and later == 2 * 2
    assert {run.stage for run in todo} == {"sweep"} and {run.seed for run in todo} == {10, 11}
    done = [r for m in ("rlora", "lora") for r in swept(m, {0.001: 0.5, 0.002: 0.9, 0.004: 0.5})]
    todo, later = missing(plan, plan["a"], {"a": done})
    # seed by seed, so that a grid that is stopped has all methods on the seeds it has
    assert [(r.stage, r.seed, r.method, r.learning_rate) for r in todo] == [
        ("test", seed, method, 0.002) for seed in (0, 1) for method in ("rlora", "lora")
    ]
    assert later == 0
    tested = {"stage": "test", "method": "lora", "learning_rate": 0.002, "seed": 0}
    todo, _ = missing(plan, plan["a"], {"a": [*done, tested]})
    assert [(r.seed, r.method) for r in todo] == [(0, "rlora"), (1, "rlora"), (1, "lora")]


RECORD = {"stage": "sweep", "method": "lora", "learning_rate": 0.001, "seed": 1}


def test_records_are_added_line_by_line(tmp_path: Path):
    file = tmp_path / "deep" / "a.jsonl"
    assert read_records(file) == ({}, [])
    add_record(file, {"machine": "one"}, RECORD)
    first = file.read_text()
    add_record(file, {"machine": "one"}, RECORD | {"seed": 2})
    add_record(file, {"machine": "two"}, RECORD | {"seed": 3})
    assert file.read_text().startswith(first) and len(file.read_text().splitlines()) == 5
    settings, records = read_records(file)
    assert sorted(s["machine"] for s in settings.values()) == ["one", "two"]
    assert [settings[r["setting"]]["machine"] for r in records] == ["one", "one", "two"]
    assert [r["seed"] for r in records] == [1, 2, 3]
    # two machines' lines after a merge: settings anywhere, and a run done twice counts once
    lines = file.read_text().splitlines()
    file.write_text(
        "\n".join([*lines[::-1], lines[1].replace('"seed"', '"again":1,"seed"')]) + "\n"
    )
    again = read_records(file)[1]
    assert [r["seed"] for r in again] == [3, 2, 1] and not any("again" in r for r in again)


def test_a_record_is_added_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a.jsonl"
    add_record(file, {}, RECORD)
    before = file.read_bytes()
    with pytest.raises(ValueError):  # no JSON has it
        add_record(file, {}, RECORD | {"loss": float("nan")})
    monkeypatch.setattr("rlora_lab.runs.record.os.replace", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        add_record(file, {}, RECORD | {"seed": 2})
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def _add(file: Path, worker: int) -> None:
    for seed in range(20):
        add_record(file, {"worker": worker}, RECORD | {"seed": 100 * worker + seed})


def test_two_processes_lose_no_record(tmp_path: Path):
    from multiprocessing import get_context

    file = tmp_path / "a.jsonl"
    processes = [get_context("fork").Process(target=_add, args=(file, w)) for w in (1, 2, 3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(read_records(file)[1]) == 60


def test_broken_records(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    add_record(file, {}, RECORD)
    whole = file.read_text()
    for broken in ("{", "[]", '{"seed": 1}', "<<<<<<< HEAD"):
        file.write_text(whole + broken + "\n")
        with pytest.raises(LabError, match="a.jsonl, line 3 is no record"):
            read_records(file)
    file.write_text(whole.splitlines()[1] + "\n")
    with pytest.raises(LabError, match="no setting"):
        read_records(file)
    file.write_text(whole.replace('"schema":2', '"schema":1'))
    with pytest.raises(LabError, match="a.jsonl has schema 1, this is for schema 2"):
        read_records(file)


def test_records_of_another_block_are_refused(tmp_path: Path):
    plan = load_plan(plan_file(tmp_path, a={}))
    now = plan["a"].shared()
    add_record(tmp_path / "a.jsonl", now, RECORD)
    records, settings = read_all(plan, tmp_path)
    assert len(records["a"]) == 1 and settings == {"a": [{"schema": 2} | now]}
    for changes, name in (({"steps": 3}, "steps"), ({"tasks": ["mirror"]}, "tasks")):
        with pytest.raises(LabError, match=f"a.jsonl holds runs with another {name} than"):
            read_all(load_plan(plan_file(tmp_path, a=changes)), tmp_path)
    add_record(tmp_path / "a.jsonl", now | {"data_sha256": "other"}, RECORD | {"seed": 5})
    with pytest.raises(LabError, match="another data than"):
        read_all(plan, tmp_path)
