"""The script that classifies texts, as a user runs it: what it leaves behind, and bad input."""

import json
import sys

import keras
import numpy as np
import pytest
from script_run import load_script, run_script

import keras_transformer as kt


@pytest.fixture(scope="module")
def script():
    return load_script("text_classification")


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    """The folder and the printed text of one whole run, which tells English from German numbers."""
    folder = tmp_path_factory.mktemp("text_classification")
    pairs = kt.pipelines.number_pairs(300, "de")
    rows = "".join(f"{language}\t{name}\n" for pair in pairs for language, name in zip(("en", "de"), pair, strict=True))
    (folder / "numbers.tsv").write_text("label\ttext\n" + rows)
    return folder, run_script(script, folder, "--data", "numbers.tsv", "--recipe", "best", "--epochs", 12)


def test_what_a_run_leaves(finished):
    output = finished[0] / "text_classification_output"
    names = "classifier confusion.png curves.png logs metrics.json model.keras saved_model"
    assert sorted(path.name for path in output.iterdir()) == names.split()
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.95 and len(metrics["val_accuracy"]) == 12
    assert metrics["accuracy"] == pytest.approx(metrics["val_accuracy"][-1], abs=0.005)
    assert metrics["parameters"] == keras.saving.load_model(output / "model.keras").count_params()
    for name in ("confusion.png", "curves.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (output / "logs").iterdir()) == ["train", "validation"]


def test_what_a_run_prints(finished):
    printed = finished[1]
    assert "480 texts of 2 classes to train on, 120 held out" in printed
    assert "Epoch 12/12" in printed and "val_accuracy" in printed
    assert "saved_model answers:" in printed and printed.count("(right: ") == 8


def test_saved_model_and_classifier_agree(finished):
    import tensorflow as tf
    import tensorflow_text  # noqa: F401

    output = finished[0] / "text_classification_output"
    texts = ["zwölftausend", "twelve thousand", "drei"]
    classifier = kt.pipelines.load(output / "classifier")
    assert classifier.labels == ["de", "en"]
    served = tf.saved_model.load(output / "saved_model").signatures["serving_default"](text=tf.constant(texts))
    assert [label.decode() for label in served["label"].numpy()] == classifier.predict(texts) == ["de", "en", "de"]
    np.testing.assert_allclose(served["probabilities"], classifier.probabilities(texts), atol=1e-5)


def test_default_data_are_names_of_emoji(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["text_classification.py"])
    _, arguments, recipe = script.parse_arguments()
    assert recipe == script.RECIPES["emoji"]
    train, held_out = script.read_data(arguments)
    emoji = {(name, language): character for name, language, character in kt.pipelines.emoji_names()}
    seen, unseen = ({emoji[pair] for pair in part} for part in (train, held_out))
    assert len({language for _, language in train}) == 8
    assert len(unseen) == pytest.approx(0.2 * len(seen | unseen), abs=20)


BAD_INPUT = {
    "missing file": (["--data", "absent.tsv"], "no file absent.tsv"),
    "unknown format": (["--data", "a.xml"], "one of .jsonl, .csv, .tsv"),
    "empty text": (["--data", "empty.tsv"], "empty.tsv, line 2: a text must be"),
    "text without a word": (["--data", "marks.tsv", "--recipe", "keras-io"], "A text must have a token"),
    "one class": (["--data", "one.tsv"], "received 1 classes, of which 'a' has 2"),
    "class of one text": (["--data", "rare.tsv"], "received 2 classes, of which 'b' has 1"),
    "unknown recipe": (["--recipe", "huge"], "invalid choice: 'huge'"),
    "no epochs": (["--epochs", "0"], "--epochs must be at least 1"),
    "all held out": (["--held-out", "1"], "--held-out lie between 0 and 1"),
    "small vocabulary": (["--data", "marks.tsv", "--vocabulary-size", "4"], "`vocabulary_size` must"),
    "output holds other things": (["--output", "mine"], "--output must be a new or an empty directory"),
}


@pytest.mark.parametrize("arguments, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(script, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    files = {
        "a.xml": "x",
        "empty.tsv": "a\tx\nb\t\n",
        "marks.tsv": "a\tone\nb\ttwo\nb\t?!\na\tsix\n" * 2,
        "one.tsv": "a\tx\na\ty\n",
        "rare.tsv": "a\tx\na\ty\nb\tz\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    monkeypatch.setattr(sys, "argv", ["text_classification.py", *arguments])
    with pytest.raises(SystemExit) as error:
        script.main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "text_classification_output").exists()


def test_keras_imdb_comes_as_texts(script, monkeypatch):
    parts = (([[1, 5, 4]], [1]), ([[1, 2]], [0]))
    monkeypatch.setattr(keras.datasets.imdb, "load_data", lambda: parts)
    monkeypatch.setattr(keras.datasets.imdb, "get_word_index", lambda: {"good": 1, "film": 2})
    train, held_out = script.read_keras_imdb()
    assert [(text.split(), label) for text, label in train] == [(["film", "good"], "positive")]
    assert [label for _, label in held_out] == ["negative"]

    def offline():
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.datasets.imdb, "load_data", offline)
    with pytest.raises(OSError, match="--data keras-imdb must be downloaded: URL fetch failure"):
        script.read_keras_imdb()
