"""Images, prepared as the image processors of transformers prepare them."""

import numpy as np
import pytest
from PIL import Image
from reference_tokenizers import write_json

import keras_transformer as kt
from keras_transformer.pipelines.images import read_image

CLIP = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.26, 0.27]}
# name -> what the file holds
FILES = {
    "vit, as published": {
        "feature_extractor_type": "ViTFeatureExtractor", "do_normalize": True, "do_resize": True, "resample": 2,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": 32,
    },
    "vit, not square": {
        "image_processor_type": "ViTImageProcessorFast", "size": {"height": 32, "width": 24}, "resample": 3,
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 0.01,
    },
    "vit, one mean": {
        "image_processor_type": "ViTImageProcessor", "size": [24, 32], "image_mean": 0.4, "image_std": 0.3,
        "do_center_crop": None, "crop_size": None,
    },
    "vit, defaults": {"image_processor_type": "ViTImageProcessor"},
    "vit, raw": {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "resample": 1,
        "do_rescale": False, "do_normalize": False,
    },
    "vit, resized not": {
        "image_processor_type": "ViTImageProcessor", "do_resize": False, "do_center_crop": True,
        "crop_size": {"height": 21, "width": 40},
    },
    "deit, as published": {
        "feature_extractor_type": "DeiTFeatureExtractor", "crop_size": 32, "do_center_crop": True, "size": 40,
        "resample": 3, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    },
    "clip, as published": {
        "feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 32, "do_center_crop": True, "resample": 3,
        "do_normalize": True, "do_resize": True, "size": 32, **CLIP,
    },
    "clip, larger crop": {
        "image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 33, "width": 32},
        "size": {"shortest_edge": 20}, "do_convert_rgb": True,
    },
    "clip, defaults": {"image_processor_type": "CLIPImageProcessor"},
    "llava, square": {
        "image_processor_type": "LlavaImageProcessor", "crop_size": {"height": 32, "width": 32}, "do_pad": True,
        "size": {"shortest_edge": 32}, "processor_class": "LlavaProcessor", **CLIP,
    },
    "paligemma": {
        "image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}, "image_seq_length": 16,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "processor_class": "PaliGemmaProcessor",
    },
}  # fmt: skip


def picture(height, width, channels=3, seed=0):
    """Waves and some noise, so that each filter makes something else of it."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 110 * np.sin(x / (3 + i) + y / (7 - i)) for i in range(channels)]
    noise = np.random.default_rng(seed).normal(0, 9, (height, width, channels))
    return np.clip(np.stack(waves, axis=-1) + noise, 0, 255).astype("uint8")


SIZES = [(40, 60), (61, 33), (18, 18), (10, 50)]


@pytest.mark.filterwarnings("error:The preprocessor")
@pytest.mark.parametrize("name", FILES)
def test_images_are_those_of_transformers(name, tmp_path):
    from transformers import AutoImageProcessor

    write_json(tmp_path, "preprocessor_config.json", FILES[name])
    reference = AutoImageProcessor.from_pretrained(tmp_path)
    preprocessor = kt.pipelines.ImagePreprocessor.from_directory(tmp_path)
    for size in SIZES:
        image = picture(*size)
        wanted = np.asarray(reference(image, return_tensors="np")["pixel_values"]).transpose(0, 2, 3, 1)
        found = preprocessor([image])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_came_after_preprocessor_config(tmp_path):
    values = FILES["vit, not square"]
    write_json(tmp_path / "old", "preprocessor_config.json", values)
    write_json(tmp_path / "new", "processor_config.json", {"image_processor": values, "processor_class": "X"})
    old, new = (kt.pipelines.ImagePreprocessor.from_directory(tmp_path / name) for name in ("old", "new"))
    assert old == new


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_every_kind_of_file_becomes_rgb(mode, tmp_path):
    from transformers.image_transforms import convert_to_rgb

    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    Image.fromarray(picture(20, 30, 4), "RGBA").convert(mode).save(path)
    image = Image.open(path)
    wanted = convert_to_rgb(image, return_numpy=True)
    np.testing.assert_array_equal(read_image(image), wanted)
    np.testing.assert_array_equal(read_image(path), wanted)
    np.testing.assert_array_equal(read_image(str(path)), wanted)


def test_arrays_with_other_channels_and_images_that_lie_on_their_side(tmp_path):
    from transformers.image_transforms import convert_to_rgb
    from transformers.image_utils import load_image

    for channels in (1, 3, 4):
        array = picture(20, 30, channels)
        np.testing.assert_array_equal(read_image(array), convert_to_rgb(array, return_numpy=True))
    assert read_image(picture(20, 30), channels=1).shape == (20, 30, 1)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(picture(20, 30)).save(tmp_path / "turned.png", exif=turned)
    assert read_image(tmp_path / "turned.png").shape == (30, 20, 3)
    np.testing.assert_array_equal(
        read_image(tmp_path / "turned.png"), np.asarray(load_image(str(tmp_path / "turned.png")))
    )


def test_shades_of_gray(tmp_path):
    values = {"image_processor_type": "ViTImageProcessor", "size": 8, "image_mean": [0.5], "image_std": [0.5]}
    write_json(tmp_path, "preprocessor_config.json", values)
    preprocessor = kt.pipelines.ImagePreprocessor.from_directory(tmp_path, channels=1)
    assert preprocessor([picture(20, 30), picture(9, 9, 1)]).shape == (2, 8, 8, 1)


NOT_IMAGES = {
    "float": np.zeros((4, 4, 3)),
    "flat": np.zeros((4, 4), "uint8"),
    "channels first": np.zeros((3, 4, 7), "uint8"),
    "empty": np.zeros((0, 4, 3), "uint8"),
    "number": 3,
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_what_is_no_image(name):
    with pytest.raises(ValueError, match=r"An image must be a path, a Pillow image, or an array uint8"):
        read_image(NOT_IMAGES[name])


def test_files_that_cannot_be_read_are_named(tmp_path):
    Image.fromarray(picture(40, 40)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    for name in ("missing.png", "cut.png", "text.png"):
        with pytest.raises(ValueError, match=f"{name} must be an image that Pillow can read"):
            read_image(tmp_path / name)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"image_processor_type": "DonutImageProcessor"}, "`image_processor_type` .* must be one of .*ViT.*'Donut"),
        ({"size": 8}, "`image_processor_type` .* received None"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 8}}, "`size` must have `height`"),
        ({"image_processor_type": "ViTImageProcessor", "resample": 9}, "`resample` .* received 9"),
        ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, "`do_pad` .* received True"),
        ({"image_processor_type": "CLIPImageProcessor", "crop_size": [3]}, "`crop_size` must have `height`"),
    ],
)
def test_fields_that_are_not_supported_are_named(values, message, tmp_path):
    write_json(tmp_path, "preprocessor_config.json", values)
    with pytest.raises(ValueError, match=message):
        kt.pipelines.ImagePreprocessor.from_directory(tmp_path)


def test_unknown_fields_are_warned_of_and_missing_files_listed(tmp_path):
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json, or processor_config.json with"):
        kt.pipelines.ImagePreprocessor.from_directory(tmp_path)
    values = {"image_processor_type": "ViTImageProcessor", "do_swirl": True}
    write_json(tmp_path, "preprocessor_config.json", values)
    with pytest.warns(UserWarning, match=r"unknown here, and have no effect: \['do_swirl'\]"):
        kt.pipelines.ImagePreprocessor.from_directory(tmp_path)
