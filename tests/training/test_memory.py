"""Half precision and gradient accumulation: Keras' own, on models of this library."""

import keras
import numpy as np
import pytest

import keras_transformer as kt


def counting(rows=16, length=9):
    """Texts that count up from anywhere, each as inputs and labels."""
    begin = np.random.default_rng(0).integers(0, 10, (rows, 1))
    counted = ((begin + np.arange(length + 1)) % 10 + 1).astype("int32")
    return counted[:, :-1], counted[:, 1:]


def model_of(policy="float32", dropout=0.1):
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(1)
    return kt.models.causal_lm(11, dim=32, depth=1, num_heads=2, dropout=dropout)


def test_half_precision_learns_as_float32_does():
    inputs, labels = counting()
    last = {}
    for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
        model = model_of(policy, dropout=0.0)
        # A loss that falls fast makes much of a lag by rounding, which depends on the processor.
        model.compile(keras.optimizers.Adam(3e-3), kt.training.SmoothedCrossEntropy(0.0))
        scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert scaled is (policy == "mixed_float16")
        losses = model.fit(inputs, labels, batch_size=16, epochs=12, verbose=0).history["loss"]
        assert np.isfinite(losses).all()
        assert all(keras.backend.standardize_dtype(weight.dtype) == "float32" for weight in model.trainable_weights)
        last[policy] = losses[-1]
        assert last[policy] < 0.8 * losses[0]
    assert max(last.values()) == pytest.approx(min(last.values()), rel=0.005)


def test_accumulated_gradients_are_those_of_the_large_batch():
    inputs, labels = counting()
    learned = []
    for steps in (None, 4):
        model = model_of(dropout=0.0)
        # Adam would make as much of rounding errors as of the gradients of weights that have none.
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=steps)
        model.compile(optimizer, kt.training.SmoothedCrossEntropy(0.0))
        before = model.get_weights()
        model.fit(inputs, labels, batch_size=16 // (steps or 1), epochs=3, shuffle=False, verbose=0)
        learned.append(model.get_weights())
        assert int(optimizer.iterations) == 3
    for one, other in zip(*learned, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert max(np.abs(one - start).max() for one, start in zip(learned[1], before, strict=True)) > 0.02
