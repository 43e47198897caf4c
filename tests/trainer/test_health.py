"""A run cannot silently fail to train: each trap is an error that names the layer and the way out."""

import lightning.pytorch as pl
import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_lora as ll
from lightning_lora.layers import attach, lora_layers
from lightning_lora.training.health import check_before
from lightning_lora.training.ways_out import PATIENCE
from tests.helpers.families import FAMILIES
from tests.helpers.modules import Wrapped, one_batch, trainer
from tests.helpers.toy import Lit, data


class Custom(Lit):
    """A Lit around any network."""

    def __init__(self, net: nn.Module, **options: object) -> None:
        super().__init__(**options)
        self.net = net


def fit(net: nn.Module, *, lora: dict[str, object] | None = None, steps: int = 1, **options: object) -> Custom:
    module = Custom(net, **options)
    trainer(ll.LoRA(r=4, **(lora or {})), max_steps=steps, max_epochs=-1).fit(module, data(batch_size=4))
    return module


# ---- dead layers ------------------------------------------------------------------------------------------------------


class ReadsWeight(nn.Module):
    """Uses a linear's weight without calling it, in a way that its source does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"first": nn.Linear(16, 16)})
        self.holder = Holder()

    def forward(self, x):
        return self.holder(self.inner["first"](x))


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(16, 4)

    def forward(self, x):
        return nn.functional.linear(x, self._modules["read"].weight)


def test_a_weight_that_is_read():
    with pytest.raises(
        ll.DeadAdapterError,
        match=r"net.holder.read.lora.default.A, net.holder.read.lora.default.B: .*Its weight is read",
    ):
        fit(ReadsWeight())
    fit(ReadsWeight(), lora={"exclude_modules": ["holder"]}, steps=3)


class UnusedOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.pooler = nn.Linear(16, 4), nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.body(x)
        self.pooler(hidden)
        return hidden


def test_an_output_that_is_not_used():
    with pytest.raises(
        ll.DeadAdapterError,
        match=r"net.pooler.lora.default.A.*called, but no gradient.*exclude_modules=\['net.pooler'\]$",
    ):
        fit(UnusedOutput())


class Tower(nn.Module):
    """Of which the model takes what comes before its last block, as LLaVA does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(3))
        self.text = nn.Linear(16, 4)

    def forward(self, x):
        for block in self.blocks:
            before, x = x, block(x)
        return self.text(before)


def test_what_to_leave_out_can_be_copied():
    with pytest.raises(ll.DeadAdapterError, match=r"That is (exclude_modules=\['net.blocks.2'\])$"):
        fit(Tower(), lora={"modules_to_save": None})
    fit(Tower(), lora={"modules_to_save": None, "exclude_modules": ["net.blocks.2"]}, steps=3)


def test_multihead_attention_is_handled():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.layer(x[:, None])[:, 0])

    module = fit(Encoder(), steps=2)
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1", "linear2"]
    assert [n for n, _ in lora_layers(module)] == [f"net.layer.{name}" for name in names]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_dora": True, "target_modules": ["1.linear1"]}])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_the_encoders_fused_path_does_not_bypass_adapters(options, masked):
    """In eval mode without gradients torch reads the linears' weights, unless one of its modules has a hook.

    Of a padded batch it makes a nested tensor, of which DoRA could not take its products.
    """
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    x, mask = torch.randn(2, 5, 16), None
    if masked:
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    ll.inject(encoder, ll.LoRAConfig(r=4, **options))
    for _, layer in lora_layers(encoder):
        nn.init.normal_(layer.lora["default"].B)
    trained = encoder.train()(x, src_key_padding_mask=mask)
    with torch.no_grad():
        evaluated = encoder.eval()(x, src_key_padding_mask=mask)
    keep = slice(None) if mask is None else ~mask
    torch.testing.assert_close(evaluated[keep], trained[keep], rtol=1e-4, atol=1e-5)
    assert not encoder.use_nested_tensor
    ll.eject(encoder)
    assert encoder.use_nested_tensor


def test_an_encoder_that_makes_no_nested_tensors_makes_none_later():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, None, False)
    ll.inject(encoder, ll.LoRAConfig(r=4))
    ll.merge_and_unload(encoder)
    assert not encoder.use_nested_tensor


class Reentrant(nn.Module):
    """A frozen embedding, a block in a reentrant checkpoint, and a trainable head: the block gets no gradient."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block, self.head, self.reentrant = nn.Linear(16, 16), nn.Linear(16, 4), reentrant

    def forward(self, x):
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_reentrant_checkpoint_behind_frozen_inputs():
    with pytest.raises(ll.DeadAdapterError, match=r"net.block.lora.default.A.*use_reentrant=False"):
        fit(Reentrant(True))
    fit(Reentrant(False), steps=2)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_loss_without_any_gradient_gets_a_note():
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        fit(Reentrant(True), lora={"modules_to_save": None})
    assert "use_reentrant=False" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
def test_an_activation_in_place_behind_dora(bias, p):
    """The magnitude's gradient needs the output, which is computed again if it was changed."""
    gradients = []
    for inplace in (False, True):
        torch.manual_seed(0)
        activation = nn.LeakyReLU(0.3, inplace=inplace)  # behind ReLU what was changed has no gradient
        net = nn.Sequential(nn.Linear(16, 16, bias=bias), activation, nn.Linear(16, 4)).double()
        options = {"lora_dropout": p, "dora_dropout": "lora"} if p else {}
        ll.inject(net, ll.LoRAConfig(r=2, lora_alpha=3.0, use_dora=True, target_modules=["0"], **options))
        adapter = net[0].lora["default"]
        nn.init.normal_(adapter.B.data)
        torch.manual_seed(1)
        net(torch.randn(5, 16, dtype=torch.float64)).square().sum().backward()
        gradients.append([adapter.magnitude.grad, adapter.A.grad, adapter.B.grad])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_checkpointing_of_transformers_models(family, reentrant):
    """Gradients equal those without checkpointing, reentrant or not."""
    gradients = []
    for checkpointing in (False, True):
        module = Wrapped(FAMILIES[family].make)
        batch = FAMILIES[family].batch(module.net)
        if checkpointing:
            module.net.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        module.configure_optimizers = lambda m=module: torch.optim.SGD(m.parameters(), lr=1e-3)
        for dropout in (m for m in module.modules() if isinstance(m, nn.Dropout)):
            dropout.p = 0.0
        module.net.config.attention_probs_dropout_prob = 0.0
        trainer(ll.LoRA(r=4), max_steps=2).fit(module, one_batch(batch))
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


# ---- what may wait, and what may not ------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Only one expert is reached at first."""

    def __init__(self, reached: int = 1) -> None:
        super().__init__()
        self.experts, self.reached = nn.ModuleList(nn.Linear(16, 4) for _ in range(3)), reached

    def forward(self, x):
        return sum(expert(x) for expert in self.experts[: self.reached])


@pytest.mark.parametrize("steps", [3, PATIENCE + 2])
def test_layers_that_were_not_reached_may_wait(steps):
    """As long as one beside them was: that is what routing looks like."""
    with pytest.warns(UserWarning, match=r"4 trainable tensors never moved in this run: net.experts.1.lora"):
        fit(Experts(), steps=steps)


class ReachedLate(pl.LightningModule):
    """An expert that is reached from a step on."""

    def __init__(self, when: int) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 1)
        self.when = when

    def training_step(self, batch, index):
        return self.head(self.experts[int(self.global_step >= self.when)](batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("when", [PATIENCE - 2, PATIENCE - 1, PATIENCE + 5])
def test_an_expert_that_is_reached_late(when):
    """In its first step B moves alone: A's gradient is 0 as long as B is."""
    module = ReachedLate(when)
    lora = ll.LoRA(r=2, target_modules=["0", "1"])
    trainer(lora, max_epochs=1).fit(module, DataLoader(torch.randn(2 * (PATIENCE + 20), 8), batch_size=2))
    assert all(expert.lora["default"].B.any() for expert in module.experts)


def test_a_factor_that_waits_for_ever_is_dead():
    """Also where the other one moved long ago."""

    class Module(ReachedLate):
        def configure_optimizers(self):
            factors = [p for name, p in self.named_parameters() if name.endswith(".A")]
            others = [p for name, p in self.named_parameters() if not name.endswith(".A")]
            return torch.optim.AdamW([{"params": others}, {"params": factors, "lr": 0.0}], lr=1e-2)

    lora = ll.LoRA(r=2, target_modules=["0"])
    with pytest.raises(ll.DeadAdapterError, match=r"experts.0.lora.default.A: did not move in 100 steps"):
        trainer(lora, max_epochs=1).fit(Module(10**6), DataLoader(torch.randn(2 * (PATIENCE + 9), 8), batch_size=2))


def test_a_tower_that_is_never_reached():
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.ModuleList([nn.Linear(16, 4)]), nn.ModuleList([nn.Linear(16, 4)])

        def forward(self, x):
            return self.first[0](x)

    with pytest.raises(
        ll.DeadAdapterError, match=r"net.second.0.lora.default.A.*did not move in 100 steps.*never reached"
    ):
        fit(Towers(), steps=PATIENCE + 1)


class Alternating(nn.Module):
    """Two experts of which each step reaches one; the other was called in the step before."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head, self.step = nn.ModuleList(nn.Linear(16, 16) for _ in range(2)), nn.Linear(16, 4), 0

    def forward(self, x):
        self.step += 1
        return self.head(self.experts[self.step % 2](x))


def test_alternating_experts_are_well():
    fit(Alternating(), steps=6)


def test_alternating_experts_during_a_warm_up():
    """At a learning rate of 0 both wait, with and without gradients."""

    def warm_up(module):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= 3))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = fit(Alternating(), steps=6, optimizers_=warm_up)
    assert all(layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(module))


def test_what_validation_reaches_is_not_expected_to_train():
    """Without inference mode too: only calls in training batches count."""

    class Extra(nn.Module):
        def __init__(self):
            super().__init__()
            self.towers, self.head = nn.ModuleList(nn.Linear(16, 16) for _ in range(2)), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.towers[0](x) + (0 if self.training else self.towers[1](x)))

    module = Custom(Extra())
    run = trainer(ll.LoRA(r=4), max_epochs=2, inference_mode=False, num_sanity_val_steps=1)
    with pytest.warns(UserWarning, match="2 trainable tensors never moved in this run: net.towers.1"):
        run.fit(module, data(), data())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_first_batch_that_is_skipped():
    """Returning None is Lightning's way to leave out a batch whose loss is nan."""

    class Skips(Lit):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 0 else loss

    module = Skips()
    trainer(ll.LoRA(r=4), max_epochs=1).fit(module, data())
    assert all(layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(module))


@pytest.mark.parametrize("in_place", [False, True])
def test_experts_in_a_compiled_module_may_wait(in_place):
    torch.compiler.reset()
    module = Custom(Alternating())
    if in_place:
        module.net.compile(backend="eager")
    else:
        module.net = torch.compile(module.net, backend="eager")
    trainer(ll.LoRA(r=4), max_epochs=2).fit(module, data())
    assert all(layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(module))


def test_a_parameter_that_some_batches_need():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.null = nn.Parameter(torch.randn(16, 4)), nn.Parameter(torch.randn(16))
            self.step = 0

        def forward(self, x):
            self.step += 1
            return (x if self.step < 3 else x + self.null) @ self.proj

    module = Custom(nn.ModuleDict({"body": nn.Linear(16, 16), "head": Head()}))
    module.net.forward = lambda x: module.net["head"](module.net["body"](x))
    trainer(ll.LoRA(r=4), max_epochs=2).fit(module, data())
    assert "net.head.null" in ll.adapter_state_dict(module)


def test_a_layer_beside_the_one_that_was_called_may_wait():
    """If the code around them reads no weight, it chooses among them."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out, self.step = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4), 0

        def forward(self, x):
            self.step += 1
            return self.out(self.a(x) if self.step % 3 else self.b(x))

    net = nn.Sequential(Branch(), nn.Identity())
    module = fit(net, steps=6)
    assert all(layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(module))


@pytest.mark.parametrize("key", ["lr_none", "no_lr"])
def test_optimizers_without_a_learning_rate(key):
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"step_size": 0.1})

        @torch.no_grad()
        def step(self, closure=None):
            with torch.enable_grad():
                loss = closure()
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=group["step_size"])
            return loss

    def adafactor(m):
        return tf.optimization.Adafactor(m.parameters(), relative_step=True, warmup_init=True, lr=None)

    module = Lit(optimizers_=adafactor if key == "lr_none" else lambda m: Own(m.parameters()))
    trainer(ll.LoRA(r=4), max_epochs=2).fit(module, data())
    assert all(layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(module))
    with pytest.raises(
        ll.UnsupportedError, match="loraplus_lr_ratio: (Adafactor|Own) finds its learning rate by itself"
    ):
        trainer(ll.LoRA(r=4, loraplus_lr_ratio=4.0), max_epochs=2).fit(module, data())


# ---- the base ----------------------------------------------------------------------------------------------------------------


class Unfreezes(pl.callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        pass

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.blocks[0], optimizer)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_a_callback_that_unfreezes_the_base():
    with pytest.raises(ll.DeadAdapterError, match="an optimizer got weights of the frozen base: .*modules_to_save"):
        trainer(ll.LoRA(r=4), Unfreezes(), max_epochs=3).fit(Lit(), data())


class TrainsByHand(Lit):
    def on_train_batch_end(self, *args):
        with torch.no_grad():
            self.net.blocks[0].q.weight.mul_(0.99)


def test_a_base_that_is_changed_by_hand(tmp_path):
    """It would be in no checkpoint, so that none is written that loads as another model."""
    saver = pl.callbacks.ModelCheckpoint(tmp_path)
    with pytest.raises(
        ll.CheckpointError, match="weights of the frozen base changed in training: net.blocks.0.q.weight"
    ):
        trainer(ll.LoRA(r=4), saver).fit(TrainsByHand(), data())
    with pytest.warns(UserWarning, match="weights of the frozen base changed in training: net.blocks.0.q.weight"):
        trainer(ll.LoRA(r=4)).fit(TrainsByHand(), data())


def test_weight_decay_is_no_sign_of_life():
    """AdamW shrinks A whatever its gradient is; only a gradient that is not 0 makes it well."""

    class Zeroed(Lit):
        def on_before_optimizer_step(self, optimizer):
            for parameter in self.net.blocks[0].q.lora["default"].parameters():
                parameter.grad.zero_()

    with pytest.raises(ll.DeadAdapterError, match=r"net.blocks.0.q.lora.default.A, .*did not move in 100 steps"):
        trainer(ll.LoRA(r=4), max_steps=PATIENCE, max_epochs=-1).fit(Zeroed(), data(batch_size=1))


def test_an_adapter_on_what_another_trains_in_full():
    """``head`` has an adapter of one callback and is trained in full by the other."""
    module = Lit()
    first = ll.LoRA(r=4, target_modules=["q", "head"], modules_to_save=None, adapter_name="first")
    second = ll.LoRA(r=4, target_modules=["q"], modules_to_save=["head"], adapter_name="second")
    trainer(first, second, max_epochs=2).fit(module, data())
    assert "net.head.weight" in ll.adapter_state_dict(module, "second")
    assert "net.head.weight" not in ll.adapter_state_dict(module, "first")
    assert all(value.count_nonzero() for value in ll.adapter_state_dict(module).values())


@pytest.mark.parametrize("fails", [False, True])
def test_help_for_reentrant_checkpoints_ends_with_the_run(fails):
    module = Wrapped(FAMILIES["llama"].make)
    module.net.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    module.net.disable_input_require_grads()  # transformers do it themselves since 5.0
    batch = one_batch(FAMILIES["llama"].batch(module.net))
    callbacks = [ll.LoRA(r=4)]
    if fails:
        callbacks.append(pl.callbacks.LambdaCallback(on_train_end=lambda *_: 1 / 0))
    run = trainer(*callbacks, max_steps=1)
    if fails:
        with pytest.raises(ZeroDivisionError):
            run.fit(module, batch)
    else:
        run.fit(module, batch)
    assert not module.net.get_input_embeddings()._forward_hooks


def test_a_warm_up_from_zero_may_wait():
    def optimizers(module):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    fit(nn.Sequential(nn.Linear(16, 4)), steps=4, optimizers_=optimizers)


class RestsAtFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.top, self.calls = nn.Linear(16, 16), nn.Linear(16, 4), 0

    def forward(self, x):
        self.calls += 1
        with torch.set_grad_enabled(self.calls > 3):
            h = self.body(x)
        return self.top(h)


def test_a_body_that_rests_in_the_first_steps():
    """It is dead, as far as the first step can tell, unless its learning rate says so too."""

    def optimizers(module):
        body = [p for n, p in module.named_parameters() if p.requires_grad and ".body." in n]
        top = [p for n, p in module.named_parameters() if p.requires_grad and ".body." not in n]
        optimizer = torch.optim.AdamW([{"params": body, "lr": 1e-2}, {"params": top, "lr": 1e-2}])
        rates = [lambda step: float(step >= 3), lambda step: 1.0]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = fit(RestsAtFirst(), steps=5, optimizers_=optimizers)
    assert module.net.body.lora["default"].B.count_nonzero()
    with pytest.raises(ll.DeadAdapterError, match=r"body.*called, but no gradient.*give it a learning rate of 0"):
        fit(RestsAtFirst(), steps=5)


def test_a_learning_rate_of_zero_for_ever():
    with pytest.raises(ll.DeadAdapterError, match=f"did not move in {PATIENCE} steps"):
        fit(
            nn.Sequential(nn.Linear(16, 4)),
            steps=PATIENCE + 1,
            optimizers_=lambda m: torch.optim.SGD(m.parameters(), lr=0.0),
        )


def test_a_zero_initialised_head_may_wait():
    net = nn.Sequential(nn.Linear(16, 16))
    net.add_module("head", nn.Linear(16, 4))
    nn.init.zeros_(net.head.weight)
    module = fit(net, steps=3)
    assert next(layer for _, layer in lora_layers(module)).lora["default"].B.count_nonzero()


def test_an_optimizer_that_does_nothing():
    class Idle(torch.optim.SGD):
        def step(self, closure=None):
            return closure() if closure else None

    with pytest.raises(ll.DeadAdapterError, match=r"lora.default.B: it has a gradient, and the optimizer left it at 0"):
        fit(nn.Sequential(nn.Linear(16, 4)), optimizers_=lambda m: Idle(m.parameters(), lr=1e-2))


def test_magnitudes_that_are_rounded_away():
    lora = {"use_dora": True, "adapter_dtype": "bfloat16"}
    net = nn.Sequential(nn.Linear(16, 4))
    nn.init.constant_(net[0].weight, 1.0)

    def optimizers(module):
        return torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.0)

    with pytest.raises(ll.DeadAdapterError, match=r"magnitude: did not move.*adapter_dtype='float32'"):
        fit(net, lora=lora, steps=PATIENCE + 1, optimizers_=optimizers)


def test_gans_step_their_optimizers_in_turn():
    class Turns(Lit):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()[batch_idx % 2]
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    module = Turns(optimizers_=lambda m: [torch.optim.AdamW(b.parameters(), lr=1e-2) for b in m.net.blocks])
    trainer(ll.LoRA(r=4, modules_to_save=None), max_epochs=2).fit(module, data())
    assert all(layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(module))


# ---- before the first step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda m: ll.merge(m), ll.DeadAdapterError, "merged into net.blocks.0.q.*call ll.unmerge"),
        (lambda m: setattr(m.net.blocks[0].q, "lora_active", ()), ll.DeadAdapterError, "net.blocks.0.q is not active"),
        (lambda m: setattr(m.net.blocks[0].q.lora["default"], "scaling", 0.0), ll.DeadAdapterError, "net.blocks.0.q has scaling 0"),
    ],
)  # fmt: skip
def test_spoiled_before_the_run(spoil, error, message):
    module = Lit()
    ll.inject(module, ll.LoRAConfig(r=4))
    spoil(module)
    with pytest.raises(error, match=message):
        trainer(ll.LoRA(r=4)).fit(module, data())


def test_adapters_on_a_weight_that_is_read():
    """Put there by hand, past the plan."""
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "head": nn.Linear(16, 4)})
    donor = nn.Sequential(nn.Linear(16, 16))
    ll.inject(donor, ll.LoRAConfig(r=4, modules_to_save=None))
    attach(net["attention"].out_proj, "default", donor[0].lora["default"])
    with pytest.raises(ll.DeadAdapterError, match="attention.out_proj: MultiheadAttention reads this weight"):
        check_before(net, [torch.optim.SGD(net.parameters())], ["default"])


def test_frozen_behind_our_back():
    class Freezes(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.requires_grad_(False)

    with pytest.raises(ll.DeadAdapterError, match="requires_grad was turned off on net.blocks.0.q.lora.default.A"):
        trainer(ll.LoRA(r=4), Freezes()).fit(Lit(), data())


def test_frozen_in_the_users_setup():
    """Users freeze their base themselves; adapters are trained all the same."""

    class FreezesEarly(Lit):
        def setup(self, stage):
            self.net.requires_grad_(False)

    module = FreezesEarly()
    trainer(ll.LoRA(r=4)).fit(module, data())
    assert module.net.head.weight.requires_grad
    assert all(layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(module))


def test_the_watch_goes_away():
    module = Lit()
    hooks = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            optimizer = trainer.optimizers[0]
            hooks.append(
                sum(len(m._forward_pre_hooks) for m in pl_module.modules() if not type(m).__name__.endswith("Adapter"))
                + len(optimizer._optimizer_step_pre_hooks)
                + len(optimizer._optimizer_step_post_hooks)
            )

    trainer(ll.LoRA(r=4), Count()).fit(module, data())
    assert hooks[-1] == 0


def test_mamba_trains():
    config = tf.MambaConfig(vocab_size=61, hidden_size=32, state_size=4, num_hidden_layers=2)
    module = Wrapped(lambda: tf.MambaForCausalLM(config))
    tokens = torch.randint(3, 61, (2, 7))
    trainer(ll.LoRA(r=2), max_steps=2).fit(module, one_batch({"input_ids": tokens, "labels": tokens}))
    assert all(layer.lora["default"].B.count_nonzero() for _, layer in lora_layers(module))
