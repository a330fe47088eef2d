"""An export is a LoRA that stock PEFT loads, with the same output for fixed weights."""

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel
from rlora_helpers import (
    LLAMA,
    METHODS,
    SEQUENTIAL,
    STRICT,
    adapt,
    assert_true_error,
    equation,
    evaluated,
    exported,
    layer_paths,
    layers_of,
    perturb,
    relative,
    tensors_of,
    train,
    unchanged,
)
from safetensors.torch import load_file

from rlora_min import RLoraConfig, export_lora, record_routing

pytestmark = STRICT
FILES = {"adapter_config.json", "adapter_model.safetensors"}


def fixed_weights_output(model, inputs, weights: dict):
    """What the adapters give when each layer's heads are weighted as told: from the equation."""
    model = copy.deepcopy(model)
    for path, layer in layer_paths(model).items():
        g = torch.as_tensor(weights[path], dtype=torch.float32)

        def forward(x, layer=layer, g=g):
            update = equation(x, tensors_of(layer), layer.configs["default"], g=g)
            return layer.base_layer(x) + update

        layer.forward = forward
    return evaluated(model, inputs)


@pytest.mark.parametrize("method", METHODS)
def test_the_export_is_the_adapter_with_fixed_weights(kind, method, tmp_path):
    """The mean, numbers for all layers, and for each layer what its router does on a batch."""
    inputs = kind.inputs()
    model = perturb(adapt(kind.base(), kind.targets, **METHODS[method]), scale=0.5)
    N = model.peft_config["default"].num_heads
    with record_routing(model) as log:
        log.task = "questions"
        evaluated(model, inputs)
    means = log.mean["questions"]
    paths = layer_paths(model)
    first = torch.eye(N)[0]
    for weights, same in (
        ("mean", dict.fromkeys(paths, [1 / N] * N)),
        (first, dict.fromkeys(paths, first)),
        (tuple(range(N)), dict.fromkeys(paths, range(N))),
        (means, means),
    ):
        assert export_lora(model, tmp_path, weights) is None
        lora = PeftModel.from_pretrained(kind.base(), tmp_path)
        assert type(lora.peft_config["default"]) is LoraConfig
        found = evaluated(lora, inputs)
        expected = fixed_weights_output(model, inputs, same)
        assert relative(found - expected, expected) < 1e-5
        base = evaluated(kind.base(), inputs)
        assert N == 1 or relative(found - base, found) > 1e-3


@pytest.mark.parametrize("weights", ["mean", [0.7, 0.2, 0.1]])
def test_the_reported_error_is_the_one_that_stock_peft_makes_and_measuring_leaves_no_trace(
    kind, weights, tmp_path
):
    inputs = kind.inputs()
    model = perturb(adapt(kind.base(), kind.targets, lora_dropout=0.5))
    routed = evaluated(model, inputs)
    model.train()
    layers_of(model)[0].eval()
    state = torch.get_rng_state()
    with unchanged(model):
        error = export_lora(model, tmp_path, weights, batch=inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(evaluated(model, inputs), routed)
    lora = PeftModel.from_pretrained(kind.base(), tmp_path)
    assert_true_error(error, routed, evaluated(lora, inputs))
    assert error[0] > 1e-4 and error[1] > 1e-4  # for the router does look at the token


def test_a_batch_that_breaks_the_model_writes_nothing_and_leaves_no_trace(tmp_path):
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets)).train()
    with unchanged(model), pytest.raises(RuntimeError):
        export_lora(model, tmp_path / "out", batch=torch.ones(2, 99))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("init_heads", "rank"), [("random", 6), ("centered", 3)])
def test_the_rank_is_r_or_2_r_with_the_side_pair_and_the_files_are_a_loras(
    init_heads, rank, tmp_path
):
    export_lora(adapt(SEQUENTIAL.base(), ["0", "2"], r=3, init_heads=init_heads), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {
        "base_model.model.0.lora_A.weight": (rank, 6),
        "base_model.model.0.lora_B.weight": (10, rank),
        "base_model.model.2.lora_A.weight": (rank, 10),
        "base_model.model.2.lora_B.weight": (10, rank),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["inference_mode"] is True
    assert config["r"] == rank and set(config["target_modules"]) == {"0", "2"}


@pytest.mark.parametrize("bias", ["none", "all", "rlora_only"])
def test_biases_and_modules_to_save_go_along(bias, tmp_path):
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets, bias=bias, modules_to_save=["4"])
    train(model, [SEQUENTIAL.inputs(seed) for seed in range(4)])
    loaded = exported(model, SEQUENTIAL.base(), SEQUENTIAL.inputs(), tmp_path)
    assert loaded.peft_config["default"].bias == bias.replace("rlora", "lora")
    assert loaded.peft_config["default"].modules_to_save == ["4"]


def test_one_of_several_adapters_is_exported_alone(tmp_path):
    model = perturb(adapt(SEQUENTIAL.base(), ["0"], "one"), "one")
    model.add_adapter("two", RLoraConfig(target_modules=["0", "2"], num_heads=2, r=2))
    perturb(model, "two", seed=9)
    export_lora(model, tmp_path, [0.9, 0.1], adapter_name="two")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {k.split(".")[2] for k in tensors} == {"0", "2"} and len(tensors) == 4
    model.set_adapter("two")
    exported(model, SEQUENTIAL.base(), SEQUENTIAL.inputs(), tmp_path, [0.9, 0.1], "two")


def test_a_bf16_base_gives_the_same_export(tmp_path):
    model = perturb(adapt(LLAMA.base().bfloat16(), LLAMA.targets))
    exported(model, LLAMA.base().bfloat16(), LLAMA.inputs(), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def half_written(tensors, path, *args, **kwargs):
    Path(path).write_bytes(b"half")
    full_disk()


FAILING = [
    (LoraConfig, "save_pretrained", full_disk),
    (safetensors.torch, "save_file", half_written),
]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("failing", FAILING)
def test_files_are_written_whole_or_not_at_all(old, failing, tmp_path, monkeypatch):
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    out = tmp_path / "out"
    if old:
        export_lora(model, out)
        (out / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()} if old else {}
    with monkeypatch.context() as broken, pytest.raises(OSError, match="No space left"):
        broken.setattr(*failing)
        export_lora(model, out, [1, 0, 0])
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    export_lora(model, out, [1, 0, 0])
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after.keys() == before.keys() | FILES
    assert after["adapter_model.safetensors"] != before.get("adapter_model.safetensors")
