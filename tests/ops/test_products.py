"""Products whose gradient is laid out by hand, against products of numpy."""

import re

import keras
import numpy as np
import pytest
from harness import BACKEND, as_numpy, dtype_of, gradients, random
from keras import ops

import keras_transformer as kt
from keras_transformer.ops.dropping import elements_kept
from keras_transformer.ops.products import (
    trained_attention,
    trained_bias,
    trained_norm,
    trained_product,
    trained_softmax,
)

tensorflow_alone = pytest.mark.skipif(BACKEND != "tensorflow", reason="the layout is for TensorFlow's XLA alone")


def flipped(x):
    return np.swapaxes(x, 2, 3)


def operands(shape, y_transposed):
    batch, heads, rows, shared, columns = shape
    y = random(batch, heads, *((columns, shared) if y_transposed else (shared, columns)), seed=1)
    return random(batch, heads, rows, shared), y, random(batch, heads, rows, columns, seed=2)


def step_of(function, signature=None):
    """`(x, y, probe)` to the result of `function(x, y)` and its gradients, one program of TensorFlow's XLA."""
    import tensorflow as tf

    @tf.function(jit_compile=True, input_signature=signature)
    def step(x, y, probe):
        with tf.GradientTape() as tape:
            tape.watch((x, y))
            output = function(x, y)
            loss = tf.reduce_sum(output * probe)
        return output, *tape.gradient(loss, (x, y))

    return step


@pytest.mark.parametrize("y_transposed", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4, 7), (1, 1, 6, 3, 6), (4, 1, 1, 8, 9), (3, 2, 9, 5, 1)])  # B K R M N
def test_values_and_gradients_are_those_of_a_product(shape, y_transposed):
    x, y, probe = operands(shape, y_transposed)
    if BACKEND == "tensorflow":
        found = step_of(lambda x, y: trained_product(x, y, y_transposed))(*map(ops.convert_to_tensor, (x, y, probe)))
    else:
        variables = [keras.Variable(x), keras.Variable(y)]
        multiply = lambda: trained_product(*(v.value for v in variables), y_transposed)  # noqa: E731
        found = ops.stop_gradient(multiply()), *gradients(lambda: ops.sum(multiply() * ops.array(probe)), variables)
    of_y = flipped(x) @ probe
    expected = x @ (flipped(y) if y_transposed else y), probe @ (y if y_transposed else flipped(y))
    for one, other in zip(found, (*expected, flipped(of_y) if y_transposed else of_y), strict=True):
        np.testing.assert_allclose(as_numpy(one), other, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_trained_softmax_has_the_values_and_gradients_of_a_softmax(dtype):
    x, probe = random(2, 3, 5, 7, scale=3.0).astype(dtype), random(2, 3, 5, 7, seed=1).astype(dtype)
    x[0, 0, 0, :4], x[0, 0, 1] = -1e30, -1e30  # As a mask leaves them.
    if BACKEND == "tensorflow":
        step = step_of(lambda x, _: trained_softmax(x) + 0 * _)
        found = step(*map(ops.convert_to_tensor, (x, x, probe)))[:2]
    else:
        variable = keras.Variable(x, dtype=dtype)
        soften = lambda: trained_softmax(variable.value)  # noqa: E731
        found = ops.stop_gradient(soften()), *gradients(lambda: ops.sum(soften() * ops.array(probe)), [variable])
    exponentials = np.exp(x - x.max(-1, keepdims=True), dtype="float64")
    weights = exponentials / exponentials.sum(-1, keepdims=True)
    of_x = weights * (probe - (weights * probe).sum(-1, keepdims=True))
    for one, other in zip(found, (weights, of_x), strict=True):
        kept = dtype_of(one)  # JAX has no float64 unless it is told to.
        assert kept == dtype or BACKEND == "jax"
        np.testing.assert_allclose(as_numpy(one), other, atol=1e-6 if kept == "float32" else 1e-12)


@pytest.mark.parametrize("shape", [(7, 4), (2, 70, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize("kind", ["bias", "layer", "root mean square"])
def test_sums_over_rows_as_products_are_those_of_the_backend(kind, shape):
    functions = {
        "bias": (trained_bias, lambda x, offset: x + offset),
        "layer": (lambda *x: trained_norm(*x, epsilon=0.1), lambda *x: ops.layer_normalization(*x, epsilon=0.1)),
        "root mean square": (
            lambda *x: trained_norm(*x, epsilon=0.1),
            lambda *x: ops.rms_normalization(*x, epsilon=0.1),
        ),
    }
    vectors = [random(4, seed=1) + 1, random(4, seed=2)][: 2 if kind == "layer" else 1]
    variables = [keras.Variable(value) for value in (random(*shape, scale=3.0) + 5, *vectors)]
    probe = ops.convert_to_tensor(random(*shape, seed=3))
    found, expected = (
        (ops.stop_gradient(f(*v)), *gradients(lambda f=f: ops.sum(f(*(x + 0 for x in variables)) * probe), variables))
        for f, v in ((f, [x.value for x in variables]) for f in functions[kind])
    )
    assert len(found) == 2 + len(vectors)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(as_numpy(other)).max() > 0.1
        np.testing.assert_allclose(as_numpy(one), as_numpy(other), atol=1e-4)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("heads, key_heads", [(3, 3), (4, 2)])
def test_trained_attention_has_the_values_and_gradients_of_its_steps(heads, key_heads, rate):
    variables = [
        keras.Variable(random(2, *shape, seed=i)) for i, shape in enumerate([(heads, 5, 7), (key_heads, 7, 4)])
    ]
    probe, seed = ops.convert_to_tensor(random(2, heads, 5, 4, seed=2)), ops.convert_to_tensor([3, 4])

    def steps(scores, value):
        keeps, share = elements_kept(seed, (2, heads, 5, 7), rate, hashed=True)
        weights = ops.where(keeps, ops.softmax(scores) / (1 - share), 0.0)
        return ops.matmul(weights, ops.repeat(value, heads // key_heads, axis=1))

    def by_products(scores, value):
        return ops.reshape(trained_attention(scores, value, *((rate, seed) if rate else ())), (2, heads, 5, 4))

    found, expected = (
        (
            ops.stop_gradient(f(*(x.value for x in variables))),
            *gradients(lambda f=f: ops.sum(f(*(x + 0 for x in variables)) * probe), variables),
        )
        for f in (by_products, steps)
    )
    for one, other in zip(found, expected, strict=True):
        assert np.abs(as_numpy(other)).max() > 0.1
        np.testing.assert_allclose(as_numpy(one), as_numpy(other), atol=1e-5)


@tensorflow_alone
@pytest.mark.parametrize("masked", [False, True])
def test_a_training_step_of_a_layer_is_the_same_with_its_softmax_and_products_apart(masked, monkeypatch):
    layer = kt.layers.MultiHeadSelfAttention(4, num_key_value_heads=2, dropout=0.3)
    x, probe = (ops.convert_to_tensor(random(2, 6, 16, seed=seed)) for seed in (0, 1))
    mask = ops.convert_to_tensor([[True] * 6, [False] * 6]) if masked else None  # A row that attends to nothing.
    layer(x)
    generator, found, taken = layer.weights_dropout.seed_generator, [], []
    first = as_numpy(generator.state)
    attend = trained_attention
    monkeypatch.setattr("keras_transformer.ops.attention.trained_attention", lambda *x: taken.append(1) or attend(*x))
    for together in (True, False):
        generator.state.assign(first)
        if not together:
            monkeypatch.setattr("keras_transformer.ops.attention.sums_are_products", lambda: False)
        step = step_of(lambda x, _: layer(x, mask=mask, training=True) + 0 * _)
        found.append(step(x, x, probe)[:2])
        assert len(taken) == 1
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(as_numpy(one), as_numpy(other), atol=1e-5)
        assert np.abs(as_numpy(other)).max() > 0.1


@tensorflow_alone
def test_sizes_need_not_be_known():
    import tensorflow as tf

    signature = [tf.TensorSpec([None, 2, None, width]) for width in (4, 4, None)]
    step = step_of(lambda x, y: trained_product(x, y, y_transposed=True), signature=signature)
    for shape in ((3, 2, 5, 4, 7), (1, 2, 8, 4, 8)):
        x, y, probe = operands(shape, True)
        np.testing.assert_allclose(as_numpy(step(x, y, probe)[2]), flipped(flipped(x) @ probe), atol=1e-5)


@tensorflow_alone
def test_a_gradient_has_a_gradient():
    """Of the sum of the cubes: what TensorFlow sums of the second derivatives, written out."""
    import tensorflow as tf

    x, y, _ = (ops.convert_to_tensor(a) for a in operands((2, 2, 3, 4, 5), True))

    @tf.function(jit_compile=True)
    def curvature(x, y):
        with tf.GradientTape() as outer:
            outer.watch(y)
            with tf.GradientTape() as tape:
                tape.watch(y)
                loss = tf.reduce_sum(trained_product(x, y, y_transposed=True) ** 3)
            slope = tape.gradient(loss, y)
        return outer.gradient(slope, y)

    scores = as_numpy(x) @ flipped(as_numpy(y))
    expected = flipped(flipped(as_numpy(x)) @ (6 * scores * as_numpy(x).sum(-1, keepdims=True)))
    np.testing.assert_allclose(as_numpy(curvature(x, y)), expected, rtol=1e-4, atol=1e-4)


@tensorflow_alone
@pytest.mark.parametrize("key_heads", [4, 2])
def test_no_batch_of_products_of_a_training_step_sums_over_the_rows_of_both(key_heads):
    """What XLA would leave to one core: it takes a transpose that it can see into the product."""
    layer = kt.layers.MultiHeadSelfAttention(4, num_key_value_heads=key_heads, dropout=0.1)
    x = ops.convert_to_tensor(random(2, 48, 64))
    layer(x)

    def sums_over_rows(training):
        step = step_of(lambda x, _: layer(x, training=training) + 0 * _)
        text = step.experimental_get_compiler_ir(x, x, x)(stage="optimized_hlo")
        products = re.findall(r" dot\(.*lhs_batch_dims=\{0,1\}, lhs_contracting_dims=\{(\d)\}", text)
        assert len(products) == 6
        return "2" in products

    assert not sums_over_rows(training=True)
    assert sums_over_rows(training=False)  # Which shows that the pattern finds them.
