"""Images by class: from folders and archives, with what cannot be read left out and named, and splits of them."""

import io

import numpy as np
import pytest
from PIL import Image

from keras_transformer.pipelines import read_image_archive, read_image_folder, split_by_class


def file_of(shade, size=(6, 4), mode="RGB", kind="png"):
    file = io.BytesIO()
    Image.new(mode, size, shade).save(file, kind)
    return file.getvalue()


def write_archive(path, files, labels, classes, **changes):
    data = np.frombuffer(b"".join(files), "uint8")
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(path, **{"data": data, "offsets": offsets, "labels": labels, "classes": classes, **changes})
    return path


@pytest.fixture
def folder(tmp_path):
    files = {
        "zebra/2.png": file_of((10, 20, 30)),
        "zebra/1.jpg": file_of((200, 200, 200), kind="jpeg"),
        "ant/grey.png": file_of(77, mode="L"),
        "ant/clear.png": file_of((0, 0, 0, 0), mode="RGBA"),
        "ant/notes.txt": b"no image",
        "ant/.hidden.png": b"no image either",
        "zebra/cut.png": file_of((1, 2, 3), (600, 400))[:200],
        "readme.md": b"which photos these are",
        ".cache/x.png": file_of(0, mode="L"),
    }
    for name, content in files.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "photos"


def test_folder(folder):
    images, labels, classes, unreadable = read_image_folder(folder, (4, 6))
    assert images.dtype == np.uint8 and images.shape == (4, 4, 6, 3)
    assert classes == ["ant", "zebra"] and labels.tolist() == [0, 0, 1, 1]
    shades = [image.reshape(-1, 3)[0].tolist() for image in images]
    assert shades == [[255] * 3, [77] * 3, [200] * 3, [10, 20, 30]]  # Clear ones lie on white.
    assert [line.split(":")[0].replace("\\", "/") for line in unreadable] == ["ant/notes.txt", "zebra/cut.png"]
    assert "must be an image that Pillow can read" in unreadable[0]


def test_folder_in_shades_of_gray_and_another_size(folder):
    data = read_image_folder(str(folder), (8, 3), channels=1)
    assert data.images.shape == (4, 8, 3, 1) and set(data.images[1].ravel()) == {77}


def test_archive(tmp_path):
    files = [file_of((9, 8, 7)), b"not an image", file_of((1, 1, 1), (3, 3)), file_of((2, 2, 2), (600, 400))[:200]]
    path = write_archive(tmp_path / "images.npz", files, np.array([2, 0, 1, 0], "uint8"), ["a", "b", "c"])
    images, labels, classes, unreadable = read_image_archive(path, (4, 6))
    assert images.shape == (2, 4, 6, 3) and images[0, 0, 0].tolist() == [9, 8, 7] and set(images[1].ravel()) == {1}
    assert labels.tolist() == [2, 1] and classes == ["a", "b", "c"]
    assert [line.split(":")[0] for line in unreadable] == ["image 1", "image 3"]


BAD_ARCHIVES = {
    "label": ({"labels": [0, 3]}, "labels must be from 0 to 1.*received 3 for image 1, and 1 such in all"),
    "negative label": ({"labels": [-1, 0]}, "received -1 for image 0"),
    "offsets": ({"offsets": [0, 5]}, "`offsets` must rise from 0.*received 2 for 2 labels"),
    "too long": ({"offsets": [0, 5, 10**6]}, "`offsets` must rise from 0"),
    "no image": ({"data": np.zeros(10, "uint8"), "offsets": [0, 5, 10]}, "must hold an image"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ARCHIVES.values(), ids=BAD_ARCHIVES)
def test_bad_archives(tmp_path, changes, message):
    path = write_archive(
        tmp_path / "images.npz", [file_of(0)] * 2, **{"labels": [0, 1], "classes": ["a", "b"], **changes}
    )
    with pytest.raises(ValueError, match=message):
        read_image_archive(path, (4, 4))


def test_no_archive(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        read_image_archive(tmp_path / "absent.npz", (4, 4))
    (tmp_path / "text.npz").write_text("images, they said")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("text.npz", "other.npz", "one.npy"):
        with pytest.raises(ValueError, match="must be an .npz file of data, offsets, labels, classes"):
            read_image_archive(tmp_path / name, (4, 4))


def test_bad_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_image_folder(tmp_path / "absent", (4, 4))
    with pytest.raises(ValueError, match="two or more classes; it has 0"):
        read_image_folder(folder / "zebra", (4, 4))
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty must hold an image that Pillow can read"):
        read_image_folder(folder, (4, 4))


def test_split():
    labels = np.repeat([0, 1, 2], [40, 20, 2])
    train, held_out = split_by_class(labels, ["a", "b", "c"], share=0.1, seed=3)
    assert sorted([*train, *held_out]) == list(range(62))
    assert np.bincount(labels[held_out]).tolist() == [4, 2, 1]
    assert held_out.tolist() == split_by_class(labels, ["a", "b", "c"], share=0.1, seed=3)[1].tolist()
    assert held_out.tolist() != split_by_class(labels, ["a", "b", "c"], share=0.1, seed=4)[1].tolist()
    assert np.bincount(labels[split_by_class(labels, ["a", "b", "c"], share=0.99)[0]]).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("labels", "share", "message"),
    [([0, 0, 1], 0.5, "'b' has 1"), ([0, 0], 0.5, "'b' has 0"), ([0, 0, 1, 1], 1.0, "`share` must lie between")],
)
def test_bad_splits(labels, share, message):
    with pytest.raises(ValueError, match=message):
        split_by_class(labels, ["a", "b"], share)
