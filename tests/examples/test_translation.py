"""The translation script as a user runs it: what it leaves behind, bad input, and going on after an interruption."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from script_run import load_script

import keras_transformer as kt

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--data", "pairs.tsv", "--config", "numbers"]
SIZES = {"dim": 32, "depth": 1, "hidden_dim": 64}
FRESH = f"import translation as t; t.RECIPES['numbers'] = t.RECIPES['numbers']._replace(**{SIZES}); t.main()"


@pytest.fixture(scope="module")
def script():
    return load_script("translation")


@pytest.fixture(scope="module")
def pairs():
    return kt.pipelines.number_pairs(120, "de")


@pytest.fixture
def folder(tmp_path, monkeypatch, pairs):
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path, pairs)
    return tmp_path


def write_pairs(folder, pairs):
    (folder / "pairs.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in pairs), encoding="utf-8")


def run_in_process(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["translation.py", *map(str, arguments)])
    script.main()


def run(folder, *arguments):
    """In a process of its own, with a smaller model than the recipe has."""
    paths = os.pathsep.join([str(EXAMPLES), *sys.path])
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow", "PYTHONPATH": paths}
    command = [sys.executable, "-c", FRESH, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pairs):
    """The folder and the printed text of one whole run."""
    folder = tmp_path_factory.mktemp("translation")
    write_pairs(folder, pairs)
    result = run(folder, *SMALL, "--epochs", "2")
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_help(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_in_process(script, monkeypatch, "--help")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--data", "--validation", "--target-language", "--config", "--tokenizer", "--epochs", "--output"):
        assert option in printed


def test_what_a_run_leaves(finished):
    folder, _ = finished
    output = folder / "translation_output"
    names = "arguments.json curves.png log.csv logs metrics.json model.keras pipeline saved_model"
    assert sorted(path.name for path in output.iterdir()) == names.split()
    metrics = json.loads((output / "metrics.json").read_text())
    assert 0 <= metrics["exact_match"] <= 1 and 0 <= metrics["bleu"] <= 100
    assert metrics["train_seconds"] > 0 and metrics["epochs"] == 2
    model = keras.saving.load_model(output / "model.keras")
    assert metrics["parameters"] == model.count_params()
    assert int(model.optimizer.iterations) > 0
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_run_prints(finished, pairs):
    _, printed = finished
    assert "Epoch 2/2" in printed and "val_bleu" in printed
    assert "114 pairs to train on, 6 to validate on" in printed
    assert printed.count("After epoch") == 2
    assert printed.count("  source  ") == printed.count("  translation  ") == 3 + 3 + 5
    assert "saved_model translates:" in printed


def test_saved_model_pipeline_and_model_agree(finished, pairs):
    import tensorflow as tf
    import tensorflow_text  # noqa: F401

    output = finished[0] / "translation_output"
    texts = [source for source, _ in pairs[:20]] + [""]
    pipeline = kt.pipelines.load(output / "pipeline")
    served = tf.saved_model.load(output / "saved_model").signatures["serving_default"](text=tf.constant(texts))["text"]
    assert [text.decode() for text in served.numpy()] == pipeline.predict(texts)
    model = keras.saving.load_model(output / "model.keras")
    for ours, theirs in zip(model.weights, pipeline.generator.model.weights, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(ours), keras.ops.convert_to_numpy(theirs))


def test_logs_can_be_read(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = finished[0] / "translation_output" / "logs"
    train = EventAccumulator(str(logs / "train")).Reload()
    assert {"epoch_loss", "epoch_token_accuracy", "epoch_learning_rate"} <= set(train.Tags()["tensors"])
    validation = EventAccumulator(str(logs / "validation")).Reload()
    assert [event.step for event in validation.Tensors("epoch_bleu")] == [0, 1]


BAD_INPUT = {
    "missing file": (["--data", "absent.tsv"], "no file absent.tsv"),
    "no tab": (["--data", "one.txt"], "one.txt, line 1"),
    "undecodable": (["--data", "latin.tsv"], "latin.tsv, line 2"),
    "unequal files": (["--data", "one.txt", "two.txt"], "1 lines in one.txt and 2 lines in two.txt"),
    "three files": (["--data", "a", "b", "c"], "take one or two files"),
    "bad validation": ([*SMALL, "--validation", "one.txt"], "one.txt, line 1"),
    "unknown language": (["--target-language", "xx"], "`language` must be one of"),
    "unknown config": (["--config", "huge"], "invalid choice: 'huge'"),
    "no pairs": (["--pairs", "0"], "must be at least 1"),
    "no epochs": ([*SMALL, "--epochs", "0"], "must be at least 1"),
    "small vocabulary": ([*SMALL, "--vocabulary-size", "9"], "`vocabulary_size` must"),
    "output holds other things": ([*SMALL, "--output", "mine"], "mine holds other things"),
    "output is a file": ([*SMALL, "--output", "one.txt"], "one.txt"),
}


@pytest.mark.parametrize("arguments, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(script, folder, monkeypatch, capsys, arguments, message):
    (folder / "one.txt").write_text("no tab here\n")
    (folder / "two.txt").write_text("a\nb\n")
    (folder / "latin.tsv").write_bytes(b"a\tb\nc\t\xe9\n")
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(SystemExit) as error:
        run_in_process(script, monkeypatch, *arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (folder / "translation_output").exists()
    assert [path.name for path in (folder / "mine").iterdir()] == ["thesis.txt"]


def test_finished_run_is_kept(finished, script, monkeypatch, capsys):
    monkeypatch.chdir(finished[0])
    before = (finished[0] / "translation_output" / "metrics.json").read_bytes()
    for epochs in ("2", "3"):
        with pytest.raises(SystemExit):
            run_in_process(script, monkeypatch, *SMALL, "--epochs", epochs)
        assert "--output must be new or an interrupted run" in capsys.readouterr().err
    assert (finished[0] / "translation_output" / "metrics.json").read_bytes() == before


def log_of(output):
    lines = [line.split(",") for line in (output / "log.csv").read_text().splitlines()]
    columns = [lines[0].index(name) for name in ("epoch", "loss", "val_loss")]
    return np.array([[float(line[column]) for column in columns] for line in lines[1:]])


def test_interrupted_run_goes_on_as_if_nothing_had_happened(script, finished, folder, monkeypatch, capsys):
    arguments = [*SMALL, "--epochs", "2", "--output", "parts"]
    monkeypatch.setattr(script, "export", lambda *arguments: None)
    monkeypatch.setitem(script.RECIPES, "numbers", script.RECIPES["numbers"]._replace(**SIZES))

    class Interrupted(kt.training.BleuScore):
        def on_train_batch_end(self, batch, logs=None):
            if self.score is not None:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kt.training, "BleuScore", Interrupted)
        with pytest.raises(SystemExit) as error:
            run_in_process(script, monkeypatch, *arguments)
    assert error.value.code == 130
    assert "The same command goes on" in capsys.readouterr().err
    assert not (folder / "parts" / "metrics.json").exists()
    assert len(log_of(folder / "parts")) == 1
    run_in_process(script, monkeypatch, *arguments)
    assert "Going on after epoch 1, batch 0." in capsys.readouterr().out
    whole = finished[0] / "translation_output"
    np.testing.assert_allclose(log_of(folder / "parts"), log_of(whole), rtol=0, atol=1e-5)
    models = [kt.pipelines.load(output / "pipeline").generator.model for output in (whole, folder / "parts")]
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_subwords_are_scored_as_words(script, folder, monkeypatch):
    pairs = [(f"a hou@@ se {i % 7}", f"ein spiel@@ haus steht dort {i % 7}") for i in range(40)]
    for side, name in enumerate(("train.en", "train.de")):
        (folder / name).write_text("".join(f"{pair[side]}\n" for pair in pairs))
    seen = []
    monkeypatch.setattr(
        kt.pipelines.Pipeline, "predict", lambda self, texts: ["ein spielhaus steht dort 3"] * len(texts)
    )
    monkeypatch.setattr(script, "train_model", lambda *arguments: seen.append(arguments[3:5]) or [])
    for name in ("draw_curves", "export"):
        monkeypatch.setattr(script, name, lambda *arguments: None)
    files = ["train.en", "train.de"]
    arguments = ["--data", *files, "--validation", *files, "--tokenizer", "subwords", "--config", "numbers"]
    run_in_process(script, monkeypatch, *arguments)
    ((scored, tokenize),) = seen
    assert tokenize == "none"
    assert scored[:2] == [
        ("a hou@@ se 0", "ein spielhaus steht dort 0"),
        ("a hou@@ se 1", "ein spielhaus steht dort 1"),
    ]
    metrics = json.loads((folder / "translation_output" / "metrics.json").read_text())
    assert metrics["exact_match"] == sum(i % 7 == 3 for i in range(40)) / 40
    assert 50 < metrics["bleu"] < 100
