"""Combinations against PEFT's ``add_weighted_adapter``, on the same adapters."""

import peft
import pytest
import torch

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from tests.helpers.families import FAMILIES
from tests.helpers.layers import randomise

WEIGHTS = {"korean": 0.7, "coding": -0.3}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6"),  # PEFT's use of transformers
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:The density .* no pruning will be performed"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to"),
]


@pytest.fixture
def both(tmp_path):
    """Two adapters on one base, here and in PEFT."""

    def make(ranks=(3, 3), family="llama", **options):
        torch.manual_seed(0)
        ours = FAMILIES[family].make().double().eval()
        torch.manual_seed(0)
        theirs = FAMILIES[family].make().double().eval()
        theirs.load_state_dict(ours.state_dict())
        for i, (name, r) in enumerate(zip(WEIGHTS, ranks, strict=True)):
            config = ll.LoRAConfig(r=r, lora_alpha=2 * i + 5, modules_to_save=None, **options)
            ll.inject(ours, config, name)
        randomise(ours)
        ours.double()
        for name in WEIGHTS:
            ll.save_adapter(ours, tmp_path / name, name)
        model = peft.PeftModel.from_pretrained(
            theirs, tmp_path / "korean", adapter_name="korean", autocast_adapter_dtype=False
        )
        model.load_adapter(tmp_path / "coding", adapter_name="coding", autocast_adapter_dtype=False)
        return ours, model

    return make


def compare(ours, theirs):
    """PEFT takes roots of weights, and singular values, in float32."""
    found = 0
    for name, layer in lora_layers(ours):
        W = layer.lora_matrix()
        update = (layer.lora["both"].merged(W.clone()) - W).detach()
        delta = theirs.base_model.model.get_submodule(name).get_delta_weight("both")
        assert (layer.lora_as_matrix(delta) - update).norm() <= 1e-6 * update.norm()
        found += bool(update.norm() > 0.01)
    assert found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"method": "cat"}, {"combination_type": "cat"}),
        ({"method": "linear"}, {"combination_type": "linear"}),
        ({"method": "ties", "density": 0.4}, {"combination_type": "ties", "density": 0.4}),
        ({"method": "ties", "density": 1.0}, {"combination_type": "ties", "density": 1.0}),
        ({"method": "dare_linear", "density": 1.0}, {"combination_type": "dare_linear", "density": 1.0}),
        ({"method": "dare_ties", "density": 1.0}, {"combination_type": "dare_ties", "density": 1.0}),
        ({"method": "svd", "rank": 4}, {"combination_type": "svd", "svd_rank": 4}),
        (
            {"method": "ties", "rank": 4, "density": 0.4},
            {"combination_type": "ties_svd", "svd_rank": 4, "density": 0.4},
        ),
        (
            {"method": "dare_ties", "rank": 4, "density": 1.0},
            {"combination_type": "dare_ties_svd", "svd_rank": 4, "density": 1.0},
        ),
    ],
    ids=lambda value: value.get("combination_type", ""),
)
def test_as_in_peft(both, family, ours, theirs):
    model, other = both(family=family)
    ll.combine_adapters(model, WEIGHTS, "both", **ours)
    other.add_weighted_adapter([*WEIGHTS], [*WEIGHTS.values()], "both", **theirs)
    compare(model, other)


def test_one_adapter_alone_is_pruned_here_and_not_in_peft(both):
    model, other = both()
    other.add_weighted_adapter(["korean"], [0.7], "both", combination_type="ties", density=0.4)
    ll.combine_adapters(model, {"korean": 0.7}, "pruned", method="ties", density=0.4)
    ll.combine_adapters(model, {"korean": 0.7}, "both", method="linear")
    compare(model, other)
    for _, layer in lora_layers(model):
        pruned, whole = layer.lora["pruned"], layer.lora["both"]
        assert (pruned.A != 0).sum() == int(0.4 * pruned.A.numel())
        assert torch.equal(pruned.A[pruned.A != 0], whole.A[pruned.A != 0])


def test_what_is_combined_here_is_the_same_in_peft(both, tmp_path):
    model, other = both(ranks=(2, 4), rank_pattern={"q_proj": 5}, use_rslora=True)
    ll.combine_adapters(model, WEIGHTS, "both")
    ll.save_adapter(model, tmp_path / "both", "both")
    other.load_adapter(tmp_path / "both", adapter_name="both", autocast_adapter_dtype=False)
    ll.set_adapter(model, "both")
    other.set_adapter("both")
    ids = torch.randint(3, 61, (2, 7))
    torch.testing.assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-9, atol=1e-9)
    assert other.peft_config["both"].use_rslora is False
