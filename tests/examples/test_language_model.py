"""The language-model script as a user runs it: what it leaves behind, what it serves, and bad input."""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from script_run import load_script, run_script

import keras_transformer as kt

SMALL = ["--data", "text.py", "--steps", "4", "--epochs", "2"]


@pytest.fixture(scope="module")
def script():
    return load_script("language_model")


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    """The output and the printed text of a run of a smaller model than the recipe's, on this package's own source."""
    folder = tmp_path_factory.mktemp("language_model")
    source = Path(kt.__file__).parent / "layers"
    (folder / "text.py").write_text("".join(path.read_text() for path in sorted(source.glob("[a-b]*.py"))))
    options = [*SMALL, "--fill-in-the-middle", "--prompt", "import ", "--output", "out"]
    return folder / "out", run_script(script, folder, *options, recipe="code", dim=32, depth=1)


def test_what_a_run_leaves(finished):
    output, printed = finished
    names = "curves.png logs metrics.json model.keras saved_model surprise.png"
    assert sorted(path.name for path in output.iterdir()) == names.split()
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["steps"] == 4 and metrics["train_seconds"] > 0
    assert 0 < metrics["bits_per_byte"] < 8  # A byte alone has 8 bits.
    assert metrics["parameters"] == keras.saving.load_model(output / "model.keras").count_params()
    for name in ("curves.png", "surprise.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert printed.count("\n>>> ") == 3  # The prompt and two holes.
    assert "Epoch 2/2" in printed


def test_what_is_served_is_what_the_model_finds_likely(finished):
    import tensorflow as tf
    import tensorflow_text  # noqa: F401

    complete = tf.saved_model.load(finished[0] / "saved_model").signatures["serving_default"]
    texts = complete(text=tf.constant(["def ", "class A:\n    def __init__(self"]))["text"].numpy()
    assert len(texts) == 2 and all(isinstance(text, bytes) for text in texts)


def test_surprise_is_the_loss(script):
    recipe = script.Recipe(16, 1, 2, 8, 2, 2, 0.0, 1e-2, 1e-3, 1, 261, "learned")
    model = script.build_model(recipe, 261, 4)
    ids = np.arange(5, 14, dtype="int32")
    loss = model.evaluate(ids[None, :-1], ids[None, 1:], verbose=0)[0]
    np.testing.assert_allclose(script.surprise(model, ids).mean(), loss, rtol=1e-4)


def test_the_rate_rises_and_falls(script):
    model = script.build_model(script.RECIPES["shakespeare-cpu"], 261, 2000)
    rate = model.optimizer._learning_rate
    assert [round(float(rate(step)), 5) for step in (0, 50, 100, 2000)] == [0.0, 0.0005, 0.001, 0.0001]
    # About 0.8 million weights, as nanoGPT says of its model, whose tokens are 65 characters instead of bytes.
    assert 0.79e6 < model.count_params() - (261 - 65) * 128 - 64 * 128 < 0.81e6


BAD_INPUT = {
    "missing file": (["--data", "absent.txt"], "--data: There is neither a file absent.txt nor a folder"),
    "folder without such files": (["--data", "mine"], "in files *.txt there"),
    "undecodable": (["--data", "latin.txt"], "latin.txt, line 1: the file must be UTF-8"),
    "empty": (["--data", "empty.txt"], "empty.txt is empty"),
    "too short": (["--data", "short.txt"], "must hold more than length=128 tokens"),
    "unknown recipe": (["--recipe", "huge"], "invalid choice: 'huge'"),
    "no steps": (["--steps", "0"], "--steps at least as many"),
    "empty prompt": (["--prompt", ""], "--prompt must hold a character"),
    "output holds other things": (["--output", "mine"], "--output must be a new or empty directory"),
}


@pytest.mark.parametrize("arguments, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(script, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "short.txt").write_text("A short text.\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.md").write_text("irreplaceable")
    monkeypatch.setattr(sys, "argv", ["language_model.py", *arguments])
    with pytest.raises(SystemExit) as error:
        script.main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "language_model_output").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.md"]
