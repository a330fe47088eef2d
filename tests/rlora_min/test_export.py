"""An export is a LoRA that stock PEFT loads, with the same output for fixed weights."""

import json
import os

import peft
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel
from rlora_helpers import (
    KINDS,
    METHODS,
    STRICT,
    adapt,
    anatomy,
    assert_unchanged,
    evaluated,
    layers_of,
    perturb,
    relative,
    train,
)
from safetensors.torch import load_file

from rlora_min import RLoraConfig, export_lora, record_routing

pytestmark = STRICT
FILES = {"adapter_config.json", "adapter_model.safetensors"}
SEQUENTIAL = KINDS["sequential"]


def as_lora(kind, directory, **settings):
    """The export on a fresh base, by stock PEFT."""
    loaded = PeftModel.from_pretrained(kind.base(**settings), directory)
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert layers_of(loaded) == []
    return loaded


def named_layers(model):
    base = model.get_base_model()
    return {path: m for path, m in base.named_modules() if type(m).__name__ == "RLoraLayer"}


@torch.no_grad()
def fixed_weights_output(model, inputs, weights: dict):
    """What the adapters give when each layer's heads are weighted as told: from the equation."""
    handles = []
    for path, layer in named_layers(model).items():
        g = torch.as_tensor(weights[path], dtype=torch.float32)

        def hook(layer, args, result, g=g):
            (x,) = args
            c = layer.configs["default"]
            A, B = layer.rlora_A["default"].weight, layer.rlora_B["default"].weight
            heads = B.unflatten(1, (c.num_heads, c.r)).unbind(1)
            h = layer.base_layer(x)
            for g_i, B_i in zip(g, heads, strict=True):
                h = h + c.scaling * g_i * (x @ A.T @ B_i.T)
            if "default" in layer.rlora_A0:
                h = h - c.scaling * layer.rlora_B0["default"](layer.rlora_A0["default"](x))
            return h

        handles.append(layer.register_forward_hook(hook))
    try:
        return evaluated(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("method", METHODS)
def test_for_the_mean_the_export_is_the_adapter_with_uniform_weights(kind, method, tmp_path):
    inputs = kind.inputs()
    model = perturb(adapt(kind.base(), kind.targets, **METHODS[method]))
    N = model.peft_config["default"].num_heads
    uniform = dict.fromkeys(named_layers(model), [1 / N] * N)
    expected = fixed_weights_output(model, inputs, uniform)
    if METHODS[method].get("router") == "mean":
        assert relative(evaluated(model, inputs) - expected, expected) < 1e-5
    assert export_lora(model, tmp_path) is None
    loaded = as_lora(kind, tmp_path)
    assert relative(evaluated(loaded, inputs) - expected, expected) < 1e-5
    base = evaluated(kind.base(), inputs)
    assert relative(expected - base, expected) > 1e-3


def test_for_fixed_weights_it_is_the_adapter_with_those_weights(kind, tmp_path):
    inputs = kind.inputs()
    model = perturb(adapt(kind.base(), kind.targets))
    outputs = []
    for weights in ([0.7, 0.2, 0.1], [1, 0, 0], (0.0, 0.0, 1.0), torch.tensor([0.1, 0.2, 0.7])):
        export_lora(model, tmp_path, weights)
        outputs.append(evaluated(as_lora(kind, tmp_path), inputs))
        everywhere = dict.fromkeys(named_layers(model), weights)
        expected = fixed_weights_output(model, inputs, everywhere)
        assert relative(outputs[-1] - expected, expected) < 1e-5
    assert all(relative(outputs[0] - other, other) > 1e-3 for other in outputs[1:])


def test_for_weights_calibrated_on_a_batch_each_layer_has_its_own(kind, tmp_path):
    inputs = kind.inputs()
    model = perturb(adapt(kind.base(), kind.targets), scale=0.5)
    with record_routing(model) as log:
        log.task = "questions"
        evaluated(model, inputs)
    means = log.mean["questions"]
    assert means.keys() == named_layers(model).keys()
    assert len({tuple(g.tolist()) for g in means.values()}) == len(means)
    error = export_lora(model, tmp_path, means, batch=inputs)
    loaded = as_lora(kind, tmp_path)
    expected = fixed_weights_output(model, inputs, means)
    assert relative(evaluated(loaded, inputs) - expected, expected) < 1e-5
    routed = evaluated(model, inputs)
    assert_true_error(error, routed, evaluated(loaded, inputs))
    assert error[1] > 1e-4  # for the router does look at the token


def assert_true_error(error, routed, exported):
    routed, difference = routed.double(), routed.double() - exported.double()
    measured = difference.abs().max().item(), (difference.norm() / routed.norm()).item()
    assert error == pytest.approx(measured, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("weights", ["mean", [0.7, 0.2, 0.1]])
def test_the_reported_error_is_the_one_that_stock_peft_makes_and_measuring_leaves_no_trace(
    kind, weights, tmp_path
):
    inputs = kind.inputs()
    model = perturb(adapt(kind.base(), kind.targets, lora_dropout=0.5))
    routed = evaluated(model, inputs)
    model.train()
    layers_of(model)[0].eval()
    before, state = anatomy(model), torch.get_rng_state()
    error = export_lora(model, tmp_path, weights, batch=inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert_unchanged(model, before)
    assert torch.equal(evaluated(model, inputs), routed)
    assert_true_error(error, routed, evaluated(as_lora(kind, tmp_path), inputs))
    assert error[0] > 1e-4 and error[1] > 1e-4


def test_a_batch_that_breaks_the_model_writes_nothing_and_leaves_no_trace(tmp_path):
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    model.train()
    before = anatomy(model)
    with pytest.raises(RuntimeError):
        export_lora(model, tmp_path / "out", batch=torch.ones(2, 99))
    assert_unchanged(model, before)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("router", ["softmax", "mean"])
@pytest.mark.parametrize(("init_heads", "rank"), [("random", 6), ("centered", 3)])
def test_the_rank_is_r_or_2_r_with_the_side_pair_and_the_files_are_a_loras(
    init_heads, rank, router, tmp_path
):
    model = adapt(SEQUENTIAL.base(), ["0", "2"], r=3, init_heads=init_heads, router=router)
    export_lora(perturb(model), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model."
    assert {k.removeprefix(prefix): tuple(t.shape) for k, t in tensors.items()} == {
        "0.lora_A.weight": (rank, 6),
        "0.lora_B.weight": (10, rank),
        "2.lora_A.weight": (rank, 10),
        "2.lora_B.weight": (10, rank),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["inference_mode"] is True
    assert config["lora_alpha"] / config["r"] == 1 and not config["use_rslora"]
    assert config["r"] == rank and set(config["target_modules"]) == {"0", "2"}


@pytest.mark.parametrize("bias", ["none", "all", "rlora_only"])
def test_biases_and_modules_to_save_go_along(bias, tmp_path):
    inputs = SEQUENTIAL.inputs()
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets, bias=bias, modules_to_save=["4"])
    train(model, [SEQUENTIAL.inputs(seed) for seed in range(4)])
    error = export_lora(model, tmp_path, batch=inputs)
    loaded = as_lora(SEQUENTIAL, tmp_path)
    assert loaded.peft_config["default"].bias == bias.replace("rlora", "lora")
    assert loaded.peft_config["default"].modules_to_save == ["4"]
    assert_true_error(error, evaluated(model, inputs), evaluated(loaded, inputs))
    state = loaded.state_dict()
    saved = {k for k in model.state_dict() if "rlora" not in k}
    assert all(torch.equal(state[k], model.state_dict()[k]) for k in saved)
    head = "base_model.model.4.modules_to_save.default.weight"
    assert not torch.equal(state[head], SEQUENTIAL.base()[4].weight)
    if bias != "none":
        moved = state["base_model.model.0.base_layer.bias"]
        assert not torch.equal(moved, SEQUENTIAL.base()[0].bias)


@pytest.mark.parametrize(
    "targets",
    [
        r".*\.(up|down)_proj",
        "all-linear",
        ["model.layers.1.mlp.up_proj"],
        None,
    ],
)
def test_targets_of_every_form_come_through(targets, tmp_path):
    kind = KINDS["llama"]
    inputs = kind.inputs()
    config = RLoraConfig(target_modules=targets)
    model = perturb(peft.get_peft_model(kind.base(), config).eval())
    error = export_lora(model, tmp_path, batch=inputs)
    loaded = as_lora(kind, tmp_path)
    assert_true_error(error, evaluated(model, inputs), evaluated(loaded, inputs))


def test_some_layers_only_come_through(tmp_path):
    kind = KINDS["llama"]
    inputs = kind.inputs()
    for settings in (
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": 1, "layers_pattern": ["layers"]},
        {"exclude_modules": r".*\.1\..*"},
    ):
        model = perturb(adapt(kind.base(layers=3), ["up_proj"], **settings))
        error = export_lora(model, tmp_path, batch=inputs)
        loaded = as_lora(kind, tmp_path, layers=3)
        assert_true_error(error, evaluated(model, inputs), evaluated(loaded, inputs))


def test_one_of_several_adapters_is_exported_alone(tmp_path):
    inputs = SEQUENTIAL.inputs()
    model = perturb(adapt(SEQUENTIAL.base(), ["0"], "one"), "one")
    config = RLoraConfig(target_modules=["0", "2"], num_heads=2, r=2)
    model.add_adapter("two", config)
    perturb(model, "two", seed=9)
    export_lora(model, tmp_path, [0.9, 0.1], adapter_name="two")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {k.split(".")[2] for k in tensors} == {"0", "2"} and len(tensors) == 4
    model.set_adapter("two")
    error = export_lora(model, tmp_path, [0.9, 0.1], adapter_name="two", batch=inputs)
    exported = evaluated(as_lora(SEQUENTIAL, tmp_path), inputs)
    assert_true_error(error, evaluated(model, inputs), exported)


def test_the_export_merges_as_any_lora(tmp_path):
    kind = KINDS["gpt2"]
    inputs = kind.inputs()
    export_lora(perturb(adapt(kind.base(), kind.targets)), tmp_path)
    loaded = as_lora(kind, tmp_path)
    expected = evaluated(loaded, inputs)
    merged = loaded.merge_and_unload()
    assert relative(evaluated(merged, inputs) - expected, expected) < 1e-5


def test_a_bf16_base_gives_the_same_export(tmp_path):
    kind = KINDS["llama"]
    inputs = kind.inputs()
    model = perturb(adapt(kind.base().to(torch.bfloat16), kind.targets))
    error = export_lora(model, tmp_path, batch=inputs)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(kind.base().to(torch.bfloat16), tmp_path)
    assert_true_error(error, evaluated(model, inputs), evaluated(loaded, inputs))


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def half_written(tensors, path, *args, **kwargs):
    with open(path, "wb") as file:
        file.write(b"half")
    full_disk()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("failing", ["tensors", "config", "half"])
def test_files_are_written_whole_or_not_at_all(old, failing, tmp_path, monkeypatch):
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    out = tmp_path / "out"
    if old:
        export_lora(model, out)
        (out / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()} if old else {}
    with monkeypatch.context() as broken:
        if failing == "config":
            broken.setattr(LoraConfig, "save_pretrained", full_disk)
        else:
            save = half_written if failing == "half" else full_disk
            broken.setattr(safetensors.torch, "save_file", save)
        with pytest.raises(OSError, match="No space left"):
            export_lora(model, out, [1, 0, 0])
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    export_lora(model, out, [1, 0, 0])
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after.keys() == before.keys() | FILES
    assert after["adapter_model.safetensors"] != before.get("adapter_model.safetensors")


def test_files_are_replaced_not_rewritten_so_a_reader_of_the_old_ones_goes_on(tmp_path):
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    export_lora(model, tmp_path)
    with open(tmp_path / "adapter_model.safetensors", "rb") as reader:
        old = os.fstat(reader.fileno())
        export_lora(model, tmp_path, [1, 0, 0])
        assert os.stat(tmp_path / "adapter_model.safetensors").st_ino != old.st_ino
        tensors = safetensors.torch.load(reader.read())
    assert tensors and all(t.isfinite().all() for t in tensors.values())
