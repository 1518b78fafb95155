"""What `verify` has formulas for: all steps of all models that come with the library, and each kind of mask."""

import json
import re

import keras
import numpy as np
import pytest
from keras import ops

import keras_transformer as kt
from keras_transformer.inspection.formulas import formula
from keras_transformer.layers import CrossAttention, MultiHeadSelfAttention, RelativePositionBias, RotaryEmbedding

IDS = np.array([[3, 1, 4, 1, 5, 0], [9, 2, 6, 5, 3, 5]], "int32")
TARGETS = np.array([[1, 3, 0, 0], [1, 2, 3, 4]], "int32")
SMALL = {"dim": 8, "depth": 1, "num_heads": 2, "hidden_dim": 12}
# Steps of these models that there is no formula for, with the reason.
UNKNOWN = {}


def numbers(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def altered(array):
    """Another array of its shape, dtype and infinities."""
    if array.dtype.kind == "b":
        return ~array
    result, finite = np.array(array), np.isfinite(array)
    result[finite] += 1 if array.dtype.kind == "i" else 0.01 * max(1, np.abs(array[finite]).max())
    return result


def frames():
    features = numbers(2, 13, 5)
    features[0, 6:] = 0
    return {"features": features, "target_ids": TARGETS}


def text(pooling, max_length=None):
    return kt.models.text_classifier(11, 3, pooling=pooling, max_length=max_length, **SMALL), IDS


def image(pooling, num_registers=0, **stem):
    model = kt.models.vision_transformer((8, 8, 3), 4, pooling=pooling, num_registers=num_registers, **stem, **SMALL)
    return model, numbers(2, 8, 8, 3)


def caption(**stem):
    return kt.models.image_captioner((8, 8, 3), 11, **stem, **SMALL), {
        "images": numbers(2, 8, 8, 3),
        "target_ids": TARGETS,
    }


def translation(**options):
    return kt.models.transformer(11, 11, **options, **SMALL), {"source_ids": IDS, "target_ids": TARGETS}


MODELS = {
    "text, mean": lambda: text("mean"),
    "text, class token": lambda: text("class_token", 9),
    "text, last token": lambda: text("last_token"),
    "image, class token": lambda: image("class_token", patch_size=4),
    "image, class token, registers": lambda: image("class_token", 2, patch_size=(4, 2)),
    "image, mean, convolutions": lambda: image("mean", convolutions=2),
    "image, sequence, registers": lambda: image("sequence", 1, convolutions=1),
    "language, rotary": lambda: (kt.models.causal_lm(11, gated=True, activation="silu", **SMALL), IDS),
    "language, learned": lambda: (
        kt.models.causal_lm(11, position="learned", max_length=6, tied_output=False, **SMALL),
        IDS,
    ),
    "language, sinusoidal": lambda: (kt.models.causal_lm(11, position="sinusoidal", **SMALL), IDS),
    "translation": lambda: translation(),
    "translation, shared": lambda: translation(norm_position="pre", shared_embedding=True),
    "translation, untied": lambda: translation(norm_position="sandwich", tied_output=False),
    "caption, patches": lambda: caption(patch_size=4),
    "caption, convolutions": lambda: caption(convolutions=2),
    "speech": lambda: (kt.models.speech_recognizer(11, 5, augmentation=kt.layers.SpecAugment(), **SMALL), frames()),
    "speech, rotary": lambda: (kt.models.speech_recognizer(11, 5, position=RotaryEmbedding(), **SMALL), frames()),
    "speech, bias, without CTC": lambda: (
        kt.models.speech_recognizer(11, 5, position=RelativePositionBias(2, 8, 16), ctc=False, **SMALL),
        frames(),
    ),
}


def test_each_builder_of_a_model_is_here():
    builders = {name for name in kt.models.__all__ if name not in ("packed", "resize_positions")}
    built = {MODELS[name]()[0].name for name in MODELS}
    assert built == builders


@pytest.mark.parametrize("name", MODELS)
def test_no_step_of_a_model_is_unknown(name):
    model, inputs = MODELS[name]()
    trace = kt.inspection.trace(model, inputs)
    result = trace.verify()
    assert [path for path in result.unknown if path not in UNKNOWN] == []
    assert result.given == [f"{x.name}/input" for x in model.inputs]
    assert len(result.recomputed) + len(result.given) == len(trace)
    for path in result.recomputed:
        with pytest.raises(ValueError, match=f"^{path} differs"):
            trace.verify({path: altered(trace[path])})


@pytest.mark.parametrize("name", MODELS)
def test_each_step_of_a_model_is_shown_with_its_formula(name, tmp_path):
    model, inputs = MODELS[name]()
    trace = kt.inspection.trace(model, inputs)
    for of in filter(None, dict.fromkeys(trace.belongs.values())):
        lines = [line for i in (0, -1) for line in trace.token(i, row=1, of=of).splitlines()]
        assert max(map(len, lines)) <= 100
        shown = [line for line in lines if line.startswith("  ") and line[2] != " "]
        assert shown and all(line.split()[0] == "input" or line.split("] ", 1)[1].strip() for line in shown)
    trace.to_html(tmp_path / "page.html", row=1)
    (held,) = re.findall(r'id="trace">(.*?)</script>', (tmp_path / "page.html").read_text("utf-8"), re.DOTALL)
    told = {step["path"]: step for step in json.loads(held)["steps"]}
    assert all(step["formula"] or path.endswith("/input") for path, step in told.items())
    for path, step in told.items():
        if path.endswith("/positions"):
            array = trace[path]
            assert step["shape"] == [array.shape[-1]] and step["axis"] == 0 and step["array"] is not None


REAL = np.array([[True, True, False, True, False], [True] * 5])
PREFIX = np.array([[True, True, True, False, False], [False] * 5])
GIVEN = np.random.default_rng(1).uniform(size=(2, 5, 5)) < 0.7
# The layer, what it is called with besides `x`, whether query `i` of row `b` sees key `j`, and how it is written.
MASKS = {
    "causal": ({"causal": True}, {}, lambda b, i, j: j <= i, "key position <= query position"),
    "window": ({"sliding_window": 2}, {}, lambda b, i, j: abs(i - j) < 2, "|query - key position| < 2"),
    "causal, window": (
        {"causal": True, "sliding_window": 3},
        {},
        lambda b, i, j: i - 3 < j <= i,
        "0 <= query - key position < 3",
    ),
    "padding": ({}, {"mask": REAL}, lambda b, i, j: REAL[b, j], "key is real"),
    "causal, padding": (
        {"causal": True},
        {"mask": REAL},
        lambda b, i, j: j <= i and REAL[b, j],
        "key position <= query position and key is real",
    ),
    "causal, prefix": (
        {"causal": True},
        {"prefix_mask": PREFIX},
        lambda b, i, j: j <= i or PREFIX[b, i] and PREFIX[b, j],
        "(key position <= query position or both in the prefix)",
    ),
    "given": ({}, {"attention_mask": GIVEN}, lambda b, i, j: GIVEN[b, i, j], "as the given mask says"),
    "all": (
        {"causal": True, "sliding_window": 2},
        {"mask": REAL, "prefix_mask": PREFIX, "attention_mask": GIVEN},
        lambda b, i, j: (i - 2 < j <= i or PREFIX[b, i] and PREFIX[b, j]) and REAL[b, j] and GIVEN[b, i, j],
        "(0 <= query - key position < 2 or both in the prefix) and key is real and as the given mask says",
    ),
}
CROSS_MASKS = {
    "padding": ({}, {"context_mask": REAL}, lambda b, i, j: REAL[b, j], "key is real"),
    "padding, given": (
        {},
        {"context_mask": REAL, "attention_mask": GIVEN},
        lambda b, i, j: REAL[b, j] and GIVEN[b, i, j],
        "key is real and as the given mask says",
    ),
}


@pytest.mark.parametrize(
    "kind, name", [(MultiHeadSelfAttention, x) for x in MASKS] + [(CrossAttention, x) for x in CROSS_MASKS]
)
def test_each_number_of_a_mask_is_recomputed(kind, name):
    options, masks, sees, written = (MASKS if kind is MultiHeadSelfAttention else CROSS_MASKS)[name]
    inputs = {"x": keras.Input((5, 4), name="x")}
    inputs.update({name: keras.Input(mask.shape[1:], dtype="bool", name=name) for name, mask in masks.items()})
    given = dict(inputs) if kind is MultiHeadSelfAttention else {**inputs, "context": inputs["x"]}
    model = keras.Model(inputs, kind(2, name="attention", **options)(**given))
    trace = kt.inspection.trace(model, {"x": numbers(2, 5, 4), **masks})
    assert "attention/mask" in trace.verify().recomputed
    found = np.broadcast_to(trace["attention/mask"], (2, 1, 5, 5))
    for b, i, j in np.ndindex(2, 5, 5):
        assert found[b, 0, i, j] == sees(b, i, j)
    for place in np.ndindex(trace["attention/mask"].shape):
        other = np.array(trace["attention/mask"])
        other[place] = not other[place]
        with pytest.raises(ValueError, match="^attention/mask differs"):
            trace.verify({"attention/mask": other})
    (line,) = [line for line in str(trace).splitlines() if line.startswith("  mask ")]
    shown = line[line.index("]") + 1 :].strip()
    assert shown == written or (shown.endswith("…") and written.startswith(shown[:-1]) and len(line) == 100)
    for path in masks:  # What a mask is made from is among its sources, so that another one is noticed as well.
        with pytest.raises(ValueError, match="^attention/mask differs"):
            trace.verify({f"{path}/input": ~trace[f"{path}/input"]})


def test_a_mask_counts_positions_that_a_cache_went_through():
    layer = MultiHeadSelfAttention(2, causal=True, sliding_window=2, name="attention")
    x = ops.convert_to_tensor(numbers(1, 3, 4))
    with kt.scopes.DecodingScope(max_length=4) as decoding:
        layer(x[:, :2])
    with kt.scopes.DecodingScope(decoding.cache, 2), kt.scopes.RecordingScope(["mask"]) as recording:
        layer(x[:, 2:])
    _, _, sources = recording.origins["attention/mask"]
    sources = [None if part is None else ops.convert_to_numpy(part) for part in sources]
    expected = formula(layer, "mask", sources).compute(layer, *sources)
    np.testing.assert_array_equal(ops.convert_to_numpy(recording.records["attention/mask"]), expected)
    assert expected.tolist() == [[[[False, True, True, False]]]]


# What is made of `x` [B, 4, 6] of floats, by operations or layers of Keras, and the formula of the last step.
STEPS = {
    "first": (lambda x: x[:, 0], "x[:, 0]"),
    "each other": (lambda x: x[..., 1::2, None], "x[..., 1::2, None]"),
    "one of the batch": (lambda x: x[-1], "x[-1]"),
    "sum": (lambda x: x + 2.0, "x + 2.0"),
    "difference": (lambda x: x - x[:, :1], "x - y"),
    "quotient": (lambda x: 1.0 / (x * x + 1.0), "1.0 / y"),
    "product": (lambda x: x * x, "x · y"),
    "matrix product": (lambda x: x @ ops.transpose(x, (0, 2, 1)), "x @ y"),
    "equal": (lambda x: ops.equal(x, x[:, :1]), "x == y"),
    "unequal": (lambda x: ops.not_equal(x, 0), "x != 0"),
    "and": (lambda x: ops.logical_and(ops.not_equal(x, 0), ops.equal(x, x[:, :1])), "x and y"),
    "or": (lambda x: ops.logical_or(ops.not_equal(x, 0), ops.equal(x, x[:, :1])), "x or y"),
    "not": (lambda x: ops.logical_not(ops.not_equal(x, 0)), "not x"),
    "choice": (lambda x: ops.where(ops.equal(x, x[:, :1]), x, -1e4), "y where x is true, else -10000.0"),
    "ones": (lambda x: ops.ones_like(x), "1 for each of x"),
    "sums": (lambda x: ops.cumsum(x, axis=1), "sums of x up to each, along axis 1"),
    "softmax": (lambda x: ops.softmax(x, axis=1), "softmax(x) along axis 1"),
    "rounded": (lambda x: ops.cast(9 * x, "int32"), "x as int32"),
    "other precision": (lambda x: ops.cast(x, "float16"), "x as float16"),
    "softmax of all": (lambda x: ops.softmax(x, axis=None), "softmax(x) along axis None"),
    "places": (
        lambda x: ops.take_along_axis(x, ops.cast(ops.ones_like(x[:, :2]), "int32"), axis=1),
        "x at the places y, along axis 1",
    ),
    "mean": (lambda x: ops.mean(x, axis=1), "mean of x along axis 1"),
    "mean of all": (lambda x: ops.mean(x, axis=(1, 2), keepdims=True), "mean of x along axis (1, 2)"),
    "total": (lambda x: ops.sum(x, axis=-1), "sum of x along axis -1"),
    "largest": (lambda x: ops.max(x, axis=1, keepdims=True), "largest of x along axis 1"),
    "any": (lambda x: ops.any(ops.equal(x, x[:, :1]), axis=-1), "any of x along axis -1"),
    "side by side": (lambda x: ops.concatenate([x, x[:, :1]], axis=1), "side by side along axis 1"),
    "axis": (lambda x: ops.expand_dims(x, 1), "x with one more axis, 1"),
    "shape": (lambda x: ops.reshape(x, (-1, 2, 12)), "x in another shape"),
    "zeros beside": (lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 0))), "x with more at the sides"),
    "sevens beside": (lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 0)), constant_values=7.0), "x with more at the sides"),
    "placeholders": (
        lambda x: kt.layers.Placeholders(1)(x, ops.cast(x[:, :, 0] > 0, "int32"), x[:, ::2]),
        "the vectors where the text holds a place for them",
    ),
    "bias": (kt.layers.Bias("ones"), "x + b"),
    "temperature": (kt.layers.LogitScale(), "x · e^scale"),
    "activation": (keras.layers.Activation("tanh"), "tanh(x)"),
    "reshaping layer": (keras.layers.Reshape((-1, 3)), "x in another shape"),
    "pooling": (keras.layers.GlobalAveragePooling1D(keepdims=True), "mean of the real positions"),
    "windows": (keras.layers.MaxPooling1D(3, 2, "same"), "the largest of each window"),
    "windows without an end": (keras.layers.MaxPooling1D(3, 1), "the largest of each window"),
    "convolution": (keras.layers.Conv1D(5, 3, 2, "same", activation="relu"), "relu(windows of x · W + b)"),
    "convolution without bias": (keras.layers.Conv1D(5, 2, use_bias=False), "windows of x · W"),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_stands_between_layers_is_recomputed(name):
    step, written = STEPS[name]
    x = keras.Input((4, 6), name="x")
    model = keras.Model(x, step(kt.layers.FeedForward(8, name="block")(x)))
    for variable in model.weights:
        variable.assign(numbers(*variable.shape))
    trace = kt.inspection.trace(model, numbers(2, 4, 6))
    last = trace.steps[-1]
    assert last.path in trace.verify().recomputed
    with pytest.raises(ValueError, match=f"^{last.path} differs"):
        trace.verify({last.path: altered(last.array)})
    assert formula(last.layer, last.name, last.sources).text == written


class Add(keras.Operation):
    """Not the one of Keras, whose name it has."""

    def call(self, x):
        return x * 2

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, dtype=x.dtype)


# Steps that there is no formula for, none of which may be taken for another.
@pytest.mark.parametrize(
    "step",
    [
        lambda x: ops.pad(x, ((0, 0), (1, 1), (0, 0)), mode="reflect"),
        lambda x: ops.sort(x),
        lambda x: ops.max(x, axis=1, initial=9.0),
        lambda x: ops.cumsum(x, axis=1, dtype="float16"),
        Add(),
        keras.layers.Conv1D(6, 2, groups=2),
        keras.layers.Conv1D(6, 2, dilation_rate=2),
        keras.layers.Conv1D(6, 2, padding="causal"),
        keras.layers.Conv1D(6, 2, activation="softsign"),
        keras.layers.MaxPooling1D(2, data_format="channels_first"),
        keras.layers.GlobalAveragePooling1D(data_format="channels_first"),
    ],
)
def test_what_has_no_formula_is_told(step):
    x = keras.Input((4, 6), name="x")
    trace = kt.inspection.trace(keras.Model(x, step(kt.layers.FeedForward(8)(x))), numbers(2, 4, 6))
    assert trace.verify().unknown[-1] == trace.steps[-1].path


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_operations_in_half_precision_are_verified_as_far_as_it_goes(dtype):
    keras.config.set_dtype_policy(dtype)
    model, inputs = image("sequence", convolutions=2)
    trace = kt.inspection.trace(model, inputs)
    last = next(step for step in reversed(trace.steps) if "sum" in step.path)
    assert last.dtype == dtype.removeprefix("mixed_") and last.path in trace.verify().recomputed
    with pytest.raises(ValueError, match="differs"):
        trace.verify(tolerance=1e-7)
