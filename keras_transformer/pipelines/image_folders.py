"""Images and their classes: read from folders and archives, and split."""

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_transformer.pipelines.images import ImagePreprocessor

ARCHIVE_KEYS = ("data", "offsets", "labels", "classes")


class LabelledImages(NamedTuple):
    """Images and their classes.

    Attributes:
        images: array uint8 `[N, height, width, channels]`.
        labels: array int32 `[N]` of places in `classes`.
        classes: list of strings. The names of the classes.
        unreadable: list of strings. The name of each file that cannot be read, and the reason.

    Example:

    >>> found = LabelledImages(np.zeros((1, 8, 8, 3), "uint8"), np.array([1], "int32"), ["day", "night"], [])
    >>> found.images.shape, found.classes[found.labels[0]]
    ((1, 8, 8, 3), 'night')
    """

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]
    unreadable: list[str]


def read_image_folder(path, size, channels=3):
    """Reads images from a folder that has one folder of files for each class.

    What cannot be read as an image is left out, and named in the result. Names that begin with a dot are passed over.

    Args:
        path: str or path. The folder.
        size: tuple `(height, width)` to resize to.
        channels: int. 3, or 1 for shades of gray.

    Returns:
        A named tuple `LabelledImages`, whose classes are in alphabetical order.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds fewer than two folders, or one without an image.

    Example:

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from PIL import Image
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for name, shade in [("day", 255), ("night", 0)]:
    ...     (folder / name).mkdir()
    ...     Image.fromarray(np.full((20, 30, 3), shade, "uint8")).save(folder / name / "1.png")
    >>> images, labels, classes, unreadable = read_image_folder(folder, (8, 8))
    >>> images.shape, labels.tolist(), classes, unreadable
    ((2, 8, 8, 3), [0, 1], ['day', 'night'], [])
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {path}.")
    folders = [folder for folder in _visible(path) if folder.is_dir()]
    if len(folders) < 2:
        raise ValueError(f"{path} must hold a folder of images for each of two or more classes; it has {len(folders)}.")
    files = [(file, label) for label, folder in enumerate(folders) for file in _visible(folder) if file.is_file()]
    images, places, unreadable = read_all(((file.relative_to(path), file) for file, _ in files), size, channels)
    labels = np.array([label for _, label in files], "int32")[places]
    for label, folder in enumerate(folders):
        if label not in labels:
            raise ValueError(f"{folder} must hold an image that Pillow can read; there is none.")
    return LabelledImages(images, labels, [folder.name for folder in folders], unreadable)


def read_image_archive(path, size, channels=3):
    """Reads images from an `.npz` file.

    The file holds `data`, uint8, the bytes of all image files one after the other; `offsets`, where each begins, and
    after them the end of the last one; `labels`, integers; and `classes`, strings, the names that the labels stand
    for. What cannot be read as an image is left out, and named in the result.

    Args:
        path: str or path.
        size: tuple `(height, width)` to resize to.
        channels: int. 3, or 1 for shades of gray.

    Returns:
        A named tuple `LabelledImages`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such file, a label is none of the classes, or no image can be read.

    Example:

    >>> import io, pathlib, tempfile
    >>> import numpy as np
    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.fromarray(np.zeros((20, 30, 3), "uint8")).save(file, "png")
    >>> path = pathlib.Path(tempfile.mkdtemp(), "images.npz")
    >>> data = np.frombuffer(file.getvalue(), "uint8")
    >>> np.savez(path, data=data, offsets=[0, len(data)], labels=[1], classes=["day", "night"])
    >>> read_image_archive(path, (8, 8)).images.shape
    (1, 8, 8, 3)
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            data, offsets, labels, classes = (file[key] for key in ARCHIVE_KEYS)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}.") from None
    except (KeyError, ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must be an .npz file of {', '.join(ARCHIVE_KEYS)}; {error}") from error
    count = len(labels)
    if len(offsets) != count + 1 or (np.diff(offsets) < 0).any() or offsets[0] < 0 or offsets[-1] > len(data):
        raise ValueError(
            f"{path}: `offsets` must rise from 0 to the length of `data`, one more than there are labels; received "
            f"{len(offsets)} for {count} labels and {len(data)} bytes."
        )
    labels = labels.astype("int64")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        raise ValueError(
            f"{path}: labels must be from 0 to {len(classes) - 1}, the places in `classes`; received "
            f"{labels[wrong[0]]} for image {wrong[0]}, and {len(wrong)} such in all."
        )
    files = (data[begin:end].tobytes() for begin, end in zip(offsets[:-1], offsets[1:], strict=True))
    named = ((f"image {i}", io.BytesIO(file)) for i, file in enumerate(files))
    images, places, unreadable = read_all(named, size, channels)
    if not len(images):
        raise ValueError(f"{path} must hold an image that Pillow can read; there is none.")
    return LabelledImages(images, labels[places].astype("int32"), [str(name) for name in classes], unreadable)


def split_by_class(labels, classes, share=0.1, seed=0):
    """Splits examples into a part to train on and a held-out part, with the same share of each class.

    Args:
        labels: integers, the class of each example.
        classes: strings, the names of the classes.
        share: float between 0 and 1. Which part of each class to hold out; at least one example of each is held out,
            and one left.
        seed: int. The same seed holds out the same examples.

    Returns:
        A tuple `(train, held_out)` of arrays of places in `labels`, both in ascending order.

    Raises:
        ValueError: if a class has fewer than two examples, or `share` is out of range.

    Example:

    >>> train, held_out = split_by_class([0, 0, 1, 1, 1, 1], ["day", "night"], share=0.5)
    >>> len(train), len(held_out)
    (3, 3)
    """
    if not 0 < share < 1:
        raise ValueError(f"`share` must lie between 0 and 1; received {share}.")
    labels, random, held_out = np.asarray(labels), np.random.default_rng(seed), []
    for label, name in enumerate(classes):
        places = np.flatnonzero(labels == label)
        if len(places) < 2:
            raise ValueError(
                f"A class must have two examples or more, one to train on and one to hold out; {name!r} has "
                f"{len(places)}."
            )
        count = min(max(1, round(share * len(places))), len(places) - 1)
        held_out.append(random.choice(places, count, replace=False))
    held_out = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def _visible(folder):
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def read_all(named, size, channels=3):
    """Reads those images that can be read.

    Args:
        named: iterable of pairs of a name, to report an image by, and a path or a file of bytes.
        size: tuple `(height, width)` to resize to.
        channels: int. 3, or 1 for shades of gray.

    Returns:
        A tuple `(images, places, unreadable)`: array uint8 `[N, height, width, channels]`; array of the places in
        `named` that they have; and for each other one a string with its name and the reason.
    """
    from PIL import Image, UnidentifiedImageError

    prepare = ImagePreprocessor(size=tuple(size), scale=1.0, channels=channels)
    images, places, unreadable = [], [], []
    for place, (name, file) in enumerate(named):
        try:
            # A file of bytes has no name that the preprocessor could open.
            image = Image.open(file) if isinstance(file, io.BytesIO) else file
            images.append(prepare([image])[0].astype("uint8"))
            places.append(place)
        except UnidentifiedImageError:
            unreadable.append(f"{name}: no image that Pillow knows")
        except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            unreadable.append(f"{name}: {error}")
    images = np.reshape(images, (len(images), *size, channels)).astype("uint8")
    return images, np.array(places, "int64"), unreadable
