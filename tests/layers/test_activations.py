import keras
import numpy as np
import pytest
from harness import as_numpy, dtype_of, random
from keras import ops

from keras_transformer.layers import ClampedSwiGLU, FeedForward, gelu_tanh, quick_gelu, relu_squared

X = np.linspace(-6, 6, 101)
FORMULAS = {
    gelu_tanh: 0.5 * X * (1 + np.tanh(np.sqrt(2 / np.pi) * (X + 0.044715 * X**3))),
    quick_gelu: X / (1 + np.exp(-1.702 * X)),
    relu_squared: np.where(X > 0, X, 0) ** 2,
}


@pytest.mark.parametrize("activation", FORMULAS)
def test_formula(activation):
    output = activation(ops.convert_to_tensor(X.astype("float32")))
    np.testing.assert_allclose(as_numpy(output), FORMULAS[activation], atol=2e-6)


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_stays(activation, dtype):
    output = activation(ops.cast(X, dtype))
    assert dtype_of(output) == dtype
    np.testing.assert_allclose(as_numpy(output), FORMULAS[activation], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("activation", FORMULAS)
def test_a_loaded_model_has_the_same_activation(activation, tmp_path):
    model = keras.Sequential([keras.Input((8,)), FeedForward(16, activation)])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].activation is activation
    np.testing.assert_array_equal(as_numpy(loaded(random(3, 8))), as_numpy(model(random(3, 8))))


def test_the_clamped_gate():
    """Both projections are cut off, and the gate below is not."""
    gate, up = np.meshgrid(np.linspace(-6, 6, 13), np.linspace(-6, 6, 13))
    output = ClampedSwiGLU(1.5, 2.0)(*(ops.convert_to_tensor(x.astype("float32")) for x in (gate, up)))
    cut = np.minimum(gate, 2)
    expected = (np.clip(up, -2, 2) + 1) * cut / (1 + np.exp(-1.5 * cut))
    np.testing.assert_allclose(as_numpy(output), expected, atol=1e-6)


@pytest.mark.parametrize("activation", [ClampedSwiGLU(1.5, 2.0), "silu"])
def test_a_loaded_model_has_the_same_gate(activation, tmp_path):
    model = keras.Sequential([keras.Input((8,)), FeedForward(16, activation, gated=True)])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = random(3, 8, scale=5.0)
    np.testing.assert_array_equal(as_numpy(loaded(x)), as_numpy(model(x)))
