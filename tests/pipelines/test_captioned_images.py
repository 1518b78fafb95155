"""Images with captions: what is read, what is named as unreadable, and bad tables."""

import pytest
from PIL import Image

from keras_transformer.pipelines import read_captioned_images

TABLE = "file\tcaption\nred.png\ta red field\ninner/blue.png\t the sea \tby A\nred.png\tall red\ngone.png\tnothing\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "red.png")
    Image.new("RGB", (60, 40), (0, 0, 255)).save(tmp_path / "inner" / "blue.png")
    (tmp_path / "broken.png").write_text("no image")
    return tmp_path


def test_images_and_captions(folder):
    (folder / "captions.tsv").write_text(TABLE + "broken.png\twhat was this?\n", encoding="utf-8")
    images, captions, names, unreadable = read_captioned_images(folder, folder / "captions.tsv", (4, 8))
    assert images.shape == (3, 4, 8, 3) and images.dtype == "uint8"
    assert images[:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255], [255, 0, 0]]
    assert captions == ["a red field", "the sea", "all red"]
    assert names == ["red.png", "inner/blue.png", "red.png"]
    assert [line.split(":")[0] for line in unreadable] == ["gone.png", "broken.png"]


BAD_TABLES = {
    "no tab": ("red.png a red field\n", r"table.tsv, line 1: a line must hold.*'red.png a red field'"),
    "no caption": ("red.png\tred\nred.png\t \n", "table.tsv, line 2"),
    "header alone": ("file\tcaption\n", "must hold captions"),
    "empty": ("", "is empty"),
    "no image": ("gone.png\tnothing\n", "must hold an image that .* names and Pillow can read; gone.png"),
}


@pytest.mark.parametrize(("text", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_tables(folder, text, message):
    (folder / "table.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_captioned_images(folder, folder / "table.tsv", (4, 4))


def test_absent(folder):
    for place, table in ((folder, "absent.tsv"), (folder / "absent", "table.tsv")):
        with pytest.raises(FileNotFoundError, match="There is no"):
            read_captioned_images(place, folder / table, (4, 4))
