"""Models that transformers quantised when they loaded them, and PEFT on the same base."""

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

import lightning_lora as ll
from lightning_lora.layers import lora_layers
from lightning_lora.quantization import is_quantized
from tests.helpers.families import FAMILIES
from tests.helpers.layers import randomise, torch_dropout
from tests.helpers.modules import Wrapped, one_batch, trainer

BITS = {
    "4 bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8 bit": {"load_in_8bit": True},
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*kernels", "ignore:MatMul8bitLt", "ignore:`is_gradient_checkpointing` is dep"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    dense_model().save_pretrained(path)
    return path


def dense_model():
    """Rows of whole blocks: in others bitsandbytes, and so PEFT, takes other scales on some CPUs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 61}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def load(folder, bits, dtype=torch.float32):
    options = {**BITS[bits], **({"bnb_4bit_compute_dtype": dtype} if bits == "4 bit" else {})}
    config = tf.BitsAndBytesConfig(**options)
    return tf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}, dtype=dtype
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("bits", BITS)
def test_they_train(folder, bits, precision):
    module = Wrapped(lambda: load(folder, bits))
    batch = FAMILIES["llama"].batch(module.net)
    trainer(ll.LoRA(r=4), max_epochs=2, precision=precision).fit(module, one_batch(batch))
    assert len(dict(lora_layers(module))) == 14
    for _, layer in lora_layers(module):
        assert is_quantized(layer)
        assert layer.lora["default"].B.count_nonzero()
        assert layer.lora["default"].B.dtype == torch.float32
    assert ll.summary(module).base.parameters == sum(p.numel() for p in dense_model().parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_logits_and_gradients_equal_those_of_peft(monkeypatch, folder, bits, use_dora, dropout):
    """With an r that is not alpha, every tensor far from its first value, and the same random numbers."""
    torch_dropout(monkeypatch)
    ours = load(folder, bits)
    ll.inject(ours, ll.LoRAConfig(r=4, lora_alpha=6, use_dora=use_dora, lora_dropout=dropout, dropout_mask="module"))
    randomise(ours)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_dora=use_dora, lora_dropout=dropout)
    theirs = get_peft_model(load(folder, bits), config)
    pairs = []
    for name, layer in lora_layers(ours):
        adapter, other = layer.lora["default"], theirs.base_model.model.get_submodule(name)
        pairs += [(adapter.A, other.lora_A["default"].weight), (adapter.B, other.lora_B["default"].weight)]
        if use_dora:
            pairs.append((adapter.magnitude, other.lora_magnitude_vector["default"].weight))
    for mine, other in pairs:
        other.data.copy_(mine.data)
    batch = FAMILIES["llama"].batch(ours)
    outputs = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        output = model(**batch)
        output.loss.backward()
        outputs.append(output.logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    for mine, other in pairs:
        assert (mine.grad - other.grad).norm() <= 1e-4 * other.grad.norm()


@pytest.mark.parametrize("bits", BITS)
def test_merged_and_unloaded_they_are_dense_models(folder, bits, tmp_path):
    model = load(folder, bits)
    ll.inject(model, ll.LoRAConfig(r=4, lora_alpha=6))
    randomise(model)
    batch = FAMILIES["llama"].batch(model)
    expected = model.train()(**batch).logits
    ll.merge_and_unload(model)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "quantization_config" not in again.config.to_dict()
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


def test_the_callback_leaves_them_as_they_are(folder):
    module = Wrapped(lambda: load(folder, "4 bit"))
    before = module.net.model.layers[0].mlp.up_proj.weight
    batch = FAMILIES["llama"].batch(module.net)
    trainer(ll.LoRA(r=4, quantization="nf4-dq")).fit(module, one_batch(batch))
    assert module.net.model.layers[0].mlp.up_proj.weight is before
    with pytest.raises(ll.TargetError, match="is quantised already, as 'nf4-dq': 'fp4' needs dense weights"):
        trainer(ll.LoRA(r=4, quantization="fp4")).fit(Wrapped(lambda: load(folder, "4 bit")), one_batch(batch))


def test_what_is_packed_can_not_be_trained_in_full(folder):
    with pytest.raises(ll.TargetError, match="modules_to_save: .*up_proj.*is quantised, and can't be trained in full"):
        ll.plan(load(folder, "4 bit"), ll.LoRAConfig(target_modules=["q_proj"], modules_to_save=["up_proj"]))
