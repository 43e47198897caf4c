"""While values don't change DoRA's norms are taken once; whatever changes them is noticed."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import transformers as tf
from torch.utils.data import DataLoader

import lightning_lora as ll
from lightning_lora.state import adapter_modules
from tests.helpers.dora import X, adapted, count_norms, wanted
from tests.helpers.layers import randomise
from tests.helpers.modules import trainer
from tests.helpers.toy import Lit, data


@pytest.fixture
def taken(monkeypatch):
    return count_norms(monkeypatch)


def build():
    return adapted().eval()


def check(model, **tolerance):
    torch.testing.assert_close(model(X).detach(), wanted(model), **(tolerance or {"rtol": 1e-5, "atol": 1e-5}))


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_once(taken, no_gradients, rows):
    model, x = build(), torch.randn(rows, 16)
    with no_gradients():
        before = model(x)
        taken.clear()
        with ll.dora_caching(model):
            outputs = [model(x) for _ in range(4)]
        assert len(taken) == 2  # there are two layers
        model(x)
        assert len(taken) == 4
    for out in outputs:
        torch.testing.assert_close(out, before, rtol=0, atol=0)


def test_not_where_gradients_are_asked_for(taken):
    model = build()
    with ll.dora_caching(model):
        for mode in (True, False):
            model.train(mode)
            taken.clear()
            for _ in range(2):
                model(X).sum().backward()
            assert len(taken) == 4


CHANGES = {
    "in place": lambda model: [layer.lora["default"].B.mul_(1.5) for layer in (model[0], model[2])],
    "a magnitude": lambda model: model[2].lora["default"].magnitude.mul_(1.5),
    "loaded": lambda model: model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}),
    "cast": lambda model: model.double().float(),
    "taken": lambda model: model[0].lora["default"].take({"B": model[0].lora["default"].B * 1.5}),
    "between modes": lambda model: (
        [model.train(), setattr(model[0].lora["default"].B, "data", torch.ones(12, 2))] and model.eval()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    model = build()
    with torch.no_grad(), ll.dora_caching(model):
        check(model)
        CHANGES[change](model)
        check(model)


def test_another_weight_is_noticed():
    model = build()
    with torch.no_grad():
        with ll.dora_caching(model):
            dense = model(X)
            ll.quantize(model, "nf4")
            packed = model(X)
        assert (packed - dense).abs().max() > 1e-3
        torch.testing.assert_close(model(X), packed, rtol=0, atol=0)


def test_steps_of_attached_optimizers_are_noticed():
    model = build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    ll.attach_optimizer(model, optimizer)
    with ll.dora_caching(model):
        for _ in range(2):
            with torch.no_grad():
                check(model)
            model(X).square().sum().backward()
            optimizer.step()
        with torch.no_grad():
            check(model)


def test_nothing_is_left_of_it(taken):
    model = build()

    def fail():
        with ll.dora_caching(model):
            model(X)
            raise KeyError("broken off")

    with torch.no_grad():
        with pytest.raises(KeyError):
            fail()
        model[0].lora["default"].B.data.mul_(1.5)
        check(model)
        with ll.dora_caching(model):
            with ll.dora_caching(model):
                model(X)
            taken.clear()
            model(X)
            assert not taken  # the inner one ended, and the outer one has not
            twin = copy.deepcopy(model)
            twin[0].lora["default"].B.data.mul_(1.5)
            check(twin)
        model[0].lora["default"].B.data.mul_(1.5)
        check(model)
        with (caching := ll.dora_caching(model)):
            with caching:
                model(X)
            taken.clear()
            model(X)
            assert not taken
        model[0].lora["default"].B.data.mul_(1.5)
        check(model)


def test_several_adapters_and_switches():
    model = build()
    ll.inject(model, ll.LoRAConfig(r=3, lora_alpha=5, use_dora=True, modules_to_save=None), "other")
    randomise(model, seed=9)
    wishes = ["default", "other", {"default": 0.7, "other": 0.3}, ["default", "other"]]
    with torch.no_grad():
        plain = []
        for wish in wishes:
            ll.set_adapter(model, wish)
            plain.append(model(X))
        with ll.dora_caching(model):
            for wish, one in zip(wishes * 2, plain * 2, strict=True):
                ll.set_adapter(model, wish)
                torch.testing.assert_close(model(X), one, rtol=0, atol=0)


class Writer(pl.LightningModule):
    """Writes texts, token by token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = tf.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
        )
        self.model = tf.LlamaForCausalLM(config)
        self.texts = []

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def write(self, batch):
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        return self.model.generate(batch, **options)

    def validation_step(self, batch, batch_idx):
        self.texts.append(self.write(batch))

    def predict_step(self, batch, batch_idx):
        return self.write(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, fused=True)


def test_a_trainer_takes_them_once_for_each_batch(taken):
    module, ids = Writer(), torch.randint(1, 50, (4, 5))
    loader = DataLoader(ids, batch_size=2)
    run = trainer(ll.LoRA(r=4, lora_alpha=6, use_dora=True), max_epochs=2)
    run.fit(module, loader, loader)
    randomise(module)
    taken.clear()
    texts = torch.cat(run.predict(module, loader))
    assert len(taken) == 2 * 14  # batches, and linears
    assert type(module).predict_step is Writer.predict_step
    assert "predict_step" not in vars(module)
    plain = Writer()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if ".lora." not in k})
    ll.inject(plain.model, ll.LoRAConfig(r=4, lora_alpha=6, use_dora=True, modules_to_save=None))
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(plain.eval().write(ids), texts, rtol=0, atol=0)


def test_a_step_that_calls_another(taken):
    """What is written behind torch's back after a test is seen, as it was before there was one."""

    class Both(Lit):
        def test_step(self, batch, batch_idx):
            return self.validation_step(batch, batch_idx)

    run, module = trainer(ll.LoRA(r=2, lora_alpha=6, use_dora=True), max_epochs=1), Both()
    run.fit(module, data())
    run.test(module, data(), verbose=False)
    x = next(iter(data()))[0]
    with torch.no_grad():
        module.eval().net(x)
        module.net.blocks[0].q.lora["default"].B.data.mul_(9)
        torch.testing.assert_close(module.net(x), ll.merge_and_unload(copy.deepcopy(module)).net(x))


def test_values_of_each_validation_are_the_current_ones():
    seen = []

    class Watched(Lit):
        def validation_step(self, batch, batch_idx):
            out = self.net(batch[0])
            with torch.inference_mode(False), torch.no_grad():
                merged = ll.merge_and_unload(copy.deepcopy(self.net)).eval()
                seen.append((out.clone(), merged(batch[0].clone())))

    trainer(ll.LoRA(r=4, lora_alpha=6, use_dora=True), max_epochs=3).fit(Watched(), data(), data())
    for one, other in seen:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert len({float(one.sum()) for one, _ in seen}) > 4


def test_a_copy_is_in_no_context():
    model = adapted()
    with ll.dora_caching(model):
        again = copy.deepcopy(model)
        assert any(adapter.resting for adapter in adapter_modules(model, "default"))
    assert not any(adapter.resting for adapter in adapter_modules(again, "default"))
