"""The command `speed`: its counts, its ratios and bars, its record. No test looks at a time."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from environments import create
from scipy import stats
from torch import nn
from typer.testing import CliRunner

from rlora_lab.__main__ import app
from rlora_lab.errors import LabError
from rlora_lab.models.methods import equal_lora_rank
from rlora_lab.models.published_loops import PublishedRLora
from rlora_lab.speed import bench, command
from rlora_lab.speed.bars import (
    BARS,
    claims,
    find,
    median_interval,
    ratio,
    time_by_kind,
    verdicts,
)
from rlora_lab.speed.bench import Speed
from rlora_lab.speed.cases import (
    ALL,
    FORMS,
    PAIR,
    SHAPES,
    Case,
    cases,
    estimate,
    forms,
    plan_table,
    rehearsal,
)
from rlora_lab.speed.instruments import Work, kept_bytes, profile_work
from rlora_lab.speed.tables import tables

ROOT = Path(__file__).parents[2]
QUIET = {"say": lambda text: None, "show": False}
TINY = {"hidden": 16, "mlp": 40, "heads": 2, "kv_heads": 1, "layers": 2}
FIRST = Case(shape="tiny", batch=2, tokens=5, rounds=6, layers=1)
ROOF = {"flops_per_s": 1e9, "bytes_per_s": 1e9}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[Case, tuple[str, ...]]:
    """Cases of a tiny shape, one for each bar but that of torch.compile."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(bench, "measure_roof", lambda *how: ROOF)
    return {
        FIRST: ALL,
        replace(FIRST, study="heads", num_heads=32, rounds=2): PAIR,
        replace(FIRST, study="generation", generate=2, rounds=2): (*PAIR, "exported"),
        replace(FIRST, study="dtype", dtype="bf16", rounds=2): PAIR,
        replace(FIRST, study="checkpointing", checkpointing=True, rounds=2): PAIR,
    }


def test_models_share_the_weights_of_their_base_and_leave_them_as_they_are(tiny):
    base = bench.make_base(FIRST, "cpu")
    before = [p.clone() for p in base.parameters()]
    for method in ALL:
        model = bench.make_model(method, base, FIRST)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert (trained == 0) == (method == "base")
        shared = {id(p) for p in model.parameters()} & {id(p) for p in base.parameters()}
        # R-LoRA as published has weights of its own where its random start is taken off
        assert len(shared) == len(before) - 3 * (method == "published-rlora")
    assert all(torch.equal(p, b) for p, b in zip(base.parameters(), before, strict=True))


# Counts


def test_kept_bytes_are_those_counted_by_hand():
    T, d_in, d_out, r, N = 5, 6, 7, 2, 3
    x = torch.randn(T, d_in, requires_grad=True)
    frozen = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
    relu = nn.Sequential(frozen, nn.ReLU())
    output = T * d_out
    assert kept_bytes(relu, lambda: relu(x).sum()) == (4 * (d_in * d_out + output), 4 * output)
    # Once x is kept, for A and the router; for each head A x and the head's output; g and s g.
    layer = PublishedRLora(frozen, r, N, 32, 0.0)
    own = T * d_in + N * T * (r + d_out) + 2 * T * N
    parameters = d_in * d_out + r * d_in + N * r * d_out + N * d_in
    assert kept_bytes(layer, lambda: layer(x).sum()) == (4 * (own + parameters), 4 * own)


def test_work_is_that_counted_by_hand():
    T, d_in, d_out = 5, 6, 7
    x = torch.randn(T, d_in, requires_grad=True)
    linear = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
    with Work() as work:
        h = linear(x)
    size = 4 * (T * d_in + d_in * d_out + T * d_out)
    assert work.ops == [(2 * T * d_in * d_out, size)]
    with Work() as work:
        linear(x).backward(torch.ones(T, d_out))
    assert work.flops == 2 * 2 * T * d_in * d_out  # the frozen weight has no gradient
    with Work() as work:
        torch.add(h, h.detach().clone()[None][0].T.T)
        h.detach().mul_(2)
    out = 4 * T * d_out
    assert work.ops == [(0, 2 * out), (0, 3 * out), (0, 2 * out)] and work.bytes == 7 * out
    work.ops = [(10, 1), (1, 10)]
    assert work.floor(flops_per_s=2, bytes_per_s=5) == 5 + 2


def test_the_shapes_have_the_sizes_that_the_models_cards_say():
    cards = {"Qwen2.5-0.5B": 0.36e9, "Qwen2.5-1.5B": 1.31e9, "Qwen2.5-7B": 6.53e9}
    for name, size in cards.items():  # without vocabulary
        case = Case(shape=name, layers=SHAPES[name]["layers"])
        parameters = sum(p.numel() for p in bench.make_base(case, "meta").parameters())
        assert parameters == pytest.approx(size, rel=0.02)


def test_lora_has_the_size_of_rlora():
    for case in cases("cpu", quick=False):
        shape = SHAPES[case.shape]
        hidden, mlp = shape["hidden"], shape["mlp"]
        sizes = [(hidden, mlp)] * 2 + [(mlp, hidden)]
        wanted = sum(case.r * i + case.num_heads * (case.r * o + i) for i, o in sizes)
        rank = bench.equal_rank(case)
        step = sum(i + o for i, o in sizes)
        assert abs(rank * step - wanted) <= step / 2 or rank == 1
    ranks = [equal_lora_rank(*size, 4, 5) for size in ((896, 4864), (4864, 896))]
    assert min(ranks) < bench.equal_rank(Case()) == 16 < max(ranks)


# Ratios and bars


def record(method: str, case: Case = FIRST, step=(1.0,), **values) -> dict:
    step = np.array(step)
    seconds = {"forward": 0.5 * step, "backward": 0.4 * step, "optimizer": 0.1 * step}
    return asdict(case) | {
        "method": method,
        "skipped": None,
        "seconds": {phase: list(numbers) for phase, numbers in seconds.items()},
        "kept_bytes": None,
        **values,
    }


def test_a_ratio_is_the_median_within_rounds_with_its_interval():
    base = np.random.default_rng(0).uniform(1, 9, 20)  # a machine that others use too
    ratios = 1 + np.arange(20) / 100
    one, other = record("rlora", step=base * ratios), record("base", step=base)
    # 5th and 15th of 20: between them lies the median in 95.9 % of samples
    assert ratio(one, other) == pytest.approx((1.095, 1.05, 1.14))
    assert ratio(one, other, "backward")[0] == pytest.approx(1.095)
    few = [record(m, step=s) for m, s in (("rlora", [1, 2, 4]), ("base", [1, 1, 1]))]
    assert ratio(*few) == pytest.approx((2, 1, 4))
    counts = record("rlora", kept_bytes=3), record("base", kept_bytes=4)
    assert ratio(*counts, "kept_bytes") == (0.75, 0.75, 0.75)


@pytest.mark.parametrize("n", [6, 9, 12, 20, 24, 40])
def test_the_interval_of_a_median_is_scipys(n):
    values = np.random.default_rng(n).normal(size=n)
    theirs = stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    assert median_interval(values) == (theirs.low, theirs.high)


def test_the_papers_claim_has_a_verdict():
    cpu = {"kept_bytes": 100, "peak_bytes": None}
    gpu = {"kept_bytes": 0, "model_bytes": 50}
    rounds = np.ones(20)

    def said(step: float, one: dict, other: dict) -> list[str]:
        loops = [
            record("published-rlora", step=step * rounds, **one),
            record("published-hydralora", step=rounds, **other),
        ]
        return [row["verdict"] for row in claims({"records": loops})]

    most, some, none = "saves at least what", "saves, within what", "no saving"
    for step, one, other, verdict in (
        (0.92, cpu | {"kept_bytes": 80}, cpu, (most, most)),
        (0.95, cpu | {"kept_bytes": 81}, cpu, (some, some)),
        (1.0, cpu, cpu, (none, none)),
        # on a GPU what the model takes counts: 110 of 150, and 75 of 100 would be 0.75
        (0.9, gpu | {"peak_bytes": 60}, gpu | {"peak_bytes": 100}, (most, most)),
        (0.9, gpu | {"peak_bytes": 75}, gpu | {"peak_bytes": 100}, (most, some)),
    ):
        found = said(step, one, other)
        assert all(map(str.startswith, found, verdict)), (step, found)
    assert {row["verdict"] for row in claims({"records": []})} == {"not measured"}


def test_kernels_are_counted_by_what_they_do():
    kernels = [
        ["nvjet_tst_128x64", 3, 3e-3],
        ["void at::native::vectorized_elementwise_kernel<4>", 5, 2e-3],
        ["void at::native::(anonymous)::CatArrayBatchedCopy", 2, 1e-3],
        ["Memcpy DtoD", 1, 1e-3],
        ["something new", 1, 5e-4],
    ]
    kinds = {"products": (3, 3e-3), "stacking": (2, 1e-3), "copies and casts": (1, 1e-3)}
    kinds |= {"elementwise": (5, 2e-3), "other": (1, 5e-4)}
    assert time_by_kind({"kernels": kernels}) == kinds


def test_verdicts_say_what_holds_and_how_clearly():
    rounds = np.ones(20)
    spread = np.linspace(-0.04, 0.04, 20)
    heads = replace(FIRST, study="heads", num_heads=32)
    result = {
        "records": [
            record("base", step=rounds, kept_bytes=50),
            record("lora", step=rounds * 1.2, kept_bytes=100),
            record("rlora", step=1.07 + spread, kept_bytes=93),
            record("published-rlora", step=rounds * 1.42, kept_bytes=100),
            record("base", heads, step=rounds),
            record("rlora", heads, step=rounds * 1.23),
            record("lora", replace(FIRST, dtype="bf16"), skipped="out of memory"),
            record("rlora", replace(FIRST, dtype="bf16")),
        ]
    }
    bars = {(b["of"], b["against"], *b["case"].items()): b for b in verdicts(result)}
    assert len(bars) == len(BARS)
    first = ("study", "bars")
    said = {key: (bar["holds"], bar["clear"]) for key, bar in bars.items()}
    assert said.pop(("step", "base", first)) == (True, False)
    assert said.pop(("step", "lora", first)) == (True, True)
    assert said.pop(("step", "published-rlora", first)) == (False, False)
    assert said.pop(("kept_bytes", "lora", first)) == (False, True)
    assert said.pop(("kept_bytes", "published-rlora", first)) == (False, True)
    assert said.pop(("step", "base", ("num_heads", 32))) == (False, True)
    assert set(said.values()) == {(None, None)}
    assert bars["step", "base", first]["rounds"] == FIRST.rounds
    assert bars["step", "base", first]["value"] == pytest.approx(1.07)


def test_the_recorded_bars_follow_from_the_recorded_runs():
    result = json.loads((files("rlora_lab") / "records" / "speed-cpu.json").read_text())
    assert verdicts(result) == result["bars"]
    assert "not measured" not in tables(result)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_the_cases_measure_every_bar(device, quick):
    wanted = cases(device, quick)
    first = next(iter(wanted))
    assert len(set(wanted)) == len(wanted)
    for of, against, _, case in BARS:
        fits = next(c for c in wanted if case.items() <= asdict(c).items())
        assert {"rlora", against} <= set(wanted[fits])
        assert (of == "token") == bool(fits.generate)
        assert quick or fits.rounds >= 20
        varied = {k for k, v in asdict(fits).items() if v != asdict(first)[k]}
        size = {"study", "rounds", "layers", "generate", *case}
        if device == "cuda" and fits.generate:  # answers to a short prompt
            size |= {"batch", "tokens"}
        assert case.keys() & {"dtype"} or varied <= size
    assert (first.r, first.num_heads, first.lora_dropout) == (4, 5, 0.1)
    shape = (4, 128, "fp32", 2) if device == "cpu" else (6, 512, "bf16", 24)
    assert (first.batch, first.tokens, first.dtype, first.layers) == shape


def test_a_gpu_is_asked_all_that_the_page_promises():
    wanted = cases("cuda", quick=False)
    whole = [case for case in wanted if case.layers == SHAPES[case.shape]["layers"]]
    assert len(whole) == len(wanted) - 2  # those that are compiled
    for name, values in {
        "num_heads": {1, 2, 5, 8, 16, 32},
        "r": {1, 4, 16, 64},
        "lora_dropout": {0.0, 0.1},
        "checkpointing": {False, True},
        "mode": {"default", "reduce-overhead"},
        "dtype": {"bf16", "fp32", "nf4"},
        "shape": {"Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B"},
    }.items():
        assert {getattr(case, name) for case in wanted} == values, name
    tokens = {case.batch * case.tokens for case in wanted if not case.generate}
    assert {128, 16384} <= tokens and min(tokens) == 128 and max(tokens) == 16384
    answers = {case.batch: set(methods) for case, methods in wanted.items() if case.generate}
    assert answers == dict.fromkeys((1, 32), {"base", "lora", "rlora", "exported"})


def test_a_record_fits_into_eight_minutes():
    wanted = cases("cuda", quick=False)
    seconds = [estimate(case, methods, "cuda") for case, methods in wanted.items()]
    assert sum(seconds) + bench.SLACK < 60 * command.GPU_MINUTES == 480
    table = plan_table(wanted, "cuda")
    assert f"{sum(seconds):.0f} s  in all" in table
    assert all(
        f"{s:.0f} s  {case.study}:" in table for s, case in zip(seconds, wanted, strict=True)
    )


def test_a_cpu_with_units_for_bf16_gets_the_whole_case():
    first = next(iter(cases("cpu", quick=True)))
    for bf16, size in ((True, (2, 4, 128)), (False, (1, 1, 32))):
        case = next(c for c in cases("cpu", quick=True, bf16=bf16) if c.dtype == "bf16")
        assert (case.layers, case.batch, case.tokens) == size
    assert (first.layers, first.batch, first.tokens) == (2, 4, 128)
    assert {c.dtype for c in forms(bf16=True)} - {c.dtype for c in forms(bf16=False)} == {"bf16"}


# Measuring


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("form", sorted(set(FORMS) - set(PAIR)))
def test_other_forms_are_the_same_function(form, p, tiny):
    case = replace(FIRST, lora_dropout=p)
    base = bench.make_base(case, "cpu")
    models = [bench.make_model(method, base, case) for method in ("rlora", form)]
    x = torch.randn(2, 5, 16, requires_grad=True)
    results = []
    for model in models:
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        torch.manual_seed(2)
        out = model(inputs_embeds=x, use_cache=False).last_hidden_state
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        results.append((out, grad))
    for one, other in zip(*results, strict=True):
        if p == 0 or form == "rlora-apart":  # which draws the same masks
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    layer = next(m for m in models[1].modules() if hasattr(m, "rlora_A"))
    with torch.no_grad():
        layer.rlora_A0["default"].weight.mul_(2)
        changed = models[1].eval()(inputs_embeds=x, use_cache=False).last_hidden_state
        same = models[0].eval()(inputs_embeds=x, use_cache=False).last_hidden_state
    assert (changed - same).abs().max() > 1e-3


def test_a_profile_counts_what_was_started():
    a = torch.randn(8, 8)
    seen = profile_work(lambda: [a @ a for _ in range(3)], "cpu")
    kernels = {name: times for name, times, _ in seen["kernels"]}
    assert kernels["aten::mm"] == 3 and seen["launches"] == sum(kernels.values())
    assert all(seconds >= 0 for *_, seconds in seen["kernels"])


def test_each_phase_of_a_step_has_its_own_time(tiny, monkeypatch):
    """On a clock that counts work: 1 for a forward, 10 for a backward, 100 for a step."""
    done = []

    class Counter:
        def __init__(self, device):
            self.marks = []

        def mark(self):
            self.marks.append(sum(done))

        def seconds(self):
            return np.diff(self.marks).tolist()

    monkeypatch.setattr(bench, "Clock", Counter)
    runner = bench.Runner("rlora", bench.make_base(FIRST, "cpu"), FIRST, "cpu")
    runner.model.register_forward_hook(lambda *_: done.append(1))
    runner.x.register_hook(lambda *_: done.append(10))
    runner.optimizer.register_step_post_hook(lambda *_: done.append(100))
    assert runner.step() == {"forward": 1, "backward": 10, "optimizer": 100}


def test_methods_take_turns_in_an_order_of_their_own_each_round(tiny, monkeypatch):
    turns = []

    def turn(self):
        turns.append(self.record["method"])
        return {"token": 0.0}

    monkeypatch.setattr(bench.Runner, "turn", turn)
    monkeypatch.setattr(bench.Runner, "count", lambda self, roof: None)
    monkeypatch.setattr(bench.Runner, "look", lambda self: None)
    bench.run_case(FIRST, ALL, "cpu", ROOF)
    rounds = np.array(turns[bench.WARM_UP * len(ALL) :]).reshape(FIRST.rounds, len(ALL))
    assert all(sorted(order) == sorted(ALL) for order in rounds)
    assert len({tuple(order) for order in rounds}) > FIRST.rounds / 2


def test_a_method_that_finds_no_memory_is_skipped_and_the_others_go_on(tiny, monkeypatch):
    count = bench.Runner.count

    def full(self, roof):
        if self.record["method"] == "published-rlora":
            raise torch.cuda.OutOfMemoryError
        count(self, roof)

    monkeypatch.setattr(bench.Runner, "count", full)
    records = {r["method"]: r for r in bench.run_case(FIRST, ALL, "cpu", ROOF)}
    assert records["published-rlora"]["skipped"] == "out of memory"
    assert all(len(records[m]["seconds"]["forward"]) == FIRST.rounds for m in PAIR)
    assert find({"records": list(records.values())}, "published-rlora") is None


# The command


def test_end_to_end(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "cases", lambda device, quick, bf16: tiny)
    out = tmp_path / "deep" / "speed.json"
    arguments = ["speed", "--quick", "--device", "cpu", "--out", str(out)]
    run = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert run.exit_code == 0
    result = json.loads(out.read_text())
    assert result["command"] == "python -m rlora_lab speed --device cpu --quick"
    assert result["complete"] and result["gpu"] is None
    assert result["config"] == {"device": "cpu", "quick": True, "rehearsal": False}
    assert {"date", "machine", "threads", "versions"} <= set(result)
    assert set(result["roof"]) == {"fp32", "bf16"}
    assert str(tmp_path) not in out.read_text()

    wanted = [(case, method) for case, methods in tiny.items() for method in methods]
    assert [(Case.of(r), r["method"]) for r in result["records"]] == wanted
    for r in result["records"]:
        generates, plain = r["generate"] > 0, not (r["generate"] or r["checkpointing"])
        phases = {"token"} if generates else {"forward", "backward", "optimizer"}
        assert set(r["seconds"]) == phases
        assert all(len(s) == r["rounds"] for s in r["seconds"].values())
        assert all(second >= 0 for s in r["seconds"].values() for second in s)
        for count in ("flops", "bytes", "floor_s"):
            assert (r[count] is None) == generates
        assert (r["kept_bytes"] is not None) == (r["kept_own_bytes"] is not None) == plain
        assert r["peak_bytes"] is None and r["skipped"] is None
        assert (r["rank"] is not None) == (r["method"] == "lora")
        assert r["launches"] > 0 and r["clock"] is None
        assert (r["kernels"] is not None) == (r["study"] == "bars")
        assert r["model_bytes"] > 0 and r["mode"] == "default"
    first = {r["method"]: r for r in result["records"] if r["study"] == "bars"}
    sizes = {method: r["trainable"] for method, r in first.items()}
    size = 2 * (4 * 16 + 20 * 40 + 5 * 16) + (4 * 40 + 20 * 16 + 5 * 40)
    assert sizes["rlora"] == sizes["published-rlora"] == sizes["published-hydralora"] == size
    assert sizes["base"] == 0 and abs(sizes["lora"] - size) <= 3 * 56 / 2
    kept = [first[m]["kept_own_bytes"] for m in ALL if m != "lora"]
    assert kept == sorted(kept) and len(set(kept)) == len(kept)
    assert [b["case"] for b in result["bars"] if b["holds"] is None] == [{"compiled": True}]
    for word in ("published", "32 heads", "generated", "kept, MiB", "not measured", "quick look"):
        assert word in run.stdout, word


def test_a_stopped_run_goes_on_with_the_next_case(tiny, tmp_path: Path, monkeypatch):
    out = tmp_path / "speed.json"
    wanted = {case: PAIR for case in list(tiny)[:2]}
    run_case = bench.run_case

    def stopped(case, *rest):
        if case != FIRST:
            raise KeyboardInterrupt
        return run_case(case, *rest)

    with monkeypatch.context() as broken:
        broken.setattr(bench, "run_case", stopped)
        with pytest.raises(KeyboardInterrupt):
            Speed("cpu", out=out, wanted=wanted).run(**QUIET)
    first = json.loads(out.read_text())
    assert len(first["records"]) == len(PAIR) and not first["complete"]
    second = Speed("cpu", out=out, wanted=wanted).run(**QUIET)
    assert second["records"][: len(PAIR)] == first["records"]
    assert len(second["records"]) == 2 * len(PAIR) and second["roof"] == first["roof"]
    assert json.loads(out.read_text()) == second


def test_without_a_compiler_the_compiled_case_is_left_out(tiny, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(bench.shutil, "which", lambda name: None)
    said = []
    wanted = {FIRST: PAIR, replace(FIRST, compiled=True): PAIR}
    result = Speed("cpu", out=tmp_path / "a.json", wanted=wanted).run(said.append, show=False)
    assert "no C++ compiler" in said[0]
    assert {r["compiled"] for r in result["records"]} == {False}


def test_a_budget_ends_before_its_end(tiny, tmp_path: Path, monkeypatch):
    """On a clock of its own, where each case takes twice what was expected."""
    now = [0.0]

    def run_case(case, *rest):
        now[0] += 2 * estimate(case, PAIR, "cpu")
        return [record("rlora", case)]

    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(bench, "run_case", run_case)
    wanted = {case: PAIR for case in tiny}
    each = estimate(FIRST, PAIR, "cpu")
    minutes = (bench.SLACK + 5 * each) / 60  # for two cases, not for three
    out = tmp_path / "a.json"
    said = []
    run = Speed("cpu", out=out, wanted=wanted, minutes=minutes)
    result = run.run(said.append, show=False)
    assert now[0] <= 60 * minutes
    assert len(result["records"]) == 2 and not result["complete"]
    assert f"{len(tiny) - 2} cases would end after" in said[-1]
    result = Speed("cpu", out=out, wanted=wanted).run(**QUIET)
    assert len(result["records"]) == len(tiny) and result["complete"]


def test_on_a_gpu_what_fails_takes_nothing_down(tiny, monkeypatch):
    count = bench.Runner.count

    def broken(self, roof):
        if self.record["method"] == "lora":
            raise RuntimeError("no such kernel\nfor this GPU")
        count(self, roof)

    monkeypatch.setattr(bench.Runner, "count", broken)
    with pytest.raises(RuntimeError):
        bench.run_case(FIRST, PAIR, "cpu", ROOF)
    monkeypatch.setattr(bench, "failures", lambda device: (Exception,))
    records = {r["method"]: r for r in bench.run_case(FIRST, PAIR, "cpu", ROOF)}
    assert records["lora"]["skipped"] == "RuntimeError: no such kernel for this GPU"
    assert records["rlora"]["skipped"] is None


# The rehearsal


def test_a_rehearsal_has_every_case_once():
    for device in ("cpu", "cuda"):
        wanted = cases(device, quick=False)
        mini = rehearsal(wanted)
        assert [c.study for c in mini] == [c.study for c in wanted]
        for case, methods, small in zip(wanted, wanted.values(), mini, strict=True):
            same = ("r", "num_heads", "lora_dropout", "dtype", "checkpointing", "compiled", "mode")
            assert all(getattr(case, n) == getattr(small, n) for n in same)
            assert bool(case.generate) == bool(small.generate)
            assert set(mini[small]) == (set(methods) if not case.compiled else {"rlora"})


def test_a_rehearsal_where_there_is_torch_peft_and_transformers_alone(tmp_path: Path):
    """The same code as on a GPU, in an environment like that of a machine lent for minutes."""
    python = create(tmp_path / "bare", ["torch", "peft", "transformers"])
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'book'}"}
    lacks = "import importlib.util as u; print([n for n in {} if u.find_spec(n)])"
    names = ["pandas", "scipy", "datasets", "matplotlib", "statsmodels", "optuna"]

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [python, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run("-c", lacks.format(names)).strip() == "[]"
    speed = ["-m", "rlora_lab.speed", "--device", "cuda"]
    assert "in all" in run(*speed, "--plan")
    said = run(*speed, "--rehearse", "--out", "a.json")
    assert "no measurement" in said
    result = json.loads((tmp_path / "a.json").read_text())
    wanted = rehearsal(cases("cuda", quick=False))
    if "no bitsandbytes" in said:
        wanted = {case: methods for case, methods in wanted.items() if case.dtype != "nf4"}
    if "no C++ compiler" in said:
        wanted = {case: methods for case, methods in wanted.items() if not case.compiled}
    made = [(Case.of(r), r["method"]) for r in result["records"]]
    assert made == [(case, method) for case, methods in wanted.items() for method in methods]
    assert result["complete"] and result["config"]["rehearsal"]
    for r in result["records"]:
        assert r["skipped"] is None and r["launches"] > 0
        assert isinstance(r["kernels"], list) == (r["study"] == "bars")
    assert "datasets" not in result["versions"] and "torch" in result["versions"]
    assert str(tmp_path) not in (tmp_path / "a.json").read_text()


def test_what_a_recording_refuses(tmp_path: Path, monkeypatch, capsys):
    for other in ({"quick": True}, {"rehearse": True}, {"out": tmp_path / "a.json"}):
        with pytest.raises(LabError, match="--record keeps a whole measurement"):
            command.speed("cpu", record=True, **other)
    from rlora_lab.speed import __main__ as alone

    monkeypatch.setattr(sys, "argv", ["speed", "--record", "--quick"])
    assert alone.main() == 2
    assert "leave out --quick" in capsys.readouterr().err


def test_what_is_refused_loses_nothing(tiny, tmp_path: Path):
    with pytest.raises(LabError, match="--device must be cpu or cuda, got 'tpu'"):
        Speed("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(LabError, match="finds no GPU"):
            Speed("cuda")
    with pytest.raises(LabError, match="unknown method 'dora': allowed are base, lora"):
        bench.make_model("dora", bench.make_base(FIRST, "cpu"), FIRST)
    out = tmp_path / "speed.json"
    Speed("cpu", out=out, wanted={replace(FIRST, rounds=2): PAIR}).run(**QUIET)
    text = out.read_text()
    with pytest.raises(LabError, match="another config"):
        Speed("cpu", quick=True, out=out)
    out.write_text(text.replace('"threads": 1', '"threads": 64'))
    with pytest.raises(LabError, match="another threads, 64"):
        Speed("cpu", out=out)
    out.write_text(text[:-9])
    with pytest.raises(LabError, match="no result of this command"):
        Speed("cpu", out=out)
    assert out.read_text() == text[:-9]
