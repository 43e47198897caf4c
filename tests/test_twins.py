"""A frozen teacher beside a student, a judge beside a policy: what was frozen beside its kind gets no adapters."""

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.comparators import BitFitConfig, BottleneckConfig, PrefixTuningConfig
from tests.helpers.families import DECODER, SMALL, ids
from tests.helpers.modules import one_batch, trainer


def bert(layers: int = 2, labels: int | None = 3) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SMALL, "num_hidden_layers": layers}
    config = tf.BertConfig(**sizes, num_labels=labels or 2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return tf.BertModel(config) if labels is None else tf.BertForSequenceClassification(config)


def distilbert() -> nn.Module:
    torch.manual_seed(1)
    return tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(
            vocab_size=bert().config.vocab_size, dim=32, n_layers=1, n_heads=4, hidden_dim=64, num_labels=3
        )
    )


class Distilled(pl.LightningModule):
    """A student that learns what its teacher says."""

    def __init__(self, student: nn.Module, teacher: nn.Module, frozen: bool = True) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(not frozen)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(**batch).logits.softmax(-1)
        return nn.functional.cross_entropy(self.student(**batch).logits, wanted)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def batches() -> Any:
    return one_batch({key: value for key, value in ids(bert()).items() if key != "labels"}, times=4)


def outside(plan: ll.Plan) -> list[str]:
    """What the plan does outside the student."""
    done = [t.name for t in plan.targets] + [s.name for s in plan.modules_to_save] + [a.name for a in plan.additions]
    return [name for name in done if name.split(".")[0] != "student"]


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(bert, bert), (bert, lambda: bert(3)), (lambda: bert(1), bert), (distilbert, bert)],
    ids=["copy", "larger", "smaller", "another class"],
)
@pytest.mark.parametrize("options", [{}, {"use_dora": True, "train_norms": True, "bias": "all"}])
def test_a_student_learns_from_its_teacher(student, teacher, options, tmp_path):
    model = Distilled(student(), teacher())
    plan = ll.plan(model, ll.LoRAConfig(r=2, lora_alpha=8, **options))
    before, others = copy.deepcopy(model.teacher.state_dict()), copy.deepcopy(model.student.state_dict())
    run = trainer(ll.LoRA(r=2, lora_alpha=8, **options), max_steps=4, default_root_dir=tmp_path)
    run.fit(model, batches())
    assert not outside(plan)
    assert plan.skipped["teacher.classifier"] == "frozen before LoRA came, beside student, which was not"
    assert model.teacher.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.teacher.state_dict().items())
    assert not torch.equal(model.student.classifier.weight, others["classifier.weight"])
    run.save_checkpoint(path := tmp_path / "a.ckpt")
    again = Distilled(student(), teacher())
    ll.load_adapter(again, path)
    batch = next(iter(batches()))
    assert torch.equal(again.eval().student(**batch).logits, model.eval().student(**batch).logits)
    assert again.teacher.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["query", "value"]},
        {"target_modules": r".*\.query"},
        {"target_modules": "attention"},
        {"target_modules": ["query"], "modules_to_save": ["classifier"]},
        {"target_modules": [], "target_parameters": ["query.weight"]},
        {"target_modules": ["query"], "trainable_token_indices": [3, 4]},
        {"target_modules": [], "trainable_token_indices": {"word_embeddings": [3, 4]}},
        {"target_modules": ["query"], "rank_pattern": {"layer.0": 4}, "layers_to_transform": [0]},
        {"target_modules": ["query"], "bias": "lora_only"},
    ],
)
def test_patterns_that_name_both_mean_the_student(options):
    plan = ll.plan(Distilled(bert(), bert()), ll.LoRAConfig(r=2, **options))
    assert plan.targets
    assert not outside(plan)
    assert not plan.notes


@pytest.mark.parametrize(
    "config",
    [BitFitConfig(), PrefixTuningConfig(num_virtual_tokens=4), BottleneckConfig(reduction_factor=4)],
    ids=lambda config: config.method,
)
def test_other_methods_leave_the_teacher_alone(config):
    plan = ll.plan(Distilled(bert(), bert()), config)
    assert plan.trainable_parameters
    assert not outside(plan)


def test_what_is_named_gets_adapters_all_the_same():
    config = ll.LoRAConfig(
        r=2, target_modules=["teacher.*.query", "student.*.value"], modules_to_save=["teacher.classifier"]
    )
    plan = ll.plan(Distilled(bert(), bert()), config)
    assert sorted({t.name.split(".")[0] for t in plan.targets}) == ["student", "teacher"]
    assert [s.name for s in plan.modules_to_save] == ["teacher.classifier"]


def test_where_both_are_frozen_or_none_is_both_get_adapters():
    """The first is what LoRA does anyway; a teacher that is only called without gradients stops at its first step."""
    for frozen in (False, True):
        model = Distilled(bert(), bert(), frozen)
        plan = ll.plan(model.requires_grad_(not frozen), ll.LoRAConfig(r=2))
        assert {name.split(".")[0] for name in outside(plan)} == {"teacher"}
    with pytest.raises(ll.DeadAdapterError, match="teacher.*exclude_modules"):
        trainer(ll.LoRA(r=2), max_steps=4).fit(Distilled(bert(), bert(), frozen=False), batches())


class Plain(nn.Module):
    """Parts of one model that are alike, the first of which the user froze: adapters are for them."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.layer1, self.layer2 = copy.deepcopy(block).requires_grad_(False), copy.deepcopy(block)
        self.blocks = nn.ModuleList(copy.deepcopy(block).requires_grad_(i > 0) for i in range(2))
        self.down, self.up = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8)


def test_frozen_blocks_of_one_model_are_no_twins():
    assert len(ll.plan(Plain(), ll.LoRAConfig(r=2)).targets) == 10


def test_a_frozen_tower_of_another_kind_gets_adapters():
    """As in PEFT: who trains a new head beside a frozen backbone wants adapters in it."""
    model = nn.ModuleDict({"text": bert(labels=None).requires_grad_(False), "head": nn.Linear(32, 3)})
    assert all(t.name.startswith("text.") for t in ll.plan(model, ll.LoRAConfig(r=2)).targets)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    vision = tf.ViTModel(tf.ViTConfig(**sizes, image_size=8, patch_size=4), add_pooling_layer=False)
    both = nn.ModuleDict({"text": bert(labels=None), "vision": vision.requires_grad_(False)})
    assert {t.name.split(".")[0] for t in ll.plan(both, ll.LoRAConfig(r=2)).targets} == {"text", "vision"}


def test_a_momentum_encoder_that_is_written_to_is_told():
    """By name nothing of it would change but by rounding: it would stay what it was."""

    class Momentum(Distilled):
        @torch.no_grad()
        def on_train_batch_end(self, *_: Any) -> None:
            own = dict(self.student.named_parameters())
            for name, p in self.teacher.named_parameters():
                p.mul_(0.9).add_(own[name], alpha=0.1) if name in own else None

    student = bert()
    with pytest.warns(UserWarning, match="weights of the frozen base changed in training: teacher"):
        trainer(ll.LoRA(r=2, lora_alpha=8), max_steps=4).fit(Momentum(student, copy.deepcopy(student)), batches())


def test_a_second_injection_sees_the_same_twins():
    model = Distilled(bert(), bert())
    first = ll.inject(model, ll.LoRAConfig(r=2))
    assert ll.inject(model, ll.LoRAConfig(r=2)).targets == first.targets
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["query"]), "second")
    assert not any("lora" in name for name, _ in model.teacher.named_parameters())
    ll.eject(model)
    assert all(p.requires_grad for p in model.student.parameters())
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_a_causal_judge():
    torch.manual_seed(0)
    policy, judge = (
        tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)),
        tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=1, n_head=4)),
    )
    for one in (judge, tf.LlamaForCausalLM(tf.LlamaConfig(**{**DECODER, "num_hidden_layers": 1}))):
        model = nn.ModuleDict({"policy": policy, "judge": one.requires_grad_(False)})
        found = {t.name.split(".")[0] for t in ll.plan(model, ll.LoRAConfig(r=2)).targets}
        assert found == ({"policy", "judge"} if one is judge else {"policy"})


class Plainly(pl.LightningModule):
    """Without transformers, where shapes tell: those of packed weights are others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.student(batch) - 2 * self.teacher(batch)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_a_teacher_of_plain_layers_stays_dense_beside_a_packed_student(quantization, tmp_path):
    if quantization is not None:
        pytest.importorskip("bitsandbytes")
    loader = torch.utils.data.DataLoader(torch.randn(4, 64), batch_size=2)
    module = Plainly()
    before = copy.deepcopy(module.teacher.state_dict())
    run = trainer(ll.LoRA(r=2, lora_alpha=6, quantization=quantization), max_epochs=2)
    run.fit(module, loader)
    run.fit_loop.max_epochs = 3
    run.fit(module, loader)
    run.save_checkpoint(path := tmp_path / "a.ckpt")
    assert module.teacher.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in module.teacher.state_dict().items())
    again = Plainly()
    trainer(ll.LoRA(r=2, lora_alpha=6, quantization=quantization), max_epochs=4).fit(again, loader, ckpt_path=path)
    assert again.teacher.state_dict().keys() == before.keys()
    assert not outside(ll.plan(again, ll.LoRAConfig(r=2)))
