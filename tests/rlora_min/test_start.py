"""Where an adapter starts, and that the base stays what it was."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from rlora_helpers import (
    LLAMA,
    METHODS,
    SEQUENTIAL,
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


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("method", METHODS)
def test_in_evaluation_an_adapter_starts_at_the_base(kind, method, dtype, bound):
    inputs, base = kind.inputs(dtype=dtype), kind.base().to(dtype)
    expected = evaluated(base, inputs)
    model = adapt(base, kind.targets, **METHODS[method])
    assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float32}
    start = evaluated(model, inputs)
    assert start.dtype == dtype
    assert relative((start - expected).float(), expected.float()) < bound
    for layer in layers_of(model):
        x = torch.randn(9, layer.in_features, dtype=dtype)
        update, h = layer._update(x, "default"), layer.base_layer(x)
        assert relative(update, h.float()) < 1e-5
    perturb(model)
    assert relative((evaluated(model, inputs) - expected).float(), expected.float()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_trained_then_disabled_unloaded_or_deleted_it_is_the_base_bit_for_bit(kind, method, dtype):
    inputs, base = kind.inputs(dtype=dtype), kind.base().to(dtype)
    expected, before = evaluated(base, inputs), snapshot(base)
    model = adapt(base, kind.targets, **METHODS[method])
    start = snapshot(model)
    train(model, [kind.inputs(seed, dtype=dtype) for seed in range(3)])
    for name, tensor in model.state_dict().items():
        trained = name.endswith(".default.weight") and "_A0." not in name and "_B0." not in name
        assert torch.equal(tensor, start[name]) != trained, name

    with model.disable_adapter():
        assert torch.equal(evaluated(model, inputs), expected)
    deleted = copy.deepcopy(model)
    deleted.delete_adapter("default")
    # a PeftModel without any adapter can't be called, its base can
    assert torch.equal(evaluated(deleted.base_model.model, inputs), expected)
    assert adapter_tensors(deleted) == {}
    unloaded = model.unload()
    assert unloaded is base and layers_of(base) == []
    assert same_tensors(snapshot(unloaded), before)


@pytest.mark.parametrize("method", METHODS)
def test_one_init_seed_is_one_adapter_whatever_ran_before(kind, method):
    def tensors(init_seed: int | None, seed: int = 1):
        settings = METHODS[method] | {"init_seed": init_seed}
        return adapter_tensors(adapt(kind.base(), kind.targets, seed=seed, **settings))

    wanted = tensors(7)
    assert same_tensors(tensors(7, seed=2), wanted)
    assert not same_tensors(tensors(8), wanted)
    # without one, the draw follows torch's own seed
    assert same_tensors(tensors(None), tensors(None))
    assert not same_tensors(tensors(None), tensors(None, seed=2))
    # added to a model that has another
    model = adapt(kind.base(), kind.targets[:1], "other")
    config = RLoraConfig(target_modules=list(kind.targets), init_seed=7, **METHODS[method])
    model.add_adapter("default", config)
    assert same_tensors(adapter_tensors(model), wanted)
    # a user may set a default device: meta stands in for a GPU, and nothing may land there
    base = kind.base()
    with torch.device("meta"):
        model = adapt(base, kind.targets, init_seed=7, **METHODS[method])
    assert same_tensors(adapter_tensors(model), wanted)


def test_every_layer_has_its_own_draw_that_no_other_target_changes():
    targets = ("q_proj", "k_proj", "v_proj")
    all_three = adapter_tensors(adapt(llama(), targets, init_seed=7))
    A = [tensor.flatten() for name, tensor in all_three.items() if ".rlora_A." in name]
    similar = torch.corrcoef(torch.stack(A)) - torch.eye(6)
    assert similar.abs().max() < 0.6  # of 64 numbers each
    alone = adapter_tensors(adapt(llama(), ["v_proj"], init_seed=7))
    assert same_tensors(alone, {name: all_three[name] for name in alone})


def test_tied_embeddings_stay_tied_and_are_touched_by_merging_alone():
    base = llama(tie_word_embeddings=True)
    before = snapshot(base)
    inputs = LLAMA.inputs()
    with pytest.warns(UserWarning, match="tie_word_embeddings"):  # PEFT's advice for merging
        model = adapt(base, ["lm_head"], router="mean")
    train(model, [LLAMA.inputs(seed) for seed in range(3)])
    expected = evaluated(model, inputs)
    assert torch.equal(base.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model.merge_adapter()
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight
    assert not torch.equal(base.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    model.unmerge_adapter()
    assert relative(evaluated(model, inputs) - expected, expected) < 1e-5
    assert model.unload().lm_head.weight is base.model.embed_tokens.weight


class QuantizedLinear(nn.Module):  # the name of one that PEFT takes
    """A linear map whose weight is packed two numbers a byte, so of another shape than the map."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_buffer("packed", linear.weight.detach().clone())
        size = torch.Size([self.packed.numel() // 2, 1])
        # All that may be asked of it: anything else is an AttributeError.
        self.weight = SimpleNamespace(device=self.packed.device, dtype=torch.uint8, shape=size)

    def forward(self, x):
        return nn.functional.linear(x, self.packed, self.bias)


def packed() -> nn.Module:
    base = SEQUENTIAL.base()
    base[0], base[2] = QuantizedLinear(base[0]), QuantizedLinear(base[2])
    return base


@pytest.mark.parametrize("method", METHODS)
def test_the_base_weight_is_asked_for_device_dtype_and_shape_only(method, tmp_path):
    inputs = SEQUENTIAL.inputs()
    expected = evaluated(packed(), inputs)
    model = adapt(packed(), SEQUENTIAL.targets, **METHODS[method])
    assert relative(evaluated(model, inputs) - expected, expected) < 1e-6
    assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float32}
    train(model, [SEQUENTIAL.inputs(seed) for seed in range(3)])
    trained = evaluated(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(evaluated(PeftModel.from_pretrained(packed(), tmp_path), inputs), trained)
    with model.disable_adapter():
        assert torch.equal(evaluated(model, inputs), expected)
    with pytest.raises(ValueError, match="can't be merged.*export_lora"):
        model.merge_adapter()
    assert torch.equal(evaluated(model.unload(), inputs), expected)
