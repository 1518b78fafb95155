"""Batches of images and their classes to train a classifier with, changed anew in each epoch."""

import keras
import numpy as np
import tensorflow as tf

from keras_transformer.layers.rand_augment import rand_augment as rand_augment_layer
from keras_transformer.pipelines.batching import epoch_rows, prefetched


def image_batches(
    images,
    labels,
    num_classes,
    preprocessor,
    batch_size=128,
    shuffle=True,
    crop=0,
    flip=False,
    rand_augment=0.0,
    mix_up=0.0,
    cut_mix=0.0,
    seed=0,
    first_epoch=0,
):
    """Batches of images as a model reads them, with one-hot classes.

    All changes are by Keras' own layers, and run while the model learns from the batches before.

    Args:
        images: array uint8 `[N, height, width, channels]`.
        labels: integers `[N]`, the classes.
        num_classes: int. Number of classes.
        preprocessor: `ImagePreprocessor`, whose `scale`, `mean` and `std` are applied.
        batch_size: int. How many images are in a batch. Of shuffled ones, a last batch with fewer is left out.
        shuffle: boolean. Whether the order is another one in each epoch.
        crop: int. By up to how many pixels each image is moved, with black beyond its borders.
        flip: boolean. Whether half of the images are mirrored, left to right.
        rand_augment: float between 0 and 1, how strongly RandAugment changes shapes and colors; 0 for not at all. The
            images of a batch are changed in the same two ways, by different strengths.
        mix_up: float, the alpha of MixUp, or 0.
        cut_mix: float, the factor of CutMix, or 0. With both, every other batch is changed by either.
        seed: int. The same seed gives the same epochs: the same order, and the same changes.
        first_epoch: int. The number of the epoch that the first pass gives, for a training that is resumed.

    Returns:
        `tf.data.Dataset` of pairs of float32 `[B, height, width, channels]` and `[B, num_classes]`.

    Raises:
        ValueError: if a label is no class, or the numbers of images and labels differ.

    References: [RandAugment](https://arxiv.org/abs/1909.13719); [MixUp](https://arxiv.org/abs/1710.09412);
    [CutMix](https://arxiv.org/abs/1905.04899).

    Example:

    >>> import numpy as np
    >>> images, prepare = np.zeros((8, 6, 6, 3), "uint8"), kt.pipelines.ImagePreprocessor(mean=0.5, std=0.5)
    >>> batches = image_batches(images, [0, 1] * 4, 2, prepare, batch_size=4, crop=1, flip=True)
    >>> [(tuple(x.shape), tuple(y.shape)) for x, y in batches]
    [((4, 6, 6, 3), (4, 2)), ((4, 6, 6, 3), (4, 2))]
    """
    labels = np.asarray(labels)
    if len(images) != len(labels):
        raise ValueError(f"`labels` must have one for each image; received {len(labels)} for {len(images)} images.")
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise ValueError(f"`labels` must be from 0 to num_classes - 1 = {num_classes - 1}; received {wrong[0]}.")

    height, width = images.shape[1:3]
    changes = [keras.layers.RandomFlip("horizontal")] if flip else []
    if rand_augment:
        changes.append(rand_augment_layer(rand_augment))
    mixes = [keras.layers.MixUp(mix_up)] if mix_up else []
    if cut_mix:
        mixes.append(keras.layers.CutMix(cut_mix))
    cropped = keras.layers.RandomCrop(height, width)
    drawn = [_drawn_from_elements([cropped]), _drawn_from_elements([*changes, *mixes])]

    def crop_one(place, element_seed):
        drawn[0].begin(element_seed)
        return cropped(padded[place]), targets[place], element_seed

    def change(number, batch):
        images, targets, seeds = batch
        drawn[1].begin(seeds[0] ^ 1)  # Not what the first image was cropped by.
        for layer in changes:
            images = layer(images)
        if mixes:
            pairs = {"images": tf.cast(images, "float32"), "labels": targets}
            mixed = [layer(dict(pairs)) for layer in mixes]
            is_first = number % len(mixes) == 0
            images, targets = (tf.where(is_first, mixed[0][name], mixed[-1][name]) for name in ("images", "labels"))
        images = tf.cast(images, "float32") * preprocessor.scale
        return (images - np.float32(preprocessor.mean)) / np.float32(preprocessor.std), targets

    targets = tf.constant(np.eye(num_classes, dtype="float32")[labels])
    padded = tf.constant(np.pad(images, ((0, 0), (crop, crop), (crop, crop), (0, 0))))
    batches = epoch_rows(len(images), shuffle, seed, first_epoch)
    # One by one: the layer would cut all images of a batch at the same place.
    one = crop_one if crop else lambda place, element_seed: (padded[place], targets[place], element_seed)
    batches = batches.map(one, num_parallel_calls=tf.data.AUTOTUNE)
    batches = batches.batch(batch_size, drop_remainder=shuffle and len(images) >= batch_size)
    return prefetched(batches.enumerate().map(change, num_parallel_calls=tf.data.AUTOTUNE), ahead=2)


class _ElementSeeds(keras.random.SeedGenerator):
    """Draws by the seed of an element alone, however many are made at a time and whatever was made before."""

    def __init__(self):
        self.begin(None)

    def begin(self, seed):
        """To be called where a function of an element begins, with the element's seed: int32 `[2]`."""
        self.seed, self.count = seed, 0

    def next(self, ordered=True):
        self.count += 1
        return tf.random.experimental.stateless_fold_in(self.seed, self.count)


def _drawn_from_elements(layers):
    seeds = _ElementSeeds()
    for layer in layers:
        for part in layer._flatten_layers():
            part._get_seed_generator = lambda backend=None: seeds
    return seeds
