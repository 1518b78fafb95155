import numpy as np
from harness import as_numpy, random

from keras_transformer.layers import Bias


def test_one_vector_is_added_to_the_last_axis():
    x = random(2, 5, 8)
    layer = Bias(name="output_bias")
    np.testing.assert_array_equal(as_numpy(layer(x)), x)
    assert [(weight.path, tuple(weight.shape)) for weight in layer.weights] == [("output_bias/bias", (8,))]
    layer.bias.assign(random(8, seed=1))
    np.testing.assert_allclose(as_numpy(layer(x)), x + random(8, seed=1), atol=1e-6)


def test_a_frozen_bias_is_not_trained():
    layer = Bias(initializer="ones", trainable=False)
    layer.build((2, 3))
    assert layer.trainable_weights == [] and len(layer.non_trainable_weights) == 1
