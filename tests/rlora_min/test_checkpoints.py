"""A checkpoint that does not fit is refused, named, and leaves everything as it was."""

import warnings

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from rlora_helpers import (
    KINDS,
    STRICT,
    adapt,
    adapter_tensors,
    anatomy,
    assert_unchanged,
    evaluated,
    llama,
    perturb,
    same_tensors,
    snapshot,
    train,
)
from safetensors.torch import load_file, save_file

from rlora_min import RLoraConfig

pytestmark = STRICT
FILE = "adapter_model.safetensors"
SEQUENTIAL = KINDS["sequential"]
HEAD = "base_model.model.4.weight"  # of modules_to_save
A, B, ROUTER, A0, B0 = (
    f"base_model.model.2.rlora_{part}"
    for part in ("A.weight", "B.weight", "router.weight", "A0", "B0")
)


def lost(name):
    return lambda tensors: tensors.pop(name)


def reshaped(name, shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def spoilt(name, value):
    def spoil(tensors):
        tensors[name].view(-1)[-1] = value

    return spoil


def added(name):
    return lambda tensors: tensors.update({name: torch.zeros(4, 10)})


# What is done to the tensors of a good checkpoint, and what the error must name.
SPOILERS = {
    "no A": (lost(A), A),
    "no heads": (lost(B), B),
    "no router": (lost(ROUTER), ROUTER),
    "no A0": (lost(A0), A0),
    "no Bbar0": (lost(B0), B0),
    "no layer": (
        lambda tensors: [tensors.pop(k) for k in list(tensors) if ".model.2." in k],
        "base_model.model.2.",
    ),
    "no tensor": (lambda tensors: tensors.clear(), "base_model.model.0."),
    "another layer": (added("base_model.model.3.rlora_A.weight"), "3.rlora_A.weight"),
    "another part": (added("base_model.model.2.rlora_C.weight"), "2.rlora_C.weight"),
    "a LoRA's tensor": (added("base_model.model.2.lora_A.weight"), "2.lora_A.weight"),
    "another rank": (reshaped(A, (3, 10)), A),
    "another width": (reshaped(A, (4, 11)), A),
    "fewer heads": (reshaped(B, (10, 8)), B),
    "another router": (reshaped(ROUTER, (2, 10)), ROUTER),
    "another A0": (reshaped(A0, (4, 11)), A0),
    "one head in Bbar0's place": (reshaped(B0, (10, 12)), B0),
    "transposed A": (reshaped(A, (10, 4)), A),
    "NaN in A": (spoilt(A, torch.nan), A),
    "inf in B": (spoilt(B, torch.inf), B),
    "NaN in the router": (spoilt(ROUTER, torch.nan), ROUTER),
    "-inf in A0": (spoilt(A0, -torch.inf), A0),
    "NaN in Bbar0": (spoilt(B0, torch.nan), B0),
    "another classifier": (reshaped(HEAD, (6, 10)), "4."),
    "NaN in the classifier": (spoilt(HEAD, torch.nan), "4."),
}
OWN = {A, B, ROUTER, A0, B0, "base_model.model.2."}


def named(error, culprit: str) -> bool:
    """Errors name a tensor as the model does, with the adapter's name inside."""
    stem, _, weight = culprit.partition(".weight")
    return stem in str(error) and weight in str(error)


def whole_modules(case: str) -> dict:
    """PEFT looks those up by itself, before anyone may check, so only where they are spoilt."""
    return {"modules_to_save": ["4"]} if "classifier" in case else {}


def save(directory, name="default", seed=5, **settings):
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets, name, **settings)
    perturb(model, name, seed).save_pretrained(directory)
    return evaluated(model, SEQUENTIAL.inputs())


def rewrite(directory, spoil):
    tensors = load_file(directory / FILE)
    spoil(tensors)
    save_file(tensors, directory / FILE)


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("case", SPOILERS)
def test_a_spoilt_checkpoint_is_refused_and_the_base_is_as_it_was(
    case, is_trainable, low_cpu_mem_usage, tmp_path
):
    spoil, culprit = SPOILERS[case]
    expected = save(tmp_path, **whole_modules(case))
    good = load_file(tmp_path / FILE)
    rewrite(tmp_path, spoil)
    base = SEQUENTIAL.base()
    before = anatomy(base)
    how = {"is_trainable": is_trainable, "low_cpu_mem_usage": low_cpu_mem_usage}
    with pytest.raises(ValueError, match="default") as caught:
        PeftModel.from_pretrained(base, tmp_path, **how)
    assert named(caught.value, culprit)
    assert_unchanged(base, before)
    assert not hasattr(base, "peft_config")

    save_file(good, tmp_path / FILE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(base, tmp_path, **how)
    assert torch.equal(evaluated(loaded, SEQUENTIAL.inputs()), expected)


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("case", SPOILERS)
def test_a_spoilt_checkpoint_leaves_the_adapters_already_loaded_alone(case, is_trainable, tmp_path):
    spoil, culprit = SPOILERS[case]
    expected = save(tmp_path, **whole_modules(case))
    good = load_file(tmp_path / FILE)
    rewrite(tmp_path, spoil)
    model = perturb(adapt(SEQUENTIAL.base(), ["2"], "mine", **whole_modules(case)), "mine")
    before, mine = anatomy(model), evaluated(model, SEQUENTIAL.inputs())
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="theirs") as caught:
        model.load_adapter(tmp_path, "theirs", is_trainable=is_trainable)
    assert named(caught.value, culprit)
    assert list(model.peft_config) == ["mine"] and model.active_adapters == ["mine"]
    assert torch.equal(evaluated(model, SEQUENTIAL.inputs()), mine)
    # as after any deletion in PEFT, an empty layer may stay around what it did not adapt before
    left = {k.replace("base_layer.", ""): v for k, v in snapshot(model).items()}
    was = {k.replace("base_layer.", ""): v for k, v in before["tensors"].items()}
    assert same_tensors(left, was)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains and all(".mine" in n for n in trains)
    assert {n for n, _ in model.named_modules()} >= set(modules)

    save_file(good, tmp_path / FILE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(tmp_path, "theirs", is_trainable=is_trainable)
        model.set_adapter("theirs")
    assert torch.equal(evaluated(model, SEQUENTIAL.inputs()), expected)


@pytest.mark.parametrize("case", SPOILERS)
def test_a_spoilt_checkpoint_over_an_adapter_leaves_that_adapter(case, tmp_path):
    spoil, culprit = SPOILERS[case]
    save(tmp_path, seed=6, **whole_modules(case))
    rewrite(tmp_path, spoil)
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets, **whole_modules(case))
    train(model, [SEQUENTIAL.inputs(seed) for seed in range(2)])
    before = anatomy(model)
    with pytest.raises(ValueError, match="default") as caught:
        model.load_adapter(tmp_path, "default")
    assert named(caught.value, culprit)
    assert_unchanged(model, before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_spoilt_checkpoint_over_an_adapter_from_a_file_leaves_that_adapter(
    low_cpu_mem_usage, tmp_path
):
    expected = save(tmp_path)
    model = PeftModel.from_pretrained(
        SEQUENTIAL.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    before = anatomy(model)
    rewrite(tmp_path, spoilt(B, torch.nan))
    with pytest.raises(ValueError, match="default"):
        model.load_adapter(tmp_path, "default")
    assert_unchanged(model, before)
    assert torch.equal(evaluated(model, SEQUENTIAL.inputs()), expected)


def test_work_on_an_adapter_made_from_a_saved_config_is_not_lost_to_a_spoilt_checkpoint(tmp_path):
    """Only an adapter that was injected for this very load may go again."""
    save(tmp_path)
    config = RLoraConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    model = get_peft_model(SEQUENTIAL.base(), config)
    train(model, [SEQUENTIAL.inputs(seed) for seed in range(2)])
    before = anatomy(model)
    state = get_peft_model_state_dict(model)
    state[A] = torch.full_like(state[A], torch.nan)
    with pytest.raises(ValueError, match="2.rlora_A"):
        set_peft_model_state_dict(model, state)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["sequential", "llama"])
@pytest.mark.parametrize(("saved", "fresh"), [(2, 3), (3, 2)])
def test_a_base_of_more_or_fewer_layers_is_refused_by_the_layers_name(name, saved, fresh, tmp_path):
    kind = KINDS[name]
    targets = ["q_proj"] if kind.token else ["0", "2", "4"]
    perturb(adapt(kind.base(layers=saved), targets)).save_pretrained(tmp_path)
    base = kind.base(layers=fresh)
    before = anatomy(base)
    # the third layer: saved without a place, or a place without tensors; or it is of another width
    culprit = "layers.2.self_attn.q_proj" if kind.token else "model.4.rlora_"
    with pytest.raises(ValueError, match=culprit):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


def test_a_base_whose_modules_have_other_names_is_refused_with_the_closest(tmp_path):
    perturb(adapt(llama(), ["q_proj"])).save_pretrained(tmp_path)
    base = KINDS["gpt2"].base()
    before = anatomy(base)
    with pytest.raises(ValueError, match="q_proj.*not found.*c_proj"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


def test_a_base_of_another_width_is_refused(tmp_path):
    perturb(adapt(llama(), ["q_proj"])).save_pretrained(tmp_path)
    base = llama(hidden_size=32)
    before = anatomy(base)
    with pytest.raises(ValueError, match=r"rlora_A.*model has \(4, 32\), the checkpoint \(4, 16\)"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid", None])
def test_a_file_that_is_not_whole_is_refused_by_its_name_before_anything_changes(
    content, is_trainable, tmp_path
):
    save(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2] if content is None else content)
    base = SEQUENTIAL.base()
    before = anatomy(base)
    with pytest.raises(ValueError, match=FILE):
        PeftModel.from_pretrained(base, tmp_path, is_trainable=is_trainable)
    assert_unchanged(base, before)
    (tmp_path / FILE).write_bytes(whole)
    PeftModel.from_pretrained(base, tmp_path, is_trainable=is_trainable)


@pytest.mark.parametrize("case", [k for k, (_, name) in SPOILERS.items() if name in OWN])
@pytest.mark.parametrize("strict", [True, False])
def test_load_state_dict_refuses_half_an_adapter_before_it_copies_any(case, strict):
    spoil, culprit = SPOILERS[case]
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    other = snapshot(perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets), seed=8))
    state = {k.replace(".default", ""): v for k, v in other.items()}
    spoil(state)
    back = {k.replace(".default", ""): k for k in other}
    state = {back[k]: v for k, v in state.items()}
    before = anatomy(model)
    with pytest.raises(ValueError, match="default") as caught:
        model.load_state_dict(state, strict=strict)
    assert named(caught.value, culprit)
    assert_unchanged(model, before)


def test_load_state_dict_of_a_whole_adapter_or_of_the_base_alone_is_free():
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    other = snapshot(perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets), seed=8))
    adapters = {k: v for k, v in other.items() if "rlora_" in k}
    base = {k: v + 1 for k, v in other.items() if "rlora_" not in k}
    model.load_state_dict(adapters, strict=False)
    assert same_tensors(adapter_tensors(model), adapters)
    model.load_state_dict(base, strict=False)
    assert same_tensors(snapshot(model), adapters | base)
    model.load_state_dict(other, strict=True)
    assert same_tensors(snapshot(model), other)


def test_an_adapter_may_have_any_name_that_peft_allows(tmp_path):
    save(tmp_path, name="my-task (v2)+")
    expected = save(tmp_path, name="my-task (v2)+")
    (folder,) = tmp_path.glob("my*")
    model = PeftModel.from_pretrained(SEQUENTIAL.base(), folder, "weight")
    assert torch.equal(evaluated(model, SEQUENTIAL.inputs()), expected)
    rewrite(folder, lost(B))
    with pytest.raises(ValueError, match="rlora_B"):
        model.load_adapter(folder, "a+b")
    assert torch.equal(evaluated(model, SEQUENTIAL.inputs()), expected)


def test_a_bf16_checkpoint_and_one_of_a_bigger_dtype_load():
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    state = get_peft_model_state_dict(model)
    for dtype in (torch.bfloat16, torch.float64):
        set_peft_model_state_dict(model, {k: v.to(dtype) for k, v in state.items()})
        assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float32}
        now = get_peft_model_state_dict(model)
        assert all(torch.equal(now[k], v.to(dtype).float()) for k, v in state.items())
        state = {k: v.clone() for k, v in now.items()}


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_module_to_save_that_is_missing_is_pefts_key_error_before_anything_is_copied(
    part, tmp_path
):
    """PEFT looks these up before the tuner sees the checkpoint, and keeps what it has injected."""
    save(tmp_path, modules_to_save=["4"])
    rewrite(tmp_path, lost(f"base_model.model.4.{part}"))
    model = perturb(adapt(SEQUENTIAL.base(), ["2"], "mine"), "mine")
    before = evaluated(model, SEQUENTIAL.inputs())
    with pytest.raises(KeyError, match=f"base_model.model.4.{part}"):
        model.load_adapter(tmp_path, "theirs")
    assert torch.equal(evaluated(model, SEQUENTIAL.inputs()), before)


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize(
    ("name", "task"), [("bert", TaskType.SEQ_CLS), ("llama", TaskType.CAUSAL_LM)]
)
def test_a_refused_checkpoint_of_a_task_leaves_the_head_and_the_base_as_they_were(
    name, task, is_trainable, tmp_path
):
    kind = KINDS[name]
    model = perturb(adapt(kind.base(), kind.targets, task_type=task))
    model.save_pretrained(tmp_path)
    good = load_file(tmp_path / FILE)
    last = [k for k in good if ".rlora_B." in k][-1]
    rewrite(tmp_path, spoilt(last, torch.nan))
    base = kind.base()
    before, expected = anatomy(base), evaluated(base, kind.inputs())
    with pytest.raises(ValueError, match="rlora_B") as caught:
        PeftModel.from_pretrained(base, tmp_path, is_trainable=is_trainable)
    assert named(caught.value, last)
    assert_unchanged(base, before)
    assert torch.equal(evaluated(base, kind.inputs()), expected)
    save_file(good, tmp_path / FILE)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=is_trainable)
    assert torch.equal(evaluated(loaded, kind.inputs()), evaluated(model, kind.inputs()))
