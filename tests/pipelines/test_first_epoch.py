"""Batches that are an epoch's own: those of a process that begins at an epoch are those of one that comes to it."""

import keras
import numpy as np
import pytest

from keras_transformer.pipelines import (
    ImagePreprocessor,
    epoch_rows,
    image_batches,
    packed_batches,
    prefetched,
    speech_batches,
    text_batches,
    token_batches,
    token_windows,
)

ROWS = [list(range(3, 3 + n)) for n in (3, 9, 4, 4, 7, 8, 2, 5, 5, 12, 3, 6)]
IMAGES = np.random.default_rng(0).integers(0, 255, (12, 8, 8, 3), "uint8")
FRAMES = [np.full((40 + 8 * n, 4), n, "float32") for n in range(12)]
CHANGES = {"crop": 2, "flip": True, "rand_augment": 0.3, "mix_up": 0.8, "cut_mix": 1.0}
MOST_CHANGES = {name: value for name, value in CHANGES.items() if name != "mix_up"}  # Which draws as CutMix does.
PREPARE = ImagePreprocessor(mean=0.5, std=0.5)
BATCHES = {
    "rows": lambda **options: epoch_rows(12, **options),
    "pairs": lambda **options: token_batches(ROWS, ROWS[::-1], 40, **options),
    "texts": lambda **options: text_batches(ROWS, list(range(12)), 2, buckets=3, **options),
    "tagged texts": lambda **options: text_batches({"token_ids": ROWS}, ROWS, 2, buckets=3, **options),
    "sounds": lambda **options: speech_batches(FRAMES, ROWS, 300, **options),
    "images": lambda **options: image_batches(IMAGES, np.arange(12) % 3, 3, PREPARE, 4, **MOST_CHANGES, **options),
}


def epoch(batches):
    return [[np.asarray(x) for x in keras.tree.flatten(batch)] for batch in batches.as_numpy_iterator()]


def equal(some, others):
    pairs = [pair for batch in zip(some, others, strict=True) for pair in zip(*batch, strict=True)]
    return all(np.array_equal(*pair) for pair in pairs)


@pytest.mark.parametrize("name", BATCHES)
def test_an_epoch_is_the_same_in_every_process(name):
    batches = BATCHES[name]()
    first, second = epoch(batches), epoch(batches)
    assert not equal(first, second)
    assert equal(epoch(BATCHES[name](first_epoch=1)), second)
    assert not equal(epoch(BATCHES[name](seed=1)), first)


@pytest.mark.parametrize("name", [*BATCHES, "windows", "packed"])
def test_no_epoch_waits_for_a_search_for_settings(name):
    """Not in what is made of the batches either, and however they are handed on."""
    more = {
        "windows": lambda: token_windows(np.arange(99), 8, 4),
        "packed": lambda: packed_batches(ROWS, ROWS, length=16, batch_size=2),
    }
    batches = {**BATCHES, **more}[name]()
    assert batches.options().autotune.enabled is False
    assert batches.map(lambda *row: row).prefetch(1).options().autotune.enabled is False


def test_batches_of_ones_own_are_made_ahead_as_well():
    import tensorflow as tf

    made = []
    numbers = tf.data.Dataset.from_generator(
        lambda: (made.append(n) or n for n in range(20)), output_signature=tf.TensorSpec((), "int64")
    )
    batches = prefetched(numbers.apply(tf.data.experimental.assert_cardinality(20)), ahead=3)
    assert batches.cardinality() == 20 and prefetched(numbers, count=20).cardinality() == 20
    assert [int(n) for n in batches] == made == list(range(20))


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_images_are_drawn_anew_for_each(change):
    is_mix = change in ("mix_up", "cut_mix")
    images = np.concatenate([IMAGES[:6], IMAGES[:6]]) if is_mix else np.broadcast_to(IMAGES[:1], IMAGES.shape)
    options = {change: CHANGES[change], "shuffle": False, "batch_size": 6}
    first, second = epoch(image_batches(images, np.arange(12) % 3, 3, PREPARE, **options))
    if is_mix:  # A batch draws once, and what is mixed with its like stays as it is.
        assert not np.array_equal(first[0], second[0])
        return
    seen = {x.tobytes() for batch in (first, second) for x in batch[0]}
    assert len(seen) > (1 if change == "flip" else 6), "of a mirrored image there are two"


def test_windows_go_on_at_a_batch():
    ids = np.arange(5, 105)
    take = lambda **options: epoch(token_windows(ids, 12, 3, middle_rate=0.5, **options).take(5))  # noqa: E731
    assert equal(take()[2:], take(first_batch=2)[:3])
    assert not equal(take(), take(seed=1))
