"""Images as a model reads them: sized, cropped and normalized as the checkpoint's `preprocessor_config.json` says."""

import dataclasses
import os
from pathlib import Path

import numpy as np

from keras_transformer.pretrained.checkpoint import read_json
from keras_transformer.pretrained.fields import Fields

NEAREST, LANCZOS, BILINEAR, BICUBIC, BOX, HAMMING = range(6)  # As Pillow numbers its filters.
STANDARD = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
CLIP = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "resample": BICUBIC, **OPENAI}
# What each kind of preprocessor does where its file does not say.
DEFAULTS = {
    "ViT": {"size": 224, "resample": BILINEAR, **STANDARD},
    "DeiT": {"size": 256, "crop_size": 224, "do_center_crop": True, "resample": BICUBIC, **STANDARD},
    "CLIP": CLIP,
    "Llava": CLIP,
    "Siglip": {"size": {"height": 224, "width": 224}, "resample": BICUBIC, **STANDARD},
}
# One number for the size is the shorter edge here, and both edges elsewhere.
ONE_SIZE_IS_SHORTER_EDGE = ("CLIP", "Llava", "Siglip")
PADS_TO_SQUARE = ("Llava",)


@dataclasses.dataclass(frozen=True)
class ImagePreprocessor:
    """Turns images into the batch that a model reads.

    An image is a path, a Pillow image, or an array uint8 `[height, width, channels]`. What has transparent parts is
    laid on white, and an image of a file is turned upright, as its camera noted.

    Args:
        size: tuple `(height, width)` to resize to, int for the shorter edge, or None.
        resample: int, the filter of Pillow.
        crop: tuple `(height, width)` to take out of the middle, with black around what is smaller, or None.
        scale: float that values between 0 and 255 are multiplied by.
        mean: float or floats for each channel, which are taken off.
        std: float or floats, which the rest is divided by.
        background: color that non-square images are made square with before all else, or None.
        channels: int. 3, or 1 for shades of gray.

    Example:

    >>> import numpy as np
    >>> preprocessor = ImagePreprocessor(size=(8, 8), mean=0.5, std=0.5)
    >>> preprocessor([np.full((20, 10, 3), 255, "uint8")]).shape
    (1, 8, 8, 3)
    """

    size: tuple | int | None = None
    resample: int = BILINEAR
    crop: tuple | None = None
    scale: float = 1 / 255
    mean: float | tuple = 0.0
    std: float | tuple = 1.0
    background: tuple | None = None
    channels: int = 3

    def __call__(self, images):
        """A batch float32 `[images, height, width, channels]`."""
        return np.stack([self._prepared(image) for image in images])

    @classmethod
    def from_directory(cls, directory, channels=3):
        """The preprocessor of a checkpoint directory.

        Args:
            directory: path of a directory with `preprocessor_config.json`, or `processor_config.json`.
            channels: int. How many channels the model reads.

        Raises:
            FileNotFoundError: if there is neither file.
            ValueError: if a field has a value that is not supported here.
        """
        values = read_preprocessor(directory, "image_processor")
        kind = _kind(values, directory)
        # A null in the file stands for the default.
        said = {name: value for name, value in values.items() if value is not None}
        fields = Fields({**DEFAULTS[kind], **said}, kind)
        fields.ignore(
            "image_processor_type feature_extractor_type processor_class _processor_class do_convert_rgb data_format "
            "input_data_format return_tensors device disable_grouping image_seq_length use_fast default_to_square "
            "_valid_kwargs_names _valid_processor_keys"
        )
        mean, std = fields.take("image_mean"), fields.take("image_std")
        is_normalized = fields.take("do_normalize", default=True)
        options = {
            "size": _size(fields, kind) if fields.take("do_resize", default=True) else None,
            "resample": fields.one_of("resample", range(6)),
            "crop": _crop(fields) if fields.take("do_center_crop", default=False) else None,
            "scale": fields.take("rescale_factor", default=1 / 255) if fields.take("do_rescale", default=True) else 1.0,
            "mean": _per_channel(mean) if is_normalized else 0.0,
            "std": _per_channel(std) if is_normalized else 1.0,
        }
        if kind not in PADS_TO_SQUARE:
            fields.only("do_pad", False)
        elif fields.take("do_pad", default=False):
            options["background"] = tuple(int(x * 255) for x in np.broadcast_to(mean, channels))
        fields.ignore("crop_size pad_size size rescale_factor")  # Where they are not asked for.
        fields.warn_of_unknown(f"The preprocessor of {directory}", "the images")
        return cls(**options, channels=channels)

    def _prepared(self, image):
        from PIL import Image

        array = read_image(image, self.channels)
        if self.background is not None:
            array = _squared(array, self.background)
        if self.size is not None:
            height, width = self.target_size(*array.shape[:2])
            plane = Image.fromarray(array[..., 0] if self.channels == 1 else array)
            array = np.asarray(plane.resize((width, height), self.resample)).reshape(height, width, self.channels)
        if self.crop is not None:
            array = _cropped(array, *self.crop)
        scaled = (array.astype("float64") * self.scale).astype("float32")
        return (scaled - np.asarray(self.mean, "float32")) / np.asarray(self.std, "float32")

    def target_size(self, height, width):
        """Height and width that an image of these sizes is resized to."""
        if not isinstance(self.size, int):
            return self.size
        if height < width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size


def read_preprocessor(directory, part):
    """Reads `preprocessor_config.json`, or `part` of `processor_config.json`, which came after it.

    Args:
        directory: path of the checkpoint directory.
        part: `"image_processor"` or `"feature_extractor"`.

    Returns:
        dict.
    """
    directory = Path(directory)
    if (directory / "preprocessor_config.json").is_file():
        return read_json(directory, "preprocessor_config.json")
    if (directory / "processor_config.json").is_file():
        values = read_json(directory, "processor_config.json").get(part)
        if isinstance(values, dict):
            return values
    raise FileNotFoundError(
        f"`directory` must hold preprocessor_config.json, or processor_config.json with `{part}`, to say how inputs "
        f"are prepared; there is neither in {directory}."
    )


def read_image(image, channels=3):
    """An image as an array.

    Args:
        image: path, Pillow image, or array uint8 `[height, width, channels]`, also of other numbers of channels.
        channels: int. 3, or 1 for shades of gray.

    Returns:
        Array uint8 `[height, width, channels]`.

    Raises:
        ValueError: if it is none of these, or the file cannot be read.

    Example:

    >>> import numpy as np
    >>> read_image(np.zeros((5, 4, 1), "uint8")).shape
    (5, 4, 3)
    """
    from PIL import Image, ImageOps

    if isinstance(image, str | os.PathLike):
        try:
            with Image.open(image) as file:
                image = ImageOps.exif_transpose(file)
                image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{image} must be an image that Pillow can read; {error}") from error
    elif not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or not array.size:
            raise ValueError(
                "An image must be a path, a Pillow image, or an array uint8 [height, width, channels]; received "
                f"{type(image).__name__} with dtype {array.dtype} and shape {array.shape}."
            )
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return array.reshape(*array.shape[:2], channels)


def _kind(values, directory):
    name = values.get("image_processor_type") or values.get("feature_extractor_type")
    kind = name
    for suffix in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        kind = kind and kind.removesuffix(suffix)
    if kind not in DEFAULTS:
        known = [f"{kind}ImageProcessor" for kind in DEFAULTS]
        raise ValueError(f"`image_processor_type` in {directory} must be one of {known}; received {name!r}.")
    return kind


def _size(fields, kind):
    """`size`, which is a dict in newer files and one number in older ones."""
    size = fields.take("size")
    if isinstance(size, int):
        return size if kind in ONE_SIZE_IS_SHORTER_EDGE else (size, size)
    if isinstance(size, list) and len(size) == 2:
        return tuple(size)
    if isinstance(size, dict):
        size = {name: value for name, value in size.items() if value is not None}
        if set(size) == {"shortest_edge"}:
            return size["shortest_edge"]
        if set(size) == {"height", "width"}:
            return size["height"], size["width"]
    raise ValueError(f"`size` must have `height` and `width`, or `shortest_edge`; received {size!r}.")


def _crop(fields):
    size = fields.take("crop_size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and {"height", "width"} <= set(size):
        return size["height"], size["width"]
    raise ValueError(f"`crop_size` must have `height` and `width`; received {size!r}.")


def _per_channel(values):
    return tuple(values) if isinstance(values, list) else values


def _squared(array, background):
    """An image in the middle of a square of its longer edge."""
    height, width, channels = array.shape
    edge = max(height, width)
    square = np.full((edge, edge, channels), background, "uint8")
    top, left = (edge - height) // 2, (edge - width) // 2
    square[top : top + height, left : left + width] = array
    return square


def _cropped(array, height, width):
    """The middle of an image, with black around it where there is too little."""
    missing = [max(0, wanted - size) for wanted, size in zip((height, width), array.shape, strict=False)]
    array = np.pad(array, [*((n - n // 2, n // 2) for n in missing), (0, 0)])
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    return array[top : top + height, left : left + width]
