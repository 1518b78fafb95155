"""Frames of sounds: subsampled without a trace of padding, and hidden in training."""

import numpy as np
import pytest
from harness import as_numpy, lengths, random
from keras import ops

from keras_transformer.layers import FrameSubsampling, SpecAugment
from keras_transformer.ops.masks import get_mask, set_mask


@pytest.mark.parametrize("length", range(1, 10))
def test_subsampling_gives_each_sequence_its_own_result(length):
    layer, size = FrameSubsampling(6), 12
    x = random(2, size, 5)
    alone = as_numpy(layer(x[1:, :length]))[0]
    mask = ops.convert_to_tensor(lengths(size, length, size=size))
    together = layer(set_mask(ops.convert_to_tensor(x), mask))
    frames = -(-length // 4)
    assert len(alone) == frames
    np.testing.assert_allclose(as_numpy(together)[1, :frames], alone, atol=1e-5)
    assert not as_numpy(together)[1, frames:].any()
    np.testing.assert_array_equal(as_numpy(get_mask(together)), lengths(3, frames, size=3))


def test_subsampling_is_a_convolution_at_every_second_frame():
    layer = FrameSubsampling(6, convolutions=1, activation="relu")
    x = random(1, 7, 5)
    layer.build(x.shape)
    kernel, bias = random(3, 5, 6, seed=1), random(6, seed=2)
    layer.set_weights([kernel, bias])
    around = np.pad(x[0], ((1, 1), (0, 0)))
    expected = [np.maximum(0, np.einsum("td,tde->e", around[i : i + 3], kernel) + bias) for i in range(0, 7, 2)]
    np.testing.assert_allclose(as_numpy(layer(x))[0], expected, atol=1e-5)


def test_what_is_hidden_is_a_run_of_real_frames_and_a_band():
    x = np.ones((200, 20, 10), "float32")
    mask = lengths(*[20, 8] * 100, size=20)
    tensor = set_mask(ops.convert_to_tensor(x), ops.convert_to_tensor(mask))
    layer = SpecAugment(time_masks=1, time_share=0.5, feature_masks=0, seed=0)
    hidden = as_numpy(layer(tensor, training=True))[..., 0] == 0
    for length in (20, 8):
        runs = hidden[mask.sum(axis=-1) == length]
        assert not runs[:, length:].any()
        assert set(runs.sum(axis=-1)) == set(range(length // 2 + 1))
        assert (np.abs(np.diff(np.pad(runs, ((0, 0), (1, 1))).astype(int))).sum(axis=-1) <= 2).all()
        assert runs[:, 0].any() and runs[:, length - 1].any()
    bands = as_numpy(SpecAugment(0, 0.0, 1, 0.4, seed=0)(x, training=True))[:, 0] == 0
    assert set(bands.sum(axis=-1)) == set(range(5))
    assert bands[:, 0].any() and bands[:, -1].any()
    again = as_numpy(layer(tensor, training=True))[..., 0] == 0
    assert (again != hidden).any()
    assert get_mask(layer(tensor, training=True)) is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FrameSubsampling(0), "must be positive; received dim=0, convolutions=2"),
        (lambda: FrameSubsampling(8, 0), "must be positive; received dim=8, convolutions=0"),
        (lambda: SpecAugment(time_masks=-1), "must be numbers of masks, 0 or more; received time_masks=-1"),
        (lambda: SpecAugment(feature_share=1.0), "`feature_share` must be a rate of at least 0 and less than 1"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
