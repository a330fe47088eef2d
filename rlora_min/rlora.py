"""R-LoRA (Liu, Chang and Wu, Findings of EMNLP 2025, arXiv 2502.15455) as a PEFT tuner.

                 +--> W0 x ------------------------------------------+
                 |                                                   v
    x (d_in) ----+--> A x (r) --+--> D_1 --> g_1 B_1 --+--> s * -->  +  --> h (d_out)
                 |              +--> D_N --> g_N B_N --+             ^
                 +--> g = softmax(W_r x) (N)                         |
                 +--> A0 x (r) --> Bbar0 ---------------> -s * ------+

    h(x) = W0 x + s sum_i g_i(x) B_i D_i(A x) - s Bbar0 A0 x,        s = alpha / sqrt(r)

A (r x d_in) is shared, the heads B_i (d_out x r) start at random, D_i is head i's own dropout mask
(training only). A0 and Bbar0, A and the mean head as drawn, stay frozen and take the random start
off the output: training begins at the base model. The forward is packed: one product down (A, W_r,
A0 stacked), one up ([B_1 | ... | B_N] concat_i(g_i D_i(A x))). W0 is touched by merging alone.
"""

import difflib
import functools
import hashlib
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

import peft
import safetensors.torch
import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass
class RLoraConfig(peft.PeftConfig):
    """Settings of an R-LoRA adapter; wrong ones are a ValueError, shared ones have PEFT's meaning.

    The defaults are R-LoRA. HydraLoRA, as R-LoRA's authors compare with it, is
    `init_heads="zeros", dropout_on="input", router_init="kaiming"`; M-LoRA is `router="mean"`; LoRA
    is `num_heads=1, init_heads="zeros", dropout_on="input", router="mean"`.
    """

    r: int = 4  # rank of A and of each head, >= 1
    num_heads: int = 3  # N >= 1
    lora_alpha: float = 32  # > 0
    lora_dropout: float = 0.1  # 0 <= p < 1
    use_rslora: bool = True  # s = alpha / sqrt(r), else alpha / r
    init_heads: Literal["random", "centered", "zeros"] = "random"  # Table 1; less its mean; Hydra
    gamma: float = 64  # > 0; at the start RMS(s B_i A x) = alpha / gamma for x of unit RMS
    dropout_on: Literal["heads", "input"] = "heads"  # a mask a head on A x; one on x, as LoRA
    router: Literal["softmax", "mean"] = "softmax"  # a weighting a token; no router (M-LoRA)
    router_init: Literal["zeros", "kaiming"] = "zeros"  # starts at the base; as released
    init_weights: bool = True  # False: nothing zeroed, centred or subtracted, so off the base
    init_seed: int | None = None  # the same adapter on every device, whatever ran before
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "rlora_only"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "RLORA"
        for f in fields(RLoraConfig):
            if get_origin(f.type) is Literal and getattr(self, f.name) not in get_args(f.type):
                allowed = f"{get_args(f.type)}, got {getattr(self, f.name)!r}"
                raise ValueError(f"{f.name} must be one of {allowed}.")
        for name in ("r", "num_heads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(self, name)!r}.")
        for name in ("lora_alpha", "gamma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number > 0, got {getattr(self, name)!r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout!r}.")
        uniform = self.router == "softmax" and self.router_init == "zeros"
        masked = self.dropout_on == "heads" and self.lora_dropout > 0
        if self.num_heads > 1 and self.init_heads == "zeros" and uniform and not masked:
            raise ValueError(
                "These heads can never separate: zero heads start equal, and under a router that "
                "starts uniform they get equal gradients for ever. Use random or centered heads, "
                "router_init='kaiming', or dropout_on='heads' with lora_dropout > 0."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        file = f"{pretrained_model_name_or_path}/{subfolder or '.'}/adapter_model.safetensors"
        try:  # PEFT reads it after it has changed the model
            safetensors.safe_open(file, "pt") if os.path.isfile(file) else None
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is not a whole file of tensors: {error}") from error
        config._loading = [], []  # not a field, so never saved; RLoraModel fills and reads it
        return config

    @property
    def scaling(self) -> float:
        """s, the factor on the heads' output."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def _check(adapter_name: str, state: Mapping, checkpoint: Mapping, whole: bool = True) -> None:
    own = re.compile(rf"(^|\.)rlora_\w+\.{re.escape(adapter_name)}(\.weight)?$")
    needed = {name for name in state if own.search(name)}
    if not (whole or needed & checkpoint.keys()):
        return  # tensors of the base or of other adapters
    for name in sorted(needed | checkpoint.keys() if whole else needed):
        here, new = (tuple(t[name].shape) if name in t else "none" for t in (state, checkpoint))
        if here != new or not checkpoint[name].isfinite().all():
            what = f"{name}: the model has {here}, the checkpoint {new}, and all must be finite"
            raise ValueError(f"Adapter '{adapter_name}' can't load {what}.")


def _load_whole(self, state_dict, prefix, *args, **kwargs) -> None:
    # RLoraModel sees all layers before the first is copied; a layer is for models without it.
    state = self.state_dict(prefix=prefix)
    for name in self.peft_config if isinstance(self, BaseTuner) else self.configs:
        _check(name, state, state_dict, whole=False)
    nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)


class RLoraLayer(nn.Module, BaseTunerLayer):
    """A linear map with R-LoRA adapters around it: (..., d_in) -> (..., d_out).

    By adapter name, it holds `rlora_A` (r, d_in), `rlora_B` (d_out, N r) with head B_i in columns
    i r to (i + 1) r - 1, `rlora_router` (N, d_in), and `rlora_A0` (r, d_in), `rlora_B0` (d_out, r).
    """

    adapter_layer_names = ("rlora_A", "rlora_B", "rlora_router")
    other_param_names = ("rlora_A0", "rlora_B0", "configs")
    _load_from_state_dict = _load_whole

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: RLoraConfig, path: str):
        super().__init__()
        self.base_layer, self.configs = base_layer, {}
        self.in_features = getattr(base_layer, "in_features", None) or base_layer.weight.shape[0]
        self.out_features = getattr(base_layer, "out_features", None) or base_layer.weight.shape[1]
        self.rlora_A, self.rlora_B, self.rlora_router = (nn.ModuleDict() for _ in range(3))
        self.rlora_A0, self.rlora_B0 = BufferDict(persistent=True), BufferDict(persistent=True)
        self._disable_adapters, self._active_adapter, self.merged_adapters = False, adapter_name, []
        self.update_layer(adapter_name, config, path)

    @torch.inference_mode(False)
    def update_layer(self, adapter_name: str, config: RLoraConfig, path: str) -> None:
        """Adds an adapter, drawn on the CPU; `path` is the module's name in the base model."""
        self.configs[adapter_name], r, N = config, config.r, config.num_heads
        with torch.device("meta" if self.weight.device.type == "meta" else "cpu"):
            self.rlora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
            self.rlora_B[adapter_name] = nn.Linear(N * r, self.out_features, bias=False)
            if config.router == "softmax":
                self.rlora_router[adapter_name] = nn.Linear(self.in_features, N, bias=False)
            if config.init_heads == "random":  # real even where PEFT makes parameters on meta
                self.rlora_A0[adapter_name] = torch.zeros(r, self.in_features)
                self.rlora_B0[adapter_name] = torch.zeros(self.out_features, r)
        if not self.rlora_A[adapter_name].weight.is_meta:  # else a checkpoint follows
            self._draw(adapter_name, config, path)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if hasattr(config, "_loading"):
            config._loading[1].append((B := self.rlora_B[adapter_name].weight, B._version))

    @torch.no_grad()
    def _draw(self, adapter_name: str, config: RLoraConfig, path: str) -> None:
        generator = None
        if config.init_seed is not None:  # a stream for each module, whatever the others draw
            digest = hashlib.sha256(f"{config.init_seed}:{path}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        kaiming = functools.partial(nn.init.kaiming_uniform_, a=math.sqrt(5), generator=generator)
        A, B = self.rlora_A[adapter_name].weight, self.rlora_B[adapter_name].weight
        heads = B.view(self.out_features, config.num_heads, config.r)
        if config.init_heads == "zeros":
            kaiming(A)
            kaiming(B) if not config.init_weights else B.zero_()
        else:  # Table 1; its second argument is a variance
            scale = self.out_features**0.25 / math.sqrt(config.gamma)
            A.normal_(0, scale / math.sqrt(self.in_features), generator=generator)
            B.normal_(0, scale / math.sqrt(self.out_features), generator=generator)
        if config.init_heads == "random" and config.init_weights:
            self.rlora_A0[adapter_name].copy_(A)
            self.rlora_B0[adapter_name].copy_(heads.mean(1))  # Bbar0
        elif config.init_heads == "centered" and config.init_weights:
            heads -= heads.mean(1, keepdim=True)
        if config.router == "softmax":
            W_r = self.rlora_router[adapter_name].weight
            zeros = config.router_init == "zeros" and config.init_weights
            W_r.zero_() if zeros else kaiming(W_r)

    def _move_adapter_to_device_of_base_layer(self, adapter_name, device=None, rounded=False):
        # In fp32 or more, unlike PEFT's: A, B rounded apart from A0, Bbar0 would miss the start.
        weight, dtype = self.weight, torch.float32
        if weight.dtype.is_floating_point:
            dtype = weight.dtype if rounded else torch.promote_types(dtype, weight.dtype)
        for name in (*self.adapter_layer_names, "rlora_A0", "rlora_B0"):
            parts = getattr(self, name)
            if adapter_name in parts and not any(t.is_meta for t in parts.parameters()):
                parts[adapter_name] = parts[adapter_name].to(device or weight.device, dtype)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(..., d_in) -> (..., d_out)"""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = base = self.base_layer(x, *args, **kwargs)
        if not self.disable_adapters and not self.merged:
            for adapter_name in self.active_adapters:
                if adapter_name in self.rlora_A:
                    update = self._update(x, adapter_name)  # takes the sum: large new tensors cost
                    same = update.dtype == result.dtype
                    result = update.add_(result) if same else result + update
        return result.to(base.dtype)

    def _update(self, x: Tensor, adapter_name: str) -> Tensor:
        """s sum_i g_i B_i D_i(A x) - s Bbar0 A0 x, a new tensor: (..., d_in) -> (..., d_out)"""
        config = self.configs[adapter_name]
        N, r, s, p = config.num_heads, config.r, config.scaling, config.lora_dropout
        A, B = self.rlora_A[adapter_name].weight, self.rlora_B[adapter_name].weight
        W_r = [self.rlora_router[adapter_name].weight] if adapter_name in self.rlora_router else []
        A0 = [self.rlora_A0[adapter_name]] if adapter_name in self.rlora_A0 else []
        x, down = self._cast_input_dtype(x, A.dtype), torch.cat([A, *W_r, *A0])
        if config.dropout_on == "input" and self.training and p > 0:  # only A sees the masked x
            Ax, rest = F.linear(F.dropout(x, p), A), F.linear(x, down[r:])
        else:
            Ax, rest = F.linear(x, down).tensor_split([r], -1)  # (..., r), (..., [N] [+ r])
        g = Ax.new_full((N,), 1 / N)
        if W_r:
            g = rest[..., :N].softmax(-1, torch.promote_types(A.dtype, torch.float32)).to(Ax)
        heads = (s * g).unsqueeze(-1) * Ax.unsqueeze(-2)  # (..., N, r)
        masked = self.training and config.dropout_on == "heads"  # D_i: a mask for each head
        heads = F.dropout(heads, p, masked).flatten(-2)  # concat_i(s g_i D_i(A x)): (..., N r)
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
        logits = F.linear(self._cast_input_dtype(x, W_r.dtype), W_r)
        return logits.softmax(-1, torch.promote_types(W_r.dtype, torch.float32))

    def lora_pair(self, adapter_name: str, weights: Tensor) -> tuple[Tensor, Tensor]:
        """A (r', d_in) and B (d_out, r') of the LoRA of scale 1 that fixed weights (N,) make of it:
        A is shared, so sum_i g_i B_i A = (sum_i g_i B_i) A has rank r; the side pair adds r."""
        A, B = self.rlora_A[adapter_name].weight, self.rlora_B[adapter_name].weight
        s = self.configs[adapter_name].scaling
        B = s * torch.einsum("onr,n->or", B.unflatten(1, (len(weights), -1)), weights.to(B))
        if adapter_name in self.rlora_A0:
            A = torch.cat([A, self.rlora_A0[adapter_name]])
            B = torch.cat([B, -s * self.rlora_B0[adapter_name]], 1)
        return A, B

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What `merge` adds to the base weight, in its shape. ValueError: a softmax router."""
        config = self.configs[adapter_name]
        if config.router != "mean":
            why = "its softmax router weights the heads anew for each token"
            raise ValueError(f"'{adapter_name}' can't be merged: {why}. Use rlora_min.export_lora.")
        A, B = self.lora_pair(adapter_name, torch.full((config.num_heads,), 1 / config.num_heads))
        return (B @ A).T if isinstance(self.get_base_layer(), Conv1D) else B @ A

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the base weight, with `safe_merge` only if the sum is finite."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.rlora_A]
        deltas, weight = [self.get_delta_weight(n) for n in names], self.get_base_layer().weight
        if not weight.dtype.is_floating_point:
            raise ValueError(f"A base weight of {weight.dtype} can't be merged into: export_lora.")
        merged = weight.data + sum(delta.to(weight) for delta in deltas)
        if safe_merge and not merged.isfinite().all():
            raise ValueError(f"NaNs or infinities in the base weight merged with {names}.")
        weight.data, self.merged_adapters = merged, self.merged_adapters + names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes every merged adapter off the base weight again, up to rounding."""
        weight = self.get_base_layer().weight
        while self.merged_adapters:
            weight.data -= self.get_delta_weight(self.merged_adapters.pop()).to(weight)


def _check_target(path: str, module: nn.Module) -> None:
    linear = all(isinstance(getattr(module, f"{s}_features", None), int) for s in ("in", "out"))
    called = not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if not (linear and called or isinstance(module, Conv1D)):
        kind = f"a {type(module).__name__}; only linear layers and GPT-2's Conv1D"
        raise ValueError(f"R-LoRA can't adapt '{path}', {kind}, not inside MultiheadAttention.")


class RLoraModel(BaseTuner):
    """Puts an `RLoraLayer` around each target of a model; made by `peft.get_peft_model`."""

    prefix = "rlora_"
    tuner_layer_cls = RLoraLayer
    target_module_mapping = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    _load_from_state_dict = _load_whole

    def _prepare_model(self, config: RLoraConfig, model: nn.Module) -> None:
        # PEFT calls this before it changes anything, so a refusal here leaves the model whole.
        if hasattr(config, "_loading"):
            config._loading = [p for p in model.parameters() if p.requires_grad], []
        peft.tuners.tuners_utils._maybe_include_all_linear_layers(config, model)
        inner = re.compile(r"\.(base_layer|rlora_\w+)(\.|$)")  # parts of adapters already there
        modules = {n: m for n, m in model.named_modules() if n and not inner.search(n)}
        targets = [name for name in modules if self._check_target_module_exists(config, name)]
        for name in targets:
            _check_target(name, modules[name])
        if not targets and config.target_modules != "dummy-target-modules":
            wanted = [w] if isinstance(w := config.target_modules, str) else sorted(w)
            names = sorted({*modules, *(name.rpartition(".")[2] for name in modules)})
            close = [name for w in wanted for name in difflib.get_close_matches(w, names, 3, 0.5)]
            raise peft.NoMatchingPeftModuleError(
                f"Target modules {wanted} not found in the base model, after exclude_modules, "
                f"layers_to_transform and modules_to_save. Closest names: {close or names[:20]}."
            )

    def _create_and_replace(self, config, adapter_name, target, name, parent, current_key) -> None:
        if isinstance(target, RLoraLayer):
            return target.update_layer(adapter_name, config, current_key)
        _check_target(current_key, target)  # again: a checkpoint's keys may have named it
        layer = RLoraLayer(target, adapter_name, config, current_key)
        self._replace_module(parent, name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in self.model.modules():
            if isinstance(layer, RLoraLayer) and not autocast_adapter_dtype:
                layer._move_adapter_to_device_of_base_layer(adapter_name, rounded=True)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        # The step of PEFT's loading that sees a checkpoint whole, before any tensor is copied.
        given = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        state = model.state_dict()
        if not any(key.startswith("base_model.model.") for key in state):  # not in a PeftModel
            given = {k.removeprefix("base_model.model."): v for k, v in given.items()}
        # PEFT itself saves the biases of modules_to_save a second time, without the adapter's name.
        twice = {cls._remove_adapter_name_from_key(k, adapter_name) for k in state} - state.keys()
        try:
            _check(adapter_name, state, {k: v for k, v in given.items() if k not in twice})
        except ValueError:  # take an adapter out that was injected for this and was not trained
            tuner = getattr(model, "base_model", None)
            trained, drawn = getattr(config, "_loading", ([], []))
            if drawn and isinstance(tuner, RLoraModel) and all(B._version == v for B, v in drawn):
                tuner.delete_adapter(adapter_name)
                if not tuner.peft_config:
                    tuner.unload()
                nn.ParameterList(trained).requires_grad_()
            raise
        vars(config).pop("_loading", None)
        return given


peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["RLORA"] = RLoraConfig
peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["RLORA"] = RLoraModel
peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["RLORA"] = RLoraModel.prefix


def _layers(model: nn.Module, adapter_name: str) -> dict[str, RLoraLayer]:
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    layers = {path: m for path, m in base.named_modules() if isinstance(m, RLoraLayer)}
    names = sorted({name for layer in layers.values() for name in layer.configs})
    if adapter_name not in names:
        raise ValueError(f"No R-LoRA adapter '{adapter_name}' in this model; it has {names}.")
    return {path: layer for path, layer in layers.items() if adapter_name in layer.configs}


def head_similarity(
    model: nn.Module, adapter_name: str = "default", initial: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Cosines between the heads of each layer, flattened: `{module path: (N, N)}`.

    With `initial`, a copy of `get_peft_model_state_dict(model)` from before training, between their
    changes B_i - B_i,init. Random heads have cosines near 0 to begin with; a head that is zero, or
    did not change, has cosine 0 with all. ValueError: no such adapter, or not all of it in initial.
    """
    cosine, known = {}, {k.removeprefix("base_model.model."): t for k, t in (initial or {}).items()}
    for path, layer in _layers(model, adapter_name).items():
        B = layer.rlora_B[adapter_name].weight.detach().double()
        if initial is not None:
            old = known.get(f"{path}.rlora_B.weight", torch.empty(0))
            if old.shape != B.shape:
                raise ValueError(f"initial has no heads of shape {tuple(B.shape)} for '{path}'.")
            B = B - old.to(B)
        N = layer.configs[adapter_name].num_heads
        heads = F.normalize(B.unflatten(1, (N, -1)).transpose(0, 1).flatten(1))  # (N, d_out r)
        cosine[path] = (heads @ heads.T).float().cpu()
    return cosine


class record_routing(ExitStack):
    """`with record_routing(model) as log:` collects the routing weights of each forward inside.

    Before a forward, `log.task` (a name, "all" at first) and `log.mask` (batch x tokens, nonzero
    where one counts; None: all do) may be set. `log.mean` is `{task: {module path: (N,)}}`, and
    `log.entropy` `{task: {module path: mean of -sum_i g_i ln g_i}}` in nats: ln N for a uniform
    router, 0 for one head only. ValueError: no such adapter, or a mask that does not fit.
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default"):
        super().__init__()
        self.task, self.mask, self.mean, self.entropy, self._sums = "all", None, {}, {}, {}
        for path, layer in _layers(model, adapter_name).items():
            hook = functools.partial(self._add, path=path, adapter_name=adapter_name)
            self.callback(layer.register_forward_pre_hook(hook).remove)

    @torch.no_grad()
    def _add(self, layer: RLoraLayer, args: tuple, path: str, adapter_name: str) -> None:
        if layer.disable_adapters or adapter_name not in layer.active_adapters:
            return
        g = layer.routing(args[0], adapter_name).double().cpu()
        mask = torch.as_tensor(torch.ones(g.shape[:-1]) if self.mask is None else self.mask)
        if mask.shape != g.shape[:-1]:
            raise ValueError(f"'{path}' has {[*g.shape[:-1]]} tokens, log.mask {[*mask.shape]}.")
        g = g[mask.cpu() != 0]  # (tokens, N)
        new = torch.cat([g, torch.special.entr(g).sum(1, True), torch.ones(len(g), 1)], 1).sum(0)
        new = self._sums[self.task, path] = new + self._sums.get((self.task, path), 0)
        if new[-1] > 0:
            self.mean.setdefault(self.task, {})[path] = (new[:-2] / new[-1]).float()
            self.entropy.setdefault(self.task, {})[path] = (new[-2] / new[-1]).item()


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
    rank r, or 2 r with the side pair; biases and `modules_to_save` go along. Both files are written
    whole before either replaces an old one. Returns, for a `batch` to call the model with,
    `max |routed - exported|` and `||routed - exported|| / ||routed||` of its output in evaluation.
    ValueError: no such adapter, weights that are not N finite numbers for each of its layers, or a
    `batch` while it is not the one active adapter.
    """
    layers = _layers(model, adapter_name)
    config = next(iter(layers.values())).configs[adapter_name]
    N = config.num_heads
    if not isinstance(weights, Mapping):
        weights = dict.fromkeys(layers, weights)
    if odd := sorted(weights.keys() ^ layers.keys()):
        raise ValueError(f"weights must name the adapter's layers and no others; see {odd[:3]}.")
    pairs = {}
    for path, g in weights.items():
        g = [1 / N] * N if isinstance(g, str) and g == "mean" else g
        if isinstance(g, str) or len(g) != N or not all(map(math.isfinite, g)):
            raise ValueError(f"Layer '{path}' needs {N} finite weights or 'mean', got {g!r}.")
        pairs[path] = layers[path].lora_pair(adapter_name, torch.as_tensor(g, dtype=torch.float64))
    error = None if batch is None else _export_error(model, layers, adapter_name, pairs, batch)
    prefix, saved = "base_model.model.", peft.get_peft_model_state_dict(model, None, adapter_name)
    tensors = {prefix + k.removeprefix(prefix): saved[k] for k in saved if ".rlora_" not in k}
    for path, (A, B) in pairs.items():
        tensors |= {f"{prefix}{path}.lora_A.weight": A, f"{prefix}{path}.lora_B.weight": B}
    tensors = {key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}
    settings = {n: getattr(config, n) for n in vars(peft.LoraConfig()) if hasattr(config, n)}
    settings |= {"r": len(A), "lora_alpha": len(A), "use_rslora": False}  # scale 1: s stands in B
    settings |= {"bias": config.bias.replace("rlora", "lora"), "inference_mode": True}
    conv = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
    os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as new:  # both are whole before one is replaced
        safetensors.torch.save_file(tensors, f"{new}/adapter_model.safetensors", {"format": "pt"})
        peft.LoraConfig(**settings, fan_in_fan_out=conv).save_pretrained(new)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.replace(os.path.join(new, name), os.path.join(directory, name))
    return error


def _export_error(model, layers, adapter_name, pairs, batch) -> tuple[float, float]:
    def output() -> Tensor:
        out = model(**batch) if isinstance(batch, Mapping) else model(batch)
        return (out if isinstance(out, Tensor) else getattr(out, "logits", out[0])).double()

    for layer in layers.values():
        if layer.active_adapters != [adapter_name] or layer.disable_adapters or layer.merged:
            raise ValueError(f"For a batch, '{adapter_name}' must be active, alone and unmerged.")
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        model.eval()
        routed = output()
        for path, (A, B) in pairs.items():
            layers[path]._update = lambda x, _, A=A, B=B: F.linear(F.linear(x.to(A.dtype), A), B)
            undo.callback(delattr, layers[path], "_update")
        difference = routed - output()
    return difference.abs().max().item(), (difference.norm() / routed.norm()).item()
