"""Where an adapter starts, and that the base stays what it was."""

import copy

import pytest
import torch
from peft import PeftModel
from rlora_helpers import (
    KINDS,
    METHODS,
    STRICT,
    adapt,
    adapter_tensors,
    evaluated,
    layers_of,
    llama,
    perturb,
    relative,
    same_tensors,
    snapshot,
    train,
)
from torch import nn

from rlora_min import RLoraConfig

pytestmark = STRICT
UNIFORM = [name for name in METHODS if name != "hydralora"]


@pytest.mark.parametrize("method", METHODS)
def test_in_evaluation_an_adapter_under_a_uniform_router_starts_at_the_base(kind, method):
    inputs = kind.inputs()
    expected = evaluated(kind.base(), inputs)
    model = adapt(kind.base(), kind.targets, **METHODS[method])
    assert relative(evaluated(model, inputs) - expected, expected) < 1e-6
    perturb(model)
    assert relative(evaluated(model, inputs) - expected, expected) > 1e-3


@pytest.mark.parametrize("init_heads", ["random", "centered"])
def test_a_router_that_starts_random_starts_off_the_base(init_heads):
    kind = KINDS["llama"]
    expected = evaluated(kind.base(), kind.inputs())
    model = adapt(kind.base(), kind.targets, init_heads=init_heads, router_init="kaiming")
    assert relative(evaluated(model, kind.inputs()) - expected, expected) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_disabled_unloaded_or_deleted_it_is_the_base_bit_for_bit_after_training(kind, method):
    inputs, base = kind.inputs(), kind.base()
    expected, before = evaluated(base, inputs), snapshot(base)
    model = adapt(base, kind.targets, **METHODS[method])
    train(model, [kind.inputs(seed) for seed in range(3)])
    assert relative(evaluated(model, inputs) - expected, expected) > 1e-3

    with model.disable_adapter():
        assert torch.equal(evaluated(model, inputs), expected)
    for name, tensor in model.state_dict().items():
        if "rlora_" not in name:
            own = name.removeprefix("base_model.model.").replace("base_layer.", "")
            assert torch.equal(tensor, before[own]), name

    deleted = copy.deepcopy(model)
    deleted.delete_adapter(
        "default"
    )  # a PeftModel without any adapter can't be called, its base can
    assert torch.equal(evaluated(deleted.base_model.model, inputs), expected)
    assert adapter_tensors(deleted) == {}

    unloaded = model.unload()
    assert unloaded is base and layers_of(base) == []
    assert same_tensors(snapshot(unloaded), before)
    assert torch.equal(evaluated(unloaded, inputs), expected)


def test_training_moves_every_trained_tensor_and_no_other(kind):
    model = adapt(kind.base(), kind.targets)
    before = snapshot(model)
    train(model, [kind.inputs(seed) for seed in range(3)])
    for name, tensor in model.state_dict().items():
        trained = name.endswith(".default.weight") and "_A0." not in name and "_B0." not in name
        assert torch.equal(tensor, before[name]) != trained, name


@pytest.mark.parametrize("method", METHODS)
def test_one_init_seed_is_one_adapter_whatever_ran_before(kind, method):
    draws = [
        adapter_tensors(adapt(kind.base(), kind.targets, seed=seed, init_seed=7, **METHODS[method]))
        for seed in (1, 2)
    ]
    assert same_tensors(*draws)
    other = adapt(kind.base(), kind.targets, init_seed=8, **METHODS[method])
    name = next(k for k in draws[0] if ".rlora_A." in k)
    assert not torch.equal(draws[0][name], adapter_tensors(other)[name])


def test_without_an_init_seed_the_draw_follows_torchs_own_seed():
    kind = KINDS["sequential"]
    one, same, other = (
        adapter_tensors(adapt(kind.base(), kind.targets, seed=seed)) for seed in (1, 1, 2)
    )
    assert same_tensors(one, same) and not same_tensors(one, other)


def test_every_layer_has_its_own_draw_that_no_other_target_changes():
    targets = ("q_proj", "k_proj", "v_proj")
    all_three = adapter_tensors(adapt(llama(), targets, init_seed=7))
    A = [tensor.flatten() for name, tensor in all_three.items() if ".rlora_A." in name]
    assert len(A) == 6
    assert len({tuple(tensor.tolist()) for tensor in A}) == 6
    similar = torch.corrcoef(torch.stack(A)) - torch.eye(6)
    assert similar.abs().max() < 0.6  # of 64 numbers each
    alone = adapter_tensors(adapt(llama(), ["v_proj"], init_seed=7))
    assert len(alone) == 10
    assert all(torch.equal(tensor, all_three[name]) for name, tensor in alone.items())


def test_the_seed_gives_one_adapter_by_any_way_into_the_model():
    kind = KINDS["sequential"]
    wanted = adapter_tensors(adapt(kind.base(), kind.targets, init_seed=7))
    model = adapt(kind.base(), ["0"], "other")
    model.add_adapter("default", RLoraConfig(target_modules=["0", "2"], init_seed=7))
    assert same_tensors(adapter_tensors(model), wanted)


def test_the_default_device_has_no_say_in_the_draw():
    """On a GPU a user may set one; the meta device stands in for it, and nothing may land there."""
    kind = KINDS["sequential"]
    wanted = adapter_tensors(adapt(kind.base(), kind.targets, init_seed=7))
    base = kind.base()
    with torch.device("meta"):
        model = adapt(base, kind.targets, init_seed=7)
    assert same_tensors(adapter_tensors(model), wanted)


def test_the_seed_is_recorded(tmp_path):
    kind = KINDS["sequential"]
    adapt(kind.base(), kind.targets, init_seed=7).save_pretrained(tmp_path)
    assert RLoraConfig.from_pretrained(tmp_path).init_seed == 7


def test_tied_embeddings_stay_tied_and_untouched():
    base = llama(tie_word_embeddings=True)
    before = snapshot(base)
    inputs = KINDS["llama"].inputs()
    expected = evaluated(base, inputs)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):  # PEFT's advice for merging
        model = adapt(base, ["lm_head"], router="mean")
    assert relative(evaluated(model, inputs) - expected, expected) < 1e-6
    train(model, [KINDS["llama"].inputs(seed) for seed in range(3)])
    assert not torch.equal(evaluated(model, inputs), expected)
    base = model.unload()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert same_tensors(snapshot(base), before)


class Sealed:
    """What may be asked of a packed weight, as a 4-bit one: where it is, its type, its size."""

    def __init__(self, weight):
        known = {"device": weight.device, "dtype": torch.uint8, "shape": weight.shape}
        object.__setattr__(self, "_known", known)

    def __getattribute__(self, name):
        known = object.__getattribute__(self, "_known")
        if name in known:
            return known[name]
        if name == "__class__":  # what isinstance asks
            return Sealed
        raise AssertionError(f"The base weight was asked for {name!r}.")


class QuantizedLinear(nn.Module):  # the name of one that PEFT takes
    """A linear map whose weight is packed two numbers a byte, so of another shape than the map."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_buffer("packed", linear.weight.detach().clone())
        self.weight = Sealed(torch.empty(self.packed.numel() // 2, 1))

    def forward(self, x):
        return nn.functional.linear(x, self.packed, self.bias)


@pytest.mark.parametrize("method", METHODS)
def test_the_base_weight_is_asked_for_device_dtype_and_shape_only(method, tmp_path):
    kind = KINDS["sequential"]

    def packed():
        base = kind.base()
        base[0], base[2] = QuantizedLinear(base[0]), QuantizedLinear(base[2])
        return base

    inputs = kind.inputs()
    expected = evaluated(packed(), inputs)
    model = adapt(packed(), kind.targets, **METHODS[method])
    if method in UNIFORM:
        assert relative(evaluated(model, inputs) - expected, expected) < 1e-6
    assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float32}
    train(model, [kind.inputs(seed) for seed in range(3)])
    trained = evaluated(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(evaluated(PeftModel.from_pretrained(packed(), tmp_path), inputs), trained)
    with model.disable_adapter():
        assert torch.equal(evaluated(model, inputs), expected)
    with pytest.raises(AssertionError, match="asked for 'data'"):
        _ = layers_of(model)[0].weight.data  # so a look at it would have been seen
    with pytest.raises(ValueError, match="can't be merged.*export_lora"):
        model.merge_adapter()
    assert torch.equal(evaluated(model.unload(), inputs), expected)
