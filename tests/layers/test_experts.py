"""Adapters on stacked experts of real transformers architectures: on the routed tokens only."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import lightning_lora as ll
from lightning_lora.layers import lazy, lora_layers, read
from lightning_lora.layers.lazy import Lazy, Update

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
OWN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, **LOCAL),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**SMALL, **OWN, shared_expert_intermediate_size=16),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SMALL, **OWN, head_dim=8),
    "olmoe": lambda: transformers.OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: transformers.GptOssConfig(**SMALL, **LOCAL, head_dim=8),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**SMALL, **LOCAL),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, n_shared_experts=1,
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=1, head_dim=8, intermediate_size_mlp=48,
        interleave_moe_layer_step=1,
    ),
}  # fmt: skip
IDS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))
LORA = {"r": 2, "lora_alpha": 3.0, "target_parameters": "experts"}


def model_of(family, implementation="eager", dtype=torch.float64):
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config._experts_implementation = implementation
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def noise(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3) if name.endswith("magnitude") else parameter.normal_(std=0.2)


def run(model):
    model.zero_grad()
    out = model(IDS).logits
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


IMPLEMENTED = [
    *[(family, "eager", torch.float64) for family in FAMILIES],
    *[(family, "batched_mm", torch.float64) for family in ("mixtral", "gpt_oss")],
    *[(family, "grouped_mm", torch.float32) for family in ("qwen3_moe", "gpt_oss", "granitemoe")],
]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("family", "implementation", "dtype"), IMPLEMENTED)
def test_on_routed_tokens_as_with_dense_weights(family, implementation, dtype, dora, monkeypatch):
    model = model_of(family, implementation, dtype)
    base = model(IDS).logits
    plan = ll.inject(model, ll.LoRAConfig(**LORA, use_dora=dora))
    experts = [target for target in plan.targets if len(target.matrix) == 3]
    assert len(experts) == (2 if family == "deepseek_v3" else 4)
    assert all(target.parameters == 4 * (2 * sum(target.matrix[1:]) + dora * target.matrix[1]) for target in experts)
    assert not [target.name for target in plan.targets if "router" in target.name or target.name.endswith(".gate")]
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-3}
    torch.testing.assert_close(model(IDS).logits, base, **close)
    noise(model)
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(lazy, "_dense", lambda lazily: pytest.fail("W + ΔW was formed"))
        patch.setattr(read, "lazily", lambda *args, real=read.lazily: made.append(real(*args)) or made[-1])
        out, gradients = run(model)
    assert len(made) == len(experts)
    assert all(isinstance(each, Lazy) for each in made)
    monkeypatch.setattr(read, "lazily", lambda *args: None)
    expected, others = run(model)
    torch.testing.assert_close(out, expected, **close)
    assert (out - base).abs().max() > 1e-3
    for name, gradient in gradients.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, others[name], **{**close, "atol": close["atol"] / 100})
    with torch.no_grad():
        ll.merge(model)
        torch.testing.assert_close(model(IDS).logits, out, **close)
        ll.unmerge(model)
        torch.testing.assert_close(model(IDS).logits, out, **close)


@pytest.mark.parametrize("semantics", [None, "input", "lora"])
def test_dropout_acts_on_what_the_experts_get(semantics, monkeypatch):
    """With a mask that keeps everything at 1 / (1 - p): the update, and DoRA's base product, are those of x / (1 - p)."""
    W, x = torch.randn(3, 5, 4).double(), torch.randn(6, 4).double()
    A, B = torch.randn(3, 2, 4).double(), torch.randn(3, 5, 2).double()
    gain = None if semantics is None else torch.rand(3, 5).double() + 0.5
    monkeypatch.setattr(lazy, "dropout", lambda x, p, training: x / (1 - p) if training else x)
    stack = lazy._lazy(W, [Update(A, B, 1.7, gain, 0.2, semantics == "input")], False)
    update = 1.7 * (x / 0.8) @ A[1].T @ B[1].T
    expected = x @ W[1].T + update
    if gain is not None:
        again = (x / 0.8 if semantics == "input" else x) @ W[1].T
        expected = x @ W[1].T + gain[1] * update + (gain[1] - 1) * again
    torch.testing.assert_close(F.linear(x, stack[1]), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_whatever_is_done_to_a_stack_is_right(dora):
    W, x = torch.randn(3, 5, 4).double(), torch.randn(3, 6, 4).double()
    A, B = torch.randn(3, 2, 4).double(), torch.randn(3, 5, 2).double()
    gain = torch.rand(3, 5).double() + 0.5 if dora else None
    stack = lazy._lazy(W, [Update(A, B, 1.7, gain, 0.0, True)], False)
    dense = (W + 1.7 * B @ A) * (1 if gain is None else gain[..., None])
    index = torch.tensor([2, 0, 2])
    for operation in (
        lambda w: F.linear(x[0], w[1], torch.ones(5).double()),
        lambda w: F.linear(x[0], w[torch.tensor(2)]),
        lambda w: x[0] @ w[0].T + x[0] @ w[0].t() + x[0] @ w[0].mT,
        lambda w: torch.matmul(x, w.transpose(1, 2)),
        lambda w: torch.bmm(w[index], x.mT),
        lambda w: w @ x.mT,
        lambda w: torch.stack([F.linear(x[0], each) for each in w]),
        lambda w: torch.stack([F.linear(x[0], each) for each in w.unbind()]),
        lambda w: x @ w[0].T,
        lambda w: torch.einsum("eti,eoi->eto", x, w),
        lambda w: w.sum() + w.norm() + (w * 2).mean() + w[..., 1].sum() + w[1:].sum(),
        lambda w: w.reshape(15, 4) @ x[0].T,
        lambda w: x[:, :, :4] @ w.to(torch.float64).contiguous().mT,
        lambda w: torch.nn.functional.linear(x[0], w.view(15, 4)),
        lambda w: x.transpose(1, 2).mT @ w[index].mT,
        lambda w: F.linear(x, w[1]),
        lambda w: torch.cat([w, w]).sum(0),
    ):
        found = operation(stack)
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, operation(dense))
    assert stack.shape == W.shape
    assert stack.dtype == W.dtype
    assert len(stack) == 3


def test_experts_compile():
    model = model_of("mixtral", "batched_mm")
    ll.inject(model, ll.LoRAConfig(**LORA))
    noise(model)
    expected = model(IDS).logits
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(IDS).logits, expected, rtol=1e-6, atol=1e-6)


def test_several_adapters_and_checkpointing():
    model = model_of("qwen3_moe")
    ll.inject(model, ll.LoRAConfig(**LORA))
    ll.inject(model, ll.LoRAConfig(**{**LORA, "r": 3}, use_dora=True), "second")
    noise(model)
    ll.set_adapter(model, ["default", "second"])
    noise(model)
    out, gradients = run(model)
    with torch.no_grad():
        ll.merge(model)
        torch.testing.assert_close(model(IDS).logits, out, rtol=1e-6, atol=1e-6)
        ll.unmerge(model)
    model.train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    again, others = run(model)
    torch.testing.assert_close(again, out, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-9)


def test_a_checkpoint_of_experts(tmp_path):
    from tests.helpers.modules import Wrapped, one_batch, trainer

    def build():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(FAMILIES["mixtral"]())

    from lightning.pytorch.callbacks import ModelCheckpoint

    module, batch = Wrapped(build), {"input_ids": IDS, "labels": IDS}
    lora = ll.LoRA(**LORA, target_modules=[])
    trainer(lora, ModelCheckpoint(tmp_path, filename="last"), max_epochs=3).fit(module, one_batch(batch, 4))
    state = ll.adapter_state_dict(module)
    assert [*state][:2] == [
        "net.model.layers.0.mlp.experts.gate_up_proj.lora.default.A",
        "net.model.layers.0.mlp.experts.gate_up_proj.lora.default.B",
    ]
    assert all(value.abs().sum() > 0 for value in state.values())
    other = Wrapped(build)
    ll.load_adapter(other, tmp_path / "last.ckpt")
    for key, value in ll.adapter_state_dict(other).items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    module.eval()
    other.eval()
    torch.testing.assert_close(other.net(IDS).logits, module.net(IDS).logits)


@pytest.mark.parametrize("method", ["cat", "svd", "ties"])
def test_experts_are_combined(method):
    model = model_of("mixtral")
    for name, r in (("one", 2), ("two", 2)):
        ll.inject(model, ll.LoRAConfig(**{**LORA, "r": r}, target_modules=[]), name)
        ll.set_adapter(model, name)
        noise(model)
    report = ll.combine_adapters(model, {"one": 0.7, "two": -0.3}, "both", method, rank=None if method == "cat" else 4)
    layer = next(layer for _, layer in lora_layers(model))
    one, two, both = (layer.lora[name] for name in ("one", "two", "both"))
    if method != "ties":
        expected = 0.7 * 1.5 * one.B @ one.A - 0.3 * 1.5 * two.B @ two.A
        torch.testing.assert_close(both.B @ both.A * both.scaling, expected)
        assert next(iter(report.layers.values())).norm == pytest.approx(expected.norm().item())
    with torch.no_grad():
        ll.set_adapter(model, {"one": 0.7, "two": -0.3})
        mixed = model(IDS).logits
        ll.set_adapter(model, "both")
        if method != "ties":
            torch.testing.assert_close(model(IDS).logits, mixed, rtol=1e-6, atol=1e-6)
    assert ll.adapters(model)["both"].target_parameters is not None
    ll.to_lora(model, rank=1, adapter_name="both")
    assert both.A.shape[1] == 4


def test_names_of_the_experts_alone():
    model = model_of("mixtral")
    plan = ll.plan(model, ll.LoRAConfig(target_modules=[], target_parameters=["experts.down_proj"], r=4))
    assert [t.name for t in plan.targets] == [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]
    assert plan.targets[0].matrix == (4, 32, 48)
    assert "4x32x48" in str(plan)
    names = {name for name, _ in lora_layers(model)}
    assert not names


class Mixture(nn.Module):
    """One whose experts are transposed, and one that computes in an own way."""

    is_transposed = True

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        return torch.einsum("eti,eio->eto", x, self.stack)


@pytest.mark.parametrize("dora", [False, True])
def test_a_stack_of_a_users_own(dora):
    model, x = Mixture().double(), torch.randn(3, 6, 4).double()
    base = model(x).detach()
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3.0, use_dora=dora, target_modules=[], target_parameters=["stack"]))
    torch.testing.assert_close(model(x).detach(), base)
    noise(model)
    out = model(x)
    adapter = dict(lora_layers(model))["stack"].lora["default"]
    assert adapter.A.shape == (3, 2, 4)
    assert adapter.B.shape == (3, 5, 2)
    W = model.stack.mT + 1.5 * adapter.B @ adapter.A
    if dora:
        W = W * (adapter.magnitude / W.norm(dim=-1))[..., None]
    torch.testing.assert_close(out, x @ W.mT)


@pytest.mark.parametrize("active", ["experts", "queries"])
def test_a_mixed_batch_is_not_of_experts(active):
    model = model_of("mixtral")
    base = model(IDS).logits
    ll.inject(model, ll.LoRAConfig(**LORA, target_modules=[], modules_to_save=None), "experts")
    noise(model)
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=3.0, target_modules=["q_proj"], modules_to_save=None), "queries")
    ll.set_adapter(model, "queries")
    noise(model)
    queries = model(IDS).logits
    ll.set_adapter(model, active)
    with pytest.raises(ll.ConfigError, match="adapter 'experts' is on .*, which is read as a whole, for all samples"):
        ll.mixed_batch(model, ["experts", None]).__enter__()
    with ll.mixed_batch(model, ["queries", None]):
        out = model(IDS).logits
    assert (queries - base).abs().max() > 1e-3
    torch.testing.assert_close(out, torch.stack([queries[0], base[1]]))
