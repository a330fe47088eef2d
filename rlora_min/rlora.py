"""R-LoRA (Liu, Chang and Wu, Findings of EMNLP 2025, arXiv 2502.15455) as a PEFT tuner.

                                      +--> W0 x ----------------------------------+
                                      |                                           |
    x (..., d_in) --------------------+--> A x --> D_1 --> g_1 B_1 --+            v
                                      |   (..., r)  ...      ...     +--> s * --> + --> h (..., d_out)
                                      |        +--> D_N --> g_N B_N --+           ^
                                      |                                           |
                                      +--> g = softmax(W_r x)                     |
                                      |   (..., N)                                |
                                      +--> A0 x --> Bbar0 ---------> -s * --------+

    h(x) = W0 x + s sum_i g_i(x) B_i D_i(A x) - s Bbar0 A0 x,        s = alpha / sqrt(r)

A (r x d_in) is shared, the heads B_i (d_out x r) start at random, D_i is a dropout mask of head i's
own (training only), and A0 and Bbar0 are A and the mean head as they were at the start: frozen,
they take the random start off the output again, so that training begins at the base model.

The forward is packed. With the heads side by side, B = [B_1 | ... | B_N],

    sum_i g_i B_i D_i(A x) = B concat_i(g_i D_i(A x)),

so one product goes down (A, W_r and A0 on top of each other) and one goes up (the heads and Bbar0
side by side), whatever N is. The base weight is read and written by `merge` and `unmerge` alone.
"""

import difflib
import functools
import hashlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import (
    LoraConfig,
    NoMatchingPeftModuleError,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
)
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass
class RLoraConfig(PeftConfig):
    """Settings of an R-LoRA adapter; the fields that PEFT's tuners share have PEFT's meaning.

    The defaults are R-LoRA. HydraLoRA, as R-LoRA's authors compare with it, is
    `init_heads="zeros", dropout_on="input", router_init="kaiming"`; M-LoRA is `router="mean"`; LoRA
    is `num_heads=1, init_heads="zeros", dropout_on="input", router="mean"`.

    Raises:
        ValueError: a value outside what its comment allows, or heads that could never separate.
    """

    r: int = 4  # rank of A and of each head, >= 1
    num_heads: int = 3  # N >= 1
    lora_alpha: float = 32  # > 0
    lora_dropout: float = 0.1  # 0 <= p < 1
    use_rslora: bool = True  # s = alpha / sqrt(r), else alpha / r
    init_heads: str = "random"  # "random" (Table 1, side pair), "centered", "zeros" (HydraLoRA)
    gamma: float = 64  # > 0; at the start RMS(s B_i A x) = alpha / gamma for x of unit RMS
    dropout_on: str = "heads"  # "heads" (a mask a head, on A x), "input" (one mask on x, as LoRA)
    router: str = "softmax"  # "softmax" (a weighting a token), "mean" (no router: M-LoRA)
    router_init: str = "zeros"  # "zeros" (training starts at the base), "kaiming" (as released)
    init_weights: bool = True  # False: nothing zeroed, centred or subtracted, so off the base
    init_seed: int | None = None  # the same adapter on every device, whatever ran before
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"  # "none", "all", "rlora_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "RLORA"
        for name in ("r", "num_heads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(self, name)!r}.")
        for name in ("lora_alpha", "gamma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number > 0, got {getattr(self, name)!r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout!r}.")
        if not (self.init_seed is None or isinstance(self.init_seed, int)):
            raise ValueError(f"init_seed must be an integer or None, got {self.init_seed!r}.")
        for name, allowed in (
            ("init_heads", ("random", "centered", "zeros")),
            ("dropout_on", ("heads", "input")),
            ("router", ("softmax", "mean")),
            ("router_init", ("zeros", "kaiming")),
            ("bias", ("none", "all", "rlora_only")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        masked = self.dropout_on == "heads" and self.lora_dropout > 0
        uniform = self.router == "softmax" and self.router_init == "zeros"
        if self.num_heads > 1 and self.init_heads == "zeros" and uniform and not masked:
            raise ValueError(
                "These heads can never separate: they start equal (init_heads='zeros'), and under "
                "a router that starts uniform (router_init='zeros') without masks of their own "
                "they get equal gradients for ever. Use init_heads='random' or 'centered', "
                "router_init='kaiming', or dropout_on='heads' with lora_dropout > 0."
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform.")

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> "RLoraConfig":
        config = super().from_pretrained(*args, **kwargs)
        config._awaits_weights = True  # not a field, so never saved: see RLoraModel's loading
        return config

    @property
    def scaling(self) -> float:
        """s, the factor on the heads' output."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class RLoraLayer(nn.Module, BaseTunerLayer):
    """A linear map with R-LoRA adapters around it: (..., d_in) -> (..., d_out).

    Each part is a dictionary by adapter name: `rlora_A` (r, d_in), `rlora_B` (d_out, N r), whose
    columns i r to (i + 1) r - 1 are head B_i, `rlora_router` (N, d_in), and the frozen side pair
    `rlora_A0` (r, d_in) and `rlora_B0` (d_out, r).
    """

    adapter_layer_names = ("rlora_A", "rlora_B", "rlora_router")
    other_param_names = ("configs", "rlora_A0", "rlora_B0")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: RLoraConfig, path: str):
        super().__init__()
        self.base_layer = base_layer
        if isinstance(base_layer, Conv1D):  # GPT-2 keeps its weight transposed
            self.in_features, self.out_features = base_layer.weight.shape
        else:
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.configs: dict[str, RLoraConfig] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.rlora_A0, self.rlora_B0 = BufferDict(persistent=True), BufferDict(persistent=True)
        self._disable_adapters, self.merged_adapters = False, []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, path)

    def update_layer(self, adapter_name: str, config: RLoraConfig, path: str) -> None:
        """Adds an adapter, drawn on the CPU; `path` is the module's name in the base model."""
        d_in, d_out, r, N = self.in_features, self.out_features, config.r, config.num_heads
        self.configs[adapter_name] = config
        self.rlora_A[adapter_name] = nn.Linear(d_in, r, bias=False)
        self.rlora_B[adapter_name] = nn.Linear(N * r, d_out, bias=False)
        if config.router == "softmax":
            self.rlora_router[adapter_name] = nn.Linear(d_in, N, bias=False)
        self._draw(adapter_name, path)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def _draw(self, adapter_name: str, path: str) -> None:
        config, generator = self.configs[adapter_name], None
        A, B = self.rlora_A[adapter_name].weight, self.rlora_B[adapter_name].weight
        heads = B.view(self.out_features, config.num_heads, config.r)
        pair = config.init_heads == "random"
        if pair:  # zeros until drawn; real even under PEFT's meta device, which skips buffers
            self.rlora_A0[adapter_name] = torch.zeros(A.shape)
            self.rlora_B0[adapter_name] = torch.zeros(heads[:, 0].shape)
        if A.is_meta:  # nothing to draw: a checkpoint follows
            return
        if config.init_seed is not None:  # a stream for each module, whatever the others draw
            digest = hashlib.sha256(f"{config.init_seed}:{path}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        if config.init_heads == "zeros":
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
            nn.init.kaiming_uniform_(B, a=math.sqrt(5), generator=generator)
        else:  # Table 1; its second argument is a variance
            scale = self.out_features**0.25 / math.sqrt(config.gamma)
            A.normal_(0, scale / math.sqrt(self.in_features), generator=generator)
            B.normal_(0, scale / math.sqrt(self.out_features), generator=generator)
        if config.router == "softmax":
            W_r = self.rlora_router[adapter_name].weight
            nn.init.kaiming_uniform_(W_r, a=math.sqrt(5), generator=generator)
        if not config.init_weights:  # off the identity
            return
        if config.router == "softmax" and config.router_init == "zeros":
            W_r.zero_()
        if config.init_heads == "zeros":
            B.zero_()
        elif pair:
            self.rlora_A0[adapter_name].copy_(A)
            self.rlora_B0[adapter_name].copy_(heads.mean(1))  # Bbar0
        else:
            heads -= heads.mean(1, keepdim=True)

    def _move_adapter_to_device_of_base_layer(self, adapter_name, device=None) -> None:
        # PEFT rounds a new adapter to the base's dtype and casts it back. Here the draw stays in
        # fp32 (or more), or A and B would be rounded apart from A0 and Bbar0 and miss the start.
        weight = self.weight
        dtype = torch.float32
        if weight.dtype.is_floating_point:
            dtype = torch.promote_types(dtype, weight.dtype)
        self._cast(adapter_name, device if device is not None else weight.device, dtype)

    def _cast(self, adapter_name: str, device: torch.device, dtype: torch.dtype) -> None:
        for name in (*self.adapter_layer_names, "rlora_A0", "rlora_B0"):
            parts = getattr(self, name)
            if adapter_name in parts and not any(t.is_meta for t in parts.state_dict().values()):
                parts[adapter_name] = parts[adapter_name].to(device, dtype)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(..., d_in) -> (..., d_out)"""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        if not self.disable_adapters and not self.merged:
            for adapter_name in self.active_adapters:
                if adapter_name in self.rlora_A:
                    result = result + self._update(x, adapter_name)
        return result.to(dtype)

    def _update(self, x: Tensor, adapter_name: str) -> Tensor:
        """s sum_i g_i B_i D_i(A x) - s Bbar0 A0 x: (..., d_in) -> (..., d_out)"""
        config = self.configs[adapter_name]
        N, r, s, p = config.num_heads, config.r, config.scaling, config.lora_dropout
        A, B = self.rlora_A[adapter_name].weight, self.rlora_B[adapter_name].weight
        W_r = [self.rlora_router[adapter_name].weight] if adapter_name in self.rlora_router else []
        A0 = [self.rlora_A0[adapter_name]] if adapter_name in self.rlora_A0 else []
        x = self._cast_input_dtype(x, A.dtype)

        down = torch.cat([A, *W_r, *A0])  # (r [+ N] [+ r], d_in)
        if config.dropout_on == "input" and self.training and p > 0:  # A alone sees the masked x
            Ax, rest = F.linear(F.dropout(x, p), A), F.linear(x, down[r:])
        else:
            Ax, rest = F.linear(x, down).tensor_split([r], -1)  # (..., r), (..., [N] [+ r])
        if W_r:
            g = _softmax(rest[..., :N])  # (..., N)
        else:
            g = Ax.new_full((N,), 1 / N)
        heads = (s * g).unsqueeze(-1) * Ax.unsqueeze(-2)  # (..., N, r)
        if config.dropout_on == "heads":
            heads = F.dropout(heads, p, self.training)  # D_i: a mask for each head
        heads = heads.flatten(-2)  # concat_i(s g_i D_i(A x)): (..., N r)
        if A0:
            heads = torch.cat([heads, -s * rest[..., -r:]], -1)  # (..., N r + r)
            B = torch.cat([B, self.rlora_B0[adapter_name]], 1)  # (d_out, N r + r)
        return F.linear(heads, B)

    def routing(self, x: Tensor, adapter_name: str = "default") -> Tensor:
        """g(x), which dropout never touches: (..., d_in) -> (..., N), each row summing to 1."""
        if adapter_name not in self.rlora_router:
            N = self.configs[adapter_name].num_heads
            return x.new_full((*x.shape[:-1], N), 1 / N, dtype=torch.float32)
        W_r = self.rlora_router[adapter_name].weight
        return _softmax(F.linear(self._cast_input_dtype(x, W_r.dtype), W_r))

    def lora_pair(self, adapter_name: str, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The layer under fixed weights (N,), as one LoRA of scale 1.

        Because A is shared, sum_i g_i B_i A is (sum_i g_i B_i) A, of rank r; the side pair adds r.
        Returns the A (r' x d_in) and the B (d_out x r') of it.
        """
        config = self.configs[adapter_name]
        A, B = self.rlora_A[adapter_name].weight, self.rlora_B[adapter_name].weight
        heads = B.view(self.out_features, config.num_heads, config.r)
        B = config.scaling * torch.einsum("onr,n->or", heads, weights.to(B))
        if adapter_name in self.rlora_A0:
            A = torch.cat([A, self.rlora_A0[adapter_name]])
            B = torch.cat([B, -config.scaling * self.rlora_B0[adapter_name]], 1)
        return A, B

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What `merge` adds to the base weight, in its shape; needs `router="mean"`."""
        config = self.configs[adapter_name]
        if config.router != "mean":
            raise ValueError(
                f"Adapter '{adapter_name}' can't be merged: its softmax router weights the heads "
                "anew for each token, and one weight matrix can't. Use rlora_min.export_lora to "
                "write a plain LoRA for fixed weights, or train with router='mean'."
            )
        A, B = self.lora_pair(adapter_name, torch.full((config.num_heads,), 1 / config.num_heads))
        delta = B @ A
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters to the base weight; with `safe_merge` only if the sum is finite."""
        names = [
            name for name in check_adapters_to_merge(self, adapter_names) if name in self.rlora_A
        ]
        deltas = [self.get_delta_weight(name) for name in names]  # all of them, or none
        if not deltas:
            return
        weight = self.get_base_layer().weight
        if not weight.dtype.is_floating_point:
            raise ValueError(
                f"A base weight of type {weight.dtype} can't take a merge; use export_lora."
            )
        merged = weight.data.clone() if safe_merge else weight.data
        for delta in deltas:
            merged += delta.to(merged)
        if safe_merge:
            if not merged.isfinite().all():
                raise ValueError(f"NaNs or infinities in the merged weights of adapters {names}.")
            weight.data = merged
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes every merged adapter off the base weight again, up to rounding."""
        weight = self.get_base_layer().weight
        while self.merged_adapters:
            weight.data -= self.get_delta_weight(self.merged_adapters.pop()).to(weight)

    def adapter_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """The adapter's parameters and buffers by their names in this layer's state dict."""
        return {
            f"{part}.{key}": tensor
            for part in (*self.adapter_layer_names, "rlora_A0", "rlora_B0")
            for key, tensor in getattr(self, part).state_dict(keep_vars=True).items()
            if key.split(".")[0] == adapter_name
        }

    def check_tensors(self, adapter_name: str, state_dict: Mapping, prefix: str) -> None:
        """Raises ValueError unless `state_dict` holds this layer's adapter, whole and finite."""
        for name, own in self.adapter_tensors(adapter_name).items():
            tensor, where = (
                state_dict.get(prefix + name),
                f"adapter '{adapter_name}': {prefix}{name}",
            )
            if tensor is None:
                raise ValueError(f"{where} is missing in the checkpoint.")
            if tensor.shape != own.shape:
                raise ValueError(
                    f"{where} has shape {tuple(tensor.shape)} in the checkpoint, and this base and "
                    f"config need {tuple(own.shape)}."
                )
            if not tensor.isfinite().all():
                raise ValueError(f"{where} has NaNs or infinities in the checkpoint.")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # Loading an adapter is not strict in PEFT, so half an adapter would pass in silence.
        for adapter_name in self.configs:
            if any(prefix + name in state_dict for name in self.adapter_tensors(adapter_name)):
                self.check_tensors(adapter_name, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(logits)


class RLoraModel(BaseTuner):
    """Puts an `RLoraLayer` around each target of a model; made by `peft.get_peft_model`."""

    prefix = "rlora_"
    tuner_layer_cls = RLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, config: RLoraConfig, model: nn.Module) -> None:
        # PEFT calls this before it changes anything: the place to refuse, and leave the model whole.
        if config.target_modules in ("all-linear", "dummy-target-modules"):
            return
        targets, names, tuned = [], set(), "\0"
        for path, module in model.named_modules():
            if path.startswith(tuned + ".") or not path:
                continue
            if isinstance(module, BaseTunerLayer):
                tuned = path
            if self._check_target_module_exists(config, path):
                targets.append((path, module))
            if _unsupported(module) is None:
                names |= {path, path.rpartition(".")[2]}
        for path, module in targets:
            if reason := _unsupported(module):
                raise ValueError(f"Target module '{path}' is {reason}")
        if not targets:
            wanted = config.target_modules
            wanted = [wanted] if isinstance(wanted, str) else sorted(wanted)
            close = {c for w in wanted for c in difflib.get_close_matches(w, names, 3, 0.5)}
            short = sorted({name.rpartition(".")[2] for name in names})
            raise NoMatchingPeftModuleError(
                f"Target modules {wanted} not found in the base model (after exclude_modules, "
                f"layers_to_transform and modules_to_save). Closest names: {sorted(close) or 'none'}"
                f"; it has linear layers named {short[:20]}."
            )

    def _create_and_replace(
        self, config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        if isinstance(target, RLoraLayer):
            target.update_layer(adapter_name, config, current_key)
            return
        layer = self._create_new_module(config, adapter_name, target, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @staticmethod
    def _create_new_module(config, adapter_name, target, path) -> RLoraLayer:
        if reason := _unsupported(target):
            raise ValueError(f"Target module '{path}' is {reason}")
        return RLoraLayer(target, adapter_name, config, path)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if autocast_adapter_dtype:  # the layers drew and keep fp32
            return
        for layer in self.model.modules():
            if isinstance(layer, RLoraLayer) and layer.weight.dtype.is_floating_point:
                layer._cast(adapter_name, layer.weight.device, layer.weight.dtype)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """PEFT's way into loading, and the one place that sees a checkpoint whole.

        PEFT has injected the adapter by now, and loads non-strictly: it would pass over tensors
        that are missing or left over. An adapter that was injected only for this checkpoint, and so
        holds nobody's work, is taken out again when the checkpoint is refused.
        """
        state_dict = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        try:
            _check_checkpoint(model, adapter_name, state_dict)
        except ValueError:
            tuner = getattr(model, "base_model", None)
            fresh = config.inference_mode and getattr(config, "_awaits_weights", False)
            if fresh and isinstance(tuner, RLoraModel):
                tuner.delete_adapter(adapter_name)
                if not tuner.peft_config:
                    tuner.unload()
            raise
        config._awaits_weights = False
        return state_dict


PEFT_TYPE_TO_CONFIG_MAPPING["RLORA"] = RLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING["RLORA"] = RLoraModel
PEFT_TYPE_TO_PREFIX_MAPPING["RLORA"] = RLoraModel.prefix


def _unsupported(module: nn.Module) -> str | None:
    """Why a module can't be adapted, or None."""
    if isinstance(module, RLoraLayer):
        return None
    kind = type(module).__name__
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"a {kind}, whose forward nn.MultiheadAttention never calls; R-LoRA can't adapt it."
    linear = all(isinstance(getattr(module, f"{s}_features", None), int) for s in ("in", "out"))
    if linear or isinstance(module, Conv1D):
        return None
    return f"a {kind}; R-LoRA adapts linear layers alone (nn.Linear and its kin, Conv1D of GPT-2)."


def _check_checkpoint(model: nn.Module, adapter_name: str, state_dict: Mapping) -> None:
    prefix = "base_model.model."
    wrapped = any(name.startswith(prefix) for name, _ in model.named_modules())
    if not wrapped:  # injected without a PeftModel, which PEFT allows
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    for path, layer in model.named_modules():
        if isinstance(layer, RLoraLayer) and adapter_name in layer.configs:
            layer.check_tensors(adapter_name, state_dict, f"{path}.")
    known = model.state_dict().keys()  # and, as PEFT saves some biases of modules_to_save twice:
    known |= {RLoraModel._remove_adapter_name_from_key(key, adapter_name) for key in known}
    if extra := sorted(state_dict.keys() - known):
        raise ValueError(
            f"adapter '{adapter_name}': the checkpoint holds {len(extra)} tensors that this model "
            f"has no place for, such as {extra[:3]}. Was it trained on another base?"
        )
    if broken := [k for k, v in state_dict.items() if not v.isfinite().all()]:
        raise ValueError(f"adapter '{adapter_name}': NaNs or infinities in {broken[:3]}.")


def _layers(model: nn.Module, adapter_name: str) -> dict[str, RLoraLayer]:
    """The layers that hold the adapter, by their module path in the base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {path: m for path, m in base.named_modules() if isinstance(m, RLoraLayer)}
    if names := sorted({name for layer in layers.values() for name in layer.configs}):
        layers = {path: layer for path, layer in layers.items() if adapter_name in layer.configs}
    if not layers:
        raise ValueError(f"No R-LoRA adapter '{adapter_name}' in this model; it has {names}.")
    return layers


def head_similarity(
    model: nn.Module, adapter_name: str = "default", initial: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Cosines between the heads of each layer, flattened: `{module path: (N, N)}`.

    Two random matrices have a cosine near 0 already, so the similarity of trained heads says little
    about what training did. With `initial`, the adapter's state dict from before training (a copy
    of `get_peft_model_state_dict(model)`), it is that of their change, B - B_init. A head that is
    zero, or did not change, has cosine 0 with every head, itself included.

    Raises:
        ValueError: no such adapter, or `initial` lacks a layer's heads or has others' shape.
    """
    similarity = {}
    for path, layer in _layers(model, adapter_name).items():
        B = layer.rlora_B[adapter_name].weight.detach().double()
        if initial is not None:
            key = next((k for k in initial if k.endswith(f"{path}.rlora_B.weight")), None)
            if key is None or initial[key].shape != B.shape:
                raise ValueError(f"initial holds no heads of shape {tuple(B.shape)} for '{path}'.")
            B = B - initial[key].to(B)
        N = layer.configs[adapter_name].num_heads
        heads = B.view(layer.out_features, N, -1).transpose(0, 1).flatten(1)  # (N, d_out r)
        heads = F.normalize(heads, dim=1)
        similarity[path] = (heads @ heads.T).float().cpu()
    return similarity


class RoutingLog:
    """What `record_routing` collects. Set `task` and `mask` before a forward to label its tokens.

    task: a name under which the next forwards are counted.
    mask: (batch, tokens), nonzero where a token counts, such as the attention mask; None: all do.
    mean: `{task: {module path: (N,)}}`, the mean routing weights.
    entropy: `{task: {module path: float}}`, the mean over tokens of -sum_i g_i ln g_i, in nats;
        ln N for a uniform router, 0 for one that always picks a single head.
    """

    def __init__(self) -> None:
        self.task, self.mask = "all", None
        self._sums: dict[str, dict[str, tuple[Tensor, float, float]]] = {}

    def _add(self, path: str, g: Tensor) -> None:
        mask = torch.ones(g.shape[:-1]) if self.mask is None else torch.as_tensor(self.mask)
        if mask.shape != g.shape[:-1]:
            raise ValueError(
                f"log.mask has shape {tuple(mask.shape)}, and the tokens at '{path}' have "
                f"{tuple(g.shape[:-1])}."
            )
        g = g.double()[mask.to(g.device) != 0]  # (tokens, N)
        new = (g.sum(0).cpu(), -torch.xlogy(g, g).sum().item(), len(g))
        sums = self._sums.setdefault(self.task, {})
        sums[path] = tuple(a + b for a, b in zip(sums.get(path, (0, 0, 0)), new, strict=True))

    def _by_task(self, value) -> dict[str, dict]:
        return {
            task: {path: value(*sums) for path, sums in layers.items() if sums[-1]}
            for task, layers in self._sums.items()
        }

    @property
    def mean(self) -> dict[str, dict[str, Tensor]]:
        return self._by_task(lambda g, entropy, count: (g / count).float())

    @property
    def entropy(self) -> dict[str, dict[str, float]]:
        return self._by_task(lambda g, entropy, count: entropy / count)


@contextmanager
def record_routing(model: nn.Module, adapter_name: str = "default") -> Iterator[RoutingLog]:
    """`with record_routing(model) as log:` collects each layer's routing weights, see `RoutingLog`.

    A layer is recorded while the adapter is active in it; with `router="mean"` it shows 1/N.

    Raises:
        ValueError: no such adapter, or `log.mask` does not fit the tokens of a forward.
    """
    log = RoutingLog()

    def hook(path: str, layer: RLoraLayer, x: Tensor) -> None:
        if adapter_name in layer.active_adapters and not layer.disable_adapters:
            with torch.no_grad():
                log._add(path, layer.routing(x, adapter_name))

    handles = [
        layer.register_forward_pre_hook(lambda layer, args, path=path: hook(path, layer, args[0]))
        for path, layer in _layers(model, adapter_name).items()
    ]
    try:
        yield log
    finally:
        for handle in handles:
            handle.remove()


class ExportError(NamedTuple):
    """How far an export's output is from the routed model's on a batch."""

    largest: float  # max |routed - exported|
    relative: float  # ||routed - exported|| / ||routed||


@torch.no_grad()
def export_lora(
    model: nn.Module,
    directory: str | os.PathLike,
    weights: str | Sequence[float] | Mapping[str, Sequence[float]] = "mean",
    adapter_name: str = "default",
    batch: Mapping[str, Tensor] | Tensor | None = None,
) -> ExportError | None:
    """Writes the adapter as a standard PEFT LoRA, for stock PEFT and every server of LoRA adapters.

    A LoRA can't route, so `weights` fixes the routing: "mean" (1/N each), N numbers, or `{module
    path: N numbers}` for every layer, such as `log.mean[task]` of `record_routing`. For fixed
    weights the LoRA is exact, of rank r, or 2 r with the side pair. Biases and `modules_to_save`
    go along. Both files are written whole before either replaces an old one.

    Returns:
        With `batch` (what the model is called with), how far the output under fixed weights is from
        the routed model's in evaluation, over all positions; None without.

    Raises:
        ValueError: no such adapter, weights that are not N finite numbers, a layer without weights
            or weights without a layer, or a `batch` while the adapter is not the active one.
    """
    layers = _layers(model, adapter_name)
    if isinstance(weights, str) and weights != "mean":
        raise ValueError(f"weights must be 'mean', N numbers or a mapping, got {weights!r}.")
    if isinstance(weights, Mapping) and (odd := sorted(weights.keys() ^ layers.keys())):
        raise ValueError(f"weights must name each layer that holds the adapter; odd: {odd[:3]}.")
    pairs = {}
    for path, layer in layers.items():
        N = layer.configs[adapter_name].num_heads
        g = weights[path] if isinstance(weights, Mapping) else weights
        g = torch.full((N,), 1 / N) if isinstance(g, str) else torch.as_tensor(g).float()
        if g.shape != (N,) or not g.isfinite().all():
            raise ValueError(f"Layer '{path}' needs {N} finite weights, got {g.tolist()}.")
        pairs[path] = layer.lora_pair(adapter_name, g)

    config = layer.configs[adapter_name]
    r = pairs[path][0].shape[0]
    lora = LoraConfig(
        r=r,
        lora_alpha=r,  # scale 1: s stands in B
        bias="lora_only" if config.bias == "rlora_only" else config.bias,
        fan_in_fan_out=any(isinstance(x.get_base_layer(), Conv1D) for x in layers.values()),
        inference_mode=True,
        **{name: getattr(config, name) for name in _SHARED_FIELDS},
    )
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {key: tensor for key, tensor in tensors.items() if ".rlora_" not in key}
    for path, (A, B) in pairs.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = A
        tensors[f"base_model.model.{path}.lora_B.weight"] = B
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}

    error = None if batch is None else _export_error(model, layers, adapter_name, pairs, batch)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        save_file(tensors, Path(scratch, "adapter_model.safetensors"), metadata={"format": "pt"})
        lora.save_pretrained(scratch)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.replace(Path(scratch, name), directory / name)
    return error


_SHARED_FIELDS = (
    "task_type base_model_name_or_path revision target_modules exclude_modules "
    "layers_to_transform layers_pattern modules_to_save"
).split()


def _export_error(model, layers, adapter_name, pairs, batch) -> ExportError:
    if any(layer.active_adapters != [adapter_name] for layer in layers.values()):
        raise ValueError(f"To measure on a batch, make '{adapter_name}' the one active adapter.")

    def output() -> Tensor:
        out = model(**batch) if isinstance(batch, Mapping) else model(batch)
        out = getattr(out, "logits", out)
        return (out if isinstance(out, Tensor) else out[0]).double()

    def exported(layer, args, result, A, B):
        x = layer._cast_input_dtype(args[0], A.dtype)
        return (layer.base_layer(*args) + F.linear(F.linear(x, A), B)).to(result.dtype)

    training = {module: module.training for module in model.modules()}
    model.eval()
    handles = []
    try:
        routed = output()
        for path, layer in layers.items():
            hook = functools.partial(exported, A=pairs[path][0], B=pairs[path][1])
            handles.append(layer.register_forward_hook(hook))
        difference = routed - output()
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return ExportError(difference.abs().max().item(), (difference.norm() / routed.norm()).item())
