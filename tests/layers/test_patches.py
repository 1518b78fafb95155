import keras
import numpy as np
import pytest
from harness import as_numpy, random
from keras import ops

from keras_transformer.layers import PatchEmbedding, PrefixTokens


@pytest.mark.parametrize(("patch_size", "height", "width"), [(2, 2, 2), ((3, 2), 3, 2), (4, 4, 4)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_patches_are_projected_row_by_row(patch_size, height, width, use_bias):
    images = random(2, 12, 8, 3)
    layer = PatchEmbedding(patch_size, 5, use_bias=use_bias, name="patches")
    layer.build(images.shape)
    assert [weight.path for weight in layer.weights][0] == "patches/projection/kernel"
    layer.set_weights([random(*w.shape, seed=i) for i, w in enumerate(layer.weights)])
    kernel = as_numpy(layer.projection.kernel).reshape(-1, 5)
    bias = as_numpy(layer.projection.bias) if use_bias else 0
    expected = [
        images[:, top : top + height, left : left + width].reshape(2, -1) @ kernel + bias
        for top in range(0, 12, height)
        for left in range(0, 8, width)
    ]
    np.testing.assert_allclose(as_numpy(layer(images)), np.stack(expected, axis=1), atol=1e-4)


def test_the_data_format_of_keras_changes_nothing():
    layer = PatchEmbedding(2, 5)
    expected = as_numpy(layer(random(2, 4, 6, 3)))
    default = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        other = PatchEmbedding(2, 5)
        other.build((2, 4, 6, 3))
        other.set_weights(layer.get_weights())
        np.testing.assert_allclose(as_numpy(other(random(2, 4, 6, 3))), expected, atol=1e-6)
    finally:
        keras.config.set_image_data_format(default)


@pytest.mark.parametrize("size", [(5, 4), (4, 5)])
@pytest.mark.parametrize("symbolic", [False, True])
def test_images_that_patches_do_not_fill(size, symbolic):
    layer = PatchEmbedding(2, 5)
    layer(random(1, 4, 4, 3))
    images = keras.Input((*size, 3)) if symbolic else random(1, *size, 3)
    with pytest.raises(ValueError, match=rf"must divide .* {size[0]} x {size[1]} for patch_size=\(2, 2\)"):
        layer(images)
    with pytest.raises(ValueError, match="(must divide|must have shape)"):
        PatchEmbedding(2, 5)(random(4, 5, 3))


@pytest.mark.parametrize("count", [1, 3])
def test_tokens_come_first_and_are_the_same_for_all_rows(count):
    x = random(2, 5, 8)
    layer = PrefixTokens(count, name="prefix")
    output = as_numpy(layer(x))
    assert [(weight.path, tuple(weight.shape)) for weight in layer.weights] == [("prefix/tokens", (count, 8))]
    np.testing.assert_allclose(output[:, :count], np.stack([as_numpy(layer.tokens)] * 2), atol=1e-7)
    np.testing.assert_array_equal(output[:, count:], x)


def test_the_tokens_are_real():
    ids = keras.Input((None,), dtype="int32")
    model = keras.Model(ids, PrefixTokens(2)(keras.layers.Embedding(5, 4, mask_zero=True)(ids)))
    output = model(ops.convert_to_tensor(np.array([[1, 2, 0], [0, 3, 4]], "int32")))
    mask = as_numpy(keras.src.backend.get_keras_mask(output))
    assert mask.tolist() == [[True, True, True, True, False], [True, True, False, True, True]]
