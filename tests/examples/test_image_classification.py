"""The script that classifies images, as a user runs it: what it leaves behind, and bad input."""

import json
import sys

import keras
import numpy as np
import pytest
from PIL import Image
from script_run import load_script, run_script

import keras_transformer as kt


@pytest.fixture(scope="module")
def script():
    return load_script("image_classification")


def write_photos(folder, count=20, size=(12, 9)):
    """Pictures of the sky, which is light above, and of the sea, which is light below; and one that is broken."""
    random = np.random.default_rng(0)
    for name in ("sea", "sky"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = random.integers(0, 60, (size[1], size[0], 3)).astype("uint8")
            image[4:] += np.uint8(150 * (name == "sea"))
            image[:4] += np.uint8(150 * (name == "sky"))
            Image.fromarray(image).save(folder / name / f"{i}.png")
    (folder / "sky" / "broken.png").write_text("no image")


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    """The folder and the printed text of one whole run."""
    folder = tmp_path_factory.mktemp("image_classification")
    write_photos(folder / "photos")
    options = ["--data", "photos", "--size", 8, 10, "--recipe", "digits", "--held-out", 0.25, "--epochs", 15]
    return folder, run_script(script, folder, *options)


def test_what_a_run_leaves(finished):
    output = finished[0] / "image_classification_output"
    names = "classifier confusion.png curves.png logs metrics.json model.keras samples.png saved_model"
    assert sorted(path.name for path in output.iterdir()) == names.split()
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.85 and len(metrics["val_accuracy"]) == 15
    assert metrics["accuracy"] == pytest.approx(metrics["val_accuracy"][-1], abs=0.005)
    assert metrics["parameters"] == keras.saving.load_model(output / "model.keras").count_params()
    for name in ("confusion.png", "curves.png", "samples.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (output / "logs").iterdir()) == ["train", "validation"]


def test_what_a_run_prints(finished):
    printed = finished[1]
    assert "30 images of 2 classes to train on, 10 held out" in printed
    assert "Epoch 15/15" in printed and "val_accuracy" in printed
    assert "saved_model answers:" in printed and printed.count("(right: s") == 8
    assert "1 files could not be read and were left out:" in printed and "broken.png: " in printed.split("left out")[1]


def test_saved_model_and_classifier_agree_on_images_of_any_size(finished):
    import tensorflow as tf

    output = finished[0] / "image_classification_output"
    image = np.full((40, 30, 3), 30, "uint8")
    image[20:] = 180
    images = np.stack([image, image[::-1]])
    classifier = kt.pipelines.load(output / "classifier")
    assert classifier.labels == ["sea", "sky"]
    served = tf.saved_model.load(output / "saved_model").signatures["serving_default"](images=tf.constant(images))
    assert [label.decode() for label in served["label"].numpy()] == classifier.predict(list(images)) == ["sea", "sky"]
    np.testing.assert_allclose(served["probabilities"], classifier.probabilities(list(images)), atol=0.02)


def test_default_data_are_digits(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["image_classification.py"])
    _, arguments, recipe = script.parse_arguments()
    assert recipe == script.RECIPES["digits"]
    data, train, held_out = script.read_data(arguments)
    assert data.images.shape == (1797, 8, 8, 1) and data.images.max() == 255
    assert len(train) + len(held_out) == 1797 and not set(train) & set(held_out)


@pytest.mark.parametrize("name", ["vit", "keras-io-cct", "cct-7"])
def test_recipes_train(script, name):
    recipe = script.RECIPES[name]._replace(batch=4, epochs=1)
    small = {"dim": 16, "depth": 1, "hidden_dim": 16, "head_dim": None}
    recipe = recipe._replace(model={**recipe.model, **small})
    model = script.build_model(recipe, (16, 16, 3), 2, steps=2)
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype("uint8")
    prepare = kt.pipelines.ImagePreprocessor(mean=0.5, std=0.25)
    batches = kt.pipelines.image_batches(images, [0, 1] * 4, 2, prepare, recipe.batch, **recipe.changes)
    assert np.isfinite(model.fit(batches, verbose=0).history["loss"][0])
    assert float(keras.ops.convert_to_numpy(model.optimizer.learning_rate)) <= recipe.rate


BAD_INPUT = {
    "missing file": (["--data", "absent.npz"], "no file absent.npz"),
    "unknown format": (["--data", "a.xml"], "--data must be digits, keras-cifar10, an .npz file or a folder"),
    "no archive of images": (["--data", "other.npz"], "other.npz must be an .npz file of data, offsets"),
    "class of one file": (["--data", "rare"], "'sky' has 1"),
    "no classes": (["--data", "rare/sky"], "a folder of images for each of two or more classes; it has 0"),
    "patches": (["--recipe", "vit", "--data", "rare", "--size", "30"], "nearest sizes that would do: 28 or 32 high"),
    "unknown recipe": (["--recipe", "huge"], "invalid choice: 'huge'"),
    "no epochs": (["--epochs", "0"], "--epochs must be at least 1"),
    "all held out": (["--held-out", "1"], "--held-out lie between 0 and 1"),
    "no size": (["--size", "0"], "--size must be one positive number, or height and width"),
    "output holds other things": (["--output", "rare"], "--output must be a new or an empty directory"),
}


@pytest.mark.parametrize("arguments, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(script, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "rare", count=2)
    if "vit" not in arguments:
        (tmp_path / "rare" / "sky" / "1.png").unlink()
    (tmp_path / "a.xml").write_text("x")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    monkeypatch.setattr(sys, "argv", ["image_classification.py", *arguments])
    with pytest.raises(SystemExit) as error:
        script.main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "image_classification_output").exists()


def test_keras_cifar10(script, monkeypatch):
    parts = [(np.full((2, 32, 32, 3), i, "uint8"), np.full((2, 1), i, "uint8")) for i in (3, 7)]
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: parts)
    data = script.read_images("keras-cifar10", None)
    assert data.labels.tolist() == [3, 3, 7, 7] and data.classes[3] == "cat" and data.classes[7] == "horse"

    def offline():
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.datasets.cifar10, "load_data", offline)
    with pytest.raises(OSError, match="--data keras-cifar10 must be downloaded: URL fetch failure"):
        script.read_images("keras-cifar10", None)
