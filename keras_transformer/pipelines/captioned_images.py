"""Images and what they are said to show: read from a folder and a table of captions."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_transformer.pipelines.corpus import _read_text
from keras_transformer.pipelines.image_folders import read_all


class CaptionedImages(NamedTuple):
    """Images and their captions.

    Attributes:
        images: array uint8 `[N, height, width, channels]`, one for each caption.
        captions: list of N strings.
        names: list of N strings. The files' names.
        unreadable: list of strings. The name of each file that cannot be read, and the reason.

    Example:

    >>> found = CaptionedImages(np.zeros((1, 8, 8, 3), "uint8"), ["all is dark"], ["night.png"], [])
    >>> found.images.shape, found.captions
    ((1, 8, 8, 3), ['all is dark'])
    """

    images: np.ndarray
    captions: list[str]
    names: list[str]
    unreadable: list[str]


def read_captioned_images(folder, captions, size, channels=3):
    """Reads images and their captions.

    Each line of the table holds the name of an image's file, a tab and a caption; columns beyond are ignored. An image
    may stand in several lines, with a caption each. A first line `file` or `image`, tab, `caption` is a header. What is
    missing or cannot be read as an image is left out, and named in the result.

    Args:
        folder: str or path. Where the images lie; names may lead into folders inside it.
        captions: str or path of the table, UTF-8, which may be compressed as `.gz`.
        size: tuple `(height, width)` to resize to.
        channels: int. 3, or 1 for shades of gray.

    Returns:
        A named tuple `CaptionedImages`.

    Raises:
        FileNotFoundError: if there is no such folder or table.
        ValueError: if a line has no tab, name or caption, or no image can be read.

    Example:

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from PIL import Image
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> Image.fromarray(np.zeros((20, 30, 3), "uint8")).save(folder / "night.png")
    >>> _ = (folder / "captions.tsv").write_text("night.png\\tall is dark\\nday.png\\tthe sun shines\\n")
    >>> images, captions, names, unreadable = read_captioned_images(folder, folder / "captions.tsv", (8, 8))
    >>> images.shape, captions, [line.split(":")[0] for line in unreadable]
    ((1, 8, 8, 3), ['all is dark'], ['day.png'])
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    rows = _rows(captions)
    files = list(dict.fromkeys(name for name, _ in rows))
    images, places, unreadable = read_all(((name, folder / name) for name in files), size, channels)
    if not len(images):
        raise ValueError(f"{folder} must hold an image that {captions} names and Pillow can read; {unreadable[0]}.")
    place_of = {files[place]: i for i, place in enumerate(places)}
    kept = [(name, caption) for name, caption in rows if name in place_of]
    names, texts = map(list, zip(*kept, strict=True))
    return CaptionedImages(images[[place_of[name] for name in names]], texts, names, unreadable)


def _rows(path):
    """The pairs of name and caption in a table."""
    table, lines = _read_text(path)
    rows = []
    for number, line in enumerate(lines, start=1):
        name, caption = [*map(str.strip, line.split("\t")), "", ""][:2]
        if number == 1 and name.lower() in ("file", "image") and caption.lower() == "caption":
            continue
        if not name or not caption:
            raise ValueError(
                f"{table}, line {number}: a line must hold a file's name, a tab and a caption; received {line[:80]!r}."
            )
        rows.append((name, caption))
    if not rows:
        raise ValueError(f"{table} must hold captions; received a header alone.")
    return rows
