"""It runs where PEFT's LoRA runs: dtypes, dropout, checkpointing, compile, generate, Trainer."""

import warnings

import pytest
import torch
from one_step import TRAINER, without_dropout
from peft import PeftModel, TaskType, get_peft_model
from peft.helpers import disable_input_dtype_casting
from rlora_helpers import (
    KINDS,
    LLAMA,
    METHODS,
    SEQUENTIAL,
    STRICT,
    VOCABULARY,
    Operations,
    adapt,
    adapter_tensors,
    evaluated,
    gradients_of,
    layers_of,
    output,
    perturb,
    relative,
    same_tensors,
    snapshot,
    train,
)
from torch import nn
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

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


def test_the_softmax_is_taken_in_fp32_also_for_bf16_adapters():
    layer = layers_of(adapt(nn.Sequential(nn.Linear(4, 4).to(BF16)), ["0"], num_heads=5))[0]
    layer._move_adapter_to_device_of_base_layer("default", rounded=True)
    x = torch.randn(100, 4, dtype=BF16)
    with torch.no_grad(), Operations() as operations:
        layer.rlora_router["default"].weight.normal_()
        layer(x)
        g = layer.routing(x)
    softmaxes = [args[0] for name, args in operations.seen if "softmax" in name]
    assert [logits.dtype for logits in softmaxes] == [torch.float32] * 2
    assert (g.sum(-1) - 1).abs().max() < 1e-6  # bf16 alone would be off by 1e-3


@pytest.mark.parametrize("base_dtype", [torch.float32, BF16])
def test_under_autocast_it_computes_in_bf16_and_trains_in_fp32(kind, base_dtype):
    inputs = kind.inputs(dtype=base_dtype)
    model = perturb(adapt(kind.base().to(base_dtype), kind.targets))
    with torch.no_grad():
        exact = output(model, inputs).float()
    without_dropout(model).train()
    with torch.autocast("cpu", BF16):
        out = output(model, inputs)
    out.float().square().mean().backward()
    assert relative(out.float() - exact, exact) < 0.1
    for gradient in gradients_of(model).values():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.any()


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


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_base_of_float8(dtype, autocast_adapter_dtype, tmp_path):
    torch.manual_seed(0)
    linear = Float8(6, 8)
    linear.weight = nn.Parameter(linear.weight.data.to(dtype), requires_grad=False)
    base, fresh = nn.Sequential(linear), nn.Sequential(linear)
    x = torch.randn(4, 6)
    expected = base(x)
    config = RLoraConfig(target_modules=["0"], router="mean")
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype).eval()
    assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float32}
    assert relative(evaluated(model, x) - expected, expected) < 1e-6
    output = evaluated(perturb(model), x)
    model.train()(x).sum().backward()
    model.save_pretrained(tmp_path)
    assert torch.equal(evaluated(PeftModel.from_pretrained(fresh, tmp_path), x), output)


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
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        torch.manual_seed(3)
        out = output(model, kind.inputs())
        out.square().mean().backward()
        results.append((out, gradients_of(model)))
    (plain, gradients), (saved, again) = results
    assert torch.equal(plain, saved)
    assert_close(again, gradients, rtol=1e-5, atol=1e-7)
    assert all(gradient.any() for gradient in gradients.values())


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
    settings = METHODS[method] | {"lora_dropout": 0.3}
    model = perturb(adapt(kind.base(layers=1), kind.targets, **settings))
    plain = output(model, inputs)
    plain.square().mean().backward()
    gradients = gradients_of(model)
    model.zero_grad()
    if wrap:
        wrap(model)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own parts
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out = output(compiled, inputs)
        out.square().mean().backward()
        trained = output(compiled.train(), inputs)
    assert_close(out, plain, rtol=1e-5, atol=1e-5)
    assert_close(gradients_of(model), gradients, rtol=1e-5, atol=1e-5)
    assert trained.isfinite().all() and not torch.allclose(trained, plain, atol=1e-5)


def test_the_trainer_trains_saves_and_resumes_to_the_same_adapter(tmp_path):
    ids = torch.randint(1, VOCABULARY, (16, 6), generator=torch.Generator().manual_seed(0))
    lines = [{"input_ids": line, "labels": line} for line in ids]

    def trainer(folder, steps):
        model = adapt(LLAMA.base(), LLAMA.targets, lora_dropout=0.2, task_type=TaskType.CAUSAL_LM)
        settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        settings |= {"optim": "adamw_torch", "learning_rate": 1e-2}
        arguments = TrainingArguments(str(tmp_path / folder), **TRAINER | settings)
        return Trainer(model=model, args=arguments, train_dataset=lines)

    whole = trainer("whole", 4)
    start = snapshot(whole.model)
    whole.train()
    trainer("half", 2).train()
    resumed = trainer("half", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert same_tensors(snapshot(whole.model), snapshot(resumed.model))
    assert not same_tensors(snapshot(whole.model), start)
    loaded = PeftModel.from_pretrained(LLAMA.base(), tmp_path / "whole" / "checkpoint-4")
    inputs = LLAMA.inputs()
    assert torch.equal(evaluated(loaded, inputs), evaluated(whole.model, inputs))
