"""A checkpoint that does not fit is refused, named, and leaves everything as it was."""

import copy
import gc
import json
import pickle
import shutil
import weakref
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from rlora_helpers import (
    KINDS,
    LLAMA,
    SEQUENTIAL,
    STRICT,
    adapt,
    adapter_tensors,
    evaluated,
    layers_of,
    perturb,
    same_tensors,
    sequential,
    snapshot,
    train,
    trained_of,
    unchanged,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from rlora_min import RLoraConfig

pytestmark = STRICT
FILE = "adapter_model.safetensors"
HEAD = "base_model.model.4.weight"  # of modules_to_save
PARTS = ("A", "B", "router", "A0", "B0")
FIRST, SECOND = ([f"base_model.model.{i}.rlora_{part}.weight" for part in PARTS] for i in (0, 2))
A, B, ROUTER, A0, B0 = SECOND


def ending_in(value, *shape):
    tensor = torch.zeros(shape)
    tensor[-1, -1] = value
    return tensor


# What takes the place of a good file's tensors, None of one that is lost, and the part that the
# error must name. The file and its configuration show these alone.
OF_THE_FILE = {
    **{f"no {part}": ({name: None}, part) for part, name in zip(PARTS, SECOND, strict=True)},
    "fewer heads": ({B: torch.zeros(10, 8)}, "B"),
    "another router": ({ROUTER: torch.zeros(2, 10)}, "router"),
    "another A0": ({A0: torch.zeros(4, 11)}, "A0"),
    "one head in Bbar0's place": ({B0: torch.zeros(10, 12)}, "B0"),
    "transposed A": ({A: torch.zeros(10, 4)}, "A"),
    "NaN in A": ({A: ending_in(torch.nan, 4, 10)}, "A"),
    "-inf in A0": ({A0: ending_in(-torch.inf, 4, 10)}, "A0"),
}
NAMED = f"{FILE}.*base_model.model.2.*rlora_"
C, LORA_A = "base_model.model.2.rlora_C.weight", "base_model.model.2.lora_A.weight"
# The same with the words of the error. To see the later ones, one needs the model.
SPOILERS = {
    **{case: (change, NAMED + part) for case, (change, part) in OF_THE_FILE.items()},
    "no layer": (dict.fromkeys(SECOND), "base_model.model.2.rlora_"),
    "no tensor": (dict.fromkeys(FIRST + SECOND), "base_model.model.0.rlora_"),
    "another part": ({C: torch.zeros(4, 10)}, "2.rlora_C.weight"),
    "a LoRA's tensor": ({LORA_A: torch.zeros(4, 10)}, "2.lora_A.weight"),
    "another classifier": ({HEAD: torch.zeros(6, 10)}, "model.4."),
    "NaN in the classifier": ({HEAD: ending_in(torch.nan, 5, 10)}, "model.4."),
}


def save(directory, name="default", seed=5, **settings):
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets, name, **settings)
    perturb(model, name, seed).save_pretrained(directory)
    return evaluated(model, SEQUENTIAL.inputs())


def rewrite(directory, change):
    tensors = load_file(directory / FILE) | change
    left = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(left, directory / FILE)


@pytest.fixture(params=SPOILERS)
def case(request, tmp_path):
    """A good adapter and a spoilt one, what the good one gives, and the words of the error."""
    case = SimpleNamespace(good=tmp_path / "good", spoilt=tmp_path / "spoilt")
    change, case.words = SPOILERS[request.param]
    # PEFT looks those up by itself, before anyone may check, so only where they are spoilt.
    case.settings = {"modules_to_save": ["4"]} if "classifier" in request.param else {}
    case.expected = save(case.good, seed=6, **case.settings)
    shutil.copytree(case.good, case.spoilt)
    rewrite(case.spoilt, change)
    return case


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_base_is_as_it_was_and_the_good_file_then_loads(case, low_cpu_mem_usage):
    base = SEQUENTIAL.base()
    base[2].bias.requires_grad = False  # what trained before trains after, and nothing else
    for is_trainable in (False, True):
        how = {"is_trainable": is_trainable, "low_cpu_mem_usage": low_cpu_mem_usage}
        with unchanged(base), pytest.raises(ValueError, match=case.words):
            PeftModel.from_pretrained(base, case.spoilt, **how)
        assert not hasattr(base, "peft_config")
    loaded = PeftModel.from_pretrained(base, case.good, **how)
    assert torch.equal(evaluated(loaded, SEQUENTIAL.inputs()), case.expected)


@pytest.mark.parametrize("from_a_file", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_beside_it_or_to_be_replaced_is_as_it_was_and_the_good_file_then_loads(
    case, beside, from_a_file, tmp_path
):
    targets = SEQUENTIAL.targets[1:] if beside else SEQUENTIAL.targets
    model = adapt(SEQUENTIAL.base(), targets, "mine", **case.settings)
    train(model, [SEQUENTIAL.inputs(seed) for seed in range(2)])
    if from_a_file:
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(SEQUENTIAL.base(), tmp_path / "mine", "mine")
    # In the place of another, the file is not looked at before its tensors are read.
    name, words = ("theirs", case.words) if beside else ("mine", "rlora_|lora_A|model.4.")
    for is_trainable in (False, True):
        with unchanged(model), pytest.raises(ValueError, match=words):
            model.load_adapter(case.spoilt, name, is_trainable=is_trainable)
    model.load_adapter(case.good, name)
    model.set_adapter(name)
    assert torch.equal(evaluated(model, SEQUENTIAL.inputs()), case.expected)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_work_on_an_adapter_made_from_a_saved_config_is_not_lost(
    trained, autocast_adapter_dtype, tmp_path
):
    """Only what was injected for this very load, and not touched since, may go again."""
    save(tmp_path)
    config = RLoraConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    model = get_peft_model(SEQUENTIAL.base(), config, autocast_adapter_dtype=autocast_adapter_dtype)
    if trained:
        train(model, [SEQUENTIAL.inputs(seed) for seed in range(2)])
    else:  # one number, of which torch's counter of versions knows nothing
        layers_of(model)[1].rlora_router["default"].weight.data[0, 0] = 1
    state = get_peft_model_state_dict(model)
    for wrong, words in ((torch.full((4, 10), torch.nan), "finite"), (torch.zeros(4, 11), "4, 11")):
        with unchanged(model), pytest.raises(ValueError, match=f"2.rlora_A.*{words}"):
            set_peft_model_state_dict(model, state | {A: wrong})


def test_a_config_from_a_file_keeps_no_model_alive_and_carries_none(tmp_path):
    save(tmp_path)
    config = RLoraConfig.from_pretrained(tmp_path)
    bare = len(pickle.dumps(config))
    model = get_peft_model(SEQUENTIAL.base(), config)
    assert len(pickle.dumps(config)) < bare + 100
    weight = weakref.ref(layers_of(model)[0].rlora_B["default"].weight)
    # what is kept for a load is not in the model's pickle either
    assert b"_Injected" not in pickle.dumps(model)
    del model
    gc.collect()
    assert weight() is None


WIDE = r"rlora_A.*model has \(4, 32\), the checkpoint \(4, 16\)"
# Targets, the base of the file, another base, and what the error names: the third layer was saved
# without a place, or is a place without tensors, or is of another width.
OTHER_BASES = {
    "fewer layers": (["q_proj"], LLAMA.base, lambda: LLAMA.base(layers=3), "2.self_attn.q_proj"),
    "more layers": (["q_proj"], lambda: LLAMA.base(layers=3), LLAMA.base, "2.self_attn.q_proj"),
    "an output less": (["0", "2", "4"], sequential, lambda: sequential(3), "model.4.rlora_"),
    "other names": (["q_proj"], LLAMA.base, KINDS["gpt2"].base, "q_proj.*not found.*c_proj"),
    "another width": (["q_proj"], LLAMA.base, lambda: LLAMA.base(hidden_size=32), WIDE),
}


@pytest.mark.parametrize("case", OTHER_BASES)
def test_another_base_is_refused_by_the_layers_name(case, tmp_path):
    targets, saved, fresh, words = OTHER_BASES[case]
    perturb(adapt(saved(), targets)).save_pretrained(tmp_path)
    base = fresh()
    with unchanged(base), pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid", None])
def test_a_file_that_is_not_whole_is_refused_by_its_name_before_anything_changes(content, tmp_path):
    save(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2] if content is None else content)
    base = SEQUENTIAL.base()
    with unchanged(base), pytest.raises(ValueError, match=FILE):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_module_to_save_that_is_missing_is_pefts_key_error_before_anything_is_copied(tmp_path):
    """PEFT looks these up before the tuner sees the checkpoint, and keeps what it has injected."""
    save(tmp_path, modules_to_save=["4"])
    rewrite(tmp_path, {HEAD: None})
    model = perturb(adapt(SEQUENTIAL.base(), ["2"], "mine"), "mine")
    before = evaluated(model, SEQUENTIAL.inputs())
    with pytest.raises(KeyError, match=HEAD):
        model.load_adapter(tmp_path, "theirs")
    assert torch.equal(evaluated(model, SEQUENTIAL.inputs()), before)


def with_a_head(classes=3) -> nn.Module:
    """A head of several layers, with a buffer, as modules_to_save has them."""
    head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, classes))
    head.register_buffer("bias_of_unseen", torch.full((classes,), -torch.inf))
    return nn.Sequential(OrderedDict(fc=nn.Linear(6, 6), head=head))


@pytest.fixture
def headed(tmp_path):
    """A folder with such a head."""
    model = perturb(adapt(with_a_head(), ["fc"], modules_to_save=["head"]))
    model.save_pretrained(tmp_path)
    return tmp_path


def test_a_head_of_another_size_is_refused_or_left_out_if_asked(headed):
    base = with_a_head(5)
    own = base.head[1].weight.detach().clone()
    with unchanged(base), pytest.raises(ValueError, match=r"head.*model has \(5.*checkpoint \(3"):
        PeftModel.from_pretrained(base, headed)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        model = PeftModel.from_pretrained(base, headed, ignore_mismatched_sizes=True)
    saved = load_file(headed / FILE)
    heads = saved["base_model.model.fc.rlora_B.weight"]
    assert torch.equal(layers_of(model)[0].rlora_B["default"].weight, heads)
    head = model.base_model.model.head.modules_to_save["default"]
    assert torch.equal(head[0].weight, saved["base_model.model.head.0.weight"])
    assert torch.equal(head[1].weight, own)


def test_a_buffer_that_is_not_finite_loads(headed):
    loaded = PeftModel.from_pretrained(with_a_head(), headed)
    assert loaded.base_model.model.head.modules_to_save["default"].bias_of_unseen.isinf().all()


def test_a_layer_of_another_width_is_left_out_if_asked(tmp_path):
    """As with PEFT's LoRA: what fits is loaded, the rest stays as drawn, and PEFT warns."""
    save(tmp_path)
    base = SEQUENTIAL.base()
    base[0], base[2] = nn.Linear(6, 12), nn.Linear(12, 10)
    drawn = adapter_tensors(adapt(copy.deepcopy(base), ["0", "2"], init_seed=4))
    config = RLoraConfig.from_pretrained(tmp_path)
    config.init_seed = 4
    with pytest.warns(UserWarning, match="rlora_A"):
        how = {"config": config, "ignore_mismatched_sizes": True}
        model = PeftModel.from_pretrained(base, tmp_path, **how)
    saved = load_file(tmp_path / FILE)
    for name, tensor in adapter_tensors(model).items():
        file = saved[name.replace(".default", "")]
        assert torch.equal(tensor, file if file.shape == tensor.shape else drawn[name])


@pytest.fixture
def model():
    return perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))


@pytest.fixture
def other():
    """The state of a model like it."""
    return snapshot(perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets), seed=8))


def test_a_state_without_the_side_pair_loads_unless_strict(model, other):
    pair = {k: v for k, v in snapshot(model).items() if "_A0" in k or "_B0" in k}
    rest = {k: v for k, v in other.items() if k not in pair}
    assert sorted(model.load_state_dict(rest, strict=False).missing_keys) == sorted(pair)
    assert same_tensors(snapshot(model), rest | pair)
    with pytest.raises(RuntimeError, match="Missing key.*rlora_A0.default.weight"):
        model.load_state_dict(rest)


@pytest.mark.parametrize("strict", [True, False])
def test_load_state_dict_refuses_another_shape_before_it_copies_any(model, other, strict):
    other["base_model.model.2.rlora_B.default.weight"] = torch.zeros(10, 8)
    words = r"2.rlora_B.*\(10, 12\), the checkpoint \(10, 8\)"
    with unchanged(model), pytest.raises(ValueError, match=words):
        model.load_state_dict(other, strict=strict)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_of_the_base_or_the_adapter_alone_is_free(model, other, assign):
    adapters = {k: v for k, v in other.items() if "rlora_" in k}
    base = {k: v + 1 for k, v in other.items() if "rlora_" not in k}
    trains, before = trained_of(model).keys(), evaluated(model, SEQUENTIAL.inputs())
    model.load_state_dict(adapters, strict=False, assign=assign)
    assert not torch.equal(evaluated(model, SEQUENTIAL.inputs()), before)
    model.load_state_dict(base, strict=False, assign=assign)
    assert same_tensors(snapshot(model), adapters | base)
    assert trained_of(model).keys() == trains


OLD = Path(__file__).parents[1] / "fixtures" / "adapter-with-buffers"


@pytest.mark.parametrize("way", ["from_pretrained", "low_cpu_mem_usage", "load_state_dict"])
def test_files_whose_side_pair_was_saved_as_buffers_load_bit_for_bit(way):
    """Written by the version before this one: `rlora_A0` and `rlora_B0` without `.weight`."""
    with safe_open(OLD / "model_state.safetensors", "pt") as file:
        expected = torch.tensor(json.loads(file.metadata()["output"]))
        state = {key: file.get_tensor(key) for key in file.keys()}
    assert "base_model.model.0.rlora_A0.default" in state
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5))
    for i, parameter in enumerate(base.parameters()):
        values = torch.linspace(-1, 1, parameter.numel()).roll(i)
        parameter.data = values.reshape(parameter.shape)
    if way == "load_state_dict":
        model = get_peft_model(base, RLoraConfig(r=2, target_modules=["0", "2"]))
        model.load_state_dict(state)
    else:
        how = {"low_cpu_mem_usage": way == "low_cpu_mem_usage"}
        model = PeftModel.from_pretrained(base, OLD, **how)
    for name, tensor in adapter_tensors(model).items():
        old = name if name in state else name.removesuffix(".weight")
        assert torch.equal(tensor, state[old]), name
    x = torch.linspace(-1, 1, 12).reshape(2, 6)
    assert torch.allclose(evaluated(model, x), expected, atol=1e-6)


def test_an_adapter_may_have_any_name_that_peft_allows(tmp_path):
    expected = save(tmp_path, name="my-task (v2)+")
    (folder,) = tmp_path.glob("my*")
    model = PeftModel.from_pretrained(SEQUENTIAL.base(), folder, "weight")
    assert torch.equal(evaluated(model, SEQUENTIAL.inputs()), expected)
    rewrite(folder, {B: None})
    with pytest.raises(ValueError, match="rlora_B"):
        model.load_adapter(folder, "a+b")
    assert torch.equal(evaluated(model, SEQUENTIAL.inputs()), expected)
