"""Activations that keep their slope alone for the gradient, against the same functions as Keras writes them."""

import keras
import numpy as np
import pytest
from harness import as_numpy, compiled, gradients
from keras import ops

from keras_transformer.layers import FeedForward
from keras_transformer.layers.activations import SMOOTH
from keras_transformer.ops.slopes import activate_smoothly

X = np.concatenate([np.linspace(-9, 9, 181), [-30.0, 30.0, 0.0]]).astype("float32")
ON_JAX = keras.backend.backend() == "jax"


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("activation", SMOOTH, ids=lambda function: function.__name__)
def test_values_and_gradients_are_those_of_the_function(activation, jit):
    def smooth(x):
        return activate_smoothly(activation, x)

    x = keras.Variable(X)
    found = (compiled(smooth) if jit else smooth)(ops.convert_to_tensor(X))
    np.testing.assert_allclose(as_numpy(found), as_numpy(activation(ops.convert_to_tensor(X))), atol=1e-6)
    weights = ops.cos(ops.convert_to_tensor(X))
    ours, plain = (gradients(lambda f=f: ops.sum(f(x + 0) * weights), [x])[0] for f in (smooth, activation))
    np.testing.assert_allclose(ours, plain, atol=3e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("activation", SMOOTH, ids=lambda function: function.__name__)
def test_half_precision_is_rounded_once_or_as_the_function_does(activation, dtype):
    half = ops.cast(X, dtype)
    exact = as_numpy(activation(ops.cast(half, "float32")))
    found = activate_smoothly(activation, half)
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    if ON_JAX:
        expected = as_numpy(ops.cast(ops.cast(exact, dtype), "float32"))
        np.testing.assert_allclose(as_numpy(ops.cast(found, "float32")), expected, rtol=2e-3, atol=1e-6)
    else:
        np.testing.assert_array_equal(as_numpy(found), as_numpy(activation(half)))


@pytest.mark.parametrize("gated", [False, True])
def test_a_feed_forward_layer_takes_it(gated, monkeypatch):
    taken = []
    monkeypatch.setattr(
        "keras_transformer.layers.activations.activate_smoothly",
        lambda activation, x: taken.append(activation) or activation(x),
    )
    for activation in ("gelu", "relu"):
        FeedForward(8, activation, gated=gated)(np.ones((1, 2, 4), "float32"))
    assert set(taken) == {keras.activations.gelu}


if ON_JAX:  # Other backends take the function as it is.
    import jax

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("activation", SMOOTH, ids=lambda function: function.__name__)
    def test_one_tensor_is_kept_for_the_gradient(activation, dtype):
        x = ops.cast(X, dtype)
        kept = [jax.tree.leaves(jax.vjp(f, x)[1]) for f in (lambda x: activate_smoothly(activation, x), activation)]
        sizes = [sum(leaf.nbytes for leaf in leaves if leaf.shape == X.shape) for leaves in kept]
        assert sizes[0] == x.nbytes < sizes[1]

    @pytest.mark.parametrize("activation", SMOOTH, ids=lambda function: function.__name__)
    def test_forward_mode_and_second_derivatives(activation):
        def derived(function):
            slope = jax.grad(lambda x: function(x).sum())
            curvature = jax.grad(lambda x: slope(x).sum())(X)
            return jax.jvp(function, (X,), (np.cos(X),))[1], curvature, jax.jvp(slope, (X,), (np.ones_like(X),))[1]

        for ours, plain in zip(derived(lambda x: activate_smoothly(activation, x)), derived(activation), strict=True):
            np.testing.assert_allclose(ours, plain, atol=1e-5)
