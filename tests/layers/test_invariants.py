"""What holds whatever the options are, as tables in which any two options meet."""

import contextlib

import keras
import numpy as np
import pytest
from harness import BACKEND, as_numpy, case_id, compiled, gradients, lengths, pairs, random
from keras import ops

import keras_transformer as kt
from keras_transformer.layers import (
    AlibiBias,
    CrossAttention,
    DecoderBlock,
    EncoderBlock,
    MultiHeadSelfAttention,
    RelativePositionBias,
    RotaryEmbedding,
)
from keras_transformer.ops.masks import get_mask, set_mask

SOURCE_MASK = lengths(4, 6, size=6)
TARGET_MASK = np.array([[True, True, True, False, False], [False, False, True, True, True]])
POSITIONS = {
    "none": lambda: None,
    "rotary": RotaryEmbedding,
    "relative": lambda: RelativePositionBias(2, num_buckets=8, max_distance=16),
    "alibi": lambda: AlibiBias(2),
}
OPTIONS = {
    "dtype": ("float32", "float16", "bfloat16"),
    "norm_position": ("pre", "post", "sandwich"),
    "mask": ("implicit", "explicit", "attention_mask"),
    "position": tuple(POSITIONS),
    "kernel": ("plain", "fused"),
    "scores": (False, True),
    "dropout": (0.0, 0.3),
    "training": (False, True),
    "jit": (False, True),
}


@pytest.fixture(autouse=True)
def kernel(request, monkeypatch):
    """The kernel that a case asks for becomes the one that attention takes by itself."""
    case = request.node.callspec.params.get("case", {}) if hasattr(request.node, "callspec") else {}
    if "kernel" in case:
        monkeypatch.setattr(kt.ops.attention, "_fused_is_faster", lambda: case["kernel"] == "fused")


class EncoderDecoder:
    """An encoder block and a decoder block that reads it, called with the options of a case."""

    def __init__(self, case, causal=True):
        def attention(causal):
            position, window = POSITIONS[case["position"]](), case.get("window")
            return MultiHeadSelfAttention(
                2, causal=causal, sliding_window=window, position=position, dropout=case["dropout"]
            )

        options = {name: case[name] for name in ("dtype", "norm_position", "dropout")}
        cross = CrossAttention(2, num_key_value_heads=1, dropout=case["dropout"])
        self.case = case
        self.encoder = EncoderBlock(attention(False), 16, **options)
        self.decoder = DecoderBlock(attention(causal), 16, cross, **options)
        self.records = {}
        self._run = compiled(self.run) if case["jit"] else self.run
        self.run(*(ops.convert_to_tensor(x) for x in (random(2, 6, 8), random(2, 5, 8))))
        variables = self.encoder.variables + self.decoder.variables
        self._states = [(variable, ops.convert_to_numpy(variable)) for variable in variables]

    def run(self, source, target):
        case = self.case
        scope = kt.scopes.RecordingScope(["weights"]) if case["scores"] else contextlib.nullcontext()
        source_mask, target_mask = (ops.convert_to_tensor(mask) for mask in (SOURCE_MASK, TARGET_MASK))
        source, target = source + 0, target + 0
        encoder, decoder = {"training": case["training"]}, {"training": case["training"]}
        if case["mask"] == "implicit":
            source, target = set_mask(source, source_mask), set_mask(target, target_mask)
        else:
            decoder["context_mask"] = source_mask
            name, axis = ("mask", None) if case["mask"] == "explicit" else ("attention_mask", 1)
            encoder[name] = source_mask if axis is None else ops.repeat(source_mask[:, None], 6, axis=1)
            decoder[name] = target_mask if axis is None else ops.repeat(target_mask[:, None], 5, axis=1)
        with scope:
            output = self.decoder(target, self.encoder(source, **encoder), **decoder)
        return output, (scope.records if case["scores"] else {})

    def __call__(self, source, target):
        # Both calls drop the same: random states go back too, also that of torch, whose dropout asks no other.
        keras.utils.set_random_seed(0)
        for variable, value in self._states:
            variable.assign(value)
        output, records = self._run(ops.convert_to_tensor(source), ops.convert_to_tensor(target))
        self.records = {path: as_numpy(value) for path, value in records.items()}
        return as_numpy(output)


@pytest.mark.parametrize("case", pairs(**OPTIONS), ids=case_id)
def test_moving_padding_moves_nothing_real(case):
    model = EncoderDecoder(case)
    source, target = random(2, 6, 8), random(2, 5, 8, seed=1)
    expected = model(source, target)
    assert np.isfinite(expected[TARGET_MASK]).all()
    moved = [x + 1e3 * ~mask[..., None] * np.arange(8) for x, mask in ((source, SOURCE_MASK), (target, TARGET_MASK))]
    output = model(*(x.astype("float32") for x in moved))
    assert np.abs(output - expected)[TARGET_MASK].max() <= 1e-6
    assert np.abs(output - expected)[~TARGET_MASK].max() > 1e-3  # The padding did arrive.
    real = source + 1e-1 * SOURCE_MASK[..., None] * random(2, 6, 8, seed=2)
    assert np.abs(model(real.astype("float32"), target) - expected)[TARGET_MASK].max() > 1e-3


@pytest.mark.parametrize("case", pairs(**OPTIONS, window=(None, 2)), ids=case_id)
def test_no_output_depends_on_a_later_token(case):
    model = EncoderDecoder(case)
    source, target = random(2, 6, 8), random(2, 5, 8, seed=1)
    expected = model(source, target)
    for last in (0, 2, 3):
        changed = target.copy()
        changed[:, last + 1 :] = random(2, 4 - last, 8, seed=2, scale=10.0)
        output = model(source, changed)
        np.testing.assert_array_equal(output[:, : last + 1], expected[:, : last + 1])
        assert not np.array_equal(output, expected)


def test_without_causality_outputs_do_depend_on_later_tokens():
    case = {name: values[0] for name, values in OPTIONS.items()}
    model = EncoderDecoder(case, causal=False)
    source, target = random(2, 6, 8), random(2, 5, 8, seed=1)
    changed = target.copy()
    changed[:, 2:] = random(2, 3, 8, seed=2)
    assert not np.allclose(model(source, target)[:, :2], model(source, changed)[:, :2])


SCORED = {**OPTIONS, "scores": (True,), "jit": (False,)}  # Recording while compiling is in the tables above.


@pytest.mark.parametrize("case", pairs(**SCORED), ids=case_id)
def test_recorded_weights_are_what_attention_took(case):
    model = EncoderDecoder(case)
    source, target = random(2, 6, 8), random(2, 5, 8, seed=1)
    recorded, weights = model(source, target), model.records
    model.case = {**case, "scores": False}
    tolerance = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1.5e-1}[case["dtype"]]
    np.testing.assert_allclose(model(source, target)[TARGET_MASK], recorded[TARGET_MASK], atol=tolerance)

    causal = np.tril(np.ones((5, 5), bool)) & TARGET_MASK[:, None]
    allowed = {
        "encoder_block": np.repeat(SOURCE_MASK[:, None], 6, axis=1),
        "self_attention": causal,
        "cross_attention": np.repeat(SOURCE_MASK[:, None], 5, axis=1),
    }
    assert len(weights) == 3
    for path, value in weights.items():
        mask = next(mask for part, mask in allowed.items() if part in path)[:, None]
        mask = np.broadcast_to(mask, value.shape)
        assert not value[~mask].any(), path
        sums = mask.any(-1).astype("float32")
        np.testing.assert_allclose(value.sum(-1), sums, atol={"float32": 1e-5}.get(case["dtype"], 2e-2), err_msg=path)


MASKED_ROW = {name: OPTIONS[name] for name in ("dtype", "position", "kernel", "scores", "dropout", "training", "jit")}
MASKED_ROW["mask"] = ("mask", "attention_mask", "causal", "cross")


@pytest.mark.parametrize("case", pairs(**MASKED_ROW), ids=case_id)
def test_who_may_attend_to_nothing_gets_zero_with_finite_gradients(case):
    kind = case["mask"]
    options = {"use_bias": ["query", "key", "value"], "dropout": case["dropout"], "dtype": case["dtype"]}
    inputs = [keras.Variable(random(2, 5, 8, seed=i)) for i in range(2)]
    everything = np.ones((2, 5), bool)
    arguments = {"mask": everything.copy()}
    empty = np.zeros((2, 5), bool)
    if kind == "cross":
        layer = CrossAttention(2, **options)
        arguments = {"context_mask": everything.copy()}
        arguments["context_mask"][1] = False
        empty[1] = True
    else:
        layer = MultiHeadSelfAttention(2, causal=kind == "causal", position=POSITIONS[case["position"]](), **options)
        inputs = inputs[:1]
        if kind == "mask":
            arguments["mask"][1] = False
            empty[1] = True
        elif kind == "attention_mask":
            arguments = {"attention_mask": np.ones((2, 5, 5), bool)}
            arguments["attention_mask"][0, 3] = False
            empty[0, 3] = True
        else:  # Padding on the left: what comes before the first real token sees nothing.
            arguments["mask"][0, :2] = False
            empty[0, :2] = True
    arguments = {name: ops.convert_to_tensor(value) for name, value in arguments.items()}

    def attend(*tensors):
        with kt.scopes.RecordingScope(["weights"]) if case["scores"] else contextlib.nullcontext():
            return layer(*tensors, training=case["training"], **arguments)

    tensors = [ops.convert_to_tensor(v) for v in inputs]
    attend(*tensors)
    output = as_numpy((compiled(attend) if case["jit"] else attend)(*tensors))
    assert not output[empty].any()
    assert np.isfinite(output).all() and np.abs(output[~empty]).min(axis=-1).max() > 0
    watched = [*inputs, *layer.trainable_weights]
    found = gradients(lambda: ops.sum(ops.square(ops.cast(attend(*(v + 0 for v in inputs)), "float32"))), watched)
    assert all(np.isfinite(gradient).all() for gradient in found)
    assert found[0].any()


@pytest.mark.parametrize("norm_position", OPTIONS["norm_position"])
@pytest.mark.parametrize("dtype", OPTIONS["dtype"])
def test_blocks_stand_rows_that_are_all_padding(norm_position, dtype):
    block = DecoderBlock(2, 16, 2, norm_position=norm_position, dtype=dtype)
    x, context = keras.Variable(random(2, 5, 8)), keras.Variable(random(2, 6, 8, seed=1))
    masks = {"mask": lengths(5, 0, size=5), "context_mask": lengths(0, 3, size=6)}

    def loss():
        return ops.sum(ops.square(ops.cast(block(x + 0, context + 0, **masks), "float32")))

    assert np.isfinite(as_numpy(loss()))
    for gradient in gradients(loss, [x, context, *block.trainable_weights]):
        assert np.isfinite(gradient).all()


def three_layers(implicit):
    """A decoder of three layers on an encoder of one, which find their masks on embeddings or take them as inputs."""
    source, target = (keras.Input((None,), dtype="int32", name=name) for name in ("source_ids", "target_ids"))
    inputs, encoder, decoder = [source, target], {}, {}
    if not implicit:
        source_mask, target_mask = (keras.Input((None,), dtype="bool", name=f"{n}_mask") for n in ("source", "target"))
        inputs += [source_mask, target_mask]
        encoder, decoder = {"mask": source_mask}, {"mask": target_mask, "context_mask": source_mask}
    context = keras.layers.Embedding(11, 8, mask_zero=implicit, name="source_embedding")(source)
    context = EncoderBlock(2, 8)(context, **encoder)
    x = keras.layers.Embedding(11, 8, mask_zero=implicit, name="target_embedding")(target)
    for _ in range(3):
        x = DecoderBlock(2, 8, 2)(x, context, **decoder)
    return keras.Model(inputs, x)


@pytest.mark.parametrize(
    "case", pairs(implicit=(True, False), reloaded=(False, True), scores=(False, True), jit=(False, True)), ids=case_id
)
def test_every_cross_attention_sees_the_mask_of_the_source(case, tmp_path):
    model = three_layers(case["implicit"])
    if case["reloaded"]:
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
    source = np.array([[4, 5, 6, 0, 0], [7, 8, 9, 10, 1]], "int32")
    target = np.array([[1, 2, 3, 4], [1, 2, 3, 0]], "int32")
    inputs = [source, target] + ([] if case["implicit"] else [source != 0, target != 0])
    inputs = [ops.convert_to_tensor(x) for x in inputs]

    def run(*tensors):
        with kt.scopes.RecordingScope(["weights"]) if case["scores"] else contextlib.nullcontext() as scope:
            output = model(list(tensors))
        return output, (scope.records if case["scores"] else {})

    run_again = compiled(run) if case["jit"] else run
    before, records = run_again(*inputs)
    cross = [as_numpy(weights) for path, weights in records.items() if "cross_attention" in path]
    assert len(cross) == (3 if case["scores"] else 0)
    for weights in cross:
        assert not weights[0, :, :, 3:].any() and (weights[0, :, :, :3] > 0).all() and (weights[1] > 0).all()
    for name in ("source_embedding", "target_embedding"):
        table = model.get_layer(name).embeddings
        # Not the same for all features: a norm would take that away.
        table.assign(as_numpy(table) + 1e3 * (np.arange(11) == 0)[:, None] * np.arange(8))
    after = (compiled(run) if case["jit"] and BACKEND == "jax" else run_again)(*inputs)[0]  # JAX compiled the table in.
    assert np.abs(as_numpy(after) - as_numpy(before))[target != 0].max() <= 1e-6
    assert not np.allclose(as_numpy(after), as_numpy(before))


@pytest.mark.parametrize("block", [False, True])
def test_masks_of_the_tensors_handed_in_stay_where_they_are(block):
    x, context = (set_mask(ops.convert_to_tensor(random(2, 5, 8, seed=i)), SOURCE_MASK[:, :5]) for i in range(2))
    layer = DecoderBlock(2, 16, 2) if block else CrossAttention(2)
    for _ in range(2):
        output = layer(x, context)
    for tensor in (x, context, output):
        assert get_mask(tensor) is not None
        np.testing.assert_array_equal(as_numpy(get_mask(tensor)), SOURCE_MASK[:, :5])


@pytest.mark.parametrize(
    "layer",
    [MultiHeadSelfAttention(2), EncoderBlock(2, 16), DecoderBlock(2, 16)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_mask_reaches_the_layer_beside_other_tensors(layer):
    """With a second tensor argument Keras hands the mask over under another name."""
    x = set_mask(ops.convert_to_tensor(random(2, 6, 8)), ops.convert_to_tensor(SOURCE_MASK))
    bias = ops.zeros((1, 1, 6, 6))
    expected = as_numpy(layer(x, mask=ops.convert_to_tensor(SOURCE_MASK)))
    assert not np.allclose(as_numpy(layer(random(2, 6, 8))), expected)
    np.testing.assert_allclose(as_numpy(layer(x, attention_bias=bias)), expected, atol=1e-6)


@pytest.mark.skipif(BACKEND != "torch", reason="torch alone compiles by reading Python")
def test_torch_compiles_attention_under_padding_in_one_graph():
    import torch

    layer, x, mask = MultiHeadSelfAttention(2, causal=True), torch.ones((2, 3, 8)), torch.tensor([[True, True, False]])
    expected = layer(x, mask=mask)
    whole = torch.compile(lambda x: layer(x, mask=mask), backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x), expected)
