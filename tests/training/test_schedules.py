"""The schedule against the paper's formula, and against the optimizer that calls it."""

import keras
import numpy as np
import pytest

from keras_transformer.training import InverseSquareRoot


def paper(step, dim, warmup_steps, scale=1.0):
    return scale * dim**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)


def pinned(step, warmup_steps, peak, initial=0.0):
    if step <= warmup_steps:
        return initial + (peak - initial) * step / warmup_steps
    return peak * (warmup_steps / step) ** 0.5


@pytest.mark.parametrize("step", [1, 2, 10, 3999, 4000, 4001, 100_000, 3_000_000])
@pytest.mark.parametrize(
    "arguments, expected",
    [
        (dict(dim=512, warmup_steps=4000), lambda step: paper(step, 512, 4000)),
        (dict(dim=128, warmup_steps=1, scale=2.0), lambda step: paper(step, 128, 1, 2.0)),
        (dict(dim=1024, warmup_steps=16000, scale=0.5), lambda step: paper(step, 1024, 16000, 0.5)),
        (dict(dim=128, warmup_steps=2000, peak=5e-3, initial=1e-7), lambda step: pinned(step, 2000, 5e-3, 1e-7)),
        (dict(dim=None, warmup_steps=4000, peak=1e-3), lambda step: pinned(step, 4000, 1e-3)),
    ],
)
def test_equals_the_formula(arguments, expected, step):
    # The paper counts from 1, Keras hands in 0 at the first update.
    rate = float(InverseSquareRoot(**arguments)(step - 1))
    np.testing.assert_allclose(rate, expected(step), rtol=1e-6)


def test_numbers_of_the_base_model():
    schedule = InverseSquareRoot(512, 4000)
    np.testing.assert_allclose(float(schedule(0)), 1.7469281e-07, rtol=1e-6)
    np.testing.assert_allclose(float(schedule(3999)), 6.9877124e-04, rtol=1e-6)


def test_peak_is_where_warmup_ends():
    schedule = InverseSquareRoot(128, 20, peak=5e-3, initial=1e-7)
    rates = [float(schedule(step)) for step in range(100)]
    assert np.argmax(rates) == 19
    np.testing.assert_allclose(rates[19], 5e-3, rtol=1e-6)


def test_optimizer_follows_it():
    # With a gradient of 1, plain gradient descent moves the weight by exactly the rate of that update.
    schedule = InverseSquareRoot(16, 3)
    optimizer = keras.optimizers.SGD(schedule)
    weight = keras.Variable(np.zeros((1,), "float32"))
    before = 0.0
    for step in range(1, 8):
        optimizer.apply([keras.ops.ones((1,))], [weight])
        after = float(keras.ops.convert_to_numpy(weight)[0])
        np.testing.assert_allclose(before - after, paper(step, 16, 3), rtol=1e-5)
        before = after


@pytest.mark.parametrize(
    "arguments",
    [
        dict(dim=512, warmup_steps=4000),
        dict(dim=np.int64(64), warmup_steps=np.int32(10), scale=3),
        dict(dim=None, warmup_steps=2000, peak=5e-3, initial=1e-7),
    ],
)
def test_configuration_round_trip(arguments):
    schedule = InverseSquareRoot(**arguments)
    optimizer = keras.optimizers.Adam(schedule)
    config = keras.saving.serialize_keras_object(optimizer)
    restored = keras.saving.deserialize_keras_object(config)._learning_rate
    assert isinstance(restored, InverseSquareRoot)
    assert restored.get_config() == schedule.get_config()
    assert float(restored(5)) == float(schedule(5))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(dim=0, warmup_steps=10), "`dim` must be a positive integer.*dim=0"),
        (dict(dim=None, warmup_steps=10), "`dim` must be a positive integer.*dim=None"),
        (dict(dim=12.5, warmup_steps=10), "`dim` must be a positive integer.*12.5"),
        (dict(dim=8, warmup_steps=0), "`warmup_steps` must be a positive integer.*warmup_steps=0"),
        (dict(dim=8, warmup_steps=True), "`warmup_steps` must be a positive integer.*True"),
        (dict(dim=8, warmup_steps=10, scale=-1.0), "`scale` must be a positive.*-1.0"),
        (dict(dim=8, warmup_steps=10, peak=0.0), "`peak` must be a positive.*0.0"),
        (dict(dim=8, warmup_steps=10, peak=1e-3, initial=1e-2), "`initial` must lie between 0 and `peak`"),
        (dict(dim=8, warmup_steps=10, peak=1e-3, scale=2.0), "`scale` must stay 1.0"),
        (dict(dim=8, warmup_steps=10, initial=1e-7), "pass `peak` as well"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        InverseSquareRoot(**arguments)
