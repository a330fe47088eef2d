"""It runs where PEFT's LoRA runs: dtypes, checkpointing, compile, generate, padding, Trainer."""

import os
import warnings

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from rlora_helpers import (
    KINDS,
    METHODS,
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


@pytest.mark.parametrize("method", METHODS)
def test_on_a_bf16_base_adapters_are_fp32_and_start_exactly_where_the_base_is(kind, method):
    inputs = kind.inputs(dtype=BF16)
    base = kind.base().to(BF16)
    expected = evaluated(base, inputs)
    model = adapt(base, kind.targets, **METHODS[method])
    assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float32}
    start = evaluated(model, inputs)
    assert start.dtype == BF16
    if method != "hydralora":
        # what a layer adds, below 1e-6 of its output, moves at most one that lay between two bf16
        assert (start != expected).float().mean() < 0.02
        assert relative(start.float() - expected.float(), expected.float()) < 2**-7
        for layer in layers_of(model):
            x = torch.randn(9, layer.in_features, dtype=BF16)
            update, h = layer._update(x, "default"), layer.base_layer(x)
            assert relative(update, h.float()) < 1e-5


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_bf16_base_reloads_with_difference_0(kind, low_cpu_mem_usage, tmp_path):
    inputs = kind.inputs(dtype=BF16)
    model = perturb(adapt(kind.base().to(BF16), kind.targets))
    expected = evaluated(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        kind.base().to(BF16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(evaluated(loaded, inputs), expected)
    assert same_tensors(adapter_tensors(loaded), adapter_tensors(model))


def test_a_bf16_base_trains_and_is_bit_for_bit_what_it_was(kind):
    base = kind.base().to(BF16)
    before = snapshot(base)
    model = adapt(base, kind.targets)
    train(model, [kind.inputs(seed, dtype=BF16) for seed in range(2)])
    assert all(p.grad is None or p.dtype == torch.float32 for p in model.parameters())
    assert same_tensors(snapshot(model.unload()), before)


def test_without_autocast_adapters_take_the_bases_dtype():
    kind = KINDS["llama"]
    config = RLoraConfig(target_modules=list(kind.targets))
    base = kind.base().to(BF16)
    expected = evaluated(base, kind.inputs())
    model = get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    assert {t.dtype for t in adapter_tensors(model).values()} == {BF16}
    out = evaluated(model, kind.inputs())
    assert out.dtype == BF16
    assert relative(out.float() - expected.float(), expected.float()) < 0.05
    train(model, [kind.inputs(seed) for seed in range(2)])


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


def test_a_float64_base_has_float64_adapters():
    model = adapt(KINDS["sequential"].base().double(), ["0"])
    assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float64}


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


@pytest.mark.parametrize(
    ("name", "method"),
    [*(("sequential", method) for method in METHODS), ("llama", "rlora"), ("gpt2", "hydralora")],
)
def test_it_compiles_whole(name, method):
    kind = KINDS[name]
    inputs = kind.inputs()
    base = kind.base(layers=2 if name == "sequential" else 1)
    model = perturb(adapt(base, kind.targets, **METHODS[method] | {"lora_dropout": 0.3}))
    plain = output(model, inputs)
    plain.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
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


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_generate_gives_the_same_tokens_with_a_cache_as_without(name):
    kind = KINDS[name]
    model = perturb(adapt(kind.base(), kind.targets, task_type=TaskType.CAUSAL_LM), scale=0.5)
    how = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    inputs = kind.inputs(length=4)
    with_cache, without = (model.generate(**inputs, **how, use_cache=c) for c in (True, False))
    assert torch.equal(with_cache, without)
    assert with_cache.shape == (2, 12)
    assert not torch.equal(with_cache, kind.base().generate(**inputs, **how))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_step_by_step_with_a_cache_the_logits_are_those_of_the_whole_sequence(name):
    kind = KINDS[name]
    model = perturb(adapt(kind.base(), kind.targets))
    ids = kind.inputs(batch=1, length=6)["input_ids"]
    whole = evaluated(model, {"input_ids": ids})
    cache, steps = None, []
    with torch.no_grad():
        for t in range(ids.shape[1]):
            out = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert relative(torch.cat(steps, 1) - whole, whole) < 1e-5


@pytest.mark.parametrize(
    ("name", "side"),
    [
        *((name, side) for name in ("llama", "qwen2", "gpt2") for side in ("left", "right")),
        ("bert", "right"),  # which classifies by its first token
    ],
)
def test_a_tokens_output_depends_on_neither_padding_nor_batch_mates(name, side):
    kind = KINDS[name]
    model = perturb(adapt(kind.base(), kind.targets))
    short = kind.inputs(seed=1, batch=1, length=3)
    long = kind.inputs(seed=2, batch=1, length=7)
    alone = evaluated(model, short)
    pad = (4, 0) if side == "left" else (0, 4)
    batch = {k: torch.cat([nn.functional.pad(short[k], pad), long[k]]) for k in short}
    positions = batch["attention_mask"].cumsum(-1).sub(1).clamp(min=0)
    together = evaluated(model, batch | {"position_ids": positions})
    if name != "bert":  # which gives one row of logits a sequence
        together = together[:, 4:] if side == "left" else together[:, :3]
    assert relative(together[:1] - alone, alone) < 1e-5


def test_a_rows_output_does_not_depend_on_the_other_rows(kind):
    layer = layers_of(perturb(adapt(kind.base(), kind.targets)))[0]
    x = torch.randn(5, 7, layer.in_features)
    whole = layer(x)
    assert torch.allclose(layer(x[2:3, 3:4]), whole[2:3, 3:4], atol=1e-5)


def test_sequence_classification_keeps_its_head_as_peft_means_it(tmp_path):
    kind = KINDS["bert"]
    model = adapt(kind.base(), kind.targets, task_type=TaskType.SEQ_CLS)
    train(model, [kind.inputs(seed) for seed in range(2)])
    assert any("classifier" in n for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kind.base(), tmp_path)
    inputs = kind.inputs()
    assert torch.equal(evaluated(loaded, inputs), evaluated(model, inputs))


def test_adapters_loaded_in_inference_mode_work_and_can_be_trained(tmp_path):
    kind = KINDS["sequential"]
    inputs = kind.inputs()
    model = perturb(adapt(kind.base(), kind.targets))
    model.save_pretrained(tmp_path)
    base = kind.base()
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


def test_on_the_meta_device_the_work_can_be_counted():
    """Packed there too: one product down, one up."""
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(4, 5))
        model = get_peft_model(base, RLoraConfig(target_modules=["0"]))

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
            return func(*args, **kwargs or {})

    with Products() as products:
        model(torch.empty(3, 4, device="meta"))
    assert products.count == 3  # the base's own, and two


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

    kind = KINDS["llama"]

    def trainer(folder, steps):
        model = adapt(kind.base(), kind.targets, lora_dropout=0.2, task_type=TaskType.CAUSAL_LM)
        before = snapshot(model)
        settings = dict(max_steps=steps, save_steps=2, per_device_train_batch_size=4)
        settings |= dict(report_to=[], disable_tqdm=True, use_cpu=True, learning_rate=1e-2)
        settings |= dict(lr_scheduler_type="constant", logging_steps=10, seed=0)
        arguments = TrainingArguments(str(tmp_path / folder), **settings)
        return Trainer(model=model, args=arguments, train_dataset=Lines()), before

    whole, before = trainer("whole", 4)
    whole.train()
    files = set(os.listdir(tmp_path / "whole" / "checkpoint-2"))
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert not files & {"model.safetensors", "pytorch_model.bin"}

    half, _ = trainer("half", 2)
    half.train()
    resumed, _ = trainer("half", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert same_tensors(snapshot(whole.model), snapshot(resumed.model))
    for name, tensor in snapshot(whole.model).items():
        trained = name.endswith(".default.weight") and "_A0." not in name and "_B0." not in name
        assert torch.equal(tensor, before[name]) != trained, name

    loaded = PeftModel.from_pretrained(kind.base(), tmp_path / "whole" / "checkpoint-4")
    inputs = kind.inputs()
    assert torch.equal(evaluated(loaded, inputs), evaluated(whole.model, inputs))
