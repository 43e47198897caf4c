"""torch.compile: no graph breaks, the numbers of eager steps, and no compiling again in later ones."""

import copy

import pytest
import torch

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from tests.gpu import DEVICE, MARKS, ON_CPU
from tests.gpu.language import VARIANTS as DENSE
from tests.gpu.modules import build
from tests.gpu.sites import assert_near
from tests.helpers.layers import randomise

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # dynamo's and inductor's own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore::UserWarning"
    ),  # inductor's advice on TF32, on reductions, on the cards it likes
]
VARIANTS = {
    **DENSE,
    "nf4-dq": {"quantization": "nf4-dq"},
    "nf4-dq dora": {"quantization": "nf4-dq", "use_dora": True},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(autouse=True)
def anew():
    """One process compiles: a pool of them takes longer to start than so small a model."""
    from torch._inductor import config

    torch.compiler.reset()
    with config.patch(compile_threads=1):
        yield
    torch.compiler.reset()


def made(options, dtype=torch.float32):
    model, quantization = build().to(DEVICE, dtype), options.get("quantization")
    config = {key: value for key, value in options.items() if key != "quantization"}
    ll.inject(model, ll.LoRAConfig(r=8, lora_alpha=24, target_modules="all-linear", **config))
    if quantization:
        ll.quantize(model, quantization)
    randomise(model)
    for _, layer in lora_layers(model):
        layer.lora["default"].B.data.mul_(0.1)
    ids = torch.randint(3, 61, (2, 16), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(7))
    return model.train(), {"input_ids": ids, "labels": ids}


def outcome(model, run, batch, seed=3):
    torch.manual_seed(seed)
    out = run(**batch)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **grads}


def steps(model, run, twin, batch, n):
    """What a compiled model and its twin compute in each of n steps of an optimizer."""
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (model, twin)]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        ll.attach_optimizer(each, optimizer)
    for step in range(n):
        torch.compiler.cudagraph_mark_step_begin()
        found, wanted = outcome(model, run, batch), outcome(twin, twin, batch)
        yield step, found, wanted
        for each, optimizer, grads in zip((model, twin), optimizers, (found, wanted), strict=True):
            for name, parameter in each.named_parameters():
                parameter.grad = grads.get(name)
            optimizer.step()
            optimizer.zero_grad()


def compare(options, backend, tolerance=1e-4):
    """Three steps of an optimizer; with dropout other values are dropped, so that only their shapes are compared."""
    model, batch = made(options)
    twin = copy.deepcopy(model)
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    run = torch.compile(model, backend=counted, fullgraph=True)
    for step, found, wanted in steps(model, run, twin, batch, 3):
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert value.isfinite().all(), name
            if not options.get("lora_dropout"):
                assert_near(value, wanted[name], tolerance, f"step {step}: {name}")
    assert len(graphs) == 1
    if options.get("lora_dropout"):  # other values each time
        again = [outcome(model, run, batch, seed)["logits"] for seed in (5, 5, 6)]
        assert torch.equal(again[0], again[1])
        assert not torch.equal(again[0], again[2])
    assert len(graphs) == 1


@variants
def test_one_graph(options):
    compare(options, "aot_eager")


@pytest.mark.skipif(ON_CPU, reason="takes a minute there")
@pytest.mark.parametrize("name", ["lora", "dora dropout", "nf4-dq dora"])
def test_code_of_inductor(name):
    compare(VARIANTS[name], "inductor", 1e-3)


@pytest.mark.skipif(ON_CPU, reason="there are no graphs of CUDA")
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_graphs_of_cuda(variant):
    """They read the norms and all else from where it was when they were recorded."""
    model, batch = made(VARIANTS[variant])
    twin = copy.deepcopy(model)
    run = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for step, found, wanted in steps(model, run, twin, batch, 6):  # the first ones record
        for name, value in found.items():
            assert_near(value, wanted[name], 1e-3, f"step {step}: {name}")


@pytest.mark.parametrize("options", [VARIANTS["lora"], VARIANTS["dora"]], ids=["lora", "dora"])
def test_low_precision(options):
    """Compiled steps take no kernels of ours."""
    model, batch = made(options, torch.bfloat16)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, wanted = outcome(model, run, batch), outcome(model, model, batch)
    assert_near(found["logits"], wanted["logits"], 0.03)
    flat = [torch.cat([v.flatten() for k, v in each.items() if ".lora." in k]) for each in (found, wanted)]
    assert_near(*flat, 0.05)


@pytest.mark.parametrize("options", [VARIANTS["lora"], VARIANTS["nf4-dq dora"]], ids=["lora", "nf4-dq dora"])
def test_without_gradients(options):
    model, batch = made(options)
    model.eval()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_near(run(**batch).logits, model(**batch).logits, 1e-4)
