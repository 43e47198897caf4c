"""all-linear on every architecture that transformers can build from its default config, on the meta device."""

import contextlib
import warnings

import pytest
import torch
from torch import nn
from transformers.models.auto import modeling_auto as auto

import lightning_lora as ll

MAPPINGS = {
    "base": (auto.MODEL_MAPPING, 300),
    "causal": (auto.MODEL_FOR_CAUSAL_LM_MAPPING, 150),
    "sequence classification": (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, 80),
    "image classification": (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, 25),
    "token classification": (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, 50),
    "CTC": (auto.MODEL_FOR_CTC_MAPPING, 8),
    "object detection": (auto.MODEL_FOR_OBJECT_DETECTION_MAPPING, 8),
    "audio classification": (auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING, 10),
    "question answering": (auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING, 70),
    "multiple choice": (auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING, 30),
}
# Perceiver classifies with its decoder; ShieldGemma 2 by the words "Yes" and "No".
NO_HEAD = {
    "PerceiverForSequenceClassification",
    "PerceiverForImageClassificationLearned",
    "ShieldGemma2ForImageClassification",
}


LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers", "num_decoder_layers")


def shallow(config, most):
    """The config with a few layers: more of them are like these."""
    for name in LAYERS:
        if isinstance(layers := getattr(config, name, None), int) and layers > most:
            setattr(config, name, most)
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            shallow(part, most)
    return config


def build(config_class, mapping, task) -> nn.Module | None:
    """The model with its default config; None where that can't be built without anything else."""
    most = (
        8 if task == "base" else 2
    )  # the base's layers may be of several kinds; behind another head they are the same
    for change in (lambda config: shallow(config, most), lambda config: config):
        with contextlib.suppress(Exception), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            classes = mapping[config_class]
            cls = classes[0] if isinstance(classes, (tuple, list)) else classes
            return cls(change(config_class()))
    return None


@pytest.mark.slow
@pytest.mark.parametrize("task", MAPPINGS)
def test_plans_on_every_architecture(task):
    mapping, at_least = MAPPINGS[task]
    planned = 0
    for config_class in list(mapping.keys()):
        model = build(config_class, mapping, task)
        if model is None:
            continue
        name = type(model).__name__
        try:
            plan = ll.plan(model, ll.LoRAConfig())
        except ll.TargetError as error:  # a convolutional network, which says what else can be named
            assert "leaves no layer to adapt" in str(error), f"{name}: {error}"  # noqa: PT017
            continue
        planned += 1
        assert plan.targets
        assert not {t.name for t in plan.targets} & set(plan.skipped), name
        heads = [m.name for m in plan.modules_to_save]
        if task not in ("base", "causal"):
            assert bool(heads) != (name in NO_HEAD), f"{name}: {heads}"
        elif "For" not in name:
            assert not heads, f"{name} has no new head, but {heads} would be trained in full"
    assert planned >= at_least
