"""A checkpoint that does not fit is refused, named, and leaves everything as it was."""

import copy
import gc
import json
import pickle
import weakref
from pathlib import Path

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
A, B, ROUTER, A0, B0 = (f"base_model.model.2.rlora_{part}.weight" for part in PARTS)


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


# What is done to the tensors of a good file, and what the error must name. The file and its
# configuration show these alone.
OF_THE_FILE = {
    **{f"no {part}": (lost(f"base_model.model.2.rlora_{part}.weight"), part) for part in PARTS},
    "another rank": (reshaped(A, (3, 10)), "A"),
    "another width": (reshaped(A, (4, 11)), "A"),
    "fewer heads": (reshaped(B, (10, 8)), "B"),
    "another router": (reshaped(ROUTER, (2, 10)), "router"),
    "another A0": (reshaped(A0, (4, 11)), "A0"),
    "one head in Bbar0's place": (reshaped(B0, (10, 12)), "B0"),
    "transposed A": (reshaped(A, (10, 4)), "A"),
    "NaN in A": (spoilt(A, torch.nan), "A"),
    "inf in B": (spoilt(B, torch.inf), "B"),
    "-inf in A0": (spoilt(A0, -torch.inf), "A0"),
}
# To see these, one needs the model.
OF_THE_MODEL = {
    "no layer": (
        lambda tensors: [tensors.pop(k) for k in list(tensors) if ".model.2." in k],
        "base_model.model.2.rlora_",
    ),
    "no tensor": (lambda tensors: tensors.clear(), "base_model.model.0.rlora_"),
    "another part": (added("base_model.model.2.rlora_C.weight"), "2.rlora_C.weight"),
    "a LoRA's tensor": (added("base_model.model.2.lora_A.weight"), "2.lora_A.weight"),
    "another classifier": (reshaped(HEAD, (6, 10)), "model.4."),
    "NaN in the classifier": (spoilt(HEAD, torch.nan), "model.4."),
}
SPOILERS = OF_THE_FILE | OF_THE_MODEL


def save(directory, name="default", seed=5, **settings):
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets, name, **settings)
    perturb(model, name, seed).save_pretrained(directory)
    return evaluated(model, SEQUENTIAL.inputs())


def rewrite(directory, spoil):
    tensors = load_file(directory / FILE)
    spoil(tensors)
    save_file(tensors, directory / FILE)


def whole_modules(case: str) -> dict:
    """PEFT looks those up by itself, before anyone may check, so only where they are spoilt."""
    return {"modules_to_save": ["4"]} if "classifier" in case else {}


@pytest.fixture(params=SPOILERS)
def spoilt_file(request, tmp_path):
    """A folder with a spoilt adapter, its settings, the words of the error, and the way back."""
    spoil, culprit = SPOILERS[request.param]
    settings = whole_modules(request.param)
    expected = save(tmp_path, seed=6, **settings)
    good = load_file(tmp_path / FILE)
    rewrite(tmp_path, spoil)
    words = culprit
    if request.param in OF_THE_FILE:
        words = f"{FILE}.*base_model.model.2.*rlora_{culprit}"
    return tmp_path, settings, words, lambda: save_file(good, tmp_path / FILE), expected


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_base_is_as_it_was_and_the_good_file_then_loads(spoilt_file, low_cpu_mem_usage):
    folder, _, words, mend, expected = spoilt_file
    base = SEQUENTIAL.base()
    base[2].bias.requires_grad = False  # what trained before trains after, and nothing else
    for is_trainable in (False, True):
        how = {"is_trainable": is_trainable, "low_cpu_mem_usage": low_cpu_mem_usage}
        with unchanged(base), pytest.raises(ValueError, match=words):
            PeftModel.from_pretrained(base, folder, **how)
        assert not hasattr(base, "peft_config")
    mend()
    loaded = PeftModel.from_pretrained(base, folder, **how)
    assert torch.equal(evaluated(loaded, SEQUENTIAL.inputs()), expected)


def test_another_adapter_is_as_it_was_and_the_good_file_then_loads(spoilt_file):
    folder, settings, words, mend, expected = spoilt_file
    model = perturb(adapt(SEQUENTIAL.base(), ["2"], "mine", **settings), "mine")
    for is_trainable in (False, True):
        with unchanged(model), pytest.raises(ValueError, match=words):
            model.load_adapter(folder, "theirs", is_trainable=is_trainable)
        assert list(model.peft_config) == ["mine"] and model.active_adapters == ["mine"]
    mend()
    model.load_adapter(folder, "theirs")
    model.set_adapter("theirs")
    assert torch.equal(evaluated(model, SEQUENTIAL.inputs()), expected)


@pytest.mark.parametrize("from_a_file", [False, True])
def test_an_adapter_that_it_was_to_replace_is_as_it_was(spoilt_file, from_a_file, tmp_path):
    folder, settings, _, _, _ = spoilt_file
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets, **settings)
    train(model, [SEQUENTIAL.inputs(seed) for seed in range(2)])
    if from_a_file:
        model.save_pretrained(tmp_path / "good")
        model = PeftModel.from_pretrained(SEQUENTIAL.base(), tmp_path / "good")
    with unchanged(model), pytest.raises(ValueError, match="rlora_|lora_A|model.4."):
        model.load_adapter(folder, "default")


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("way", ["an optimizer", "p.data", "one number"])
def test_work_on_an_adapter_made_from_a_saved_config_is_not_lost(
    way, autocast_adapter_dtype, tmp_path
):
    """Only what was injected for this very load, and not touched since, may go again."""
    save(tmp_path)
    config = RLoraConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    model = get_peft_model(SEQUENTIAL.base(), config, autocast_adapter_dtype=autocast_adapter_dtype)
    if way == "an optimizer":
        train(model, [SEQUENTIAL.inputs(seed) for seed in range(2)])
    elif way == "one number":
        layers_of(model)[1].rlora_router["default"].weight.data[0, 0] = 1
    else:
        evaluated(model, SEQUENTIAL.inputs())
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.sub_(0.01)  # torch's counter of versions does not see it
    for spoil, words in ((spoilt(A, torch.nan), "finite"), (reshaped(A, (4, 11)), "4, 11")):
        state = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
        spoil(state)
        with unchanged(model), pytest.raises(ValueError, match=f"2.rlora_A.*{words}"):
            set_peft_model_state_dict(model, state)


def test_a_config_from_a_file_keeps_no_model_alive_and_carries_none(tmp_path):
    save(tmp_path)
    config = RLoraConfig.from_pretrained(tmp_path)
    bare = len(pickle.dumps(config))
    model = get_peft_model(SEQUENTIAL.base(), config)
    assert len(pickle.dumps(config)) < bare + 100
    assert vars(config).keys() == vars(RLoraConfig()).keys()
    assert copy.deepcopy(config) == config
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
    "an output more": (["0", "2", "4"], lambda: sequential(3), sequential, "model.4.rlora_"),
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


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid", None])
def test_a_file_that_is_not_whole_is_refused_by_its_name_before_anything_changes(
    content, is_trainable, tmp_path
):
    save(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2] if content is None else content)
    base = SEQUENTIAL.base()
    with unchanged(base), pytest.raises(ValueError, match=FILE):
        PeftModel.from_pretrained(base, tmp_path, is_trainable=is_trainable)


def test_a_module_to_save_that_is_missing_is_pefts_key_error_before_anything_is_copied(tmp_path):
    """PEFT looks these up before the tuner sees the checkpoint, and keeps what it has injected."""
    save(tmp_path, modules_to_save=["4"])
    rewrite(tmp_path, lost(HEAD))
    model = perturb(adapt(SEQUENTIAL.base(), ["2"], "mine"), "mine")
    before = evaluated(model, SEQUENTIAL.inputs())
    with pytest.raises(KeyError, match=HEAD):
        model.load_adapter(tmp_path, "theirs")
    assert torch.equal(evaluated(model, SEQUENTIAL.inputs()), before)


class Headed(nn.Module):
    """A head of several layers, with a buffer, as modules_to_save has them."""

    def __init__(self, classes=3):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, classes))
        self.head.register_buffer("bias_of_unseen", torch.full((classes,), -torch.inf))

    def forward(self, x):
        return self.head(self.fc(x))


def headed():
    torch.manual_seed(0)
    config = RLoraConfig(target_modules=["fc"], modules_to_save=["head"])
    return perturb(get_peft_model(Headed(), config))


def test_a_head_of_another_size_is_refused_or_left_out_if_asked(tmp_path):
    headed().save_pretrained(tmp_path)
    base = Headed(5)
    own = base.head[1].weight.detach().clone()
    with unchanged(base), pytest.raises(ValueError, match=r"head.*model has \(5.*checkpoint \(3"):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        model = PeftModel.from_pretrained(base, tmp_path, ignore_mismatched_sizes=True)
    saved = load_file(tmp_path / FILE)
    heads = saved["base_model.model.fc.rlora_B.weight"]
    assert torch.equal(layers_of(model)[0].rlora_B["default"].weight, heads)
    head = model.base_model.model.head.modules_to_save["default"]
    assert torch.equal(head[0].weight, saved["base_model.model.head.0.weight"])
    assert torch.equal(head[1].weight, own)


def test_a_buffer_that_is_not_finite_loads(tmp_path):
    headed().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Headed(), tmp_path)
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


def test_a_state_without_the_side_pair_loads_unless_strict():
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    pair = {k: v for k, v in snapshot(model).items() if "_A0" in k or "_B0" in k}
    other = snapshot(perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets), seed=8))
    rest = {k: v for k, v in other.items() if k not in pair}
    assert len(pair) == 4
    assert sorted(model.load_state_dict(rest, strict=False).missing_keys) == sorted(pair)
    assert same_tensors(snapshot(model), rest | pair)
    with pytest.raises(RuntimeError, match="Missing key.*rlora_A0.default.weight"):
        model.load_state_dict(rest)


def test_load_state_dict_refuses_another_shape_before_it_copies_any():
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    other = snapshot(perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets), seed=8))
    other["base_model.model.2.rlora_B.default.weight"] = torch.zeros(10, 8)
    words = r"2.rlora_B.*\(10, 12\), the checkpoint \(10, 8\)"
    for strict in (True, False):
        with unchanged(model), pytest.raises(ValueError, match=words):
            model.load_state_dict(other, strict=strict)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_of_the_base_or_the_adapter_alone_is_free(assign):
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    other = snapshot(perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets), seed=8))
    adapters = {k: v for k, v in other.items() if "rlora_" in k}
    base = {k: v + 1 for k, v in other.items() if "rlora_" not in k}
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    model.load_state_dict(adapters, strict=False, assign=assign)
    assert same_tensors(adapter_tensors(model), adapters)
    model.load_state_dict(base, strict=False, assign=assign)
    assert same_tensors(snapshot(model), adapters | base)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trains


OLD = Path(__file__).parents[1] / "fixtures" / "adapter-with-buffers"


def base_of_old() -> nn.Module:
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5))
    with torch.no_grad():
        for i, parameter in enumerate(base.parameters()):
            values = torch.linspace(-1, 1, parameter.numel()).roll(i)
            parameter.copy_(values.reshape(parameter.shape))
    return base


@pytest.mark.parametrize("way", ["from_pretrained", "low_cpu_mem_usage", "load_state_dict"])
def test_files_whose_side_pair_was_saved_as_buffers_load_bit_for_bit(way):
    """Written by the version before this one: `rlora_A0` and `rlora_B0` without `.weight`."""
    with safe_open(OLD / "model_state.safetensors", "pt") as file:
        expected = torch.tensor(json.loads(file.metadata()["output"]))
        state = {key: file.get_tensor(key) for key in file.keys()}
    assert "base_model.model.0.rlora_A0.default" in state
    if way == "load_state_dict":
        model = get_peft_model(base_of_old(), RLoraConfig(r=2, target_modules=["0", "2"]))
        model.load_state_dict(state)
    else:
        how = {"low_cpu_mem_usage": way == "low_cpu_mem_usage"}
        model = PeftModel.from_pretrained(base_of_old(), OLD, **how)
    for name, tensor in adapter_tensors(model).items():
        old = name if name in state else name.removesuffix(".weight")
        assert torch.equal(tensor, state[old]), name
    x = torch.linspace(-1, 1, 12).reshape(2, 6)
    assert torch.allclose(evaluated(model, x), expected, atol=1e-6)


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
