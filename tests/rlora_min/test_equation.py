"""The layer is the equation: against a plain loop over the heads, in float64, to 1e-10."""

import math
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rlora_helpers import STRICT, adapt, adapter_tensors, layers_of, perturb, relative
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from rlora_min import RLoraConfig

pytestmark = STRICT
EXACT = 1e-10


def one_layer(d_in=6, d_out=5, conv=False, dtype=torch.float64, perturbed=True, **config):
    """A model of one adapted layer, and the layer."""
    torch.manual_seed(0)
    base = Conv1D(d_out, d_in) if conv else nn.Linear(d_in, d_out)
    nn.init.normal_(base.bias)  # a Conv1D's is zero
    model = adapt(nn.Sequential(base).to(dtype), ["0"], **config)
    return perturb(model) if perturbed else model, layers_of(model)[0]


def tensors_of(layer, name="default") -> dict[str, Tensor]:
    """A, the heads side by side, the router's and the side pair's, those that there are."""
    parts = ("A", "B", "router", "A0", "B0")
    dicts = {part: getattr(layer, f"rlora_{part}") for part in parts}
    found = {part: d[name] for part, d in dicts.items() if name in d}
    return {p: t.weight if isinstance(t, nn.Linear) else t for p, t in found.items()}


def equation(x: Tensor, t: dict[str, Tensor], c: RLoraConfig, input_mask=1.0, head_masks=None):
    """s sum_i g_i(x) B_i D_i(A x) - s Bbar0 A0 x, one head after the other."""
    N, r = c.num_heads, c.r
    s = c.lora_alpha / r**0.5 if c.use_rslora else c.lora_alpha / r
    if c.router == "softmax":
        z = x @ t["router"].T
        g = z.exp() / z.exp().sum(-1, keepdim=True)
    else:
        g = torch.full((*x.shape[:-1], N), 1 / N, dtype=x.dtype)
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


@contextmanager
def known_masks():
    """Dropout as ever, and the masks that it drew (kept numbers as 1 / (1 - p))."""
    masks, real = [], F.dropout

    def dropout(x, p=0.5, training=True, inplace=False):
        if training:
            masks.append(real(torch.ones_like(x), p))
        return x * masks[-1] if training else x

    with mock.patch.object(F, "dropout", dropout):
        yield masks


@st.composite
def cases(draw):
    sizes = st.integers(1, 5)
    config = {
        "r": draw(st.integers(1, 4)),
        "num_heads": draw(st.integers(1, 4)),
        "lora_alpha": draw(st.sampled_from([1, 8, 32])),
        "lora_dropout": draw(st.sampled_from([0.0, 0.1, 0.6])),
        "use_rslora": draw(st.booleans()),
        "init_heads": draw(st.sampled_from(["random", "centered", "zeros"])),
        "dropout_on": draw(st.sampled_from(["heads", "input"])),
        "router": draw(st.sampled_from(["softmax", "mean"])),
        "router_init": "kaiming",
    }
    shape = draw(st.lists(st.integers(1, 3), max_size=3)) + [draw(sizes)]
    return config, shape, {"d_out": draw(sizes), "conv": draw(st.booleans())}


@given(cases(), st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_forward_and_every_gradient_equal_a_loop_over_the_heads(case, training):
    config, shape, sizes = case
    model, layer = one_layer(d_in=shape[-1], **sizes, **config)
    model.train(training)
    config, trained = layer.configs["default"], tensors_of(layer)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with known_masks() as masks:
        h = model(x)
    draws = training and config.lora_dropout > 0
    assert len(masks) == draws
    masked = {}
    if draws:
        masked = {"input_mask" if config.dropout_on == "input" else "head_masks": masks[0]}

    clones = {name: t.detach().clone().requires_grad_() for name, t in trained.items()}
    y = x.detach().clone().requires_grad_()
    base = layer.base_layer
    W = base.weight.T if isinstance(base, Conv1D) else base.weight
    expected = y @ W.T + base.bias + equation(y, clones, config, **masked)
    assert h.shape == expected.shape == (*shape[:-1], sizes["d_out"])
    assert relative(h - expected, expected) < EXACT

    weight = torch.randn_like(h)
    (h * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (x.grad - y.grad).abs().max() <= EXACT * y.grad.abs().max().clamp(min=1)
    for name in trained.keys() - {"A0", "B0"}:
        theirs = clones[name].grad
        scale = theirs.abs().max().clamp(min=1)
        assert (trained[name].grad - theirs).abs().max() <= EXACT * scale, name
    assert base.weight.grad is None and base.bias.grad is None
    assert not any(t.requires_grad for n, t in trained.items() if n in ("A0", "B0"))


def test_four_dimensions_and_one_are_the_same_map_row_by_row():
    model, _ = one_layer(num_heads=3)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    rows = torch.stack([model(row) for row in x.flatten(0, -2)])
    assert relative(model(x).flatten(0, -2) - rows, rows) < EXACT


def test_several_active_adapters_add_up_each_with_its_own_settings():
    model, layer = one_layer(r=2, num_heads=3)
    second = RLoraConfig(target_modules=["0"], r=3, num_heads=2, router="mean", lora_alpha=5)
    model.add_adapter("second", second)
    perturb(model, "second", seed=7)
    model.base_model.set_adapter(["default", "second"])
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = layer.base_layer(x)
    for name in ("default", "second"):
        expected = expected + equation(x, tensors_of(layer, name), layer.configs[name])
    assert relative(model(x) - expected, expected) < EXACT


@pytest.mark.parametrize("router", ["softmax", "mean"])
@pytest.mark.parametrize("init_heads", ["random", "centered", "zeros"])
@pytest.mark.parametrize("conv", [False, True])
def test_state_is_named_and_shaped_as_promised_and_the_trained_part_counts_by_formula(
    router, init_heads, conv
):
    d_in, d_out, r, N = 7, 9, 2, 3
    model, _ = one_layer(
        d_in, d_out, conv, r=r, num_heads=N, router=router, init_heads=init_heads, perturbed=False
    )
    trained = {"rlora_A.default.weight": (r, d_in), "rlora_B.default.weight": (d_out, N * r)}
    if router == "softmax":
        trained["rlora_router.default.weight"] = (N, d_in)
    frozen = {}
    if init_heads == "random":
        frozen = {"rlora_A0.default.weight": (r, d_in), "rlora_B0.default.weight": (d_out, r)}
    prefix = "base_model.model.0."
    shapes = {k.removeprefix(prefix): tuple(v.shape) for k, v in adapter_tensors(model).items()}
    assert shapes == trained | frozen
    parameters = {n.removeprefix(prefix): p for n, p in model.named_parameters()}
    trains = {name for name, p in parameters.items() if p.requires_grad}
    assert trains == trained.keys() and parameters.keys() >= frozen.keys()
    assert not list(model.named_buffers())
    count = r * d_in + N * r * d_out + (N * d_in if router == "softmax" else 0)
    assert model.get_nb_trainable_parameters()[0] == count


def test_a_and_the_heads_and_the_router_are_linear_maps_without_bias():
    _, layer = one_layer()
    for part in ("rlora_A", "rlora_B", "rlora_router"):
        module = getattr(layer, part)["default"]
        assert type(module) is nn.Linear and module.bias is None


def test_head_i_stands_in_columns_i_r_to_i_plus_one_r():
    r, N = 2, 3
    model, layer = one_layer(r=r, num_heads=N, router="mean", init_heads="centered")
    x = torch.randn(6, dtype=torch.float64)
    A, B = (tensors_of(layer)[part] for part in "AB")
    all_heads = B.detach().clone()
    for i in range(N):
        B_i = all_heads[:, i * r : (i + 1) * r]
        with torch.no_grad():
            B.zero_()[:, i * r : (i + 1) * r] = B_i
        head = layer.configs["default"].scaling / N * B_i @ A @ x
        assert relative(model(x) - layer.base_layer(x) - head, head) < EXACT


@pytest.mark.parametrize(
    ("settings", "s"),
    [({}, 16.0), ({"use_rslora": False}, 8.0), ({"r": 1}, 32.0), ({"lora_alpha": 3, "r": 9}, 1.0)],
)
def test_the_scale_is_alpha_over_root_r_or_over_r(settings, s):
    assert RLoraConfig(**settings).scaling == s


def test_the_defaults_are_r_lora():
    config = RLoraConfig()
    defaults = {
        "r": 4,
        "num_heads": 3,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "use_rslora": True,
        "init_heads": "random",
        "gamma": 64,
        "dropout_on": "heads",
        "router": "softmax",
        "router_init": "zeros",
        "init_weights": True,
        "init_seed": None,
        "target_modules": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "bias": "none",
    }
    assert {name: getattr(config, name) for name in defaults} == defaults


def test_random_heads_are_drawn_as_table_1_says():
    d_in, d_out, r, N, gamma = 200, 300, 8, 4, 16
    _, layer = one_layer(d_in, d_out, r=r, num_heads=N, gamma=gamma, perturbed=False)
    t = tensors_of(layer)
    scale = d_out**0.25 / math.sqrt(gamma)
    # 1600 and 9600 numbers: their spread is known to about 2 % and 1 %
    for tensor, std in ((t["A"], scale / d_in**0.5), (t["B"], scale / d_out**0.5)):
        assert tensor.std().item() == pytest.approx(std, rel=0.06)
        assert abs(tensor.mean().item()) < 0.1 * std
        assert tensor.abs().max() > 2.5 * std  # a normal's tails, which a uniform lacks
    assert torch.equal(t["A0"], t["A"])
    mean_head = t["B"].unflatten(1, (N, r)).mean(1)
    assert relative(t["B0"] - mean_head, mean_head) < 1e-6
    assert not t["router"].any()


def test_each_head_starts_at_alpha_over_gamma_of_a_unit_input_whatever_the_widths():
    for d_in, d_out, r in ((64, 256, 4), (256, 64, 16)):
        _, layer = one_layer(d_in, d_out, r=r, perturbed=False)
        t, c = tensors_of(layer), layer.configs["default"]
        x = torch.randn(2000, d_in, dtype=torch.float64)
        for i in range(c.num_heads):
            head = c.scaling * x @ t["A"].T @ t["B"][:, i * r : (i + 1) * r].T
            rms = head.square().mean().sqrt().item()
            assert rms == pytest.approx(c.lora_alpha / c.gamma, rel=0.35)  # a draw of r directions


def test_centered_heads_are_the_random_heads_less_their_mean():
    random = tensors_of(one_layer(init_seed=3, perturbed=False)[1])
    centered = tensors_of(one_layer(init_seed=3, init_heads="centered", perturbed=False)[1])
    assert centered.keys() == {"A", "B", "router"}
    assert torch.equal(centered["A"], random["A"])
    less = random["B"].unflatten(1, (3, 4)) - random["B0"].unsqueeze(1)
    assert relative(centered["B"] - less.flatten(1), less) < 1e-6


def test_zero_heads_start_as_lora_does():
    """A is Kaiming-uniform with a = sqrt 5: uniform up to 1 / sqrt(d_in)."""
    _, layer = one_layer(100, 50, init_heads="zeros", r=16, perturbed=False)
    t = tensors_of(layer)
    assert t.keys() == {"A", "B", "router"} and not t["B"].any() and not t["router"].any()
    assert 0.095 < t["A"].abs().max() <= 0.1
    assert t["A"].std().item() == pytest.approx(0.1 / 3**0.5, rel=0.06)


def test_the_router_starts_at_zero_or_kaiming_as_released():
    t = tensors_of(one_layer(100, 5, router_init="kaiming", num_heads=16, perturbed=False)[1])
    assert 0.095 < t["router"].abs().max() <= 0.1
    assert t["router"].std().item() == pytest.approx(0.1 / 3**0.5, rel=0.06)


@pytest.mark.parametrize("init_heads", ["random", "centered", "zeros"])
def test_without_init_weights_nothing_is_zeroed_centred_or_subtracted(init_heads):
    model, layer = one_layer(init_weights=False, init_heads=init_heads, perturbed=False)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert relative(model(x) - layer.base_layer(x), layer.base_layer(x)) > 1e-2
    t = tensors_of(layer)
    assert t["router"].any() and t["B"].any()
    assert t["B"].unflatten(1, (3, 4)).mean(1).abs().max() > 1e-3
    if init_heads == "random":  # the pair is there, as the checkpoint has it, and takes nothing off
        assert not t["A0"].any() and not t["B0"].any()


@pytest.mark.parametrize("N", [2, 3])
@pytest.mark.parametrize("init_heads", ["random", "centered", "zeros"])
def test_the_router_learns_at_step_0_if_and_only_if_the_heads_differ(init_heads, N):
    model, layer = one_layer(num_heads=N, init_heads=init_heads, perturbed=False)
    model.eval()  # a mask would separate the heads
    model(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
    gradient = layer.rlora_router["default"].weight.grad
    assert bool(gradient.abs().max() > 1e-6) == (init_heads != "zeros")
    assert gradient.isfinite().all()


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_under_a_uniform_router_only_their_masks_give_heads_different_gradients(p):
    """dL/dB_i = g_i (gradient at the output) D_i(A x)^T does not contain B_i."""
    model, layer = one_layer(num_heads=3, lora_dropout=p, perturbed=False)
    model.train()
    model(torch.randn(50, 6, dtype=torch.float64)).square().sum().backward()
    heads = layer.rlora_B["default"].weight.grad.unflatten(1, (3, 4)).transpose(0, 1).flatten(1)
    cosines = F.cosine_similarity(heads[:1], heads[1:])
    assert (cosines > 1 - 1e-9).all() if p == 0 else (cosines < 0.99).all()


def masks_of_heads(p=0.25, N=3, r=4, tokens=4000):
    """What each head lets through of A x = 1: (tokens, N, r), kept numbers as 1 / (1 - p)."""
    model, layer = one_layer(
        6, N * r, num_heads=N, r=r, lora_dropout=p, router="mean", init_heads="centered"
    )
    t = tensors_of(layer)
    with torch.no_grad():  # A x = (1, ..., 1); head i writes its r numbers into rows of its own
        t["A"].zero_()[:, 0] = 1
        t["B"].copy_(torch.eye(N * r))
    x = torch.zeros(tokens, 6, dtype=torch.float64)
    x[:, 0] = 1
    model.train()
    update = model(x) - layer.base_layer(x)
    return (update * N / layer.configs["default"].scaling).unflatten(-1, (N, r)).detach()


def test_each_head_has_its_own_mask_on_each_of_its_numbers_and_each_token():
    p = 0.25
    masks = masks_of_heads(p)
    kept = masks.abs() > 0.5
    assert torch.allclose(masks[kept], torch.tensor(1 / (1 - p), dtype=torch.float64))
    assert masks[~kept].abs().max() < 1e-9
    kept = kept.double()
    # 48000 draws: the rate is known to 0.002; rates of pairs (4000 draws each) to 0.008
    assert kept.mean().item() == pytest.approx(1 - p, abs=0.01)
    assert (kept.mean(0) - (1 - p)).abs().max() < 0.04
    flat = kept.flatten(1) - (1 - p)
    correlations = (flat.T @ flat / len(flat) / (p * (1 - p))) - torch.eye(12)
    assert correlations.abs().max() < 0.1  # no two numbers, so no two heads, share a mask
    neighbours = (flat[1:] * flat[:-1]).mean() / (p * (1 - p))
    assert abs(neighbours) < 0.05  # nor do two tokens


@pytest.mark.parametrize("dropout_on", ["heads", "input"])
def test_training_averages_to_the_evaluation_output(dropout_on):
    model, layer = one_layer(lora_dropout=0.5, dropout_on=dropout_on)
    x = torch.randn(6, dtype=torch.float64)
    expected = model(x)
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        draws = model(x.expand(20000, 6))
    error = draws.mean(0) - expected
    assert (error.abs() < 5 * draws.std(0) / 20000**0.5).all()
    assert (draws.std(0) > 0).all()


def test_evaluation_is_deterministic_and_the_generator_is_left_alone():
    model, _ = one_layer(lora_dropout=0.5)
    x = torch.randn(3, 6, dtype=torch.float64)
    state = torch.get_rng_state()
    assert torch.equal(model(x), model(x))
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("dropout_on", ["heads", "input"])
def test_the_router_and_the_side_pair_see_the_input_undropped(dropout_on):
    model, layer = one_layer(lora_dropout=0.9, dropout_on=dropout_on)
    t, c = tensors_of(layer), layer.configs["default"]
    x = torch.randn(3, 6, dtype=torch.float64)
    model.train()
    with mock.patch.object(F, "dropout", lambda x, *args: torch.zeros_like(x)):
        h = model(x)  # every number dropped
    left = layer.base_layer(x) - c.scaling * (x @ t["A0"].T) @ t["B0"].T
    assert relative(h - left, left) < EXACT
    z = x @ t["router"].T
    assert relative(layer.routing(x) - z.softmax(-1), z) < EXACT


class Products(TorchDispatchMode):
    """Counts matrix products, by any name that ATen has for them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += name in ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mv", "addmv")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("router", ["softmax", "mean"])
@pytest.mark.parametrize("init_heads", ["random", "centered"])
@pytest.mark.parametrize("N", [1, 2, 7])
def test_beside_the_base_there_is_one_product_down_and_one_up_however_many_heads(
    init_heads, router, N
):
    model, _ = one_layer(num_heads=N, init_heads=init_heads, router=router)
    model.train()
    with Products() as products:
        model(torch.randn(4, 6, dtype=torch.float64))
    assert products.count == 3


@pytest.mark.parametrize("init_heads", ["random", "centered"])
def test_no_head_output_is_kept_for_the_backward(init_heads):
    """The packed form: of the tensors kept, none has N outputs a token."""
    tokens, d_in, d_out, N, r = 64, 16, 48, 8, 2
    model, _ = one_layer(d_in, d_out, num_heads=N, r=r, dtype=torch.float32, init_heads=init_heads)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(tokens, d_in, requires_grad=True))
    assert kept and max(kept) <= max(tokens * d_in, tokens * (N + 1) * r, (N + 1) * r * d_out)
    assert max(kept) < tokens * d_out < tokens * N * d_out
