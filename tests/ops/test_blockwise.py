"""Attention in blocks of queries against the plain kernel, with lengths that take several blocks and a rest."""

import keras
import numpy as np
import pytest
from harness import as_numpy, case_id, compiled, gradients, pairs, random
from keras import ops

import keras_transformer as kt
from keras_transformer.ops import dot_product_attention
from keras_transformer.ops.looping import walk

BLOCK, WIDTH, BATCH, HEADS = 4, 8, 2, 4
TOLERANCE = {"float32": 5e-6, "float16": 1e-2, "bfloat16": 8e-2}
CASES = pairs(
    length=(3, 8, 13, 37),
    key_length=(9, 13),
    key_heads=(4, 2, 1),
    causal=(False, True),
    window=(None, 1, 5),
    padding=(None, "rows", "one row"),
    mask=(None, "full", "of keys"),
    bias=(None, (1, HEADS), (BATCH, 1), (BATCH, HEADS)),
    dtype=tuple(TOLERANCE),
    by_xla=(False, True),
    jit=(False, True),
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kt.ops.blockwise, "block_size", lambda *_: BLOCK)


def hidden_by(case):
    """A case's explicit mask, its padding, and all that hides as one mask, `[B, 1, T, S]`."""
    length, key_length = case["length"], case["key_length"]
    distance = np.arange(length)[:, None] - np.arange(key_length)
    full = np.ones((BATCH, 1, length, key_length), bool)
    mask = padding = None
    if case["mask"]:
        drawn = np.random.default_rng(0).random((BATCH, length if case["mask"] == "full" else 1, key_length)) < 0.6
        drawn[0, 0] = False  # A row that may attend to nothing.
        mask = ops.convert_to_tensor(drawn)
        full &= drawn[:, None]
    if case["padding"]:
        padding = np.arange(key_length) < np.array([[key_length], [3]] if case["padding"] == "rows" else [[7]])
        full &= padding[:, None, None]
        padding = ops.convert_to_tensor(padding)
    if case["causal"]:
        full &= distance >= 0
    if case["window"]:
        full &= np.abs(distance) < case["window"]
    return mask, padding, full


def variables_of(case):
    sizes = ((HEADS, "length"), (case["key_heads"], "key_length"), (case["key_heads"], "key_length"))
    values = [random(BATCH, heads, case[length], WIDTH, seed=i) for i, (heads, length) in enumerate(sizes)]
    if case["bias"]:
        values.append(random(*case["bias"], case["length"], case["key_length"], seed=5))
    return [keras.Variable(value, dtype=case["dtype"]) for value in values]


def with_gradients(attend, variables, probe):
    """Output of a function of the variables, and the gradients of its product with a probe."""
    output = as_numpy(attend(*(v.value for v in variables)))
    probe = ops.convert_to_tensor(probe)
    loss = lambda: ops.sum(ops.cast(attend(*(v + 0 for v in variables)), "float32") * probe)  # noqa: E731
    return [output, *gradients(loss, variables)]


def assert_close(found, expected, tolerance):
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        atol = tolerance * max(1, np.abs(other).max())
        np.testing.assert_allclose(one, other, atol=atol, err_msg=f"{i}", equal_nan=False)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_blocks_equal_the_plain_kernel(monkeypatch, case):
    monkeypatch.setattr(kt.ops.blockwise, "compiled_by_xla", lambda: case["by_xla"])
    mask, padding, full = hidden_by(case)

    def blockwise(query, key, value, bias=None):
        told = {"causal": case["causal"], "padding": padding, "sliding_window": case["window"]}
        return dot_product_attention(query, key, value, mask, bias, kernel="blockwise", **told)

    def plain(query, key, value, bias=None):
        return dot_product_attention(query, key, value, full, bias, kernel="plain")

    variables, probe = variables_of(case), random(BATCH, HEADS, case["length"], WIDTH, seed=9)
    found = with_gradients(compiled(blockwise) if case["jit"] else blockwise, variables, probe)
    assert_close(found, with_gradients(plain, variables, probe), TOLERANCE[case["dtype"]])
    nothing = np.broadcast_to(~full.any(-1), found[0].shape[:3])
    assert not found[0][nothing].any() and not found[1][nothing].any()


@pytest.mark.parametrize("kernel", ["plain", "auto"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 3])
def test_a_window_is_told_to_every_kernel(kernel, causal, window):
    query = random(1, 2, 7, WIDTH)
    distance = np.arange(7)[:, None] - np.arange(7)
    mask = (np.abs(distance) < window) & ((distance >= 0) | (not causal))
    told = dot_product_attention(query, query, query, kernel=kernel, causal=causal, sliding_window=window)
    expected = dot_product_attention(query, query, query, mask, kernel="plain")
    np.testing.assert_allclose(as_numpy(told), as_numpy(expected), atol=2e-6)


DROPS = pairs(
    length=(3, 13),
    key_length=(13,),
    key_heads=(4, 2),
    causal=(False, True),
    window=(None, 5),
    bias=(None, (1, HEADS)),
    dtype=tuple(TOLERANCE),
    by_xla=(False, True),
    jit=(False, True),
)


@pytest.mark.parametrize("case", DROPS, ids=case_id)
def test_dropout_is_the_same_in_the_gradient(monkeypatch, case):
    """What was dropped is read off by values that are the identity, and given to the plain kernel."""
    monkeypatch.setattr(kt.ops.blockwise, "compiled_by_xla", lambda: case["by_xla"])
    _, _, full = hidden_by({**case, "mask": None, "padding": None})
    variables, probe = variables_of(case), random(BATCH, HEADS, case["length"], WIDTH, seed=9)

    def blockwise(query, key, value, bias=None):
        layer = keras.layers.Dropout(0.4, seed=3)
        told = {"causal": case["causal"], "sliding_window": case["window"]}
        return dot_product_attention(query, key, value, bias=bias, dropout=layer, kernel="blockwise", **told)

    query, key, _, *bias = (ops.cast(v.value, "float32") for v in variables)
    identity = ops.broadcast_to(ops.eye(13), (BATCH, case["key_heads"], 13, 13))
    _, weights = dot_product_attention(query, key, identity, full, *bias, return_weights=True)
    weights, dropped = as_numpy(weights), as_numpy(blockwise(query, key, identity, *bias))
    factor = np.where(weights > 0, dropped / np.maximum(weights, 1e-30), 1)
    seen = np.broadcast_to(full, factor.shape)
    np.testing.assert_allclose(factor[seen], np.where(factor[seen] > 0.5, 1 / 0.6, 0), rtol=1e-4)
    assert 0.3 < (factor[seen] == 0).mean() < 0.5

    def plain(query, key, value, bias=None):
        drop = lambda weights: weights * ops.cast(factor, weights.dtype)  # noqa: E731
        return dot_product_attention(query, key, value, full, bias, dropout=drop, kernel="plain")

    attend = compiled(blockwise) if case["jit"] and keras.backend.backend() == "jax" else blockwise
    assert_close(
        with_gradients(attend, variables, probe),
        with_gradients(plain, variables, probe),
        2 * TOLERANCE[case["dtype"]],
    )


def test_blocks_drop_differently_and_so_do_calls():
    query = ops.zeros((1, 1, 3 * BLOCK, WIDTH))
    identity = ops.reshape(ops.eye(40), (1, 1, 40, 40))
    key, layer = ops.zeros((1, 1, 40, WIDTH)), keras.layers.Dropout(0.5)
    rows = np.concatenate([
        as_numpy(dot_product_attention(query, key, identity, dropout=layer, kernel="blockwise"))[0, 0] > 0
        for _ in range(2)
    ])  # fmt: skip
    assert len(np.unique(rows, axis=0)) == len(rows)


@pytest.mark.parametrize("by_xla", [False, True])
def test_all_may_be_dropped(monkeypatch, by_xla):
    monkeypatch.setattr(kt.ops.blockwise, "compiled_by_xla", lambda: by_xla)
    x = ops.convert_to_tensor(random(1, 2, 5, WIDTH))
    output = dot_product_attention(x, x, x, dropout=keras.layers.Dropout(1.0), kernel="blockwise")
    np.testing.assert_array_equal(as_numpy(output), 0)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="only TensorFlow has lengths that are not known")
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_lengths_need_not_be_known(jit, causal, window):
    import tensorflow as tf

    @tf.function(jit_compile=jit, input_signature=[tf.TensorSpec([None, 2, None, WIDTH])] * 3)
    def found(query, key, value):
        with tf.GradientTape() as tape:
            tape.watch((query, key, value))
            output = dot_product_attention(query, key, value, kernel="blockwise", causal=causal, sliding_window=window)
        return output, *tape.gradient(output, (query, key, value))

    for length in (3, 8, 13, 45):
        query, key, value = (random(3, 2, length, WIDTH, seed=i) for i in range(3))
        case = {"length": length, "key_length": length, "causal": causal, "window": window, "mask": 0, "padding": 0}
        variables = [keras.Variable(x) for x in (query, key, value)]
        mask = hidden_by(case)[2][0, 0]
        expected = with_gradients(
            lambda *x, mask=mask: dot_product_attention(*x, mask, kernel="plain"), variables, np.ones_like(query)
        )
        assert_close([as_numpy(x) for x in found(query, key, value)], expected, 5e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_a_walk_carries_and_keeps(count):
    (total,), (kept,) = walk(
        count, lambda i, x: ((x[0] + ops.cast(i + 1, "float32"),), (x[0] * 2,)), (ops.ones((2,)),), ("float32",)
    )
    sums = np.cumsum(np.r_[1, np.arange(count) + 1])
    np.testing.assert_array_equal(as_numpy(total), [sums[-1]] * 2)
    np.testing.assert_array_equal(as_numpy(kept), np.stack([2 * sums[:-1]] * 2, axis=1))


def test_auto_takes_blocks_where_they_pay(monkeypatch):
    taken = []
    monkeypatch.setattr(kt.ops.attention, "blockwise_attention", lambda *_: taken.append("blocks"))
    monkeypatch.setattr(kt.ops.blockwise, "MANY_SCORES", 2**22)
    backend = keras.backend.backend()
    monkeypatch.setattr(kt.ops.blockwise, "on_cpu", lambda _: True)

    def taken_for(length, **options):
        taken.clear()
        x = ops.zeros((1, 1, length, 2))
        dot_product_attention(x, x, x, **options)
        return bool(taken)

    drop = keras.layers.Dropout(0.1)
    assert not taken_for(128, causal=True) and not taken_for(128, sliding_window=8) and not taken_for(512)
    assert taken_for(512, causal=True) == (backend != "torch")
    assert taken_for(1024, sliding_window=64) and not taken_for(1024, sliding_window=512, dropout=drop)
    assert taken_for(1024, sliding_window=256, dropout=drop) == (backend == "jax")
    assert taken_for(2048, dropout=drop)
    assert taken_for(2048) == (backend != "torch")
    assert not taken_for(1024, dropout=drop) and not taken_for(1024, dropout=lambda x: x)
    assert not taken_for(2048, dropout=lambda x: x) and not taken_for(2048, return_weights=True)
    monkeypatch.setattr(kt.ops.blockwise, "on_cpu", lambda _: False)
    assert taken_for(1024, causal=True) == (backend == "tensorflow")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 64])
def test_layers_are_the_same_in_blocks(monkeypatch, causal, window):
    layer = kt.layers.MultiHeadSelfAttention(2, causal=causal, sliding_window=window, position=kt.layers.AlibiBias(2))
    x = ops.convert_to_tensor(random(1, 40, WIDTH))
    expected = as_numpy(layer(x))
    monkeypatch.setattr(kt.ops.attention, "blockwise_pays", lambda *_: True)
    np.testing.assert_allclose(as_numpy(layer(x)), expected, atol=2e-6)
