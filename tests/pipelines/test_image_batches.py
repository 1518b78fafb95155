"""Batches of images: what each change does to them, and what it leaves as it is."""

import numpy as np
import pytest

from keras_transformer.layers.rand_augment import rand_augment
from keras_transformer.pipelines import ImagePreprocessor, image_batches

PREPARE = ImagePreprocessor(scale=1.0)
LABELS = np.arange(12) % 3


def dots(count=12):
    """Black images, each with a point of its own brightness left of the middle."""
    images = np.zeros((count, 8, 8, 1), "uint8")
    images[:, 3, 2, 0] = 100 + np.arange(count)
    return images


def batches_of(images, **options):
    batches = image_batches(images, LABELS, 3, PREPARE, **{"batch_size": 4, **options})
    return [(x.numpy(), y.numpy()) for x, y in batches]


def places(images):
    return [tuple(np.argwhere(image[..., 0])[0]) for image in images]


def test_without_changes():
    (images, targets), *rest = batches_of(dots(), shuffle=False, batch_size=5)
    assert [len(x) for x, _ in rest] == [5, 2]
    np.testing.assert_array_equal(images, dots()[:5])
    np.testing.assert_array_equal(targets, np.eye(3)[LABELS[:5]])
    normal = ImagePreprocessor(mean=(0.5,), std=(0.25,))
    ((images, _),) = image_batches(np.full((1, 2, 2, 1), 255, "uint8"), [0], 2, normal, shuffle=False)
    np.testing.assert_allclose(images, np.full((1, 2, 2, 1), 2.0), rtol=1e-6)


def test_order_is_another_in_each_epoch_and_labels_stay():
    batches = image_batches(dots(), LABELS, 3, PREPARE, batch_size=4)
    epochs = [[(x.numpy().max((1, 2, 3)), y.numpy().argmax(1)) for x, y in batches] for _ in range(2)]
    shades = [np.concatenate([x for x, _ in epoch]) for epoch in epochs]
    assert shades[0].tolist() != shades[1].tolist() and sorted(shades[0]) == sorted(shades[1])
    for epoch, shade in zip(epochs, shades, strict=True):
        np.testing.assert_array_equal(np.concatenate([y for _, y in epoch]), (shade - 100) % 3)


def test_each_image_is_moved_by_itself():
    found = [place for x, _ in batches_of(dots(), crop=1, seed=1) for place in places(x)]
    assert set(found) <= {(y, x) for y in (2, 3, 4) for x in (1, 2, 3)} and len(set(found)) > 3


def test_some_are_mirrored():
    found = [place for x, _ in batches_of(dots(), flip=True) for place in places(x)]
    assert set(found) == {(3, 2), (3, 5)}


@pytest.mark.parametrize("options", [{"mix_up": 0.8}, {"cut_mix": 1.0}, {"mix_up": 0.8, "cut_mix": 1.0}], ids=str)
def test_mixed_images_have_mixed_targets(options):
    """Each class is one shade all over: the shade of a mixture says which targets it must have."""
    shades, labels = np.array([0, 90, 180]), np.arange(48) % 3
    images = np.broadcast_to(shades[labels][:, None, None, None], (48, 32, 32, 1)).astype("uint8")
    batches = [(x.numpy(), y.numpy()) for x, y in image_batches(images, labels, 3, PREPARE, batch_size=8, **options)]
    for x, y in batches:
        np.testing.assert_allclose(y.sum(1), 1, atol=1e-5)
        # What is cut out ends between two pixels, of one row and of one column.
        shade = 180 * 63 / 1024 if "cut_mix" in options else 0.1
        np.testing.assert_allclose(x.mean((1, 2, 3)), y @ shades, atol=shade)
    assert max(np.abs(y - y.round()).max() for _, y in batches) > 0.05
    is_even = [all(len(np.unique(image)) == 1 for image in x) for x, _ in batches]
    cut = is_even[1 if "mix_up" in options else 0 :: len(options)] if "cut_mix" in options else []
    assert not cut or not all(cut)  # A piece that is cut out may be empty.
    if "mix_up" in options:
        assert all(is_even[:: len(options)])


def test_rand_augment_changes_images_alone():
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3)).astype("uint8")
    batches = batches_of(images, shuffle=False, rand_augment=0.5)
    found = np.concatenate([x for x, _ in batches])
    assert found.min() >= 0 and found.max() <= 255 and np.abs(found - images).max() > 20
    np.testing.assert_array_equal(np.concatenate([y for _, y in batches]).argmax(1), LABELS)


def test_rand_augment_is_the_weaker_the_smaller_its_number():
    ramp = np.broadcast_to(np.linspace(0, 255, 32)[None, None, :, None], (4, 32, 32, 3)).round().astype("float32")
    found = {}
    for strength in (0.02, 0.5):
        change = rand_augment(strength, seed=1)
        found[strength] = [np.abs(np.asarray(change(ramp, training=True)) - ramp).mean() for _ in range(24)]
    assert np.max(found[0.02]) < 12  # Of 255: what nearly inverts, turns over or leaves two shades is 60 and more.
    assert np.median(found[0.5]) > 2 * np.median(found[0.02])
    with pytest.raises(ValueError, match="`strength` must lie between 0 and 1; received 30"):
        rand_augment(30)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 3], "`labels` must be from 0 to num_classes - 1 = 2; received 3"), ([0], "received 1 for 2 images")],
)
def test_bad_input(labels, message):
    with pytest.raises(ValueError, match=message):
        image_batches(dots(2), labels, 3, PREPARE)
