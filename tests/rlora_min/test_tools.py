"""What transformers, PEFT's helpers and other tools ask of an adapter, they find."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.utils.hotswap import hotswap_adapter
from rlora_helpers import (
    KINDS,
    METHODS,
    STRICT,
    adapt,
    adapter_tensors,
    evaluated,
    layers_of,
    output,
    perturb,
    relative,
    same_tensors,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from rlora_min import RLoraConfig, record_routing

pytestmark = STRICT
LLAMA, SEQUENTIAL = KINDS["llama"], KINDS["sequential"]


def test_the_type_is_a_string_with_what_is_read_of_pefts_own_types():
    kind = RLoraConfig().peft_type
    assert kind == "RLORA" and kind in {"RLORA"} and isinstance(kind, str)
    assert (kind.value, kind.name, str(kind)) == ("RLORA", "RLORA", "PeftType.RLORA")
    assert type(kind.value) is str
    assert type(copy.deepcopy(kind)) is type(kind)


class Saved:
    """A folder with a base, one with an adapter on it, and what the two give together."""

    def __init__(self, folder):
        self.base, self.adapter = folder / "base", folder / "adapter"
        base = LLAMA.base()
        base.save_pretrained(self.base)
        loaded = AutoModelForCausalLM.from_pretrained(self.base)
        settings = {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
        model = perturb(get_peft_model(loaded, RLoraConfig(**settings)))
        self.expected = evaluated(model, LLAMA.inputs())
        model.save_pretrained(self.adapter)
        self.tensors = load_file(self.adapter / "adapter_model.safetensors")


@pytest.fixture
def saved(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Saved(tmp_path)


def from_the_adapters_folder(saved):
    return AutoModelForCausalLM.from_pretrained(saved.adapter)


def load_adapter(saved):
    model = AutoModelForCausalLM.from_pretrained(saved.base)
    model.load_adapter(str(saved.adapter))
    return model


def add_adapter(saved):
    model = AutoModelForCausalLM.from_pretrained(saved.base)
    model.add_adapter(RLoraConfig(target_modules=["q_proj", "up_proj"]))
    state = model.state_dict()
    for key, tensor in saved.tensors.items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        state[f"{name}.default.weight"].copy_(tensor)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [from_the_adapters_folder, load_adapter, add_adapter])
def test_transformers_own_ways_give_the_same_model(way, saved, tmp_path):
    model = way(saved)
    assert torch.equal(evaluated(model, LLAMA.inputs()), saved.expected)
    assert model.active_adapters() == ["default"]
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert same_tensors(again, saved.tensors)
    model.disable_adapters()
    assert torch.equal(evaluated(model, LLAMA.inputs()), evaluated(LLAMA.base(), LLAMA.inputs()))


@pytest.mark.filterwarnings("ignore")
def test_what_transformers_add_adapter_trains_is_the_adapter_alone(saved):
    model = AutoModelForCausalLM.from_pretrained(saved.base)
    model.add_adapter(RLoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trains and not any("_A0." in name or "_B0." in name for name in trains)
    assert all(".rlora_" in name or "modules_to_save" in name for name in trains)


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_generates_with_the_adapter(saved):
    from transformers import GenerationConfig, TextGenerationPipeline

    class Letters:
        """The least of a tokenizer that the pipeline asks for."""

        pad_token_id, eos_token_id, padding_side, model_max_length = 0, None, "right", 64

        def __call__(self, text, **settings):
            ids = torch.tensor([[1 + ord(letter) % 30 for letter in text]])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

        def decode(self, ids, **settings):
            return " ".join(str(int(i)) for i in ids)

    inputs = Letters()("a few words")
    how = {"max_new_tokens": 5, "do_sample": False}
    texts = []
    for model in (load_adapter(saved), LLAMA.base()):
        model.generation_config = GenerationConfig(**how, pad_token_id=0)
        pipe = TextGenerationPipeline(model=model, tokenizer=Letters(), device="cpu")
        (answer,) = pipe("a few words", **how)
        texts.append(answer["generated_text"])
        (ids,) = model.generate(**inputs, **how)
        assert texts[-1].endswith(Letters().decode(ids[inputs["input_ids"].shape[1] :]))


def test_pefts_status_knows_the_adapter():
    model = adapt(LLAMA.base(), LLAMA.targets)
    status = model.get_model_status()
    assert status.peft_types == {"default": "RLORA"}
    assert status.adapter_model_type == "RLoraModel"
    assert status.num_adapter_layers == len(layers_of(model))
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    assert status.requires_grad == {"default": True} and status.enabled is True
    assert {s.module_type for s in model.get_layer_status()} == {"RLoraLayer"}


def test_pefts_refusals_name_the_type(tmp_path):
    with pytest.raises(ValueError, match="RLORA.*not compatible with the `PeftMixedModel`"):
        get_peft_model(SEQUENTIAL.base(), RLoraConfig(target_modules=["0"]), mixed=True)
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="RLORA"):
        hotswap_adapter(model, tmp_path, "default")


def test_the_model_card_says_which_import_loading_needs(tmp_path):
    model = adapt(SEQUENTIAL.base(), SEQUENTIAL.targets)
    for _ in range(2):
        model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---") and text.count("import rlora_min") == 1
    model.add_adapter("second", RLoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path)
    assert "import rlora_min" in (tmp_path / "second" / "README.md").read_text()
    assert not list(tmp_path.rglob("*.new"))


def test_the_cast_of_the_input_can_be_switched_off():
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    x = SEQUENTIAL.inputs()
    expected = evaluated(model, x)
    with disable_input_dtype_casting(model):
        assert torch.equal(evaluated(model, x), expected)
        assert not layers_of(model)[0].cast_input_dtype_enabled
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
    def base():
        torch.manual_seed(0)
        linear = Float8(6, 8)
        linear.weight = nn.Parameter(linear.weight.data.to(dtype), requires_grad=False)
        return nn.Sequential(linear)

    x = torch.randn(4, 6)
    expected = base()(x)
    config = RLoraConfig(target_modules=["0"], router="mean")
    model = get_peft_model(base(), config, autocast_adapter_dtype=autocast_adapter_dtype).eval()
    assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float32}
    assert relative(evaluated(model, x) - expected, expected) < 1e-6
    perturb(model)
    output = evaluated(model, x)
    model.train()(x).sum().backward()
    model.save_pretrained(tmp_path)
    assert torch.equal(evaluated(PeftModel.from_pretrained(base(), tmp_path), x), output)
    with pytest.raises(ValueError, match="float8.*can't be merged into: export_lora"):
        model.merge_adapter()


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
        assert relative(output(model, x) - expected, expected) < 1e-5
    assert weight.data_ptr() == place and weight.is_shared() and not weight.is_inference()
    assert not torch.equal(weight, before)
    with torch.inference_mode(inference):
        model.unmerge_adapter()
    assert relative(weight - before, before) < 1e-5
    model(x.requires_grad_()).sum().backward()
    assert layers_of(model)[0].rlora_A["default"].weight.grad.any()


def test_a_merge_that_would_not_be_finite_leaves_the_weight_as_it_was():
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets, router="mean"))
    layer = layers_of(model)[1]
    layer.rlora_B["default"].weight.data[0, 0] = torch.inf
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match=r"infinities.*\['default'\]"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged


def test_merging_changes_a_tied_weight_for_both_its_owners():
    base = LLAMA.base(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):  # PEFT's advice for merging
        model = perturb(adapt(base, ["lm_head"], router="mean"))
    before = base.model.embed_tokens.weight.clone()
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model.merge_adapter()
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight
    assert not torch.equal(base.model.embed_tokens.weight, before)


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
    for drop in drops:
        drop.p = 0.5
        drop.eval()
    assert relative(model(x) - expected, expected) < 1e-5
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(SEQUENTIAL.base(), tmp_path).peft_config[
        "default"
    ].lora_dropout == pytest.approx(0.5)


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


@pytest.mark.parametrize("cast", ["the trained", "the adapter", "everything"])
def test_the_start_is_off_by_rounding_whatever_was_cast(cast):
    """TRL casts the trained parameters of a 4-bit base alone. The forward computes in A's dtype.

    A, B and the pair are rounded alike, so what is left is the rounding of products: at most
    2^-8 of an update whose size is alpha / gamma = 1/2 of the output's, times a few.
    """
    base = SEQUENTIAL.base().bfloat16()
    x = SEQUENTIAL.inputs(dtype=torch.bfloat16)
    expected = evaluated(base, x).float()
    model = adapt(base, SEQUENTIAL.targets)
    for name, parameter in model.named_parameters():
        own = ".rlora_" in name and cast == "the adapter"
        if parameter.requires_grad or own or cast == "everything":
            parameter.data = parameter.data.to(torch.bfloat16)
    start = evaluated(model, x)
    assert start.dtype == torch.bfloat16
    assert relative(start.float() - expected, expected) < 0.03
    assert layers_of(model)[0].rlora_A["default"].weight.dtype == torch.bfloat16
    model.train()(x).float().sum().backward()


def test_a_copy_of_a_trained_adapter_by_parameters_is_that_adapter():
    """As TRL makes its reference for DPO and KTO."""
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    expected = evaluated(model, SEQUENTIAL.inputs())
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(evaluated(model, SEQUENTIAL.inputs()), expected)


@pytest.mark.parametrize("hooked", [False, True])
def test_compiled_whole_it_is_the_same_map_and_gives_the_same_gradients(hooked):
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets, lora_dropout=0.0))
    x = SEQUENTIAL.inputs()
    output(model, x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    value = evaluated(model, x)
    model.zero_grad()
    if hooked:
        for layer in layers_of(model):
            router = layer.rlora_router["default"]
            router.forward = lambda z, W_r=router.weight: nn.functional.linear(z, W_r)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative(evaluated(compiled, x) - value, value) < 1e-5
    output(compiled, x).square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert relative(grad - expected[name], expected[name]) < 1e-4, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [False, True])
def test_routing_is_recorded_on_a_compiled_model_or_the_error_says_that_it_cant(inside):
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    x = SEQUENTIAL.inputs()
    with record_routing(model) as log:
        evaluated(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    evaluated(compiled, x)
    with record_routing(compiled if inside else model) as again:
        value = evaluated(compiled, x)
    assert again.mean["all"].keys() == log.mean["all"].keys() == {"0", "2"}
    for path, mean in log.mean["all"].items():
        assert torch.allclose(again.mean["all"][path], mean, atol=1e-6)
    assert torch.equal(evaluated(compiled, x), value)
    torch._dynamo.reset()
    whole = torch.compile(model, fullgraph=True, backend="eager")
    evaluated(whole, x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RoutingLog.add"):
        with record_routing(model):
            evaluated(whole, x)


def test_recording_needs_with_and_shows_only_what_is_recorded():
    model = perturb(adapt(SEQUENTIAL.base(), SEQUENTIAL.targets))
    recording = record_routing(model)
    evaluated(model, SEQUENTIAL.inputs())
    with recording as log:
        assert log.mean == {}
    public = {name for name in dir(log) if not name.startswith("_")}
    assert public == {"task", "mask", "mean", "entropy", "add"}


def test_the_bias_of_a_task_is_kept_through_transformers_and_peft(tmp_path):
    kind = KINDS["bert"]
    model = perturb(adapt(kind.base(), kind.targets, task_type=TaskType.SEQ_CLS, bias="rlora_only"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kind.base(), tmp_path)
    assert torch.equal(evaluated(loaded, kind.inputs()), evaluated(model, kind.inputs()))
