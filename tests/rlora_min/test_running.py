"""It runs where PEFT's LoRA runs: dtypes, dropout, checkpointing, compile, generate, Trainer."""

import os
import warnings

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from peft.helpers import disable_input_dtype_casting
from rlora_helpers import (
    KINDS,
    LLAMA,
    METHODS,
    SEQUENTIAL,
    STRICT,
    VOCABULARY,
    adapt,
    adapter_tensors,
    evaluated,
    layers_of,
    output,
    perturb,
    relative,
    same_tensors,
    snapshot,
    train,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlora_min import RLoraConfig

pytestmark = STRICT
BF16 = torch.bfloat16


# Dtypes


@pytest.mark.parametrize("cast", ["the trained", "the adapter", "everything", "by PEFT"])
def test_the_start_is_off_by_rounding_whatever_was_cast(cast):
    """TRL casts the trained parameters of a 4-bit base alone. The forward computes in A's dtype.

    A, B and the pair are rounded alike, so what is left is the rounding of products: at most
    2^-8 of an update whose size is alpha / gamma = 1/2 of the output's, times a few.
    """
    base = SEQUENTIAL.base().bfloat16()
    x = SEQUENTIAL.inputs(dtype=BF16)
    expected = evaluated(base, x).float()
    config = RLoraConfig(target_modules=["0", "2"])
    model = get_peft_model(base, config, autocast_adapter_dtype=cast != "by PEFT")
    for name, parameter in model.named_parameters():
        own = ".rlora_" in name and cast == "the adapter"
        if parameter.requires_grad or own or cast == "everything":
            parameter.data = parameter.data.to(BF16)
    if cast != "the trained":
        assert {t.dtype for t in adapter_tensors(model).values()} == {BF16}
    start = evaluated(model, x)
    assert start.dtype == BF16
    assert relative(start.float() - expected, expected) < 0.03
    assert layers_of(model)[0].rlora_A["default"].weight.dtype == BF16
    model.train()(x).float().sum().backward()


class Softmaxes(TorchDispatchMode):
    """Notes the type of what every softmax is taken of."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "softmax" in str(func):
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_the_softmax_is_taken_in_fp32_also_for_bf16_adapters():
    layer = layers_of(adapt(nn.Sequential(nn.Linear(4, 4).to(BF16)), ["0"], num_heads=5))[0]
    layer._move_adapter_to_device_of_base_layer("default", rounded=True)
    x = torch.randn(100, 4, dtype=BF16)
    with torch.no_grad(), Softmaxes() as softmaxes:
        layer.rlora_router["default"].weight.normal_()
        layer(x)
        g = layer.routing(x)
    assert softmaxes.dtypes == [torch.float32] * 2
    assert g.dtype == torch.float32
    assert (g.sum(-1) - 1).abs().max() < 1e-6  # bf16 alone would be off by 1e-3


@pytest.mark.parametrize("base_dtype", [torch.float32, BF16])
def test_under_autocast_it_computes_in_bf16_and_trains_in_fp32(kind, base_dtype):
    inputs = kind.inputs(dtype=base_dtype)
    model = perturb(adapt(kind.base().to(base_dtype), kind.targets, lora_dropout=0))
    with torch.no_grad():
        exact = output(model, inputs).float()
    model.train()
    for module in model.modules():  # the base's own dropout
        if isinstance(module, nn.Dropout):
            module.p = 0
    with torch.autocast("cpu", BF16):
        out = output(model, inputs)
        loss = out.float().square().mean()
    loss.backward()
    assert relative(out.float() - exact, exact) < 0.1
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)
    assert all(p.grad.any() for p in trained)


def test_the_cast_of_the_input_can_be_switched_off():
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    x = SEQUENTIAL.inputs()
    expected = evaluated(model, x)
    with disable_input_dtype_casting(model):
        assert torch.equal(evaluated(model, x), expected)
        for layer in layers_of(model):
            layer.base_layer.double()
        model.base_model.model[4].double()
        with pytest.raises(RuntimeError, match="dtype"):
            model(x.double())
    assert relative(evaluated(model, x.double()) - expected, expected) < 1e-5


class Float8(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def float8_base(dtype) -> nn.Module:
    torch.manual_seed(0)
    linear = Float8(6, 8)
    linear.weight = nn.Parameter(linear.weight.data.to(dtype), requires_grad=False)
    return nn.Sequential(linear)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_base_of_float8(dtype, autocast_adapter_dtype, tmp_path):
    x = torch.randn(4, 6)
    base = float8_base(dtype)
    expected = base(x)
    config = RLoraConfig(target_modules=["0"], router="mean")
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype).eval()
    assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float32}
    assert relative(evaluated(model, x) - expected, expected) < 1e-6
    output = evaluated(perturb(model), x)
    model.train()(x).sum().backward()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(float8_base(dtype), tmp_path)
    assert torch.equal(evaluated(loaded, x), output)
    with pytest.raises(ValueError, match="float8.*can't be merged into: export_lora"):
        model.merge_adapter()


# Modes


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_a_module_whose_rate_and_mode_are_read_at_each_forward(method, tmp_path):
    settings = METHODS[method] | {"lora_dropout": 0.5}
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets, **settings))
    x = SEQUENTIAL.inputs(batch=8)
    expected = evaluated(model, x)
    model.train()
    assert (model(x) - model(x)).abs().max() > 1e-3
    drops = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert len(drops) == len(layers_of(model))
    for drop in drops:
        drop.p = 0.0
    assert relative(model(x) - expected, expected) < 1e-5
    model.save_pretrained(tmp_path)
    for drop in drops:
        drop.p = 0.5
        drop.eval()
    assert relative(model(x) - expected, expected) < 1e-5
    assert RLoraConfig.from_pretrained(tmp_path).lora_dropout == 0.5


def test_an_adapter_added_to_a_model_in_evaluation_drops_nothing():
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets)
    model.add_adapter("second", RLoraConfig(target_modules=["0", "2"], lora_dropout=0.5))
    perturb(model, "second")
    model.set_adapter("second")
    x = SEQUENTIAL.inputs()
    assert torch.equal(model(x), model(x))


def test_the_side_pair_is_never_trained_whatever_is_switched():
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets)
    model.add_adapter("second", RLoraConfig(target_modules=["0"]))
    pair = [p for n, p in model.named_parameters() if "_A0." in n or "_B0." in n]
    assert len(pair) == 6
    model.set_adapter("second")
    model.set_requires_grad(["default", "second"])
    with model.disable_adapter():
        pass
    model.base_model.set_adapter(["default", "second"])
    model.train()(SEQUENTIAL.inputs()).sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in pair)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == model.get_nb_trainable_parameters()[0]


def test_adapters_loaded_in_inference_mode_work_and_can_be_trained(tmp_path):
    inputs = SEQUENTIAL.inputs()
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    model.save_pretrained(tmp_path)
    base = SEQUENTIAL.base()
    with torch.inference_mode():
        loaded = PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(output(loaded, inputs), evaluated(model, inputs))
    loaded.set_adapter("default")
    train(loaded, [inputs])


def test_on_the_meta_device_nothing_is_drawn():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(4, 4))
        model = get_peft_model(base, RLoraConfig(target_modules=["0"]))
    assert all(t.is_meta for t in adapter_tensors(model).values())
    assert torch.equal(torch.get_rng_state(), state)


# What wraps a model


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(name, use_reentrant):
    kind = KINDS[name]
    results = []
    for checkpointing in (False, True):
        model = perturb(adapt(kind.base(), kind.targets, lora_dropout=0.3))
        if checkpointing:
            model.enable_input_require_grads()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # transformers renames it
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        torch.manual_seed(3)
        out = output(model, kind.inputs())
        out.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((out, grads))
    (plain, grads), (saved, again) = results
    assert torch.equal(plain, saved)
    assert all(torch.allclose(g, again[n], rtol=1e-5, atol=1e-7) for n, g in grads.items())
    assert all(g.any() for g in grads.values())


def with_a_forward_of_its_own(model: nn.Module) -> None:
    for layer in layers_of(model):
        router = layer.rlora_router["default"]
        router.forward = lambda x, W_r=router.weight: nn.functional.linear(x, W_r)


@pytest.mark.parametrize(
    ("name", "method", "wrap"),
    [
        *(("sequential", method, None) for method in METHODS),
        ("sequential", "rlora", with_a_forward_of_its_own),
        ("llama", "rlora", None),
        ("gpt2", "hydralora", None),
    ],
)
def test_it_compiles_whole(name, method, wrap):
    kind = KINDS[name]
    inputs = kind.inputs()
    base = kind.base(layers=2 if name == "sequential" else 1)
    model = perturb(adapt(base, kind.targets, **METHODS[method] | {"lora_dropout": 0.3}))
    plain = output(model, inputs)
    plain.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    if wrap:
        wrap(model)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own parts
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out = output(compiled, inputs)
        out.square().mean().backward()
        assert torch.allclose(out, plain, atol=1e-5)
        for n, p in model.named_parameters():
            if p.requires_grad:
                assert torch.allclose(p.grad, grads[n], atol=1e-5), n
        compiled.train()
        trained = output(compiled, inputs)
        assert trained.isfinite().all() and not torch.allclose(trained, plain, atol=1e-5)


class Lines(torch.utils.data.Dataset):
    def __init__(self, size=16):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, VOCABULARY, (size, 6), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


@pytest.mark.filterwarnings("default")
def test_the_trainer_trains_saves_and_resumes_to_the_same_adapter(tmp_path):
    from transformers import Trainer, TrainingArguments

    def trainer(folder, steps):
        settings = {"lora_dropout": 0.2, "task_type": TaskType.CAUSAL_LM}
        model = adapt(LLAMA.base(), LLAMA.targets, **settings)
        settings = dict(max_steps=steps, save_steps=2, per_device_train_batch_size=4)
        settings |= dict(report_to=[], disable_tqdm=True, use_cpu=True, learning_rate=1e-2)
        settings |= dict(lr_scheduler_type="constant", logging_steps=10, seed=0)
        arguments = TrainingArguments(str(tmp_path / folder), **settings)
        return Trainer(model=model, args=arguments, train_dataset=Lines())

    whole = trainer("whole", 4)
    start = snapshot(whole.model)
    whole.train()
    files = set(os.listdir(tmp_path / "whole" / "checkpoint-2"))
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert not files & {"model.safetensors", "pytorch_model.bin"}
    trainer("half", 2).train()
    resumed = trainer("half", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert same_tensors(snapshot(whole.model), snapshot(resumed.model))
    assert not same_tensors(snapshot(whole.model), start)
    loaded = PeftModel.from_pretrained(LLAMA.base(), tmp_path / "whole" / "checkpoint-4")
    inputs = LLAMA.inputs()
    assert torch.equal(evaluated(loaded, inputs), evaluated(whole.model, inputs))
