"""Tiny bases of every supported kind, and the few verbs that the tests of `rlora_min` share."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlora_min import RLoraConfig, RLoraLayer, export_lora

# A warning is an error, but for names that transformers has deprecated.
STRICT = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # torch's advice to who runs the first release of Python 3.13
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"),
    # transformers 5.24 calls it `cache`, which 4.56 does not know
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]
VOCABULARY = 31
# One setting a method, in the words of RLoraConfig's docstring, and the centred start.
METHODS = {
    "rlora": {},
    "centered": {"init_heads": "centered"},
    "zeros": {"init_heads": "zeros"},
    "mlora": {"router": "mean"},
    "hydralora": {"init_heads": "zeros", "dropout_on": "input", "router_init": "kaiming"},
    "lora": {"num_heads": 1, "init_heads": "zeros", "dropout_on": "input", "router": "mean"},
}


SIZES = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=VOCABULARY)


def llama(layers: int = 2, **settings) -> PreTrainedModel:
    own = dict(num_hidden_layers=layers, num_key_value_heads=1, pad_token_id=0, eos_token_id=None)
    return LlamaForCausalLM(LlamaConfig(**SIZES | own | settings))


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=2, num_key_value_heads=1, **SIZES))


def gpt2(layers: int = 2) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=layers, n_head=2, vocab_size=VOCABULARY))


def bert() -> PreTrainedModel:
    # A test that switches dropout off could not reach this one in transformers 4: it is no module.
    config = BertConfig(num_hidden_layers=2, attention_probs_dropout_prob=0, **SIZES)
    return BertForSequenceClassification(config)


def sequential(layers: int = 2) -> nn.Module:
    middle = [m for _ in range(layers - 1) for m in (nn.Linear(10, 10), nn.Tanh())]
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), *middle, nn.Linear(10, 5))


@dataclass(frozen=True)
class Kind:
    """A kind of base: how to make one, always with the same weights, and what to adapt in it."""

    build: Callable[..., nn.Module]
    targets: tuple[str, ...]
    token: bool = True  # takes input_ids, else vectors of width 6

    def base(self, **settings) -> nn.Module:
        torch.manual_seed(0)
        return self.build(**settings).eval()

    def inputs(self, seed=0, batch=2, length=5, dtype=None) -> dict[str, Tensor] | Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.token:
            ids = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return torch.randn(batch, length, 6, generator=generator).to(dtype)


KINDS = {
    "llama": Kind(llama, ("q_proj", "gate_proj", "up_proj", "down_proj")),
    "qwen2": Kind(qwen2, ("q_proj", "v_proj", "down_proj")),
    "gpt2": Kind(gpt2, ("c_attn", "c_fc", "c_proj")),
    "bert": Kind(bert, ("query", "value", "output.dense")),
    "sequential": Kind(sequential, ("0", "2"), token=False),
}
LLAMA, SEQUENTIAL = KINDS["llama"], KINDS["sequential"]


def adapt(base: nn.Module, targets, adapter_name: str = "default", seed: int = 1, **settings):
    """The base with an R-LoRA adapter, in evaluation."""
    torch.manual_seed(seed)
    config = RLoraConfig(target_modules=list(targets), **settings)
    return get_peft_model(base, config, adapter_name=adapter_name).eval()


def output(model: nn.Module, inputs) -> Tensor:
    out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def evaluated(model: nn.Module, inputs) -> Tensor:
    return output(model.eval(), inputs)


def layers_of(model: nn.Module) -> list[RLoraLayer]:
    return [module for module in model.modules() if isinstance(module, RLoraLayer)]


def layer_paths(model: nn.Module) -> dict[str, RLoraLayer]:
    """The adapted layers by their path in the base model."""
    named = model.get_base_model().named_modules()
    return {path: module for path, module in named if isinstance(module, RLoraLayer)}


def adapter_tensors(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Every tensor of an adapter, the side pair included, by its name in the state dict."""
    own = f".{adapter_name}.weight"
    state = model.state_dict()
    return {k: v for k, v in state.items() if ".rlora_" in k and k.endswith(own)}


def trained_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in trained_of(model).items()}


@torch.no_grad()
def perturb(model: nn.Module, adapter_name: str = "default", seed: int = 5, scale: float = 0.2):
    """Moves every tensor of an adapter off its start, so that an equality says something."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_tensors(model, adapter_name).values():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.add_(scale * noise.to(tensor))
    return model


def train(model: nn.Module, batches: Iterable) -> nn.Module:
    """A step of AdamW for each batch, without weight decay, to make the outputs small."""
    model.train()
    optimizer = torch.optim.AdamW(trained_of(model).values(), lr=1e-2, weight_decay=0)
    for inputs in batches:
        output(model, inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit, NaN included."""
    return one.keys() == other.keys() and all(
        a.dtype == other[k].dtype and a.shape == other[k].shape and a.equal(other[k])
        for k, a in one.items()
    )


def relative(difference: Tensor, to: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return (difference.abs().max() / to.abs().max()).item()


def anatomy(model: nn.Module) -> dict:
    """All that an error may not change: modules, tensors, what trains, what is active."""
    return {
        "modules": [(name, type(module), id(module)) for name, module in model.named_modules()],
        "training": [module.training for module in model.modules()],
        "trains": [parameter.requires_grad for parameter in model.parameters()],
        "active": [layer.active_adapters for layer in layers_of(model)],
        "configs": sorted(getattr(model, "peft_config", {})),
        "tensors": snapshot(model),
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = anatomy(model)
    assert same_tensors(before["tensors"], after["tensors"])
    for part in before.keys() - {"tensors"}:
        assert before[part] == after[part], part


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What is tried inside leaves the model as it was."""
    before = anatomy(model)
    yield
    assert_unchanged(model, before)


class Operations(TorchDispatchMode):
    """Notes each of ATen's operations that runs inside, and its arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))


def tensors_of(layer: RLoraLayer, name: str = "default") -> dict[str, Tensor]:
    """A, the heads side by side, the router's and the side pair's, those that there are."""
    dicts = {part: getattr(layer, f"rlora_{part}") for part in ("A", "B", "router", "A0", "B0")}
    return {part: d[name].weight for part, d in dicts.items() if name in d}


def equation(x, t: dict[str, Tensor], c: RLoraConfig, input_mask=1.0, head_masks=None, g=None):
    """s sum_i g_i(x) B_i D_i(A x) - s Bbar0 A0 x, one head after the other; `g` fixes the weights.

    x: (..., d_in) -> (..., d_out); t: `tensors_of` the layer.
    """
    N, r = c.num_heads, c.r
    s = c.lora_alpha / r**0.5 if c.use_rslora else c.lora_alpha / r
    if g is None and c.router == "softmax":
        z = x @ t["router"].T
        g = z.exp() / z.exp().sum(-1, keepdim=True)
    elif g is None:
        g = torch.full((N,), 1 / N, dtype=x.dtype)
    h = 0
    for i in range(N):
        B_i = t["B"][:, i * r : (i + 1) * r]
        Ax = (input_mask * x) @ t["A"].T
        if head_masks is not None:
            Ax = head_masks[..., i, :] * Ax
        h = h + s * g[..., i : i + 1] * (Ax @ B_i.T)
    if "A0" in t:
        h = h - s * (x @ t["A0"].T) @ t["B0"].T
    return h


def assert_true_error(error: tuple[float, float], routed: Tensor, exported: Tensor) -> None:
    """The largest and the relative difference of an export are as `export_lora` said."""
    routed, difference = routed.double(), routed.double() - exported.double()
    measured = difference.abs().max().item(), (difference.norm() / routed.norm()).item()
    assert error == pytest.approx(measured, rel=1e-4, abs=1e-6)


def exported(model: nn.Module, base: nn.Module, inputs, folder, *how) -> PeftModel:
    """The export on a fresh base, by stock PEFT, off the model as far as was said."""
    error = export_lora(model, folder, *how, batch=inputs)
    loaded = PeftModel.from_pretrained(base, folder)
    assert_true_error(error, evaluated(model, inputs), evaluated(loaded, inputs))
    return loaded
