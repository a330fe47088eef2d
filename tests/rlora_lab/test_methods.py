"""The methods by name: what they are, and that their sizes are equal."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from rlora_lab.errors import LabError
from rlora_lab.models.bases import load_base
from rlora_lab.models.hydralora import HydraLoraConfig
from rlora_lab.models.methods import (
    adapt,
    adapter_config,
    count_trainable,
    equal_lora_rank,
    equal_rank,
    rlora_size,
    target_shapes,
)
from rlora_lab.names import METHODS
from rlora_lab.tasks.strings import Synthetic
from rlora_min import RLoraConfig, RLoraLayer

# The oracle has to be told tasks, which the language suite does: see its tests.
ADAPTERS = [method for method in METHODS if method not in ("none", "heads", "oracle")]
MOVED = ("rlora+router", "rlora-moved")  # the two that don't start at the base
SMALLER = ("lora-rank", "lora-rank+init")
widths, small = st.integers(1, 4000), st.integers(1, 16)


@given(d_in=widths, d_out=widths, r=small, num_heads=small, heads=small)
def test_no_rank_comes_closer(d_in: int, d_out: int, r: int, num_heads: int, heads: int):
    def off(rank: int) -> int:
        return abs(rank * (d_in + heads * d_out) - rlora_size(d_in, d_out, r, num_heads))

    rank = equal_rank(d_in, d_out, r, num_heads, heads)
    assert rank >= 1 and off(rank) <= off(rank + 1)
    assert rank == 1 or off(rank) <= off(rank - 1)
    assert equal_lora_rank(d_in, d_out, r, num_heads) == equal_rank(d_in, d_out, r, num_heads, 1)


# heads of the methods without a router, which take in each module the rank that comes closest
ROUTERLESS = {"lora": 1, "lora-classic": 1, "one-head": 1, "mlora": None, "mlora-nodropout": None}


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("r, heads", [(4, 3), (2, 5)])
def test_counted_size_is_the_formula(method: str, r: int, heads: int):
    base = load_base("tiny")
    shapes = target_shapes(base).values()
    wanted = size = sum(rlora_size(*shape, r, heads) for shape in shapes)
    if method in SMALLER:
        size = sum(r * (i + o) for i, o in shapes)
    elif method in ROUTERLESS:
        own = ROUTERLESS[method] or heads
        size = sum(equal_rank(i, o, r, heads, own) * (i + own * o) for i, o in shapes)
    model = adapt(method, base, Synthetic(), seed=0, r=r, num_heads=heads)
    assert count_trainable(model) == (size, 0)
    assert abs(size / wanted - 1) < (0.8 if method in SMALLER else 0.03 if r == 4 else 0.09)


def test_minilm_lora_is_exactly_equal():
    config = adapter_config("lora", load_base("minilm"))
    assert isinstance(config, LoraConfig) and config.use_rslora
    ranks = {path.split(".", 3)[3]: rank for path, rank in config.rank_pattern.items()}
    assert ranks == {"intermediate.dense": 11, "output.dense": 8}
    assert rlora_size(384, 1536, 4, 3) == 11 * (384 + 1536)
    assert rlora_size(1536, 384, 4, 3) == 8 * (384 + 1536)


def test_what_the_methods_are():
    def facts(method: str) -> tuple:
        config = adapter_config(method, load_base("tiny"))
        assert config.lora_dropout == (0.0 if method == "mlora-nodropout" else 0.1)
        assert config.lora_alpha == 32
        assert config.use_rslora is (method not in ("lora-classic", "hydralora-own"))
        if isinstance(config, LoraConfig):
            return config.r, bool(config.rank_pattern)
        return config.init_heads, config.dropout_on, config.router, config.router_init

    assert facts("rlora") == ("random", "heads", "softmax", "zeros")
    assert facts("rlora-centered") == ("centered", "heads", "softmax", "zeros")
    assert facts("mlora")[:3] == facts("mlora-nodropout")[:3] == ("random", "heads", "mean")
    assert facts("one-head")[:3] == ("random", "heads", "mean")
    assert facts("hydralora") == ("zeros", "input", "softmax", "kaiming")
    assert facts("hydralora-own") == ("zeros", "input", "softmax", "kaiming")
    assert facts("hydralora+dropout") == ("zeros", "heads", "softmax", "kaiming")
    assert facts("hydralora+init") == ("random", "input", "softmax", "zeros")
    assert facts("lora") == facts("lora-classic") == (11, True)
    assert facts("lora-rank") == (4, False)
    heads = {m: adapter_config(m, load_base("tiny")).num_heads for m in ("one-head", "mlora")}
    assert heads == {"one-head": 1, "mlora": 3}
    with pytest.raises(LabError, match="'dora'.*lora, lora-classic.*hydralora.*rlora"):
        adapter_config("dora", load_base("tiny"))


@pytest.mark.parametrize("many", [False, True])
def test_hydraloras_own_masks(many: bool, monkeypatch: pytest.MonkeyPatch):
    """h = W0 x + (alpha / r) sum_i g_i(x) B_i A D_i(x), a mask on x for each head, head by head."""
    N, r, p = 3, 4, 0.4
    base = nn.Sequential(nn.Linear(7, 5)).double()
    own_type = HydraLoraConfig if many else RLoraConfig
    config = own_type(
        r=r,
        num_heads=N,
        lora_alpha=6,
        lora_dropout=p,
        use_rslora=False,
        init_heads="zeros",
        dropout_on="input",
        router_init="kaiming",
        target_modules=["0"],
    )
    W0, b = (parameter.detach().clone() for parameter in base[0].parameters())
    model = get_peft_model(base, config).train()
    layer = model.base_model.model[0]
    for part in (layer.rlora_A, layer.rlora_B, layer.rlora_router):
        part["default"].double()
        nn.init.normal_(part["default"].weight)  # every trainable tensor is off its start
    A, B, W_r = (
        part["default"].weight for part in (layer.rlora_A, layer.rlora_B, layer.rlora_router)
    )
    drawn = []

    def mask(x, p, training=True, inplace=False):  # one that is seen
        if not training:
            return x
        drawn.append(torch.bernoulli(0 * x + 1 - p) / (1 - p))
        return x * drawn[0]

    monkeypatch.setattr(F, "dropout", mask)
    x = torch.randn(2, 6, 7, dtype=torch.double)
    h = model(x)
    (mask,) = drawn
    assert mask.shape == ((2, 6, N, 7) if many else (2, 6, 7))
    g = (x @ W_r.T).softmax(-1)
    expected = x @ W0.T + b
    for i in range(N):
        own = mask[:, :, i] if many else mask
        expected = expected + 6 / r * g[..., i : i + 1] * (
            (own * x) @ A.T @ B[:, i * r : (i + 1) * r].T
        )
    torch.testing.assert_close(h, expected)
    if many:
        assert not torch.equal(mask[:, :, 0], mask[:, :, 1])
        model.eval()
        heads = sum(g[..., i : i + 1] * (x @ A.T @ B[:, i * r : (i + 1) * r].T) for i in range(N))
        torch.testing.assert_close(model(x), x @ W0.T + b + 6 / r * heads)


def test_masks_for_each_head_need_hydralora():
    with pytest.raises(ValueError, match="HydraLoRA needs init_heads='zeros'"):
        HydraLoraConfig()


@pytest.mark.parametrize("method", ["mlora", "hydralora-own"])
def test_variants_are_saved_and_loaded(method: str, tmp_path):
    suite = Synthetic()
    model = adapt(method, load_base("tiny"), suite, seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_base("tiny").model, tmp_path).eval()
    ids = suite.batch(8, 0)["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    before, after = (m.peft_config["default"] for m in (model, loaded))
    for name in ("peft_type", "rank_pattern", "r", "use_rslora"):
        assert getattr(before, name) == getattr(after, name)
    ranks = {
        len(m.rlora_A["default"].weight) for m in loaded.modules() if isinstance(m, RLoraLayer)
    }
    assert ranks == ({4, 6} if method == "mlora" else {4})


@pytest.mark.parametrize("method", ADAPTERS)
def test_adapt_starts_at_the_base_and_repeats_by_seed(method: str):
    suite = Synthetic()
    ids = suite.batch(8, 0)["input_ids"]
    with torch.no_grad():
        expected = load_base("tiny").model(input_ids=ids).logits
        models = [adapt(method, load_base("tiny"), suite, seed=s).eval() for s in (1, 1, 2)]
        for model in models:
            off = (model(input_ids=ids).logits - expected).abs().max()
            assert (off <= 1e-5 * expected.abs().max()) == (method not in MOVED)
    a, b, c = (get_peft_model_state_dict(model) for model in models)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)
