"""Keras' RandAugment, with changes as strong as they are asked for."""

import keras


def rand_augment(strength, seed=None):
    """RandAugment whose changes are the stronger the larger its one number is, and go either way, as in the paper.

    Keras hands its number on to each change as that counts for itself: images only ever become brighter, richer in
    contrast and blurred, move to one side, and turn by up to that share of a whole turn; posterization leaves the fewer
    bits and solarization inverts the more shades the smaller it is. In place of these come changes either way, turns of
    up to 30 degrees, 8 to 4 bits, and, as the lowest shade to invert from cannot be told to Keras, no change at all,
    which the paper has among its changes as well.

    Args:
        strength: float between 0 and 1.
        seed: int.

    Returns:
        `keras.layers.RandAugment` of images with values from 0 to 255.

    Raises:
        ValueError: if `strength` is not between 0 and 1.

    Reference: [RandAugment](https://arxiv.org/abs/1909.13719), section 3.

    Example:

    >>> import numpy as np
    >>> from keras_transformer.layers.rand_augment import rand_augment
    >>> tuple(rand_augment(0.3, seed=1)(np.zeros((2, 8, 8, 3), "float32"), training=True).shape)
    (2, 8, 8, 3)
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"`strength` must lie between 0 and 1; received {strength}.")
    layer, bits = keras.layers.RandAugment(factor=strength, seed=seed), 8 - round(4 * strength)
    layer.random_translation = keras.layers.RandomTranslation(strength, strength, seed=seed)
    layer.random_rotation = keras.layers.RandomRotation(strength * 30 / 360, seed=seed)
    layer.random_brightness = keras.layers.RandomBrightness(strength, seed=seed)
    layer.random_contrast = keras.layers.RandomContrast((strength, strength), seed=seed)
    # From blurred over 0.5, which changes nothing, to sharpened.
    layer.random_sharpness = keras.layers.RandomSharpness(((1 - strength) / 2, (1 + strength) / 2), seed=seed)
    layer.random_posterization = keras.layers.RandomPosterization((bits, bits), seed=seed)
    layer.solarization = keras.layers.RandomContrast(0.0, seed=seed)
    return layer
