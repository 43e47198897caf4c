"""`quantize`: what it packs, what it leaves, what it costs, and what it refuses."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch import nn

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from lightning_lora.quantization import bits_per_weight, dense, is_quantized, quantizer_of
from lightning_lora.quantize import dequantize_
from tests.helpers.families import FAMILIES
from tests.helpers.layers import randomise
from tests.helpers.toy import build

MODES = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"]
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


def packed(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_quantized(module)]


# ---- what is packed ---------------------------------------------------------------------------------------------------


def test_what_is_left_dense():
    """Heads, output embeddings, tied weights, routers, weights that are read, forwards of their own."""

    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    model = nn.ModuleDict({"body": nn.Linear(64, 64), "own": Own(64, 64), "attention": nn.MultiheadAttention(64, 2)})
    model["one"], model["other"] = nn.Linear(64, 64), nn.Linear(64, 64)
    model["other"].weight = model["one"].weight
    model["classifier"] = nn.Linear(64, 3)
    ll.quantize(model)
    assert packed(model) == ["body"]
    for family, left in (("mixtral", "gate"), ("qwen2-tied", "lm_head"), ("llama-classifier", "score"), ("t5", "wo")):
        model = FAMILIES[family].make()
        ll.quantize(model)
        assert packed(model)
        assert not any(name.endswith(left) for name in packed(model)), family


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.ModuleDict({"wi": nn.Linear(64, 64), "wo": nn.Linear(64, 64)})


class Casts(Two):
    """Casts what a linear gets to the dtype of its weight, as Kosmos-2.5's vision does."""

    def forward(self, x):
        x = self.mlp.wi(x)
        return self.mlp.wo(x.to(self.mlp.wo.weight.dtype))


class Guarded(Two):
    def forward(self, x):
        x = self.mlp.wi(x)
        if self.mlp.wo.weight.dtype != torch.uint8:
            x = x.to(self.mlp.wo.weight.dtype)
        return self.mlp.wo(x)


class Hidden(Two):
    def forward(self, x):
        wo = self.mlp["wo"]
        return wo(self.mlp["wi"](x).to(wo.weight.dtype))


def test_linears_whose_dtype_is_asked_for():
    """The input of a packed one would be rounded to bytes."""
    for cls, expected in ((Casts, ["0.mlp.wi"]), (Guarded, ["0.mlp.wi", "0.mlp.wo"])):
        model = nn.ModuleList([cls()])
        ll.quantize(model)
        assert packed(model) == expected
        assert model[0](torch.randn(2, 64)).isfinite().all()
    for adapted in (False, True):
        model = Hidden()
        ll.quantize(model)
        if adapted:
            ll.inject(model, ll.LoRAConfig(r=2))
        with pytest.raises(ll.UnsupportedError, match="is given torch.uint8: the model casts .*ignore_modules"):
            model(torch.randn(2, 64))


class Tied(Two):
    """An autoencoder: the way back is by the weight of the way there. The other one is only looked at."""

    def forward(self, x):
        x = self.mlp.wi(x)
        if self.mlp.wi.weight.dtype == torch.float64 and isinstance(self.mlp.wi.weight, nn.Parameter):
            x = x @ self.mlp.wi.weight
        return x, self.decode(self.mlp.wo(x))

    def decode(self, h):
        return h @ self.mlp.wo.weight.to(h.dtype)


class Penalised(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Two()

    def training_step(self, batch, batch_idx):
        return self.net.mlp.wo(self.net.mlp.wi(batch)).sum() + self.net.mlp.wo.weight.square().sum()


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_weights_that_are_read_beside_calls_are_what_they_stand_for(mode):
    """In int8 a step would compute with bytes, without a word."""
    x = torch.randn(2, 64)
    for model, steps in ((Tied(), lambda m: m(x)[1]), (Penalised(), lambda m: m.training_step(x, 0))):
        expected = steps(model).detach()
        ll.quantize(model, mode)
        assert [name.rpartition(".")[2] for name in packed(model)] == ["wi"]
        torch.testing.assert_close(steps(model).detach(), expected, rtol=0.1, atol=0.3)


def test_what_transformers_keeps_in_float32_by_names_with_dots():
    class Keeps(transformers.BertModel):
        _keep_in_fp32_modules = ("attention.output", "intermediate.dense.weight", "quer")

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = Keeps(transformers.BertConfig(**sizes))
    ll.quantize(model)
    left = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)} - {*packed(model)}
    assert left == {f"encoder.layer.{i}.{n}.dense" for i in (0, 1) for n in ("attention.output", "intermediate")}


def test_ignored_modules():
    model = build()
    ll.quantize(model, ll.Quantization(mode="nf4", ignore_modules=["blocks.0", "re:.*1.o"]))
    assert packed(model) == ["blocks.1.q"]
    with pytest.raises(ll.TargetError, match="ignore_modules: 'bloks' matches nothing. Did you mean 'blocks'"):
        ll.quantize(build(), ll.Quantization(ignore_modules=["bloks"]))


def test_bits_per_weight():
    """QLoRA, section 3: 32/64 bits for the scales, with double quantisation 8/64 + 32/(64·256)."""
    for mode, bits in (("nf4", 4.5), ("nf4-dq", 4.127), ("fp4-dq", 4.127), ("int8", 8.008)):
        model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
        ll.quantize(model, mode)
        assert bits_per_weight(model[0]) == pytest.approx(bits, abs=1e-3)
        state = model[0].weight.quant_state if mode != "int8" else None
        if state is not None:
            kept = [state.code, *([state.state2.code, state.offset] if state.state2 else [])]
            assert sum(t.nbytes for t in kept) <= 1e-3 * model[0].weight.nbytes


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "nf4-dq", "blocksize": 128, "quant_storage": "bfloat16"},
        {"mode": "fp4", "blocksize": 256},
        {"mode": "nf4"},
    ],
    ids=lambda settings: settings["mode"],
)
def test_what_is_merged_is_packed_as_it_was(settings):
    model = nn.Sequential(nn.Linear(256, 64, dtype=torch.bfloat16))
    ll.quantize(model, ll.Quantization(**settings))
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3, modules_to_save=None, target_modules=["0"]))
    randomise(model)

    def said(layer):
        state = layer.weight.quant_state
        own = state.quant_type, state.nested, state.blocksize, state.dtype, tuple(state.shape)
        return *own, layer.weight.dtype, layer.weight.numel(), layer.quant_state is state

    before, codes = said(model[0]), model[0].weight.data.clone()
    ll.merge(model)
    assert said(model[0]) == before
    assert before[:4] == (
        settings["mode"].removesuffix("-dq"),
        settings["mode"].endswith("-dq"),
        settings.get("blocksize", 64),
        torch.bfloat16,
    )
    assert not torch.equal(model[0].weight.data, codes)


@pytest.mark.parametrize("double", [False, True])
def test_bits_are_known_before_anything_is_packed(double):
    """On the meta device, and of layers that bitsandbytes packs when they are moved."""
    import bitsandbytes as bnb

    def make() -> nn.Module:
        four = bnb.nn.Linear4bit(1024, 512, quant_type="nf4", compress_statistics=double)
        return nn.Sequential(four, bnb.nn.Linear8bitLt(512, 64, has_fp16_weights=False))

    with torch.device("meta"):
        meta = make()
    found = [
        [t.bits for t in ll.plan(m, ll.LoRAConfig(modules_to_save=None)).targets]
        for m in (meta, make(), make().to("cpu"))
    ]
    assert found[0] == found[1] == pytest.approx(found[2], abs=1e-3)
    assert found[0][0] == pytest.approx(4.127 if double else 4.5, abs=1e-3)
    for m in (meta, make(), make().to("cpu")):
        assert quantizer_of(m[0]).mode(m[0]) == ("nf4-dq" if double else "nf4")


def test_what_is_not_packed_yet_is_not_merged():
    import bitsandbytes as bnb

    model = nn.Sequential(bnb.nn.Linear4bit(64, 64))
    ll.inject(model, ll.LoRAConfig(modules_to_save=None))
    with pytest.raises(ll.ConfigError, match="merge: 0: quantised when moved to a device: do that first"):
        ll.merge(model)
    model(torch.ones(2, 64))
    ll.merge(model.to("cpu"))


@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_settings(blocksize, storage):
    model = nn.Sequential(nn.Linear(64, 48))
    before = model[0].weight.clone()
    settings = ll.Quantization(mode="nf4", blocksize=blocksize, quant_storage=storage, compute_dtype="bfloat16")
    ll.quantize(model, settings)
    assert model[0].weight.dtype == getattr(torch, storage)
    assert model[0].weight.blocksize == blocksize
    assert (dense(model[0]) - before).norm() < 0.25 * before.norm()
    x = torch.randn(3, 64)
    expected = nn.functional.linear(x.bfloat16(), dense(model[0]).bfloat16(), model[0].bias.bfloat16()).float()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_casts_do_not_touch_what_is_packed(storage):
    model = build()
    ll.inject(model, ll.LoRAConfig(r=2))
    ll.quantize(model, ll.Quantization(mode="nf4-dq", quant_storage=storage))
    before = dense(model.blocks[0].q)
    for cast in (torch.float16, torch.bfloat16, torch.float32):
        model.to(cast)
        assert torch.equal(dense(model.blocks[0].q), before)
        model(torch.randn(2, 16, dtype=cast))


# ---- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_computes_what_it_computes_on_the_unpacked_base(mode, variant):
    """Outputs, gradients and merged weights; then merged into the packed base, and back bit for bit."""
    model = build().train()
    ll.inject(model, ll.LoRAConfig(r=3, lora_alpha=5, modules_to_save=None, **variant))
    ll.quantize(model, mode)
    for module in model.modules():
        module.training = not isinstance(module, nn.Dropout)
    x = torch.randn(5, 16, requires_grad=True)
    with ll.disable_adapters(model):
        base = model(x)
    torch.testing.assert_close(model(x), base, rtol=1e-5, atol=1e-5)  # magnitudes are those of the packed weight
    randomise(model)
    unpacked = copy.deepcopy(model)
    dequantize_(unpacked)
    results = []
    for each in (model, unpacked):
        x.grad = None
        out = each(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in each.parameters() if p.requires_grad)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    keys = {key: value.clone() for key, value in model.state_dict().items()}
    report = ll.merge(model)
    assert all(layer.error > 0 for layer in report.layers.values())
    with ll.disable_adapters(model):
        assert torch.equal(model(x), base) or mode == "int8"
    ll.unmerge(model)
    assert all(torch.equal(value, keys[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), results[0][0])
    ll.merge_and_unload(model)
    torch.testing.assert_close(model(x), results[0][0], rtol=1e-4, atol=1e-5)
    assert not packed(model)
    assert model.state_dict().keys() == build().state_dict().keys()


def test_norms_of_a_packed_weight_are_taken_once(monkeypatch):
    from lightning_lora.adapters import dora

    calls, real = [], dora.row_squares
    monkeypatch.setattr(dora, "row_squares", lambda *args: calls.append(1) or real(*args))
    model, x = build().eval(), torch.randn(3, 16)
    ll.inject(model, ll.LoRAConfig(r=2, use_dora=True, modules_to_save=None))
    model(x)
    assert not calls  # a dense weight could change
    ll.quantize(model, "nf4")
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert len(calls) == 4
    ll.quantize(model, "nf4")  # already is: the weights are the same, and looked at again
    randomise(model)
    expected = copy.deepcopy(model)
    dequantize_(expected)
    torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-6)
    assert not [key for key in model.state_dict() if "squares" in key]


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_copies_and_pickles(mode):
    model, x = build().eval(), torch.randn(3, 16)
    ll.inject(model, ll.LoRAConfig(r=2, use_dora=True))
    ll.quantize(model, mode)
    randomise(model)
    out = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), out)
        nn.init.zeros_(twin.blocks[0].q.lora["default"].B)
        assert torch.equal(model(x), out)
        ll.merge_and_unload(twin)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_copies_of_what_was_pickled(mode, merged):
    """A pickle of a packed weight comes back as a plain parameter, whose copies lose what unpacks it."""
    model, x = build().eval(), torch.randn(3, 16)
    ll.inject(model, ll.LoRAConfig(r=2))
    ll.quantize(model, mode)
    randomise(model)
    out = model(x)
    if merged:
        ll.merge(model)
    twin = copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(pickle.loads(pickle.dumps(model))))))
    assert torch.equal(twin(x), model(x))
    if not merged:
        ll.merge(twin)
    ll.unmerge(twin)
    assert torch.equal(twin(x), out)
    ll.eject(twin)
    if merged:
        ll.unmerge(model)
    ll.eject(model)
    again = copy.deepcopy(pickle.loads(pickle.dumps(twin)))
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("first", [False, True], ids=["inner", "first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_step_is_the_plain_one(monkeypatch, dtype, first, dropout):
    """Outputs and all gradients; on the first layer, whose input needs none, too."""
    from lightning_lora.layers import activation

    model = nn.Sequential(nn.Linear(48, 40))
    ll.inject(model, ll.LoRAConfig(r=3, lora_alpha=5, lora_dropout=dropout, modules_to_save=None))
    ll.quantize(model.to(dtype), "nf4")
    randomise(model)
    x = torch.randn(2, 5, 48, dtype=dtype, requires_grad=not first)
    fused, results = [], []
    real = activation.fused_linears
    monkeypatch.setattr(activation, "fused_linears", lambda *args: fused.append(1) or real(*args))
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(activation.LoRALinear, "lora_alone", lambda *_: None)
        torch.manual_seed(0)
        out = model(x)
        out.square().sum().backward()
        tensors = [x, *(p for p in model.parameters() if p.requires_grad)]
        results.append([out.detach(), *(t.grad.clone() for t in tensors if t.grad is not None)])
        for tensor in tensors:
            tensor.grad = None
    assert len(fused) == 1
    assert len(results[0]) == (3 if first else 4)
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * other.norm()


@pytest.mark.parametrize("mode", ["dense", "nf4", "int8"])
def test_inputs_of_any_shape(mode):
    model = nn.Sequential(nn.Linear(48, 40))
    ll.inject(model, ll.LoRAConfig(r=3, modules_to_save=None))
    if mode != "dense":
        ll.quantize(model, mode)
    randomise(model)
    x = torch.randn(2, 3, 48)
    out = model(x)
    torch.testing.assert_close(model(x[0]), out[0])
    if mode != "int8":
        torch.testing.assert_close(model(x[0, 0]), out[0, 0])
        assert model(x[:0]).shape == (0, 3, 40)
        assert model(x.transpose(0, 1)).shape == (3, 2, 40)


@pytest.mark.parametrize("shape", [(40, 48), (5, 16), (3, 80), (9, 96), (2, 24), (17, 112), (4, 64)], ids=str)
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4"])
def test_values_are_those_of_the_codes(mode, shape):
    """Also in rows that end within a block, where bitsandbytes takes other scales on CPUs with AVX512."""
    ll.quantize(model := nn.Sequential(nn.Linear(*shape[::-1]), nn.Linear(64, 64)), mode)
    from bitsandbytes.functional import dequantize_blockwise

    codes, state = model[0].weight.data.view(-1), model[0].weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    values = state.code[torch.stack([codes >> 4, codes & 15], 1).view(-1).long()][: shape[0] * shape[1]]
    wanted = (values * scales.repeat_interleave(64)[: len(values)]).view(shape)
    torch.testing.assert_close(dense(model[0]), wanted)
    x = torch.randn(3, shape[1])
    torch.testing.assert_close(model[0](x), nn.functional.linear(x, wanted, model[0].bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4-dq"])
def test_products_by_kernels_of_bitsandbytes(mode, storage):
    """What accelerators take where no gradients are asked for: the same as with the unpacked weight."""
    from lightning_lora.quantization.four_bit import packed_product

    torch.manual_seed(0)
    size = 128  # in rows that end within a block bitsandbytes' values on some CPUs are others
    layer = nn.Sequential(nn.Linear(size, 64)).to(torch.bfloat16)
    ll.quantize(layer, ll.Quantization(mode=mode, quant_storage=storage))
    (layer,) = layer
    for rows in (1, 3, 40):
        x = torch.randn(2, rows, size, dtype=torch.bfloat16)
        with torch.inference_mode():
            out = packed_product(layer, x, layer.bias)
            torch.testing.assert_close(out, nn.functional.linear(x, dense(layer), layer.bias), rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(packed_product(layer, x, None), out - layer.bias, rtol=5e-2, atol=5e-2)


def test_where_gradients_are_not_asked_for_products_are_the_quantisers(monkeypatch):
    from lightning_lora.quantization.four_bit import FourBit, packed_product

    taken = []

    def product(self, layer, x, bias):
        taken.append(x.shape)
        return packed_product(layer, x, bias)

    monkeypatch.setattr(FourBit, "product", product)
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 32))
    ll.quantize(model, "nf4-dq")
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3, modules_to_save=None))
    randomise(model)
    model.eval()
    for rows in (1, 40):
        x = torch.randn(rows, 128)
        wanted = model(x)
        assert not taken
        with torch.no_grad():
            torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
            assert len(taken) == 2
            with ll.disable_adapters(model):
                base = model(x)
        assert len(taken) == 4
        taken.clear()
        with ll.disable_adapters(model):
            torch.testing.assert_close(base, model(x).detach(), rtol=1e-5, atol=1e-5)


def test_where_the_fused_step_is_not_taken():
    model, x = build().train(), torch.randn(3, 16)
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["q"], modules_to_save=None))
    ll.quantize(model, "nf4")
    layer = model.blocks[0].q

    def is_fused():
        return type(layer(x).grad_fn).__name__ == "FusedLoRABackward"

    assert is_fused()
    with torch.no_grad():
        assert not is_fused()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_fused()
    with ll.disable_adapters(model):
        assert not is_fused()
    handle = layer.lora["default"].register_forward_hook(lambda *_: None)
    assert not is_fused()
    handle.remove()
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["q"], modules_to_save=None), "second")
    assert not is_fused()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_compiled(mode, use_dora):
    """One graph, with the same outputs and gradients."""
    torch.compiler.reset()
    model, x = build().eval(), torch.randn(3, 16)
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=5, use_dora=use_dora))
    ll.quantize(model, mode)
    randomise(model)
    results = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        out = forward(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("mode", ["nf4", "int8", None])
def test_functional_transforms(mode, use_dora):
    """torch.func sees the plain path: per-sample gradients, with dropout, add up to those of the batch."""
    from torch.func import functional_call, grad, vmap

    model, x = build().train(), torch.randn(3, 16)
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=5, use_dora=use_dora, modules_to_save=None))
    if mode is not None:
        ll.quantize(model, mode)
    randomise(model)
    for drop in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        drop.p = 0.0
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    loss = lambda parameters, x: functional_call(model, parameters, x).square().sum()  # noqa: E731
    each = vmap(grad(loss), in_dims=(None, 0))(trained, x[:, None])
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-4)
    for layer in (layer for _, layer in lora_layers(model)):
        for adapter in layer.lora.values():
            object.__setattr__(adapter.config, "lora_dropout", 0.5)
    assert all(torch.isfinite(g).all() for g in grad(loss)(trained, x).values())


def test_layers_that_others_packed_have_the_dtype_that_they_were_packed_from():
    weight = bnb.nn.Params4bit(torch.randn(32, 64).bfloat16(), requires_grad=False, quant_type="nf4")
    four = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4")
    four.weight = weight
    model = nn.Sequential(nn.LayerNorm(64), four).to("cpu")  # packs it
    ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=None, target_modules=["1"]))
    assert ll.merge_and_unload(model)[1].weight.dtype == torch.bfloat16


def test_merging_a_packed_base_for_good():
    model, x = build().eval(), torch.randn(3, 16)
    ll.inject(model, ll.LoRAConfig(r=2))
    ll.quantize(model, "nf4")
    randomise(model)
    merged = ll.merge_and_unload(model, dequantize=False)
    assert packed(merged) == ["blocks.0.q", "blocks.0.o", "blocks.1.q", "blocks.1.o"]
    assert not list(lora_layers(merged))
    assert not [key for key in merged.state_dict() if "lora" in key]
    merged(x)


def test_nothing_dense_is_kept_for_the_backward_pass():
    saved: list[torch.Tensor] = []
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    ll.inject(model, ll.LoRAConfig(r=4, modules_to_save=None, exclude_modules=None, target_modules=["0", "1"]))
    ll.quantize(model, ll.Quantization(mode="nf4"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(2, 256))
    assert saved
    assert max(t.numel() for t in saved) <= 4 * 256


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unloaded_layers_have_the_dtype_they_had(mode, dtype):
    model, x = build().to(dtype), torch.randn(3, 16, dtype=dtype)
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["q"]))
    ll.quantize(model, mode)
    randomise(model)
    ll.merge_and_unload(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    model(x)


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
@pytest.mark.parametrize("merged", [False, True])
def test_casts_of_what_is_packed_in_floats(storage, merged):
    """Of layers without an adapter, and of what a merge keeps, too."""
    model, x = build().eval(), torch.randn(3, 16)
    ll.quantize(model, ll.Quantization(mode="nf4", quant_storage=storage))
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["q"], modules_to_save=None))
    randomise(model)
    before = {name: dense(m) for name, m in model.named_modules() if is_quantized(m)}
    if merged:
        ll.merge(model)
    model.half().bfloat16().float()
    if merged:
        ll.unmerge(model)
    for name, module in model.named_modules():
        assert not is_quantized(module) or torch.equal(dense(module), before[name]), name
    model(x)


def test_merged_and_then_unloaded():
    """Not what was packed again, but what was trained."""
    model, x = build().eval(), torch.randn(3, 16)
    ll.inject(model, ll.LoRAConfig(r=2))
    ll.quantize(model, "nf4")
    randomise(model)
    expected = model(x)
    ll.merge(model)
    ll.merge_and_unload(model)
    assert not packed(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_order_of_calls():
    model = build()
    ll.inject(model, ll.LoRAConfig(r=2))
    ll.merge(model)
    with pytest.raises(ll.ConfigError, match="merged into blocks.0.q.*call ll.unmerge first"):
        ll.quantize(model)
    ll.unmerge(model)
    plain = build()
    ll.quantize(plain)
    with pytest.raises(ll.ConfigError, match="no adapters"):
        ll.merge_and_unload(plain)
    assert packed(plain)


@pytest.mark.parametrize("size", [1e6, 1e-9])
def test_rows_of_any_size_in_8_bits(size):
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    model[0].weight.data.mul_(size)
    before = model[0].weight.clone()
    model[0].weight.data[3] = 0
    ll.quantize(model, "int8")
    after = dense(model[0])
    assert not after[3].any()
    rows = [i for i in range(32) if i != 3]
    assert (after - before)[rows].norm() < 0.02 * before[rows].norm()


def test_int8_in_any_number_of_dimensions():
    model, x = nn.Sequential(nn.Linear(48, 40)), torch.randn(2, 3, 4, 48)
    ll.inject(model, ll.LoRAConfig(r=3, modules_to_save=None))
    ll.quantize(model, "int8")
    randomise(model)
    for mode in (True, False):
        model.train(mode)
        for each in (x, x[0], x[0, 0], x[0, 0, 0]):
            assert model(each).shape == (*each.shape[:-1], 40)
    assert (model(x[0, 0, 0]) - model(x)[0, 0, 0]).norm() < 0.05 * model(x)[0, 0, 0].norm()


@pytest.mark.parametrize("options", [None, {}, {"use_dora": True}, {"target_modules": ["1.linear1"]}])
@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_encoders_of_torch_call_packed_layers(mode, options):
    """In eval mode they would multiply with packed weights themselves, and make nested tensors of padded batches."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 64, dropout=0.0, batch_first=True), 2)
    encoder.requires_grad_(False)
    x, mask = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    if options is not None:
        ll.inject(encoder, ll.LoRAConfig(r=4, **options))
        randomise(encoder)
    ll.quantize(encoder, mode)
    with torch.no_grad():
        found = encoder.eval()(x, src_key_padding_mask=mask)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        plain = encoder(x, src_key_padding_mask=mask)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(found[~mask], plain[~mask], rtol=1e-4, atol=1e-5)
    dequantize_(encoder)
    assert encoder.use_nested_tensor == (options is None)
    assert not encoder.layers[0]._forward_pre_hooks


def test_ties_outside_of_what_is_quantised():
    one, other = nn.Linear(64, 64), nn.Linear(64, 64)
    other.weight = one.weight
    before = other.weight.clone()
    ll.quantize(nn.Sequential(one))
    assert torch.equal(other.weight, before)


def test_weights_that_are_too_small_to_be_packed():
    model, x = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2), nn.Linear(2, 64)), torch.randn(3, 2)
    expected = model[1](model[0](x))
    ll.quantize(model)
    assert packed(model) == ["2"]
    assert torch.equal(model[1](model[0](x)), expected)


# ---- memory -------------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys, torch
from torch import nn
import lightning_lora as ll
torch.set_num_threads(1)
ll.quantize(nn.Sequential(nn.Linear(512, 512)), sys.argv[1])  # what is loaded and allocated once
model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(16)))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096
before = resident(), peak()
ll.quantize(model, sys.argv[1])
print(*before, resident(), peak())
"""


# So that what is freed goes back at once, and what is measured is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_dense_weights_go_one_by_one(mode):
    """The highest point is not above what was there by more than a layer; at the end the dense weights are gone."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, mode],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(root), **MALLOC},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before, peak_before, after, peak = map(int, done.stdout.split())
    layer = 2048 * 2048 * 4
    assert peak - max(before, peak_before) <= 1.05 * layer
    assert after - before <= 16 * layer * ((0.13 if mode == "nf4-dq" else 0.26) - 1) + layer


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4-dq"])
@pytest.mark.parametrize("shape", [(48, 64), (1030, 1024), (33, 7)])
def test_packing_in_pieces_is_what_bitsandbytes_does(monkeypatch, mode, shape):
    import bitsandbytes as bnb

    from lightning_lora.quantization import nearest

    W = torch.randn(shape)
    data, state = bnb.functional.quantize_4bit(W, quant_type=mode[:3], compress_statistics=mode.endswith("dq"))
    monkeypatch.setattr(nearest, "PIECE", 1 << 12)
    layer = nn.Linear(*shape[::-1])
    layer.weight.data.copy_(W)
    ll.quantize(model := nn.Sequential(layer), mode)
    assert torch.equal(model[0].weight.data, data)
    assert torch.equal(model[0].weight.quant_state.absmax, state.absmax)
    assert torch.equal(dense(model[0]), bnb.functional.dequantize_4bit(data, state))


# ---- what is refused ------------------------------------------------------------------------------------------------------


def test_bad_input():
    with pytest.raises(ll.ConfigError, match="Did you mean 'nf4'"):
        ll.quantize(build(), "nf5")
    for wrong in (None, 4, {"mode": "nf4"}):
        with pytest.raises(
            ll.ConfigError, match=r"must be one of nf4, .* or a Quantization, got (None|4|{.*Quantization)"
        ):
            ll.quantize(nn.Linear(64, 64), wrong)
    with pytest.raises(
        ll.ConfigError, match="mode='int8' has no compute_dtype='bfloat16', blocksize=128: leave that out"
    ):
        ll.Quantization(mode="int8", compute_dtype="bfloat16", blocksize=128)
    with pytest.raises(ll.ConfigError, match="blocksize must be a power of two from 32 to 4096, got 8192"):
        ll.Quantization(blocksize=8192)
    with pytest.raises(ll.TargetError, match="no linear that can be quantised"):
        ll.quantize(nn.Sequential(nn.Conv2d(3, 3, 3)))
    with pytest.raises(ll.TargetError, match="0 is on the meta device: give it its values in configure_model"):
        ll.quantize(nn.Sequential(nn.Linear(4, 4, device="meta")))
    with pytest.raises(
        ll.TargetError, match="0 has 15 weights, which do not fill float32 .a multiple of 8.: use quant_st"
    ):
        ll.quantize(nn.Sequential(nn.Linear(3, 5)), ll.Quantization(quant_storage="float32"))
    ll.quantize(nn.Sequential(nn.Linear(3, 5)))
    model = build()
    ll.quantize(model, "nf4")
    ll.quantize(model, "nf4")
    with pytest.raises(ll.TargetError, match="quantised already, as 'nf4': 'nf4-dq' needs dense weights"):
        ll.quantize(model, "nf4-dq")
    ll.inject(model, ll.LoRAConfig())
    with pytest.raises(ll.ConfigError, match="dtype is for dense layers"):
        ll.merge(model, dtype="bfloat16")
    ll.merge(model)
    with pytest.raises(ll.ConfigError, match="merged into blocks.0.q, which is quantised|merged already"):
        dequantize_(model)


def test_devices_that_bitsandbytes_does_not_have():
    with pytest.raises(ll.UnsupportedError, match="bitsandbytes has no kernels for 'mps': leave quantization out"):
        ll.quantize(build(), "nf4", device="mps")


def test_memory_that_runs_out_half_way(monkeypatch):
    """The layers before it are packed and can't be brought back: nothing is left that could train."""
    from lightning_lora.quantization.bitsandbytes import FourBit

    real, calls = FourBit.convert, []

    def fails_at_the_third(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args)

    monkeypatch.setattr(FourBit, "convert", fails_at_the_third)
    model = build()
    ll.inject(model, ll.LoRAConfig(r=2))
    with pytest.raises(ll.UnsupportedError, match="quantising blocks.1.q failed .OutOfMemoryError: CUDA out of memory"):
        ll.quantize(model)
    assert not ll.adapters(model)
    with pytest.raises(ll.TargetError, match="broke off at blocks.1.q: build it anew"):
        ll.quantize(model)
    with pytest.raises(ll.TargetError, match="broke off at blocks.1.q: build it anew"):
        ll.inject(model, ll.LoRAConfig(r=2))


@pytest.mark.parametrize("missing", [True, False])
def test_without_bitsandbytes(monkeypatch, missing):
    monkeypatch.delitem(sys.modules, "lightning_lora.quantization.bitsandbytes", raising=False)
    if missing:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    else:
        import bitsandbytes

        monkeypatch.setattr(bitsandbytes, "__version__", "0.49.2")
    with pytest.raises(ll.UnsupportedError, match="needs bitsandbytes 0.50 or newer .pip install -U bitsandbytes"):
        ll.quantize(build())


def test_loading_unpacks_nothing(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    ll.quantize(model, "nf4")
    ll.inject(model, ll.LoRAConfig(r=2, modules_to_save=None))
    state = model.state_dict()
    monkeypatch.setattr("lightning_lora.quantization.four_bit._unpacked", None)
    model.load_state_dict(state, strict=False)  # what unpacks the weight is not loaded by such a layer


@pytest.mark.parametrize("double", [False, True])
def test_a_base_that_was_evaluated_before(double):
    """On CPUs with AVX512-bf16 bitsandbytes repacks it for that, and throws away what it was packed with twice."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    data = torch.randn(64, 64)
    layer.weight = bnb.nn.Params4bit(data, requires_grad=False, quant_type="nf4", compress_statistics=double)
    model, x = nn.Sequential(layer).to("cpu").eval(), torch.randn(3, 64)
    with torch.no_grad():
        model(x)
    plan = ll.inject(model, ll.LoRAConfig(r=2, target_modules=["0"], modules_to_save=None))
    assert [target.name for target in plan.targets] == ["0"]
    randomise(model, seed=0)
    wanted = x @ (dense(model[0]) + (model[0].lora["default"].merged(dense(model[0])) - dense(model[0]))).T
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    model(x).sum().backward()


def test_an_adapter_from_a_file_turns_off_what_would_harm_training(tmp_path):
    """On CPUs with AVX512-bf16 bitsandbytes' own layers repack in eval for a kernel without a backward pass."""
    first, second = build(), build()
    for model in (first, second):
        ll.quantize(model, "nf4")
    ll.inject(first, ll.LoRAConfig(r=2, modules_to_save=None))
    ll.save_adapter(first, tmp_path / "a")
    layers = [second.get_submodule(name) for name in packed(second)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    ll.load_adapter(second, tmp_path / "a")
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
