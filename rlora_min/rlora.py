"""R-LoRA (Liu, Chang and Wu, Findings of EMNLP 2025, arXiv 2502.15455) as a PEFT tuner.

                 +--> W0 x ------------------------------------------+
                 |                                                   v
    x (d_in) ----+--> A x (r) --+--> D_1 --> g_1 B_1 --+--> s * -->  +  --> h (d_out)
                 |              +--> D_N --> g_N B_N --+             ^
                 +--> g = softmax(W_r x) (N)                         |
                 +--> A0 x (r) --> Bbar0 ---------------> -s * ------+

    h(x) = W0 x + s sum_i g_i(x) B_i D_i(A x) - s Bbar0 A0 x,        s = alpha / sqrt(r)

A (r x d_in) is shared, the heads B_i (d_out x r) start at random, D_i is head i's own dropout
mask (training only). A0 and Bbar0, A and the mean head as drawn, stay frozen and take the random
start off the output: training begins at the base model. W0 is touched by merging alone.

The file reads in this order: the method, as functions on tensors that need torch alone; then its
settings, the layer, the tuner that PEFT calls, looking inside, and export.
"""

import copy
import difflib
import hashlib
import math
import os
import re
import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import peft
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils.other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    get_pattern_key,
)
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

# ---------------------------------------------------------------- the method


def routing_weights(logits: Tensor) -> Tensor:
    """g = softmax(W_r x), one weighting a token, in fp32 or more: (..., N) both."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(-1, dtype=precise)


def weighted_heads(
    Ax: Tensor, g: Tensor, s: float, mask: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """concat_i(s g_i D_i(A x)), what [B_1 | ... | B_N] multiplies.

    Ax: (..., r); g: (..., N), or (N,) for all tokens -> (..., N r). `mask` drops out
    of (..., N, r), where each head has r numbers, and so a mask, of its own.
    """
    heads = (s * g).unsqueeze(-1) * Ax.unsqueeze(-2)  # (..., N, r)
    if mask is not None:
        heads = mask(heads)
    return heads.flatten(-2)


def rlora_update(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    s: float,
    W_r: Tensor | None = None,
    A0: Tensor | None = None,
    B0: Tensor | None = None,
    mask: Callable[[Tensor], Tensor] | None = None,
    mask_on: str = "heads",
) -> Tensor:
    """s sum_i g_i(x) B_i D_i(A x) - s Bbar0 A0 x: (..., d_in) -> (..., d_out)

    A: (r, d_in); B: (d_out, N r), with B_i in columns i r to (i + 1) r - 1;
    W_r: (N, d_in), or None for g_i = 1/N; the side pair A0: (r, d_in) and
    B0 = Bbar0: (d_out, r), or None. Packed: one product down and one up, whatever N
    is, and no output of a head is kept. `mask` is the dropout in training, on the
    "heads" or, as LoRA's, on the "input" of A.
    """
    r = A.shape[0]
    N = B.shape[1] // r
    down = [A]
    if W_r is not None:
        down.append(W_r)
    if A0 is not None:
        down.append(A0)
    if mask is not None and mask_on == "input":  # only A sees the masked x
        Ax = F.linear(mask(x), A)
        rest = F.linear(x, torch.cat(down)[r:])
        mask = None
    else:
        packed = F.linear(x, torch.cat(down))
        Ax, rest = packed.tensor_split([r], -1)  # (..., r) and (..., [N] [+ r])
    if W_r is not None:
        g = routing_weights(rest[..., :N]).to(Ax)
    else:
        g = Ax.new_full((N,), 1 / N)
    heads = weighted_heads(Ax, g, s, mask)  # (..., N r)
    if A0 is not None:
        A0x = rest[..., -r:]
        heads = torch.cat([heads, -s * A0x], -1)  # (..., N r + r)
        B = torch.cat([B, B0], 1)  # (d_out, N r + r)
    return F.linear(heads, B)


def draw_table_1(
    A: Tensor, B: Tensor, gamma: float, generator: torch.Generator | None = None
) -> None:
    """Draws A (r, d_in) and all heads B (d_out, N r) in place: the paper's Table 1.

    A ~ d_out^(1/4) / sqrt(gamma) * N(0, 1/d_in), and B_i ~ the same factor times
    N(0, 1/d_out); the second argument is a variance. For x of unit RMS,
    RMS(s B_i A x) is then alpha / gamma.
    """
    d_in = A.shape[1]
    d_out = B.shape[0]
    factor = d_out**0.25 / math.sqrt(gamma)
    with torch.no_grad():
        A.normal_(0, factor / math.sqrt(d_in), generator=generator)
        B.normal_(0, factor / math.sqrt(d_out), generator=generator)


def mean_head(B: Tensor, r: int) -> Tensor:
    """Bbar, the mean of the heads: (d_out, N r) -> (d_out, r)"""
    return B.unflatten(1, (-1, r)).mean(1)


def lora_of_fixed_weights(
    A: Tensor,
    B: Tensor,
    g: Tensor,
    s: float,
    A0: Tensor | None = None,
    B0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The LoRA, of scale 1, that fixed weights g (N,) make: (r', d_in), (d_out, r').

    A is shared, so sum_i g_i B_i A = (sum_i g_i B_i) A has rank r; the side pair
    adds r.
    """
    N = len(g)
    B = s * torch.einsum("onr,n->or", B.unflatten(1, (N, -1)), g.to(B))
    if A0 is not None:
        A = torch.cat([A, A0])
        B = torch.cat([B, -s * B0], 1)
    return A, B


# ---------------------------------------------------------------- its settings

CHOICES = {
    "init_heads": ("random", "centered", "zeros"),
    "dropout_on": ("heads", "input"),
    "router": ("softmax", "mean"),
    "router_init": ("zeros", "kaiming"),
    "bias": ("none", "all", "rlora_only"),
}
# A tensor of an adapter, in a checkpoint. The pair's `.weight` is missing in files of old.
SAVED = re.compile(r"(?P<path>.*)\.(?P<part>rlora_(A|B|router|A0|B0))(\.weight)?")


class RLoraType(str):
    """The name "RLORA", with `.value` and `.name`, which are read of PEFT's own types."""

    @property
    def value(self) -> str:
        return self[:]

    name = value

    def __str__(self) -> str:
        return "PeftType." + self.value


# Configs that were read from a file, as PEFT's loading begins; no config is kept alive by it.
_read_from_file = weakref.WeakValueDictionary()


@dataclass
class RLoraConfig(peft.PeftConfig):
    """Settings of an R-LoRA adapter; wrong ones are a ValueError, shared ones have PEFT's meaning.

    The defaults are R-LoRA. HydraLoRA, as R-LoRA's authors compare with it, is
    `init_heads="zeros", dropout_on="input", router_init="kaiming"`; M-LoRA is `router="mean"`; LoRA
    is `num_heads=1, init_heads="zeros", dropout_on="input", router="mean"`.

    Three things surprise. Dropout is on by default, and moves the start of training: a DPO loss
    is then not ln 2 at first. AdamW's default weight decay pulls the layer to W0 - s Bbar0 A0 and
    not to W0: set it to 0. An export has rank r, or 2 r with random heads, and a server of LoRA
    adapters must allow that rank.
    """

    r: int = 4  # rank of A and of each head, >= 1
    num_heads: int = 3  # N >= 1
    lora_alpha: float = 32  # > 0
    lora_dropout: float = 0.1  # 0 <= p < 1
    use_rslora: bool = True  # s = alpha / sqrt(r), else alpha / r
    init_heads: str = "random"  # Table 1; or "centered", less the mean; or "zeros"
    gamma: float = 64  # > 0; at the start RMS(s B_i A x) = alpha / gamma for x of unit RMS
    dropout_on: str = "heads"  # a mask a head on A x; or one on "input", x, as LoRA
    router: str = "softmax"  # a weighting a token; or "mean", no router (M-LoRA)
    router_init: str = "zeros"  # starts at the base; or "kaiming", as released
    init_weights: bool = True  # False: nothing zeroed, centred or subtracted, so off the base
    init_seed: int | None = None  # the same adapter on every device, whatever ran before
    rank_pattern: dict[str, int] = field(default_factory=dict)  # r of the modules so named
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # lora_alpha of those
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"  # or "all", or "rlora_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = RLoraType("RLORA")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")
        _check_whole("r", self.r)
        _check_whole("num_heads", self.num_heads)
        _check_positive("lora_alpha", self.lora_alpha)
        _check_positive("gamma", self.gamma)
        self.rank_pattern = dict(self.rank_pattern or {})
        self.alpha_pattern = dict(self.alpha_pattern or {})
        for name, r in self.rank_pattern.items():
            _check_whole(f"rank_pattern[{name!r}]", r)
        for name, alpha in self.alpha_pattern.items():
            _check_positive(f"alpha_pattern[{name!r}]", alpha)
        p = self.lora_dropout
        if not isinstance(p, int | float) or not 0 <= p < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {p!r}.")
        self._check_heads_can_separate()
        self._check_layers()

    def _check_heads_can_separate(self) -> None:
        equal = self.num_heads > 1 and self.init_heads == "zeros"
        uniform = self.router == "softmax" and self.router_init == "zeros"
        masked = self.dropout_on == "heads" and self.lora_dropout > 0
        if equal and uniform and not masked:
            raise ValueError(
                "These heads can never separate: zero heads start equal, and under a router that "
                "starts uniform they get equal gradients for ever. Use random or centered heads, "
                "router_init='kaiming', or dropout_on='heads' with lora_dropout > 0."
            )

    def _check_layers(self) -> None:
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform works with a list of target_modules; the string "
                f"{self.target_modules!r} names layers by itself."
            )

    @property
    def scaling(self) -> float:
        """s, the factor on the heads' output."""
        if self.use_rslora:
            return self.lora_alpha / math.sqrt(self.r)
        return self.lora_alpha / self.r

    def at(self, path: str) -> "RLoraConfig":
        """These settings, with the rank and alpha that the patterns give the module at `path`."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        rank_key = get_pattern_key(self.rank_pattern, path)
        alpha_key = get_pattern_key(self.alpha_pattern, path)
        r = self.rank_pattern.get(rank_key, self.r)
        alpha = self.alpha_pattern.get(alpha_key, self.lora_alpha)
        return replace(self, r=r, lora_alpha=alpha)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """As PEFT's; a ValueError if the adapter's file beside it is not whole or does not fit."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        file = os.path.join(folder, "adapter_model.safetensors")
        if os.path.isfile(file):
            _check_file(file, config)
        _read_from_file[id(config)] = config
        return config

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """As PEFT's, with the line in the model card that says which import loading needs."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory, "README.md")
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        if "import rlora_min" not in text:
            new = Path(save_directory, "README.md.new")
            new.write_text(f"{text}\n{LOADING}", encoding="utf-8")
            new.replace(card)


LOADING = """## Loading

This adapter is an R-LoRA. PEFT knows the type once `rlora_min` was imported:

```python
import rlora_min  # registers the tuner with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base, "this folder")
```
"""


def _check_whole(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number > 0, got {value!r}.")


def _check_file(file: str, config: RLoraConfig) -> None:
    """A ValueError for what the file and its configuration alone show to be wrong."""
    layers = {}
    try:
        with safetensors.safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                match = SAVED.fullmatch(key)
                if match:
                    parts = layers.setdefault(match["path"], {})
                    parts[match["part"]] = tensors.get_tensor(key)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a whole file of tensors: {error}") from error
    for path, parts in sorted(layers.items()):
        own = config.at(path.removeprefix("base_model.model."))
        shapes = {part: tuple(tensor.shape) for part, tensor in sorted(parts.items())}
        expected = _expected_shapes(own, shapes)
        if shapes != expected:
            raise ValueError(f"{file}: {path} has {shapes}; its configuration {expected}.")
        for part, tensor in parts.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{file}: {path}.{part} must be finite.")


def _expected_shapes(config: RLoraConfig, shapes: Mapping[str, tuple]) -> dict[str, tuple]:
    r, N = config.r, config.num_heads
    d_in = shapes.get("rlora_A", ["d_in"])[-1]
    d_out = shapes.get("rlora_B", ["d_out"])[0]
    expected = {"rlora_A": (r, d_in), "rlora_B": (d_out, N * r)}
    if config.init_heads == "random":
        expected |= {"rlora_A0": (r, d_in), "rlora_B0": (d_out, r)}
    if config.router == "softmax":
        expected["rlora_router"] = (N, d_in)
    return expected


# ---------------------------------------------------------------- the layer


def _is_dense(weight: object) -> bool:
    """Whether it is a plain tensor of floats: not sharded, not quantized."""
    plain = type(weight) is nn.Parameter or type(weight) is Tensor
    return plain and weight.is_floating_point()


def _is_here(weight: object) -> bool:
    """Whether it is such a tensor and has values: not offloaded."""
    return _is_dense(weight) and not weight.is_meta


def _is_bare(module: nn.Module) -> bool:
    """Whether nothing is around it: calling it does what its class does."""
    hooked = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return not hooked and "forward" not in module.__dict__


def _is_plain(part: nn.Module) -> bool:
    """Whether calling this part would do no more than multiply by its weight."""
    if type(part) is not nn.Linear or part.bias is not None or not _is_bare(part):
        return False
    return "weight" in part._parameters and _is_dense(part._parameters["weight"])


def _dtype_of(part: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype that a part computes in; x's own where its weight does not say."""
    weight = getattr(part, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.dtype
    return x.dtype


def _add(update: Tensor, result: Tensor) -> Tensor:
    """Their sum, in the update's own memory where that is free: large new tensors cost."""
    if torch.compiler.is_compiling() or update.dtype != result.dtype:
        return result + update
    if torch._C._functorch.is_functorch_wrapped_tensor(result):  # vmap forbids it
        return result + update
    return update.add_(result)


def _frozen(weight: Tensor) -> nn.Linear:
    """An `nn.Linear` of this weight that is never trained. Nothing is drawn for it."""
    d_out, d_in = weight.shape
    part = nn.Linear(d_in, d_out, bias=False, device="meta")
    part.weight = nn.Parameter(weight, requires_grad=False)
    return part


def _draw(config: RLoraConfig, path: str, A: Tensor, B: Tensor, W_r: Tensor | None) -> None:
    """Draws an adapter in place, after `init_seed` if there is one."""
    generator = None
    if config.init_seed is not None:  # a stream for each module, whatever the others draw
        digest = hashlib.sha256(f"{config.init_seed}:{path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    kaiming = partial(nn.init.kaiming_uniform_, a=math.sqrt(5), generator=generator)
    if config.init_heads != "zeros":
        draw_table_1(A, B, config.gamma, generator)
    else:
        kaiming(A)
        if config.init_weights:
            B.zero_()
        else:
            kaiming(B)
    if config.init_heads == "centered" and config.init_weights:
        B -= mean_head(B, config.r).repeat(1, config.num_heads)
    if W_r is not None:
        if config.router_init == "zeros" and config.init_weights:
            W_r.zero_()
        else:
            kaiming(W_r)


def _start_of(config: RLoraConfig, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The side pair of an adapter as drawn."""
    if config.init_weights:
        return A.clone(), mean_head(B, config.r)
    return torch.zeros_like(A), torch.zeros_like(B[:, : config.r])


class RLoraLayer(nn.Module, BaseTunerLayer):
    """A linear map with R-LoRA adapters around it: (..., d_in) -> (..., d_out).

    By adapter name, it holds `rlora_A` (r, d_in), `rlora_B` (d_out, N r) with head B_i in columns
    i r to (i + 1) r - 1, `rlora_router` (N, d_in), and the frozen pair `rlora_A0` (r, d_in) and
    `rlora_B0` (d_out, r): each an `nn.Linear` without bias; and `rlora_dropout`, an `nn.Dropout`.
    """

    adapter_layer_names = ("rlora_A", "rlora_B", "rlora_router")
    other_param_names = ("rlora_A0", "rlora_B0", "rlora_dropout", "configs")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: RLoraConfig,
        path: str,
    ):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _features(base_layer)
        self.rlora_A = nn.ModuleDict()
        self.rlora_B = nn.ModuleDict()
        self.rlora_router = nn.ModuleDict()
        self.rlora_A0 = nn.ModuleDict()
        self.rlora_B0 = nn.ModuleDict()
        self.rlora_dropout = nn.ModuleDict()
        self.configs: dict[str, RLoraConfig] = {}
        self.recorders: dict[int, Callable] = {}  # see record_routing
        self.cast_input_dtype_enabled = True  # PEFT's helper switches it
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, path)

    @torch.inference_mode(False)
    def update_layer(self, adapter_name: str, config: RLoraConfig, path: str) -> None:
        """Adds an adapter, drawn on the CPU; `path` is the module's name in the base model."""
        config = config.at(path)
        r, N = config.r, config.num_heads
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        on_meta = device is not None and device.type == "meta"
        how = {
            "bias": False,
            "dtype": torch.float32,
            "device": "meta" if on_meta else "cpu",
        }
        self.configs[adapter_name] = config
        self.rlora_dropout[adapter_name] = nn.Dropout(config.lora_dropout).train(self.training)
        self.rlora_A[adapter_name] = nn.Linear(self.in_features, r, **how)
        self.rlora_B[adapter_name] = nn.Linear(N * r, self.out_features, **how)
        if config.router == "softmax":
            self.rlora_router[adapter_name] = nn.Linear(self.in_features, N, **how)
        A = self.rlora_A[adapter_name].weight.detach()
        B = self.rlora_B[adapter_name].weight.detach()
        if not A.is_meta:  # else a checkpoint follows
            W_r = None
            if config.router == "softmax":
                W_r = self.rlora_router[adapter_name].weight.detach()
            _draw(config, path, A, B, W_r)
        if config.init_heads == "random":
            A0, B0 = _start_of(config, A, B)
            self.rlora_A0[adapter_name] = _frozen(A0)
            self.rlora_B0[adapter_name] = _frozen(B0)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def side_pair(self, adapter_name: str, path: str) -> tuple[Tensor, Tensor] | None:
        """A0 (r, d_in) and Bbar0 (d_out, r), drawn again where they are sharded and a seed is set.

        None where they can't be had; `path` is the module's name in the base model.
        """
        config = self.configs[adapter_name]
        A0 = self.rlora_A0[adapter_name].weight.detach()
        B0 = self.rlora_B0[adapter_name].weight.detach()
        if A0.shape == (config.r, self.in_features) and not A0.is_meta:
            return A0, B0
        if config.init_seed is None:
            return None
        A = torch.empty(config.r, self.in_features)
        B = torch.empty(self.out_features, config.num_heads * config.r)
        _draw(config, path, A, B, W_r=None)
        return _start_of(config, A, B)

    def _move_adapter_to_device_of_base_layer(
        self,
        adapter_name: str,
        device: torch.device | None = None,
        rounded: bool = False,
    ) -> None:
        # In fp32 or more, unlike PEFT's: A, B rounded apart from A0, Bbar0 would miss the start.
        base_device, base_dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = torch.float32
        if base_dtype == torch.float64 or (
            rounded and base_dtype in (torch.float16, torch.bfloat16)
        ):
            dtype = base_dtype
        if adapter_name in self.configs:
            for part in self._parts(adapter_name).values():
                if not part.weight.is_meta:
                    part.to(device=device or base_device, dtype=dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # In older versions the side pair was buffers, without `.weight`.
        for part in ("rlora_A0", "rlora_B0"):
            for adapter_name in getattr(self, part):
                key = f"{prefix}{part}.{adapter_name}"
                if key in state_dict:
                    state_dict[f"{key}.weight"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(
        self, x: Tensor, *args, adapter_names: Sequence[str] | None = None, **kwargs
    ) -> Tensor:
        """(..., d_in) -> (..., d_out); with `adapter_names`, row i of x by adapter_names[i]."""
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        base = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return base
        for record in self.recorders.values():
            record(self, x, adapter_names)
        if self.merged:
            return base
        if adapter_names is not None:
            return self._mixed(x, base, adapter_names)
        result = base
        for adapter_name in self.active_adapters:
            if adapter_name in self.rlora_A:
                result = _add(self._update(x, adapter_name), result)
        return result.to(base.dtype)

    def _check_adapter_names(self, x: Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            rows = f"{len(adapter_names)} names for {len(x)} rows"
            raise ValueError(f"adapter_names must have one name for each row, got {rows}.")
        if self.merged:
            raise ValueError("adapter_names need unmerged adapters: call unmerge_adapter first.")

    def _mixed(self, x: Tensor, base: Tensor, adapter_names: Sequence[str]) -> Tensor:
        result = base.clone()
        for adapter_name in dict.fromkeys(adapter_names):
            if adapter_name in self.rlora_A:
                rows = [i for i, name in enumerate(adapter_names) if name == adapter_name]
                total = _add(self._update(x[rows], adapter_name), base[rows])
                result[rows] = total.to(base.dtype)
        return result

    def _update(self, x: Tensor, adapter_name: str) -> Tensor:
        """s sum_i g_i B_i D_i(A x) - s Bbar0 A0 x, a new tensor: (..., d_in) -> (..., d_out)"""
        config = self.configs[adapter_name]
        parts = self._parts(adapter_name)
        x = self._cast_input_dtype(x, _dtype_of(parts["A"], x))
        mask = self.rlora_dropout[adapter_name]
        idle = type(mask) is nn.Dropout and (mask.p == 0 or not mask.training)
        if idle and _is_bare(mask):
            mask = None
        if _has_any_global_hook() or not all(map(_is_plain, parts.values())):
            return self._called_update(x, parts, mask, config)
        weights = {name: part.weight for name, part in parts.items()}
        for name in ("A0", "B0"):  # some tools cast the trained parameters alone
            if name in weights:
                weights[name] = weights[name].to(weights["A"].dtype)
        return rlora_update(x, **weights, s=config.scaling, mask=mask, mask_on=config.dropout_on)

    def _parts(self, adapter_name: str) -> dict[str, nn.Module]:
        """The adapter's linear maps, by their names in `rlora_update`."""
        parts = {"A": self.rlora_A[adapter_name], "B": self.rlora_B[adapter_name]}
        if adapter_name in self.rlora_router:
            parts["W_r"] = self.rlora_router[adapter_name]
        if adapter_name in self.rlora_A0:
            parts["A0"] = self.rlora_A0[adapter_name]
            parts["B0"] = self.rlora_B0[adapter_name]
        return parts

    def _called_update(self, x: Tensor, parts: dict, mask, config: RLoraConfig) -> Tensor:
        """The same, from calls of the modules: so that hooks and wrappers see them."""
        A, B = parts["A"], parts["B"]
        s, N = config.scaling, config.num_heads
        if mask is not None and config.dropout_on == "input":
            Ax = A(mask(x))
            mask = None
        else:
            Ax = A(x)
        if "W_r" in parts:
            g = routing_weights(parts["W_r"](x)).to(Ax)
        else:
            g = Ax.new_full((N,), 1 / N)
        update = B(weighted_heads(Ax, g, s, mask))
        if "A0" not in parts:
            return update.clone()  # _add writes into it, and torch forbids that after some hooks
        A0x = parts["A0"](x.to(_dtype_of(parts["A0"], x)))
        return update + parts["B0"](-s * A0x).to(update.dtype)

    def routing(self, x: Tensor, adapter_name: str = "default") -> Tensor:
        """g(x), which dropout never touches: (..., d_in) -> (..., N), each row summing to 1."""
        if adapter_name not in self.rlora_router:
            N = self.configs[adapter_name].num_heads
            return x.new_full((*x.shape[:-1], N), 1 / N, dtype=torch.float32)
        router = self.rlora_router[adapter_name]
        return routing_weights(router(self._cast_input_dtype(x, _dtype_of(router, x))))

    def lora_pair(self, adapter_name: str, weights: Tensor) -> tuple[Tensor, Tensor]:
        """A (r', d_in) and B (d_out, r') of the LoRA of scale 1 that fixed weights (N,) make of it.

        ValueError: the adapter is sharded, quantized or offloaded.
        """
        tensors = {}
        for name, part in self._parts(adapter_name).items():
            tensors[name] = part.weight
            if not _is_here(part.weight):
                raise ValueError(f"{name} of '{adapter_name}' must be a whole, dense tensor here.")
        tensors.pop("W_r", None)
        return lora_of_fixed_weights(**tensors, g=weights, s=self.configs[adapter_name].scaling)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What `merge` adds to the base weight, in its shape. ValueError: a softmax router."""
        config = self.configs[adapter_name]
        if config.router != "mean":
            why = "its softmax router weights the heads anew for each token"
            raise ValueError(f"'{adapter_name}' can't be merged: {why}. Use rlora_min.export_lora.")
        N = config.num_heads
        A, B = self.lora_pair(adapter_name, torch.full((N,), 1 / N, dtype=torch.float64))
        if isinstance(self.get_base_layer(), Conv1D):
            return (B @ A).T
        return B @ A

    def check_mergeable(self) -> None:
        """A ValueError if the base weight can't be merged into."""
        weight = getattr(self.get_base_layer(), "weight", None)
        if not _is_dense(weight) or weight.dtype.itemsize < 2:
            kind = f"{type(weight).__name__} of {getattr(weight, 'dtype', 'packed numbers')}"
            raise ValueError(f"A base weight that is a {kind} can't be merged into: export_lora.")

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the base weight in place, with `safe_merge` only if the sum is finite.

        ValueError: a softmax router, or a base weight that is not a dense one of 16 bits or more.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.rlora_A]
        self.check_mergeable()
        weight = self.get_base_layer().weight
        deltas = [self.get_delta_weight(name).to(weight) for name in names]
        if safe_merge:
            merged = weight.clone()
            for delta in deltas:
                merged += delta
            if not merged.isfinite().all():
                raise ValueError(f"NaNs or infinities in the base weight merged with {names}.")
        for name, delta in zip(names, deltas, strict=True):
            weight.data += delta
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes every merged adapter off the base weight again, up to rounding."""
        weight = self.get_base_layer().weight
        while self.merged_adapters:
            weight.data -= self.get_delta_weight(self.merged_adapters.pop()).to(weight)


# ---------------------------------------------------------------- the tuner

# The quantized linear layers that PEFT's LoRA takes and that are not an `nn.Linear`, by name:
# their packages need not be installed.
QUANTIZED = {
    "AwqGEMMQuantLinear",
    "BaseQuantLinear",
    "EetqLinear",
    "HQQLinear",
    "PatchedLinear",
    "QuantLinear",
    "QuantizedLinear",
    "WQLinear_GEMM",
}


def _features(base_layer: nn.Module) -> tuple[int, int]:
    """d_in and d_out of a target."""
    if isinstance(base_layer, Conv1D):
        return base_layer.nx, base_layer.nf  # its weight may be sharded
    if hasattr(base_layer, "infeatures"):
        return base_layer.infeatures, base_layer.outfeatures
    return base_layer.in_features, base_layer.out_features


def _check_target(path: str, model: nn.Module) -> None:
    """A ValueError unless the module at `path` can be adapted."""
    module = model
    inside = False
    for name in path.split("."):
        inside = inside or isinstance(module, nn.MultiheadAttention)
        module = getattr(module, name)
    names = {cls.__name__ for cls in type(module).__mro__}
    linear = isinstance(module, nn.Linear | Conv1D) or names & QUANTIZED
    lazy = isinstance(module, nn.LazyLinear) and module.has_uninitialized_params()
    if inside or lazy or not linear:
        kind = f"a {type(module).__name__}; only linear layers and GPT-2's Conv1D"
        raise ValueError(
            f"R-LoRA can't adapt '{path}', {kind}, of known size, not inside MultiheadAttention."
        )


@dataclass
class _Injected:
    """What an injection for a load found, so that a load that is refused can put it back."""

    trained: list[weakref.ref]  # the parameters that required a gradient
    values: bytes  # a hash of the adapter as injected


# By tuner, then adapter. It keeps no model alive and is not pickled with one.
_injected: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class RLoraModel(BaseTuner):
    """Puts an `RLoraLayer` around each target of a model; made by `peft.get_peft_model`."""

    prefix = "rlora_"
    tuner_layer_cls = RLoraLayer
    target_module_mapping = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, config: RLoraConfig, model: nn.Module) -> None:
        # PEFT calls this before it changes anything, so a refusal here leaves the model whole.
        modules = dict(_outside_adapters(model))
        left_out = _fused_experts(config, model, modules)
        config = _maybe_include_all_linear_layers(copy.copy(config), model)
        targets = [path for path in modules if self._check_target_module_exists(config, path)]
        for path in targets:
            if not isinstance(modules[path], RLoraLayer):
                _check_target(path, model)
        if not targets and config.target_modules != "dummy-target-modules":
            raise peft.NoMatchingPeftModuleError(_not_found(config, modules))
        if left_out:
            warnings.warn(
                f"R-LoRA adapts linear layers, and leaves out these experts, which are one tensor "
                f"each: {left_out}.",
                stacklevel=2,
            )

    def _check_merge_allowed(self) -> None:
        # PEFT calls it before the first layer is merged, when weights may still be offloaded.
        super()._check_merge_allowed()
        for layer in self.model.modules():
            if isinstance(layer, RLoraLayer):
                layer.check_mergeable()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        trained = [weakref.ref(p) for p in model.parameters() if p.requires_grad]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        if _read_from_file.get(id(config)) is config:
            injected = _Injected(trained, _hash(model, adapter_name))
            _injected.setdefault(self, {})[adapter_name] = injected

    def _create_and_replace(self, config, adapter_name, target, name, parent, current_key) -> None:
        if isinstance(target, RLoraLayer):
            target.update_layer(adapter_name, config, current_key)
        else:
            _check_target(current_key, self.model)  # again: a checkpoint's keys may have named it
            layer = self.tuner_layer_cls(target, adapter_name, config, current_key)
            self._replace_module(parent, name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if autocast_adapter_dtype:
            return
        for layer in self.model.modules():
            if isinstance(layer, RLoraLayer):
                layer._move_adapter_to_device_of_base_layer(adapter_name, rounded=True)
        injected = _injected.get(self, {}).get(adapter_name)
        if injected is not None:
            injected.values = _hash(self.model, adapter_name)

    # ------------------------------------------------ saving and loading

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, *args, **kwargs):
        # Some tools hand over what is trained alone; an adapter without its side pair is none.
        state_dict = dict(state_dict)
        for path, layer in model.named_modules():
            if not isinstance(layer, RLoraLayer) or adapter_name not in layer.rlora_A0:
                continue
            path = path.replace("_fsdp_wrapped_module.", "")
            keys = [f"{path}.{part}.{adapter_name}.weight" for part in ("rlora_A0", "rlora_B0")]
            if state_dict.keys() >= set(keys):
                continue
            pair = layer.side_pair(adapter_name, path.removeprefix("base_model.model."))
            if pair is None:
                warnings.warn(
                    f"The frozen tensors {keys} are sharded and were left out, so this file can't "
                    "be loaded. Set init_seed, and they are drawn again.",
                    stacklevel=2,
                )
            else:
                state_dict |= dict(zip(keys, pair, strict=True))
        return super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, *args, **kwargs
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        # The step of PEFT's loading that sees a checkpoint whole, before any tensor is copied.
        renamed = {}
        for key, tensor in state_dict.items():
            old = SAVED.fullmatch(key) and not key.endswith(".weight")
            renamed[f"{key}.weight" if old else key] = tensor
        given = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)
        problem = _misfit(cls, model, adapter_name, given)
        if problem is not None:
            tuner = getattr(model, "base_model", None)
            if isinstance(tuner, RLoraModel):
                tuner._take_back(adapter_name)
            raise ValueError(f"Adapter '{adapter_name}' can't load {problem}.")
        return given

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # torch would copy what fits and then complain of the rest.
        for name, parameter in self.named_parameters(prefix=prefix.removesuffix(".")):
            of_adapter = ".rlora_" in name or ".modules_to_save." in name
            if not of_adapter or name not in state_dict or parameter.numel() == 0:
                continue  # the last: a part of it lies elsewhere
            here, given = tuple(parameter.shape), tuple(state_dict[name].shape)
            if here != given:
                for adapter_name in list(_injected.get(self, {})):
                    if f".{adapter_name}." in name:
                        self._take_back(adapter_name)
                what = f"the model has {here}, the checkpoint {given}"
                raise ValueError(f"An adapter can't load {name}: {what}.")
        _injected.pop(self, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _take_back(self, adapter_name: str) -> None:
        """Undoes the injection of an adapter for a load, unless somebody worked on it since."""
        injected = _injected.get(self, {}).pop(adapter_name, None)
        if injected is None or injected.values != _hash(self.model, adapter_name):
            return
        self.delete_adapter(adapter_name)
        for path, module in list(self.model.named_modules()):
            inner = None
            if isinstance(module, RLoraLayer) and not module.configs:
                inner = module.base_layer
            elif isinstance(module, ModulesToSaveWrapper) and not module.modules_to_save:
                inner = module.original_module
            if inner is not None:
                parent, _, name = path.rpartition(".")
                setattr(self.model.get_submodule(parent), name, inner)
        if not self.peft_config and hasattr(self.model, "peft_config"):
            del self.model.peft_config
        trained = {id(reference()) for reference in injected.trained}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    # ------------------------------------------------ batches of several adapters

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        # PEFT enters it around forward and generate; `adapter_names` reach the layers by hooks.
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        repeated = adapter_names
        num_beams = kwargs.get("num_beams")
        if isinstance(num_beams, int) and num_beams > 1:
            repeated = [name for name in adapter_names for _ in range(num_beams)]
        encoder = None
        if hasattr(self.model, "get_encoder"):
            encoder = self.model.get_encoder()
        encoded = set()
        if encoder is not None and encoder is not self.model:
            encoded = set(encoder.modules())  # it sees each row once, before beams repeat them
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, RLoraLayer | AuxiliaryTrainingWrapper):
                    names = adapter_names if module in encoded else repeated
                    hook = partial(_pass_adapter_names, adapter_names=names)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, adapter_names: object) -> None:
        if not isinstance(adapter_names, list | tuple):
            raise TypeError(f"adapter_names must be a list of names, got {adapter_names!r}.")
        if self.training:
            raise ValueError("adapter_names are for inference: call model.eval() first.")
        known = set(self.peft_config)
        unknown = sorted(set(adapter_names) - known - {"__base__"})
        if unknown:
            have = f"it has {sorted(known)}, and '__base__' for no adapter"
            raise ValueError(f"No adapters {unknown} in this model; {have}.")


def _pass_adapter_names(module, args, kwargs, adapter_names):
    return args, kwargs | {"adapter_names": adapter_names}


def _outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by path, less those inside of adapter layers, whatever they are called."""
    inside = []
    for path, module in model.named_modules():
        if path and not any(path.startswith(prefix) for prefix in inside):
            yield path, module
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{path}.")


def _not_found(config: RLoraConfig, modules: Mapping[str, nn.Module]) -> str:
    targets = config.target_modules
    wanted = [targets] if isinstance(targets, str) else sorted(targets)
    names = sorted({*modules, *(path.rpartition(".")[2] for path in modules)})
    close = []
    for name in wanted:
        close += difflib.get_close_matches(name, names, 3, 0.5)
    return (
        f"Target modules {wanted} not found in the base model, after exclude_modules, "
        f"layers_to_transform and modules_to_save. Closest names: {close or names[:20]}."
    )


def _fused_experts(config: RLoraConfig, model: nn.Module, modules: Mapping) -> list[str]:
    """Tensors (experts, d, d') that the targets name, alone or fused as in `gate_up_proj`."""
    experts = []
    for path, parameter in model.named_parameters():
        leaf = path.rpartition(".")[2]
        if parameter.ndim == 3 and "expert" in path and leaf not in ("weight", "bias"):
            experts.append(path)
    targets = config.target_modules
    if isinstance(targets, str):
        everything = targets.lower() == "all-linear"
        return [path for path in experts if everything or re.fullmatch(targets, path)]
    leaves = {path.rpartition(".")[2] for path in modules}
    found = set()
    for target in targets:
        name = target.rpartition(".")[2]
        pieces = set(name.split("_"))
        named = [p for p in experts if pieces <= set(p.rpartition(".")[2].split("_"))]
        if not named and name not in leaves:  # a name of before the experts became one tensor
            named = experts
        found.update(named)
    return sorted(found)


def _hash(model: nn.Module, adapter_name: str) -> bytes:
    """Of an adapter's values; tensors on the meta device have none."""
    digest = hashlib.sha256()
    for layer in model.modules():
        if isinstance(layer, RLoraLayer) and adapter_name in layer.configs:
            for part in layer._parts(adapter_name).values():
                if not part.weight.is_meta:
                    values = part.weight.detach().double().cpu().numpy()
                    digest.update(values.tobytes())
    return digest.digest()


def _misfit(cls: type, model: nn.Module, adapter_name: str, given: Mapping) -> str | None:
    """What is wrong with a checkpoint's names or values, or None."""
    state = model.state_dict()
    in_peft_model = any(key.startswith("base_model.model.") for key in state)
    if not in_peft_model:
        given = {key.removeprefix("base_model.model."): value for key, value in given.items()}
    own = re.compile(rf"(^|.*\.)rlora_(A|B|router|A0|B0)\.{re.escape(adapter_name)}\.weight")
    for key in sorted(state):
        if own.fullmatch(key) and key not in given:
            return f"a checkpoint without {key}, {tuple(state[key].shape)}"
    # PEFT itself saves the biases of modules_to_save a second time, without the adapter's name.
    twice = {cls._remove_adapter_name_from_key(key, adapter_name) for key in state}
    buffers = {key for key, _ in model.named_buffers()}
    for key in sorted(given):
        if key not in state and key not in twice:
            return f"{key}, which the model does not have"
        if key not in buffers and not given[key].isfinite().all():
            return f"{key}, which must be finite"
    return None


peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["RLORA"] = RLoraConfig
peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["RLORA"] = RLoraModel
peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["RLORA"] = RLoraModel.prefix


# ---------------------------------------------------------------- looking inside


def _layers(model: nn.Module, adapter_name: str) -> dict[str, RLoraLayer]:
    """The layers that have this adapter, by their path in the base model."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    layers = {}
    names = set()
    for path, module in base.named_modules():
        if isinstance(module, RLoraLayer):
            names.update(module.configs)
            if adapter_name in module.configs:
                layers[path] = module
    if not layers:
        have = sorted(names)
        raise ValueError(f"No R-LoRA adapter '{adapter_name}' in this model; it has {have}.")
    return layers


def head_similarity(
    model: nn.Module,
    adapter_name: str = "default",
    initial: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Cosines between the heads of each layer, flattened: `{module path: (N, N)}`.

    With `initial`, a copy of `get_peft_model_state_dict(model)` from before training, between their
    changes B_i - B_i,init. Random heads have cosines near 0 to begin with; a head that is zero, or
    did not change, has cosine 0 with all. ValueError: no such adapter, or not all of it in initial.
    """
    known = {}
    if initial is not None:
        known = {key.removeprefix("base_model.model."): t for key, t in initial.items()}
    cosine = {}
    for path, layer in _layers(model, adapter_name).items():
        B = layer.rlora_B[adapter_name].weight.detach().double()
        if initial is not None:
            old = known.get(f"{path}.rlora_B.weight")
            if old is None or old.shape != B.shape:
                raise ValueError(f"initial has no heads of shape {tuple(B.shape)} for '{path}'.")
            B = B - old.to(B)
        N = layer.configs[adapter_name].num_heads
        heads = B.unflatten(1, (N, -1)).transpose(0, 1).flatten(1)  # (N, d_out r)
        heads = F.normalize(heads)
        cosine[path] = (heads @ heads.T).float().cpu()
    return cosine


@dataclass
class RoutingLog:
    """What `record_routing` collects. `task` and `mask` may be set before a forward."""

    task: str = "all"
    mask: Tensor | None = None  # (batch, tokens), nonzero where one counts; None: all do
    mean: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # task, path: (N,)
    entropy: dict[str, dict[str, float]] = field(default_factory=dict)  # in nats
    _sums: dict = field(default_factory=dict, repr=False)

    @torch.compiler.disable
    @torch.no_grad()
    def add(self, layer: RLoraLayer, x: Tensor, names, *, path: str, adapter_name: str) -> None:
        """Called by a layer with its input, and with the adapter of each row in a mixed batch."""
        rows = slice(None)
        if names is not None:
            rows = [i for i, name in enumerate(names) if name == adapter_name]
        elif adapter_name not in layer.active_adapters:
            return
        counts = torch.ones(x.shape[:-1])
        if self.mask is not None:
            counts = torch.as_tensor(self.mask).cpu()
        if counts.shape != x.shape[:-1]:
            here, given = list(x.shape[:-1]), list(counts.shape)
            raise ValueError(f"'{path}' has {here} tokens, log.mask {given}.")
        g = layer.routing(x[rows], adapter_name).double().cpu()
        g = g[counts[rows] != 0]  # (tokens, N)
        weights, nats, tokens = self._sums.get((self.task, path), (0, 0, 0))
        weights = weights + g.sum(0)
        nats = nats + torch.special.entr(g).sum()
        tokens = tokens + len(g)
        self._sums[self.task, path] = weights, nats, tokens
        if tokens > 0:
            self.mean.setdefault(self.task, {})[path] = (weights / tokens).float()
            self.entropy.setdefault(self.task, {})[path] = (nats / tokens).item()


def record_routing(
    model: nn.Module, adapter_name: str = "default"
) -> AbstractContextManager[RoutingLog]:
    """`with record_routing(model) as log:` collects the routing weights of each forward inside.

    Before a forward, `log.task` (a name, "all" at first) and `log.mask` (batch x tokens, nonzero
    where one counts; None: all do) may be set. `log.mean` is `{task: {module path: (N,)}}`, and
    `log.entropy` `{task: {module path: mean of -sum_i g_i ln g_i}}` in nats: ln N for a uniform
    router, 0 for one head only. In a batch of several adapters, only the rows of this one count.
    ValueError: no such adapter, or a mask that does not fit.
    """
    return _recording(_layers(model, adapter_name), adapter_name)


@contextmanager
def _recording(layers: Mapping[str, RLoraLayer], adapter_name: str) -> Iterator[RoutingLog]:
    log = RoutingLog()
    try:
        for path, layer in layers.items():
            layer.recorders[id(log)] = partial(log.add, path=path, adapter_name=adapter_name)
        yield log
    finally:
        for layer in layers.values():
            layer.recorders.pop(id(log), None)


# ---------------------------------------------------------------- export


@torch.no_grad()
def export_lora(
    model: nn.Module,
    directory: str | os.PathLike,
    weights: str | Sequence[float] | Mapping[str, Sequence[float]] = "mean",
    adapter_name: str = "default",
    batch: Mapping[str, Tensor] | Tensor | None = None,
) -> tuple[float, float] | None:
    """Writes the adapter as a standard PEFT LoRA, for stock PEFT and every server of LoRA adapters.

    A LoRA can't route, so `weights` fixes the routing: "mean" (1/N), N numbers, or `{module path: N
    numbers}`, such as `log.mean[task]` of `record_routing`. For fixed weights the LoRA is exact, of
    rank r, or 2 r with the side pair, which a server must allow; biases and `modules_to_save` go
    along. Both files are written whole before either replaces an old one. Returns, for a `batch`
    to call the model with, `max |routed - exported|` and `||routed - exported|| / ||routed||` of
    its output in evaluation. ValueError: no such adapter, weights that are not N finite numbers for
    each of its layers, or a `batch` while it is not the one active adapter.
    """
    layers = _layers(model, adapter_name)
    model = getattr(model, "_orig_mod", model)
    pairs = {}
    for path, g in _fixed_weights(layers, weights, adapter_name).items():
        pairs[path] = layers[path].lora_pair(adapter_name, torch.as_tensor(g, dtype=torch.float64))
    error = None
    if batch is not None:
        error = _export_error(model, layers, adapter_name, pairs, batch)
    prefix = "base_model.model."
    tensors = {}
    for key, tensor in peft.get_peft_model_state_dict(model, None, adapter_name).items():
        if not SAVED.fullmatch(key):
            tensors[prefix + key.removeprefix(prefix)] = tensor
    for path, (A, B) in pairs.items():
        tensors[f"{prefix}{path}.lora_A.weight"] = A
        tensors[f"{prefix}{path}.lora_B.weight"] = B
    for key, tensor in tensors.items():
        if not _is_here(tensor):
            raise ValueError(f"{key} must be a whole, dense tensor, to be exported.")
        tensors[key] = tensor.cpu().contiguous().clone()
    config = _lora_config(model.peft_config[adapter_name], layers, pairs)
    os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as new:  # both are whole before one is replaced
        safetensors.torch.save_file(tensors, f"{new}/adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(new)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.replace(os.path.join(new, name), os.path.join(directory, name))
    return error


def _fixed_weights(layers: Mapping[str, RLoraLayer], weights, adapter_name: str) -> dict:
    """N numbers for each layer, checked."""
    if not isinstance(weights, Mapping):
        weights = dict.fromkeys(layers, weights)
    odd = sorted(weights.keys() ^ layers.keys())
    if odd:
        raise ValueError(f"weights must name the adapter's layers and no others; see {odd[:3]}.")
    fixed = {}
    for path, g in weights.items():
        N = layers[path].configs[adapter_name].num_heads
        if isinstance(g, str) and g == "mean":
            g = [1 / N] * N
        if isinstance(g, str) or len(g) != N or not all(map(math.isfinite, g)):
            raise ValueError(f"Layer '{path}' needs {N} finite weights or 'mean', got {g!r}.")
        fixed[path] = g
    return fixed


def _lora_config(config: RLoraConfig, layers: Mapping, pairs: Mapping) -> peft.LoraConfig:
    """Of scale 1, as s stands in B; ranks other than the commonest are named by pattern."""
    ranks = {path: len(A) for path, (A, _) in pairs.items()}
    commonest, _ = Counter(ranks.values()).most_common(1)[0]
    others = {re.escape(path): rank for path, rank in ranks.items() if rank != commonest}
    bases = [layer.get_base_layer() for layer in layers.values()]
    return peft.LoraConfig(
        r=commonest,
        lora_alpha=commonest,
        use_rslora=False,
        rank_pattern=others,
        alpha_pattern=dict(others),
        fan_in_fan_out=any(isinstance(base, Conv1D) for base in bases),
        bias=config.bias.replace("rlora", "lora"),
        inference_mode=True,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=config.modules_to_save,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
    )


def _export_error(model, layers, adapter_name, pairs, batch) -> tuple[float, float]:
    """Largest and relative difference of the output, routed against exported."""
    for layer in layers.values():
        if layer.active_adapters != [adapter_name] or layer.disable_adapters or layer.merged:
            raise ValueError(f"For a batch, '{adapter_name}' must be active, alone and unmerged.")
    training = [(module, module.training) for module in model.modules()]
    handles = []
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not see new hooks
            model.eval()
            routed = _output(model, batch)
            for path, (A, B) in pairs.items():
                hook = partial(_as_lora, A=A, B=B)
                handles.append(layers[path].register_forward_hook(hook, with_kwargs=True))
            exported = _output(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training:
            module.training = mode
    difference = routed - exported
    return difference.abs().max().item(), (difference.norm() / routed.norm()).item()


def _as_lora(layer: RLoraLayer, args: tuple, kwargs: dict, _, A: Tensor, B: Tensor) -> Tensor:
    """A forward hook that puts a LoRA in the place of the layer's own output."""
    base = layer.base_layer(*args, **kwargs)
    update = F.linear(F.linear(args[0].to(A.dtype), A), B)
    return (base + update).to(base.dtype)


def _output(model: nn.Module, batch: Mapping[str, Tensor] | Tensor) -> Tensor:
    out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    if not isinstance(out, Tensor):
        out = getattr(out, "logits", out[0])
    return out.double()
