"""Every kernel against a reference in float64, written out as the equations are."""

import keras
import numpy as np
import pytest
from harness import as_numpy, case_id, compiled, dtype_of, gradients, pairs, random
from keras import ops

import keras_transformer as kt
from keras_transformer.ops import dot_product_attention, make_attention_mask

KERNELS = ("plain", "fused", "blockwise")
T, S, D, E = 5, 7, 4, 4
TOLERANCE = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}


def reference(query, key, value, mask=None, bias=None, scale=None):
    """Row by row: softmax over the keys that are allowed, and 0 where none is."""
    query, key, value = (np.asarray(x, "float64") for x in (query, key, value))
    batch, heads, length, width = query.shape
    group = heads // key.shape[1]
    scale = 1 / np.sqrt(width) if scale is None else scale
    shape = (batch, heads, length, key.shape[2])
    mask = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape)
    bias = np.zeros(shape) if bias is None else np.broadcast_to(np.asarray(bias, "float64"), shape)
    output, weights = np.zeros((batch, heads, length, value.shape[3])), np.zeros(shape)
    for b, h, t in np.ndindex(batch, heads, length):
        seen = np.flatnonzero(mask[b, h, t])
        if len(seen):
            scores = scale * key[b, h // group][seen] @ query[b, h, t] + bias[b, h, t, seen]
            exponentials = np.exp(scores - scores.max())
            weights[b, h, t, seen] = exponentials / exponentials.sum()
            output[b, h, t] = weights[b, h, t] @ value[b, h // group]
    return output, weights


def mask_of(causal, window, padding, explicit):
    """The mask `[2, T, S]` that a case describes, its T queries the last of the S positions; None if all may."""
    query_positions, key_positions = np.arange(S - T, S), np.arange(S)
    distance = query_positions[:, None] - key_positions
    mask = np.ones((2, T, S), bool)
    if causal:
        mask &= distance >= 0
    if window:
        mask &= (distance < window) & (distance > -window)
    if padding:
        mask &= PADDING[:, None]
    if explicit:
        mask &= EXPLICIT
    return mask if causal or window or padding or explicit else None


PADDING = np.array([[True] * 4 + [False] * 3, [False, False] + [True] * 5])
EXPLICIT = np.random.default_rng(0).random((2, T, S)) < 0.6
EXPLICIT[0, 2] = False  # A row that may attend to nothing.
BIASES = {"none": None, "of heads": random(1, 8, T, S, seed=1), "of rows": random(2, 1, T, S, seed=2)}


def drawn(heads=8, key_heads=8, dtype="float32", scale=1.0):
    shapes = ((2, heads, T, D), (2, key_heads, S, D), (2, key_heads, S, E))
    return [ops.cast(random(*shape, seed=i, scale=scale), dtype) for i, shape in enumerate(shapes)]


CASES = pairs(
    causal=(False, True),
    window=(None, 1, 3),
    padding=(False, True),
    explicit=(False, True),
    bias=tuple(BIASES),
    key_heads=(8, 2, 1),
    scale=(None, 0.3),
    dtype=tuple(TOLERANCE),
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_kernels_equal_the_reference(case):
    query, key, value = drawn(key_heads=case["key_heads"], dtype=case["dtype"])
    made = make_attention_mask(
        np.arange(S - T, S),
        np.arange(S),
        case["causal"],
        case["window"],
        ops.convert_to_tensor(PADDING) if case["padding"] else None,
    )
    mask = mask_of(case["causal"], case["window"], case["padding"], case["explicit"])
    if case["explicit"]:
        made = ops.convert_to_tensor(EXPLICIT) if made is None else ops.logical_and(made, EXPLICIT)
    assert (made is None) == (mask is None)
    if mask is not None:
        np.testing.assert_array_equal(np.broadcast_to(as_numpy(made), mask.shape), mask)
    bias = BIASES[case["bias"]]
    expected, expected_weights = reference(
        *map(as_numpy, (query, key, value)), None if mask is None else mask[:, None], bias, case["scale"]
    )
    tolerance = TOLERANCE[case["dtype"]] * max(1, np.abs(expected).max())
    for kernel in KERNELS:
        output = dot_product_attention(query, key, value, made, bias, case["scale"], kernel=kernel)
        assert dtype_of(output) == case["dtype"]
        np.testing.assert_allclose(as_numpy(output), expected, atol=tolerance, err_msg=kernel)
    output, weights = dot_product_attention(query, key, value, made, bias, case["scale"], return_weights=True)
    np.testing.assert_allclose(as_numpy(output), expected, atol=tolerance)
    np.testing.assert_allclose(as_numpy(weights), expected_weights, atol=tolerance)
    if mask is not None:
        assert not as_numpy(weights)[~np.broadcast_to(mask[:, None], weights.shape)].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "shape",
    [(T, S), (1, T, S), (2, T, S), (2, 1, S), (1, 1, T, S), (2, 1, 1, S), (2, 8, T, S), (1, 8, T, S)],
    ids=str,
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_masks_of_every_shape_broadcast(kernel, shape, with_bias):
    mask = np.random.default_rng(1).random(shape) < 0.7
    bias = BIASES["of heads"] if with_bias else None
    query, key, value = drawn(key_heads=2)
    full = mask if mask.ndim == 4 else mask[:, None] if mask.ndim == 3 else mask[None, None]
    output = dot_product_attention(query, key, value, mask, bias, kernel=kernel)
    np.testing.assert_allclose(
        as_numpy(output), reference(*map(as_numpy, (query, key, value)), full, bias)[0], atol=2e-6
    )


def test_values_may_be_wider_than_keys():
    query, key, _ = drawn()
    value = random(2, 8, S, 3 * E)
    output = dot_product_attention(query, key, value, kernel="plain")
    np.testing.assert_allclose(as_numpy(output), reference(*map(as_numpy, (query, key)), value)[0], atol=2e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_rows_without_a_key_are_zero_with_finite_gradients(dtype, kernel, with_bias, jit):
    mask = EXPLICIT.copy()
    mask[1] = False  # A whole row of the batch, beside the single query of row 0.
    inputs = [keras.Variable(x, dtype=dtype) for x in drawn(key_heads=2)]
    bias = keras.Variable(BIASES["of heads"], dtype=dtype) if with_bias else None

    def attend(*tensors):
        query, key, value, *rest = tensors
        return dot_product_attention(query, key, value, mask, *rest, kernel=kernel)

    variables = inputs + ([bias] if with_bias else [])
    values = [ops.convert_to_tensor(v) for v in variables]
    output = as_numpy((compiled(attend) if jit else attend)(*values))
    assert not output[1].any() and not output[0, :, 2].any()
    assert output[0, :, 0].all()
    found = gradients(lambda: ops.sum(ops.square(attend(*(v + 0 for v in variables)))), variables)
    for gradient in found:
        assert np.isfinite(gradient).all() and gradient.any()
    assert not found[0][1].any() and not found[0][0, :, 2].any()


@pytest.mark.parametrize("case", pairs(kernel=KERNELS, bias=("none", "of heads"), masked=(False, True)), ids=case_id)
def test_gradients_of_the_kernels_are_those_of_the_reference(case):
    """Central differences of the float64 reference, in a random direction of each argument."""
    values = [as_numpy(x) for x in drawn(key_heads=2)]
    mask = EXPLICIT if case["masked"] else None
    full = None if mask is None else mask[:, None]
    bias = BIASES[case["bias"]]
    values = values if bias is None else [*values, bias]
    probe = random(2, 8, T, E, seed=9)

    def loss(values):
        return (reference(*values[:3], full, *values[3:])[0] * probe).sum()

    variables = [keras.Variable(v) for v in values]

    def attended():
        tensors = [v + 0 for v in variables]
        output = dot_product_attention(*tensors[:3], mask, *tensors[3:], kernel=case["kernel"])
        return ops.sum(output * ops.convert_to_tensor(probe))

    found = gradients(attended, variables)
    for i, gradient in enumerate(found):
        direction = random(*values[i].shape, seed=20 + i).astype("float64")
        moved = [[v + (sign * 1e-5 * direction if i == j else 0) for j, v in enumerate(values)] for sign in (1, -1)]
        slope = (loss(moved[0]) - loss(moved[1])) / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logits_of_a_thousand_stay_finite(kernel, masked, with_bias, dtype):
    signs = np.sign(random(2, 2, S, 16))
    query, key = 16 * signs[:, :, :T], 16 * signs  # Scaled scores of 1024 where the signs agree; unscaled 4096.
    value = random(2, 2, S, 16)
    bias = random(1, 2, T, S, scale=10.0) if with_bias else None
    mask = EXPLICIT if masked else None
    tensors = [ops.cast(x, dtype) for x in (query, key, value)]
    output = as_numpy(dot_product_attention(*tensors, mask, bias, kernel=kernel))
    expected, _ = reference(query, key, as_numpy(tensors[2]), mask if mask is None else mask[:, None], bias)
    assert np.isfinite(output).all()
    if not with_bias:  # Beside such scores half precision rounds the bias.
        np.testing.assert_allclose(output, expected, atol=1e-2)
    variables = [keras.Variable(x, dtype=dtype) for x in tensors]
    found = gradients(
        lambda: ops.sum(dot_product_attention(*(v + 0 for v in variables), mask, bias, kernel=kernel)), variables
    )
    assert all(np.isfinite(gradient).all() for gradient in found)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_masked_key_counts_for_nothing_however_large_its_score(kernel, with_bias, dtype):
    query, key, value = (as_numpy(x) for x in drawn(dtype=dtype))
    query = np.abs(query) + 1
    mask = np.arange(S) < 4
    bias = BIASES["of heads"] if with_bias else None
    moved = key.copy(), value.copy()
    for x in moved:
        x[:, :, 4:] = 2e4
    outputs = [
        as_numpy(
            dot_product_attention(
                *(ops.cast(x, dtype) for x in (query, *source)), np.tile(mask, (T, 1)), bias, kernel=kernel
            )
        )
        for source in ((key, value), moved)
    ]
    assert np.isfinite(outputs[1]).all()
    np.testing.assert_array_equal(*outputs)


def test_dropout_acts_on_the_weights_and_leaves_those_returned_alone():
    query, key, value = drawn()
    half = lambda weights: weights * ops.cast(np.arange(S) % 2, weights.dtype) * 2  # noqa: E731
    output, weights = dot_product_attention(query, key, value, dropout=half, return_weights=True)
    expected = reference(*map(as_numpy, (query, key, value)))[1]
    np.testing.assert_allclose(as_numpy(weights), expected, atol=2e-6)
    dropped = expected * (np.arange(S) % 2) * 2
    np.testing.assert_allclose(as_numpy(output), dropped @ as_numpy(value), atol=5e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "flash"}, "`kernel` must be one of .*'flash'"),
        ({"kernel": "fused", "return_weights": True}, "neither `dropout` nor `return_weights`"),
        ({"kernel": "fused", "dropout": lambda x: x}, "neither `dropout` nor `return_weights`"),
        ({"kernel": "fused", "softmax": lambda scores, mask: scores}, "nor `softmax`"),
        ({"kernel": "blockwise", "softmax": lambda scores, mask: scores}, "nor `softmax`"),
        ({"kernel": "blockwise", "return_weights": True}, "neither `return_weights`"),
        ({"kernel": "blockwise", "dropout": lambda x: x}, "must be a `keras.layers.Dropout`"),
        ({"key_heads": 3}, "8 query heads and 3 key-value heads"),
    ],
)
def test_bad_input(arguments, message):
    tensors = drawn(key_heads=arguments.pop("key_heads", 8))
    with pytest.raises(ValueError, match=message):
        dot_product_attention(*tensors, **arguments)


def test_auto_takes_the_fused_kernel_where_it_is_the_faster_one(monkeypatch):
    module = kt.ops.attention
    taken = []
    monkeypatch.setattr(module, "flash_attention", lambda *_: None)
    monkeypatch.setattr(module, "_fused", lambda *_: taken.append("fused"))
    for faster in (True, False):
        monkeypatch.setattr(module, "_fused_is_faster", lambda faster=faster: faster)
        dot_product_attention(*drawn())
    assert taken == ["fused"]
    monkeypatch.setattr(module, "_fused_is_faster", lambda: True)
    dot_product_attention(*drawn(), dropout=lambda weights: weights)
    dot_product_attention(*drawn(), return_weights=True)
    dot_product_attention(*drawn(), softmax=lambda scores, mask: scores)
    assert taken == ["fused"]
