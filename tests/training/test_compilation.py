"""A compiled training step does what Keras' own does, compiles once, and refuses what it would not do alike."""

import functools

import keras
import numpy as np
import pytest

import keras_transformer as kt

TORCH = keras.backend.backend() == "torch"


def padded(rows=6, length=7):
    tokens = np.random.default_rng(0).integers(1, 20, (rows, length + 1)).astype("int32")
    tokens[0, 5:] = 0
    return tokens[:, :-1], tokens[:, 1:]


def trained(prepare, optimizer, policy):
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(1)
    model = kt.models.causal_lm(20, dim=8, depth=1, num_heads=2, dropout=0.0)
    model.compile(optimizer(), kt.training.SmoothedCrossEntropy(0.0), metrics=[kt.training.Perplexity()])
    prepare(model)
    history = model.fit(*padded(), batch_size=4, epochs=3, shuffle=False, verbose=0).history
    return history, model.get_weights()


@pytest.fixture
def compilations(monkeypatch):
    """Graphs that torch is given to compile: run as they stand here, as making code of them takes long."""
    graphs = []
    if TORCH:
        import torch

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


@pytest.mark.parametrize(
    "policy, optimizer, with_optimizer, graphs",  # Batches of 4 and of 2 rows, and the update of the weights.
    [
        ("float32", lambda: keras.optimizers.AdamW(kt.training.InverseSquareRoot(8, warmup_steps=2)), True, 3),
        ("mixed_bfloat16", lambda: keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=1.0), False, 2),
        ("mixed_float16", lambda: keras.optimizers.Adam(0.01), True, 2),  # Asks whether gradients are finite.
    ],
)
def test_compiled_steps_are_those_of_keras(policy, optimizer, with_optimizer, graphs, compilations):
    def compile_step(model):
        assert kt.training.compile_step(model, with_optimizer) is model
        assert (model.train_function is not None) is TORCH

    expected, weights = trained(lambda model: None, optimizer, policy)
    found, others = trained(compile_step, optimizer, policy)
    assert expected.keys() == found.keys() == {"loss", "perplexity"}
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4)
    for value, other in zip(weights, others, strict=True):
        np.testing.assert_allclose(other, value, atol=1e-4)
    assert len(compilations) == (graphs if TORCH else 0)  # Each once in three epochs.


def test_state_that_is_no_weight_is_kept(compilations):
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    kt.training.compile_step(model)
    x = np.random.default_rng(0).normal(2.0, 1.0, (8, 3)).astype("float32")
    model.fit(x, x[:, :1], batch_size=8, epochs=2, verbose=0)
    mean = (1 - 0.99**2) * x.mean(axis=0)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model.layers[0].moving_mean), mean, rtol=1e-4)


def test_what_is_no_training_step_of_keras_is_refused():
    class Own(keras.Model):
        def train_step(self, data):
            return {}

    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    with pytest.raises(ValueError, match="compiled"):
        kt.training.compile_step(model)
    own = Own(inputs, keras.layers.Dense(1)(inputs))
    own.compile("sgd", "mse")
    with pytest.raises(ValueError, match="Own has its own"):
        kt.training.compile_step(own)


@pytest.mark.skipif(not TORCH, reason="other backends have random numbers of their own")
def test_layers_that_look_at_values_are_refused():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3), keras.layers.Dropout(0.5, seed=1)])
    model.compile("sgd", "mse")
    kt.training.compile_step(model)
    with pytest.raises(ValueError, match="seed"):
        model.fit(np.ones((4, 3)), np.ones((4, 3)), verbose=0)
