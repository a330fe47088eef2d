"""The command `speed`, as `python -m rlora_lab speed` and `python -m rlora_lab.speed` call it."""

from importlib.util import find_spec
from pathlib import Path

from ..errors import LabError
from ..names import LAB
from .cases import cases, forms, plan_table

RECORDS = LAB / "records"
GPU_MINUTES = 8.0


def speed(
    device: str | None = None,
    *,
    quick: bool = False,
    other_forms: bool = False,
    record: bool = False,
    rehearse: bool = False,
    plan: bool = False,
    minutes: float | None = None,
    threads: int | None = None,
    out: Path | None = None,
) -> dict | None:
    """Measure what a step costs with each adapter, or say what would be measured.

    Args:
        device: "cpu" or "cuda"; None is a GPU where there is one.
        quick: few rounds, and the cases of the bars alone.
        other_forms: instead, R-LoRA's update in two other forms, where bars were missed on CPUs.
        record: keep the result as `records/speed-DEVICE.json` of this package
            (`speed-forms-DEVICE.json`).
        rehearse: every case in miniature on the CPU, within a minute. It measures nothing.
        plan: only print the cases, an estimate of each, and their sum.
        minutes: start no case that would end later; None is 8 on a GPU, and no end on a CPU.
        threads: CPU threads; None is PyTorch's own choice.
        out: another file of the result.

    Returns:
        The result, as `rlora_lab.speed.bench` describes it; None with `plan`.

    Raises:
        LabError: what can't be done, and what is allowed instead.
    """
    import torch

    from ..models.answers import has_bf16
    from .bench import Speed

    if record and (quick or rehearse or out):
        raise LabError(
            "--record keeps a whole measurement: leave out --quick, --rehearse and --out"
        )
    if threads:
        torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = forms(has_bf16()) if other_forms else cases(device, quick, bf16=has_bf16())
    if plan:
        print(plan_table(wanted, device))
        return None
    if minutes is None:
        minutes = GPU_MINUTES if device == "cuda" and not rehearse else float("inf")
    kind = "speed-forms" if other_forms else "speed"
    if record:
        out = RECORDS / f"{kind}-{device}.json"
    measured = Speed(
        device,
        quick=quick,
        kind=kind,
        rehearse=rehearse,
        out=out,
        wanted=wanted,
        minutes=minutes,
    )
    result = measured.run()
    if find_spec("pandas"):  # a machine that is lent has it not always
        from .tables import tables

        print(f"\n{tables(result)}\n")
    if rehearse:
        print("A rehearsal in miniature: that all of it runs, and no measurement.")
    elif quick:
        print("A quick look, from few steps: leave --quick out for a measurement.")
    where = f"records/{out.name} of this package" if record else measured.out
    print(f"{result['machine']}, {result['date']}; kept in {where}")
    return result
