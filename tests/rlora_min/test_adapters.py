"""Saved, loaded, several side by side, switched, deleted, merged, copied: difference 0."""

import copy
import pickle

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from rlora_helpers import (
    KINDS,
    LLAMA,
    METHODS,
    SEQUENTIAL,
    STRICT,
    adapt,
    adapter_tensors,
    evaluated,
    layers_of,
    perturb,
    relative,
    same_tensors,
    snapshot,
    train,
    trained_of,
    unchanged,
)
from safetensors.torch import load_file
from torch import nn

from rlora_min import RLoraConfig

pytestmark = STRICT
FILE = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("dtype", "low_cpu_mem_usage"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
)
@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_on_a_fresh_base_it_is_the_same_model(
    kind, method, dtype, low_cpu_mem_usage, tmp_path
):
    inputs = kind.inputs(dtype=dtype)
    odd = dict(lora_alpha=3, r=3, use_rslora=method != "hydralora", init_seed=4)
    model = perturb(adapt(kind.base().to(dtype), kind.targets, **METHODS[method] | odd))
    model.save_pretrained(tmp_path)
    own = {k.replace(".default", ""): v for k, v in adapter_tensors(model).items()}
    assert same_tensors(load_file(tmp_path / FILE), own)
    base = kind.base().to(dtype)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(evaluated(loaded, inputs), evaluated(model, inputs))
    assert not trained_of(loaded)


def test_every_setting_survives_the_file(tmp_path):
    settings = dict(r=2, num_heads=5, lora_alpha=7, lora_dropout=0.25, use_rslora=False)
    settings |= dict(init_heads="centered", gamma=9, dropout_on="input", router="mean")
    settings |= dict(router_init="kaiming", init_weights=False, init_seed=11, bias="all")
    config = RLoraConfig(target_modules=["0", "2"], **settings)
    config.save_pretrained(tmp_path)
    assert RLoraConfig.from_pretrained(tmp_path) == PeftConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("second", ["mlora", "centered", "lora"])
def test_adapters_side_by_side_are_switched_added_up_and_deleted(kind, second, tmp_path):
    inputs = kind.inputs()
    alone = {}
    adapters = {"one": ("rlora", kind.targets), "two": (second, kind.targets[1:])}
    for name, (method, targets) in adapters.items():
        model = perturb(adapt(kind.base(), targets, name, **METHODS[method]), name)
        alone[name] = evaluated(model, inputs)
        model.save_pretrained(tmp_path)

    base = kind.base()
    expected = evaluated(base, inputs)
    model = PeftModel.from_pretrained(base, tmp_path / "one", "one")
    model.load_adapter(tmp_path / "two", "two")
    assert model.active_adapters == ["one"]
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert torch.equal(evaluated(model, inputs), alone[name])
        trains = trained_of(model)
        assert trains and all(f".{name}." in n for n in trains)
    with model.disable_adapter():
        assert torch.equal(evaluated(model, inputs), expected)

    model.set_adapter("two")
    model.delete_adapter("one")
    assert torch.equal(evaluated(model, inputs), alone["two"])
    assert list(model.peft_config) == ["two"] and not adapter_tensors(model, "one")
    assert not any("one" in layer.configs for layer in layers_of(model))
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(kind.base(), tmp_path / "again" / "two")
    assert torch.equal(evaluated(again, inputs), alone["two"])


# Merging


@pytest.mark.parametrize("method", ["mlora", "lora"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_without_a_router_it_is_the_same_function(kind, method, safe_merge):
    inputs = kind.inputs()
    model = perturb(adapt(kind.base(), kind.targets, **METHODS[method]))
    before, expected = snapshot(model), evaluated(model, inputs)
    model.merge_adapter(safe_merge=safe_merge)
    once = snapshot(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter(safe_merge=safe_merge)
    assert same_tensors(snapshot(model), once)
    assert relative(evaluated(model, inputs) - expected, expected) < 1e-5
    with model.disable_adapter():  # PEFT's meaning: what is disabled is not merged either
        base = evaluated(kind.base(), inputs)
        assert relative(evaluated(model, inputs) - base, base) < 1e-5
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert all(torch.allclose(t, before[k], atol=1e-5) for k, t in snapshot(model).items())
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert relative(evaluated(merged, inputs) - expected, expected) < 1e-5
    assert merged.state_dict().keys() == kind.base().state_dict().keys()


def test_two_merged_adapters_add_up_and_come_off_by_one_call():
    kind = KINDS["gpt2"]
    inputs = kind.inputs()
    model = perturb(adapt(kind.base(), kind.targets, "one", router="mean"), "one", 3)
    settings = dict(router="mean", r=2, init_heads="centered")
    model.add_adapter("two", RLoraConfig(target_modules=list(kind.targets), **settings))
    perturb(model, "two", 4)
    model.base_model.set_adapter(["one", "two"])
    before, expected = snapshot(model), evaluated(model, inputs)
    model.merge_adapter(["one"])
    with pytest.warns(UserWarning, match="additionally merging two"):
        model.merge_adapter(["one", "two"])
    assert relative(evaluated(model, inputs) - expected, expected) < 1e-5
    model.unmerge_adapter()
    assert all(torch.allclose(t, before[k], atol=1e-5) for k, t in snapshot(model).items())


def in_float8(model):
    base = layers_of(model)[-1].base_layer
    base.weight = nn.Parameter(base.weight.to(torch.float8_e4m3fn), requires_grad=False)


def infinite(model):
    layers_of(model)[0].rlora_B["default"].weight.data[0, 0] = torch.inf


REFUSED = {
    "routed": ("softmax", lambda model: None, "'default' can't be merged.*softmax.*export_lora"),
    # what the last layer refuses begins in none
    "in float8": ("mean", in_float8, "float8.* can't be merged into: export_lora"),
    "infinite": ("mean", infinite, r"NaNs or infinities.*\['default'\]"),
}


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_merge_that_is_refused_changes_nothing(case, call):
    router, spoil, words = REFUSED[case]
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets, router=router))
    spoil(model)
    with unchanged(model), pytest.raises(ValueError, match=words):
        getattr(model, call)(safe_merge=True)
    assert not any(layer.merged for layer in layers_of(model))


@pytest.mark.parametrize("inference", [False, True])
def test_merging_writes_into_the_base_weight_where_it_lies(inference):
    """So other owners of that memory follow, and training goes on after it."""
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets, router="mean"))
    x = SEQUENTIAL.inputs()
    weight = layers_of(model)[0].base_layer.weight
    weight.share_memory_()
    before, place, expected = weight.clone(), weight.data_ptr(), evaluated(model, x)
    with torch.inference_mode(inference):
        model.merge_adapter(safe_merge=True)
        assert relative(evaluated(model, x) - expected, expected) < 1e-5
    assert weight.data_ptr() == place and weight.is_shared() and not weight.is_inference()
    with torch.inference_mode(inference):
        model.unmerge_adapter()
    assert relative(weight - before, before) < 1e-5
    model(x.requires_grad_()).sum().backward()
    assert layers_of(model)[0].rlora_A["default"].weight.grad.any()


# Copied, injected, handed over


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_the_same_model_and_lives_on_its_own(kind, copied):
    inputs = kind.inputs()
    model = perturb(adapt(kind.base(), kind.targets))
    expected = evaluated(model, inputs)
    twin = copied(model)
    assert torch.equal(evaluated(twin, inputs), expected)
    train(twin, [inputs])
    assert not torch.equal(evaluated(twin, inputs), expected)
    assert torch.equal(evaluated(model, inputs), expected)


@pytest.mark.parametrize("bias", ["none", "all", "rlora_only"])
def test_biases_and_whole_modules_are_trained_and_saved_as_peft_means_it(bias, tmp_path):
    inputs = SEQUENTIAL.inputs()
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets, bias=bias, modules_to_save=["4"])
    train(model, [SEQUENTIAL.inputs(seed) for seed in range(3)])
    names = {name for name in trained_of(model) if "rlora_" not in name}
    prefix = "base_model.model."
    wanted = {f"{prefix}4.modules_to_save.default.{part}" for part in ("weight", "bias")}
    if bias != "none":
        wanted |= {f"{prefix}{layer}.base_layer.bias" for layer in "02"}
    assert names - {f"{prefix}4.original_module.bias"} == wanted
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(SEQUENTIAL.base(), tmp_path)
    assert torch.equal(evaluated(loaded, inputs), evaluated(model, inputs))


@pytest.mark.parametrize("bias", ["none", "all"])
def test_injected_without_a_peft_model_it_is_the_same_adapter(bias):
    kind = KINDS["gpt2"]
    wrapped = adapt(kind.base(), kind.targets, bias=bias)
    train(wrapped, [kind.inputs()])
    config = RLoraConfig(target_modules=list(kind.targets), bias=bias)
    injected = inject_adapter_in_model(config, kind.base())
    result = set_peft_model_state_dict(injected, get_peft_model_state_dict(wrapped))
    assert not result.unexpected_keys
    inputs = kind.inputs()
    assert torch.equal(evaluated(injected, inputs), evaluated(wrapped, inputs))


@pytest.mark.parametrize("seeded", [True, False])
def test_what_a_tool_hands_over_without_the_side_pair_is_saved_with_it(seeded, tmp_path):
    """The Trainer under ZeRO-3 hands over what is trained; sharded, the pair is drawn again."""
    model = adapt(LLAMA.base(), LLAMA.targets, init_seed=3 if seeded else None)
    train(model, [LLAMA.inputs(seed) for seed in range(2)])
    whole, trained = get_peft_model_state_dict(model), trained_of(model)
    model.save_pretrained(tmp_path, state_dict=trained)
    assert same_tensors(load_file(tmp_path / FILE), whole)
    for layer in layers_of(model):
        for part in (layer.rlora_A0, layer.rlora_B0):
            part["default"].weight.data = torch.empty(0)  # as a partitioned parameter looks
    if seeded:
        assert same_tensors(get_peft_model_state_dict(model, state_dict=trained), whole)
    else:
        with pytest.warns(UserWarning, match="rlora_A0.default.weight.*Set init_seed"):
            left = get_peft_model_state_dict(model, state_dict=trained)
        assert left.keys() == {name for name in whole if "_A0." not in name and "_B0." not in name}
