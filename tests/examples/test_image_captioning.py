"""The script that writes captions, as a user runs it: what it leaves behind, and bad input."""

import json
import sys

import keras
import numpy as np
import pytest
from PIL import Image
from script_run import load_script, run_script

import keras_transformer as kt

COLORS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def script():
    return load_script("image_captioning")


def write_fields(folder, count=240):
    """Fields of one color, with captions that name it, one of which stands by an image that is missing."""
    folder.mkdir()
    random, rows = np.random.default_rng(0), ["gone.png\tNobody knows."]
    for i in range(count):
        name = list(COLORS)[i % 3]
        image = np.clip(COLORS[name] + random.integers(-30, 30, (10, 12, 3)), 0, 255).astype("uint8")
        Image.fromarray(image).save(folder / f"{i}.png")
        rows.append(f"{i}.png\tA {name} field.")
    (folder / "captions.tsv").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    """The folder and the printed text of one whole run, with a smaller model than the recipe has."""
    folder = tmp_path_factory.mktemp("image_captioning")
    write_fields(folder / "fields")
    small = {"dim": 32, "depth": (1, 1), "hidden_dim": 32, "dropout": 0.0, "rate": 5e-3, "batch": 16, "epochs": 8}
    options = ["--data", "fields", "fields/captions.tsv", "--size", 8, "--recipe", "digits", "--held-out", 0.2]
    return folder, run_script(script, folder, *options, recipe="digits", **small)


def test_what_a_run_leaves(finished):
    output = finished[0] / "image_captioning_output"
    names = "captions.png curves.png logs metrics.json model.keras pipeline saved_model"
    assert sorted(path.name for path in output.iterdir()) == names.split()
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["exact_match"] > 0.9 and metrics["bleu"] > 90 and len(metrics["val_token_accuracy"]) == 8
    assert metrics["parameters"] == keras.saving.load_model(output / "model.keras").count_params()
    assert len(metrics["unreadable"]) == 1 and metrics["unreadable"][0].startswith("gone.png")
    for name in ("captions.png", "curves.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (output / "logs").iterdir()) == ["train", "validation"]


def test_what_a_run_prints(finished):
    printed = finished[1]
    assert "192 captions to train on, 48 held out" in printed
    assert "Epoch 8/8" in printed and "val_token_accuracy" in printed
    assert "saved_model writes:" in printed and printed.count("(right: a ") == 6
    assert "1 files could not be read and were left out:" in printed and "\n  gone.png" in printed


def test_saved_model_and_pipeline_agree_on_images_of_any_size(finished):
    import tensorflow as tf
    import tensorflow_text  # noqa: F401

    output = finished[0] / "image_captioning_output"
    images = np.stack([np.full((30, 20, 3), color, "uint8") for color in COLORS.values()])
    expected = [f"a {name} field ." for name in COLORS]
    assert kt.pipelines.load(output / "pipeline").predict(list(images)) == expected
    served = tf.saved_model.load(output / "saved_model").signatures["serving_default"](images=tf.constant(images))
    assert [text.decode() for text in served["text"].numpy()] == expected


def test_default_data_are_rows_of_digits(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["image_captioning.py", "--pictures", "40"])
    _, arguments, recipe = script.parse_arguments()
    assert recipe == script.RECIPES["digits"]
    (images, captions), (held_out, references), unreadable = script.read_data(arguments)
    assert images.shape == (40, 12, 48, 1) and held_out.shape == (8, 12, 48, 1) and not unreadable
    assert {len(caption.split()) for caption in captions} == {2, 3, 4}
    assert {word for caption in captions + references for word in caption.split()} <= set(script.NAMES)


def test_a_picture_shows_what_its_caption_says(script):
    digits = np.stack([np.full((8, 8), 10 * (i + 1), "uint8") for i in range(10)])
    pictures, captions = script.digit_rows(digits, np.arange(10), 50, np.random.default_rng(0))
    for picture, caption in zip(pictures, captions, strict=True):
        columns = picture[..., 0].max(axis=0)
        shades = [script.NAMES.index(word) * 10 + 10 for word in caption.split()]
        assert columns[columns > 0].tolist() == np.repeat(shades, 8).tolist()
        assert (picture > 0).sum() == 64 * len(shades)  # None hides another, or is cut.


def test_digits_of_the_two_parts_are_others(script, monkeypatch):
    """Each part is made of the images that the split gave it."""
    monkeypatch.setattr(sys, "argv", ["image_captioning.py", "--pictures", "5"])
    parts = []
    monkeypatch.setattr(script, "digit_rows", lambda digits, labels, *_: parts.append(digits) or (digits, list(labels)))
    script.read_data(script.parse_arguments()[1])
    train, held_out = ({image.tobytes() for image in part} for part in parts)
    assert len(parts[0]) + len(parts[1]) == 1797 and not train & held_out


BAD_INPUT = {
    "no table": (["--data", "fields"], "--data must be digits, or a folder of images and a table"),
    "missing folder": (["--data", "absent", "fields/captions.tsv"], "no folder absent"),
    "missing table": (["--data", "fields", "absent.tsv"], "no file absent.tsv"),
    "broken table": (["--data", "fields", "broken.tsv"], "broken.tsv, line 1: a line must hold a file's name"),
    "small vocabulary": (["--vocabulary-size", "4", "--pictures", "5"], "`vocabulary_size` must be more than 4"),
    "unknown recipe": (["--recipe", "huge"], "invalid choice: 'huge'"),
    "no epochs": (["--epochs", "0"], "--epochs and --pictures must be at least 1"),
    "no pictures": (["--pictures", "0"], "--epochs and --pictures must be at least 1"),
    "all held out": (["--held-out", "1"], "--held-out must lie between 0 and 1"),
    "output holds other things": (["--output", "fields"], "--output must be a new or an empty directory"),
}


@pytest.mark.parametrize("arguments, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(script, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_fields(tmp_path / "fields", count=3)
    (tmp_path / "broken.tsv").write_text("0.png a red field\n")
    monkeypatch.setattr(sys, "argv", ["image_captioning.py", *arguments])
    with pytest.raises(SystemExit) as error:
        script.main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "image_captioning_output").exists()
