"""Protects the memory estimate: against what autograd keeps, tensors that are alive, and a process's measured peak."""

from pathlib import Path

import pytest
import torch

from fa_transformers import FABertConfig, FABertModel, FAViTConfig, FAViTModel, estimate_memory
from fa_transformers.hub.timing import PeakMemory
from fa_transformers.studies.peak_memory import compare

SIZES = dict(hidden_size=64, num_attention_heads=4, intermediate_size=256)


def kept_bytes(config, num_tokens: int) -> int:
    """Bytes of the distinct tensors, weights left out, that autograd keeps of a forward pass in training."""
    is_text = isinstance(config, FABertConfig)
    model = (FABertModel if is_text else FAViTModel)(config).train()
    known = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = torch.randint(config.vocab_size, (1, num_tokens)) if is_text else torch.rand(1, 3, 64, 4 * num_tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(inputs)
        assert output.last_hidden_state.requires_grad
        return sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("config_class", [FABertConfig, FAViTConfig])
def test_a_layer_of_the_estimate_is_what_autograd_keeps_of_one(config_class, dropout):
    num_tokens = 512

    def layer_bytes(count) -> float:
        one, three = (config_class(num_hidden_layers=layers, hidden_dropout_prob=dropout, **SIZES) for layers in (1, 3))
        return (count(three) - count(one)) / 2

    kept = layer_bytes(lambda config: kept_bytes(config, num_tokens))
    estimated = layer_bytes(lambda config: estimate_memory(config, num_tokens, training=True).activations)
    print(f"{kept / num_tokens / 256:.2f} hidden states are kept, {estimated / num_tokens / 256:.2f} estimated")
    # The plain operator keeps a copy more of a hidden state than a fused one; contexts and norms' statistics are small.
    assert estimated == pytest.approx(kept, rel=0.15)


@pytest.mark.parametrize("chunk", [0, 64])
def test_the_forward_estimate_is_close_to_the_tensors_that_are_alive(chunk):
    fields = {"position_embedding_type": "periodic", "vocab_size": 100, "chunk_size_feed_forward": chunk}
    config = FABertConfig(num_hidden_layers=2, **fields, **SIZES)
    model = FABertModel(config).eval()
    with PeakMemory() as meter, torch.inference_mode():
        model(torch.randint(100, (1, 2048)))
    estimate = estimate_memory(config, 2048)
    print(f"{meter.peak_bytes} bytes alive, {estimate.activations} estimated")
    # With chunks the mixing is the peak, where the plain operator has temporaries that a fused one has not: 3 of 9.
    assert estimate.activations == pytest.approx(meter.peak_bytes, rel=0.35 if chunk else 0.15)


def test_weights_are_counted_and_checkpointing_and_bf16_save_memory():
    config = FABertConfig(num_hidden_layers=4, **SIZES)
    plain = estimate_memory(config, 10_000, training=True)
    assert plain.weights == 4 * FABertModel(config).num_parameters()
    assert plain.optimizer == 2 * plain.weights and plain.total == 3 * plain.weights + plain.activations
    assert estimate_memory(config, 10_000, training=True, gradient_checkpointing=True).total < plain.total / 2
    assert estimate_memory(config, 10_000, training=True, mixed_precision="bf16").activations < 0.7 * plain.activations
    assert estimate_memory(config, 5_000, batch_size=2, training=True) == plain
    assert estimate_memory(config, 10_000).optimizer == 0
    adapted = estimate_memory(config, 10_000, training=True, num_trained=1000)
    assert (adapted.weights, adapted.gradients, adapted.optimizer) == (plain.weights, 4000, 8000)
    assert str(plain).startswith(f"{plain.total / 2**30:.2f} GiB (weights ")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`num_tokens` must be at least 1, got 0"):
        estimate_memory(FABertConfig(), 0)
    with pytest.raises(ValueError, match="`mixed_precision` must be one of .*, got 'int8'"):
        estimate_memory(FABertConfig(), 8, mixed_precision="int8")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize(
    ("num_tokens", "options"), [(8192, {}), (4096, {"training": True}), (8192, {"training": True})]
)
def test_the_estimate_is_within_15_percent_of_the_peak_of_a_fresh_process(num_tokens, options):
    row = compare("MiniLM", num_tokens, options, "cpu")
    print(f"estimated / measured = {row['ratio']:.3f}")
    assert row["ratio"] == pytest.approx(1.0, abs=0.15)
