"""A classifier of images: its stems and poolings, that it learns, and that it moves to images of other sizes."""

import keras
import numpy as np
import pytest
from harness import as_numpy
from keras import ops

import keras_transformer as kt

SIZES = {"dim": 16, "depth": 1, "num_heads": 2, "hidden_dim": 32}
VARIANTS = {
    "class token": {"patch_size": 4},
    "mean, registers": {"patch_size": (4, 8), "pooling": "mean", "num_registers": 3},
    "class token, registers": {"patch_size": 8, "num_registers": 2},
    "sequence": {"convolutions": 2, "pooling": "sequence", "drop_path": 0.1, "head_dim": 12},
    "one convolution": {"convolutions": 1, "pooling": "mean"},
}


def pictures(height, width, rows=2, channels=3):
    return np.random.default_rng(0).normal(size=(rows, height, width, channels)).astype("float32")


def logits_of(model, images):
    return as_numpy(model(ops.convert_to_tensor(images)))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_logits_files_and_sizes(options, tmp_path):
    model = kt.models.vision_transformer((16, 24, 3), 5, **SIZES, **options)
    images = pictures(16, 24)
    logits = logits_of(model, images)
    assert logits.shape == (2, 5) and np.abs(logits[0] - logits[1]).max() > 1e-4
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(logits_of(again, images), logits, atol=1e-6)
    same = kt.models.resize_positions(again, (16, 24))
    np.testing.assert_allclose(logits_of(same, images), logits, atol=1e-6)
    larger = kt.models.resize_positions(again, (32, 40))
    assert larger.count_params() - model.count_params() == SIZES["dim"] * (
        larger.get_layer("position").max_length - model.get_layer("position").max_length
    )
    assert logits_of(larger, pictures(32, 40)).shape == (2, 5)
    np.testing.assert_allclose(logits_of(model, images), logits, atol=1e-6)  # The old one is as it was.


@pytest.mark.parametrize(("old", "new"), [((2, 3), (5, 4)), ((4, 4), (7, 2)), ((3, 3), (3, 9)), ((6, 5), (3, 3))])
def test_positions_are_interpolated_as_torch_does_it(old, new):
    import torch

    pooling = "mean" if old == (4, 4) else "class_token"
    shapes = [(4 * height, 4 * width, 1) for height, width in (old, new)]
    model = kt.models.vision_transformer(shapes[0], 2, patch_size=4, **SIZES, pooling=pooling)
    resized = kt.models.resize_positions(model, shapes[1])
    tables = [as_numpy(x.get_layer("position").position_table) for x in (model, resized)]
    extra = int(pooling == "class_token")
    np.testing.assert_array_equal(tables[1][:extra], tables[0][:extra])
    grid = torch.tensor(tables[0][extra:].reshape(1, *old, -1)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    np.testing.assert_allclose(
        tables[1][extra:], expected.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).numpy(), atol=1e-5
    )
    images = pictures(*shapes[1])[..., :1]
    assert np.isfinite(logits_of(resized, images)).all()


def test_parameters_of_the_published_models():
    """ViT-Ti/16 of DeiT has 5.7 million; keras.io's compact one says 0.4 million, CCT-7/3x1 3.76 million."""
    tiny = kt.models.vision_transformer((224, 224, 3), 1000, 16, None, 192, 12, 3, 768)
    assert tiny.count_params() == 5_717_416
    compact = {"pooling": "sequence", "num_classes": 10, "image_shape": (32, 32, 3)}
    small = {"convolutions": 2, "dim": 128, "depth": 2, "num_heads": 2, "hidden_dim": 128, "head_dim": 128}
    assert round(kt.models.vision_transformer(**small, **compact).count_params() / 1e6, 1) == 0.4
    cct7 = kt.models.vision_transformer(convolutions=1, dim=256, depth=7, num_heads=4, hidden_dim=512, **compact)
    assert round(cct7.count_params() / 1e6, 1) in (3.7, 3.8)


def test_a_convolution_sees_over_the_border_of_a_patch():
    """Two poolings make squares of 4 by 4 of an image. What is next to a square moves it, unless it is a patch."""
    changed = pictures(16, 16)
    changed[:, :, 8:] += 1
    for options, sees in (({"patch_size": 4}, False), ({"convolutions": 2}, True)):
        model = kt.models.vision_transformer((16, 16, 3), 2, **SIZES, **options, pooling="mean")
        sequence = keras.Model(model.inputs, model.get_layer("patches").output)
        before, after = (logits_of(sequence, x).reshape(2, 4, 4, -1) for x in (pictures(16, 16), changed))
        assert bool(np.abs(before - after)[:, :, 1].max() > 1e-6) is sees


def test_it_learns_where_the_light_is():
    keras.utils.set_random_seed(1)
    random = np.random.default_rng(0)
    images = random.normal(size=(128, 8, 8, 1)).astype("float32") * 0.1
    labels = random.integers(0, 4, 128)
    for image, label in zip(images, labels, strict=True):
        image[4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 1
    model = kt.models.vision_transformer((8, 8, 1), 4, patch_size=4, **SIZES, dropout=0.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"])
    model.fit(images, labels, epochs=30, batch_size=32, verbose=0)
    assert model.evaluate(images, labels, verbose=0)[1] > 0.95


BAD_INPUT = {
    "neither": ({}, "Either `patch_size` or `convolutions` must be given"),
    "both": ({"patch_size": 4, "convolutions": 1}, "received patch_size=4, convolutions=1"),
    "patches": ({"patch_size": (5, 8)}, "nearest sizes that would do: 15 or 20 high, 24 wide"),
    "large patches": ({"patch_size": 32}, "32 high, 32 wide"),
    "no patch": ({"patch_size": 0}, "`patch_size` must be positive"),
    "dim": ({"convolutions": 3, "dim": 18}, "received convolutions=3, dim=18"),
    "pooling": ({"patch_size": 4, "pooling": "max"}, "`pooling` must be one of"),
    "classes": ({"patch_size": 4, "num_classes": 1}, "received num_classes=1"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        kt.models.vision_transformer(**{"image_shape": (16, 24, 3), "num_classes": 5, **arguments})


def test_bad_sizes():
    model = kt.models.vision_transformer((16, 16, 3), 2, patch_size=8, **SIZES)
    with pytest.raises(ValueError, match="must divide the height and width of the images; received images of 20 x 16"):
        kt.models.resize_positions(model, (20, 16))
    with pytest.raises(ValueError, match=r"must have an input `images`.*received the inputs \['token_ids'\]"):
        kt.models.resize_positions(kt.models.causal_lm(9, dim=8, depth=1), (16, 16))
