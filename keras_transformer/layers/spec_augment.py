"""Spectra that are partly hidden in training."""

import keras
from keras import ops

from keras_transformer.layers.checks import check_rate


@keras.saving.register_keras_serializable(package="keras_transformer")
class SpecAugment(keras.layers.Layer):
    """Hides runs of frames and bands of features from what follows, in training alone.

    Each sequence has masks of its own. What is hidden becomes zero; the mask that `x` carries stays as it is, and runs
    of frames lie within what it leaves.

    Args:
        time_masks: int. How many runs of frames to hide.
        time_share: float between 0 and 1. The longest run, as a share of the real frames.
        feature_masks: int. How many bands to hide.
        feature_share: float between 0 and 1. The widest band, as a share of the features.
        seed: int, or `keras.random.SeedGenerator`.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of shape `[B, T, features]`.
        mask: boolean tensor of shape `[B, T]`, True for real frames. By default the mask that `x` carries.
        training: boolean. Whether anything is hidden.

    Returns:
        Tensor of the shape of `x`.

    Raises:
        ValueError: if a number is negative, or a share is not one.

    Reference: [SpecAugment](https://arxiv.org/abs/1904.08779), section 2, without the warping of time.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> layer = kt.layers.SpecAugment(time_masks=1, time_share=0.5, feature_masks=0, seed=1)
    >>> x = np.ones((1, 8, 1), "float32")
    >>> hidden = int(np.sum(keras.ops.convert_to_numpy(layer(x, training=True)) == 0))
    >>> 0 <= hidden <= 4  # A half of the 8 frames, at most.
    True
    >>> bool(np.all(keras.ops.convert_to_numpy(layer(x)) == x))
    True
    """

    def __init__(self, time_masks=2, time_share=0.1, feature_masks=2, feature_share=0.3, seed=None, **kwargs):
        super().__init__(**kwargs)
        if min(time_masks, feature_masks) < 0:
            raise ValueError(
                "`time_masks` and `feature_masks` must be numbers of masks, 0 or more; received time_masks="
                f"{time_masks}, feature_masks={feature_masks}."
            )
        self.time_masks = time_masks
        self.time_share = check_rate(time_share, "time_share")
        self.feature_masks = feature_masks
        self.feature_share = check_rate(feature_share, "feature_share")
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True

    def build(self, input_shape):
        pass

    def call(self, x, mask=None, training=False):
        if not training:
            return x
        batch, length, features = ops.shape(x)
        frames = ops.full((batch,), length) if mask is None else ops.sum(ops.cast(mask, "int32"), axis=-1)
        hidden = self._runs(batch, length, ops.cast(frames, "float32"), self.time_masks, self.time_share)
        x = ops.where(ops.expand_dims(hidden, -1), 0, x)
        bands = ops.full((batch,), float(features))
        hidden = self._runs(batch, features, bands, self.feature_masks, self.feature_share)
        return ops.where(ops.expand_dims(hidden, 1), 0, x)

    def _runs(self, batch, size, real, count, share):
        """Which of `size` places lie in one of `count` runs of random width and place, boolean `[B, size]`."""
        draws = keras.random.uniform((2, batch, count), seed=self.seed_generator)
        real = ops.expand_dims(real, -1)
        width = ops.floor(draws[0] * (share * real + 1))  # [B, count]: 0 to `share * real`, all alike.
        begin = ops.expand_dims(ops.floor(draws[1] * (real - width + 1)), -1)
        places = ops.cast(ops.arange(size), "float32")
        return ops.any((places >= begin) & (places < begin + ops.expand_dims(width, -1)), axis=1)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "time_masks": self.time_masks,
            "time_share": self.time_share,
            "feature_masks": self.feature_masks,
            "feature_share": self.feature_share,
            "seed": self.seed,
        }
