"""Sequence parallelism changes nothing but where tokens lie: outputs, losses and gradients are those of one process.

The oracle is the same model outside the context. Each start of processes runs all checks of its size at once.
"""

from functools import partial

import pytest
import torch
from sequence_parallel_ranks import ByteCounter, SavedBytes, gradients_of, largest_error, run_on_ranks
from tiny_models import (
    ALL_OPTIONS,
    HEADS,
    OPTION_SETS,
    ROW_IDS,
    ROWS,
    as_float64,
    build,
    image_inputs,
    inputs_of,
    labels_of,
)
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fa_transformers import (
    FABertConfig,
    FABertForSequenceClassification,
    FABertForTokenClassification,
    FABertModel,
    FAViTConfig,
    FAViTForImageClassification,
    FAViTModel,
    sequence_parallel,
)

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
LOCAL = {"local_window": 3, "local_kernel_size": 5, "classifier_pooling": "mean"}
TEXT_OPTIONS = {
    "cls": {},
    "mean": {"classifier_pooling": "mean", "attention_normalization": "scaling", "key_feature_size": 20},
    "local": LOCAL,
    "kernel of 1": {"local_kernel_size": 1, "classifier_pooling": "mean"},
    "wide halo": {"local_window": 9, "classifier_pooling": "mean"},
    "softmax": {"softmax_layers": [0], "position_embedding_type": "periodic"},
}
# Tokens, then padding on the left and on the right of the second of two documents.
SHAPES = [(1, 0, 0), (3, 0, 1), (4, 2, 2), (13, 5, 0), (13, 0, 8), (22, 3, 5)]
IMAGES = [(40, 19), (8, 30), (21, 33)]


def sum_of_squares(output: dict[str, Tensor]) -> Tensor:
    return sum(value.pow(2).mean() for value in output.values())


def run(model, inputs: dict[str, Tensor], group=None):
    """The output's tensors, and the gradients of the loss or, without one, of all outputs' squares; in the context
    where a group is given."""

    def forward():
        return {name: value for name, value in model(**inputs).items() if isinstance(value, Tensor)}

    if group is None:
        output = forward()
    else:
        with sequence_parallel(group, gather_outputs=True):
            output = forward()
    loss = output["loss"] if "loss" in output else sum_of_squares(output)
    loss.backward()  # out of the context
    return output, gradients_of(model)


def compare(model, inputs: dict[str, Tensor], group) -> float:
    """The largest error of outputs and gradients."""
    pairs = zip(run(model, inputs, group), run(model, inputs), strict=True)
    return max(largest_error(*pair) for pair in pairs)


def compare_row(row, dtype, rank, size, group) -> float:
    config_class, auto_class, model_class, options = row
    model = build(config_class, model_class, **OPTION_SETS[options]).to(dtype)
    inputs = inputs_of(model, auto_class)
    inputs |= labels_of(auto_class, inputs)
    return compare(model, as_float64(inputs) if dtype == torch.float64 else inputs, group)


def text_batch(length: int, left: int = 0, right: int = 0, seed: int = 2) -> dict[str, Tensor]:
    """Two documents, the second between paddings and with every fifth token masked, with their labels."""
    ids = torch.randint(1, 60, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :left] = 0
    mask[1, length - right :] = 0
    mask[1, left + 2 : length - right - 1 : 5] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])}


def compare_text(options, rank, size, group, is_checkpointed=False) -> float:
    model = build(FABertConfig, FABertForSequenceClassification, **options).double()
    if is_checkpointed:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return max(compare(model, text_batch(*shape), group) for shape in SHAPES)


def compare_images(options, rank, size, group) -> float:
    """Of several shapes, with padding among the patches."""
    errors = []
    for height, width in IMAGES:
        model = build(FAViTConfig, FAViTForImageClassification, num_register_tokens=2, **options).double()
        inputs = as_float64(image_inputs(height, width)) | {"labels": torch.tensor([0, 1])}
        inputs["attention_mask"] = torch.ones(2, 3 + -(-height // 8) * -(-width // 8), dtype=torch.long)
        inputs["attention_mask"][0, 4:6] = 0
        errors.append(compare(model, inputs, group))
    return max(errors)


def share_of_a_loss(rank, size, group) -> float:
    """Sharded outputs: each rank's part, and gradients of a loss that each rank takes over its part."""
    model = build(FABertConfig, FABertModel, **LOCAL, add_pooling_layer=False).double()
    inputs = {"input_ids": text_batch(13)["input_ids"]}
    whole = model(**inputs).last_hidden_state
    whole.pow(3).sum().backward()
    expected = gradients_of(model) | {"part": whole[:, 13 * rank // size : 13 * (rank + 1) // size]}
    with sequence_parallel(group):
        part = model(**inputs).last_hidden_state
    part.pow(3).sum().backward()
    return largest_error(gradients_of(model) | {"part": part}, expected)


def gradient_of_inputs(rank, size, group) -> float:
    """Embeddings that a module outside of the model made, whose parameters get complete gradients as well."""
    model = build(FABertConfig, FABertForTokenClassification).double()
    embedding = torch.nn.Embedding(60, 32, dtype=torch.float64)
    batch = text_batch(9)

    def gradient():
        inputs = {"inputs_embeds": embedding(batch["input_ids"]), "labels": batch["input_ids"] % 2}
        model(**inputs).loss.backward()
        return gradients_of(embedding)

    expected = gradient()
    with sequence_parallel(group):
        return largest_error(gradient(), expected)


def inference(rank, size, group) -> float:
    """At once and in chunks of several sizes."""
    errors = []
    for options in (LOCAL, TEXT_OPTIONS["kernel of 1"], TEXT_OPTIONS["wide halo"], ALL_OPTIONS):
        text = build(FABertConfig, FABertModel, **options).double()
        image = build(FAViTConfig, FAViTModel, **options, num_register_tokens=2).double()
        ids, mask = (text_batch(22, 3, 5)[name] for name in ("input_ids", "attention_mask"))
        cases = [(text, {"input_ids": ids, "attention_mask": mask}), (text, {"input_ids": ids[:, :1]})]
        cases += [(image, as_float64(image_inputs(*shape))) for shape in IMAGES]
        with torch.inference_mode():
            for model, inputs in cases:
                expected = dict(model(**inputs, output_hidden_states=True))
                expected |= {f"state {index}": state for index, state in enumerate(expected.pop("hidden_states"))}
                for chunk_size in (None, 1, 5):
                    with sequence_parallel(group, gather_outputs=True):
                        actual = dict(model(**inputs, output_hidden_states=True, chunk_size=chunk_size))
                    actual |= {f"state {index}": state for index, state in enumerate(actual.pop("hidden_states"))}
                    errors.append(largest_error(actual, expected))
    return max(errors)


def logits_under_dropout(rank, size, group) -> Tensor:
    torch.manual_seed(rank)
    model = build(FABertConfig, FABertForSequenceClassification, hidden_dropout_prob=0.3).train()
    with sequence_parallel(group):
        return model(**text_batch(13)).logits.detach()


def accumulated_under_ddp(rank, size, group, mesh=None) -> float:
    """Two batches per step and data-parallel rank, averaged over all ranks by DDP; then a step without the context."""
    mesh = mesh or init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "sp"))
    num_replicas, replica = mesh.size(0), mesh.get_local_rank("dp")
    model = build(FABertConfig, FABertForSequenceClassification, **LOCAL).double()
    batches = [text_batch(11, 2, 1, seed) for seed in range(2 * num_replicas)]
    sum(model(**batch).loss for batch in batches).div(num_replicas).backward()
    expected = gradients_of(model)
    parallel = DistributedDataParallel(model)
    with sequence_parallel(mesh):
        with parallel.no_sync():
            parallel(**batches[2 * replica]).loss.backward()
        parallel(**batches[2 * replica + 1]).loss.backward()
    errors = [largest_error(gradients_of(model), expected)]
    model(**batches[0]).loss.backward()
    expected = gradients_of(model)
    parallel(**batches[0]).loss.backward()
    return max(*errors, largest_error(gradients_of(model), expected))


def under_fsdp(rank, size, group) -> float:
    model = build(FABertConfig, FABertForSequenceClassification, **LOCAL).double()
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = text_batch(11, 2, 1)
    expected = run(model, batch)[1]
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    with sequence_parallel(group):
        model(**batch).loss.backward()
    actual = {name: gradient.full_tensor() for name, gradient in gradients_of(model).items()}
    return largest_error(actual, expected)


def exchanged(options, rank, size, group) -> dict[int, list]:
    """Kind and bytes of every exchange in forward and backward pass by length, of the parameters' gradients none."""
    model = build(FABertConfig, FABertModel, add_pooling_layer=False, max_position_embeddings=300, **options)
    model.requires_grad_(False)
    calls = {}
    for length in (64, 256):
        embeddings = torch.randn(1, length, 32, requires_grad=True)
        with sequence_parallel(group), ByteCounter() as counter:
            model(inputs_embeds=embeddings).last_hidden_state.sum().backward()
        calls[length] = counter.calls
    return calls


def saved_bytes(length, options, rank, size, group) -> tuple[int, int]:
    """What autograd keeps of a forward pass, on this rank and on one process."""
    model = build(FABertConfig, FABertForSequenceClassification, **options, max_position_embeddings=length)
    inputs = {"input_ids": torch.ones(1, length, dtype=torch.long), "labels": torch.tensor([0])}
    with sequence_parallel(group), SavedBytes(model) as part:
        model(**inputs)
    with SavedBytes(model) as whole:
        model(**inputs)
    return part.total, whole.total


def refusals(rank, size, group) -> dict[str, str]:
    """The messages of what is refused, on every rank alike."""
    model = build(FABertConfig, FABertForSequenceClassification)
    batch, other = text_batch(9), text_batch(9, seed=3 + rank)
    packed = {"input_ids": batch["input_ids"][:1], "cu_seqlens": torch.tensor([0, 4, 9])}
    in_other_order = batch | {"input_ids": batch["input_ids"].flip(1) if rank else batch["input_ids"]}
    in_other_order.pop("attention_mask")
    bad = {"packed": packed, "different": other, "longer": text_batch(9 + rank), "order": in_other_order}
    messages = {}
    for name, inputs in bad.items():
        with sequence_parallel(group), pytest.raises(ValueError) as caught:  # noqa: PT011
            model(**inputs)
        messages[name] = str(caught.value)
    with sequence_parallel(group), pytest.raises(ValueError) as caught, sequence_parallel(group):  # noqa: PT011
        pass
    messages["nested"] = str(caught.value)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with sequence_parallel(group), pytest.raises(ValueError) as caught:  # noqa: PT011
        model(**batch)
    messages["reentrant"] = str(caught.value)
    model.eval()
    output = model(**batch)
    assert not any("weight" in vars(module) for module in model.modules())
    messages["after"] = str(float(output.loss) > 0)
    return messages


def row_checks(rows, dtype) -> dict:
    return {f"{model.__name__} {options} {dtype}": partial(compare_row, (*head, model, options), dtype)
            for *head, model, options in rows}  # fmt: skip


ALL_ROWS = [(*head, "all") for head in HEADS]
EXACT_CHECKS = {
    **row_checks(ALL_ROWS, torch.float64),
    **row_checks(ALL_ROWS[1:4] + ALL_ROWS[-2:], torch.float32),
    **{f"text {name}": partial(compare_text, options) for name, options in TEXT_OPTIONS.items()},
    "checkpointed": partial(compare_text, LOCAL, is_checkpointed=True),
    "images cls": partial(compare_images, {}),
    "images local": partial(compare_images, LOCAL),
    "images kernel of 1": partial(compare_images, TEXT_OPTIONS["kernel of 1"]),
    "images softmax": partial(compare_images, {"softmax_layers": [0], **LOCAL}),
    "a loss of each rank's own tokens": share_of_a_loss,
    "gradient of inputs": gradient_of_inputs,
    "inference": inference,
    "DDP and gradient accumulation": accumulated_under_ddp,
    "FSDP": under_fsdp,
}
OTHER_CHECKS = {
    "dropout": logits_under_dropout,
    "bytes plain": partial(exchanged, {}),
    "bytes local": partial(exchanged, LOCAL),
    "saved plain": partial(saved_bytes, 4096, {}),
    "saved local": partial(saved_bytes, 4096, LOCAL),
    "refusals": refusals,
}


# Beyond its part a rank keeps what has no length and, for local terms, copies of Q and V with their neighbours.
SAVED = {"plain": 0.02, "local": 0.15}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    return run_on_ranks(EXACT_CHECKS | OTHER_CHECKS, 2, tmp_path_factory.mktemp("two"))


def assert_exact(found: list, tolerance: float) -> None:
    for error in found:
        assert isinstance(error, float), error
        assert error <= tolerance


@pytest.mark.parametrize("name", EXACT_CHECKS)
def test_two_processes_give_outputs_and_gradients_of_one(on_two, name):
    print(name, on_two[name])
    assert_exact(on_two[name], TOLERANCES[torch.float32 if name.endswith("float32") else torch.float64])


def test_logits_are_equal_on_all_ranks_under_dropout(on_two):
    assert torch.equal(*on_two["dropout"])


@pytest.mark.parametrize("options", ["plain", "local"])
def test_what_a_layer_exchanges_does_not_depend_on_the_length(on_two, options):
    for calls in on_two[f"bytes {options}"]:
        # The first and the last are of the whole batch: that all ranks have the same, and the gradient of the inputs.
        short, long = (calls[length][1:-1] for length in (64, 256))
        assert short == long and len(short) > 0


def test_a_plain_layer_exchanges_a_maximum_a_context_and_the_gradient_of_a_context(on_two):
    heads, features, width = 2, 16, 16
    numbers = [heads * features, heads * features * (1 + width)] * 2 + [heads * width] + [heads * features * width] * 2
    for calls in on_two["bytes plain"]:  # two layers, the pooled token, two layers back
        assert calls[64][1:-1] == [("all_reduce", 4 * number) for number in numbers]


@pytest.mark.parametrize(("options", "more"), SAVED.items())
def test_activations_are_shared_out(on_two, options, more):
    for part, whole in on_two[f"saved {options}"]:
        print(f"{options}: {part:,} of {whole:,} bytes")
        assert 0.95 / 2 <= part / whole <= (1 + more) / 2


def test_what_cannot_be_shared_is_refused_on_every_rank(on_two):
    for messages in on_two["refusals"]:
        assert isinstance(messages, dict), messages
        assert "cu_seqlens" in messages["packed"] and "nested" in messages["nested"]
        assert all("same whole batch" in messages[name] for name in ("different", "longer", "order"))
        assert "reentrant" in messages["reentrant"]
        assert messages["after"] == "True"


def over_mesh(rank, size, group) -> float:
    return accumulated_under_ddp(rank, size, group, init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp")))


FOUR_CHECKS = {
    **{f"row {name}": partial(compare_row, row, torch.float64) for name, row in zip(ROW_IDS, ROWS, strict=True)},
    **{name: check for name, check in EXACT_CHECKS.items() if not name.endswith(("float64", "float32"))},
    "over a mesh": over_mesh,
}


@pytest.mark.slow
def test_four_processes_give_outputs_and_gradients_of_one(tmp_path):
    found = run_on_ranks(FOUR_CHECKS, 4, tmp_path)
    for name, errors in found.items():
        print(name, errors)
        assert_exact(errors, TOLERANCES[torch.float64])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_activations_of_64k_tokens_are_shared_out(size, tmp_path):
    checks = {"plain": partial(saved_bytes, 65_536, {}), "local": partial(saved_bytes, 65_536, LOCAL)}
    for options, found in run_on_ranks(checks, size, tmp_path).items():
        for part, whole in found:
            print(f"{options}, {size} processes: {part / 2**20:.2f} of {whole / 2**20:.2f} MiB, {part / whole:.4f}")
            assert 0.95 / size <= part / whole <= (1 + SAVED[options]) / size
