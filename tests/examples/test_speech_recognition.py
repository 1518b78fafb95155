"""The script that recognizes speech, as a user runs it: what it leaves behind, and bad input."""

import json
import sys

import keras
import numpy as np
import pytest
import soundfile
from script_run import load_script, run_script

import keras_transformer as kt

PITCHES = {"low": 300, "middle": 900, "high": 2500}


@pytest.fixture(scope="module")
def script():
    return load_script("speech_recognition")


def write_tones(folder, count):
    """Recordings of one or two tones, each of which is said as the name of its pitch."""
    random, lines = np.random.default_rng(0), []
    folder.mkdir()
    for i in range(count):
        names = random.choice(list(PITCHES), random.integers(1, 3))
        parts = []
        for name in names:
            pitch = PITCHES[name] * random.uniform(0.9, 1.1)
            parts += [random.uniform(0.3, 0.9) * np.sin(2 * np.pi * pitch * np.arange(2000) / 8000), np.zeros(800)]
        sound = np.concatenate(parts)
        soundfile.write(folder / f"{i}.wav", sound + 0.01 * random.normal(size=len(sound)), 8000)
        lines.append(f"{i}.wav\t{' '.join(names)}\n")
    (folder / "broken.wav").write_bytes(b"no sound")
    (folder / "transcripts.tsv").write_text("".join([*lines, "broken.wav\tlow\n"]))


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    """The folder and the printed text of one whole run, with a smaller model and fewer speeds than the recipe has."""
    folder = tmp_path_factory.mktemp("speech_recognition")
    write_tones(folder / "tones", 200)
    small = {"dim": 64, "depth": (1, 1), "hidden_dim": 128, "speeds": (1.0,), "frames": 800, "epochs": 13}
    options = ["--data", "tones", "--recipe", "fsdd", "--held-out", "recordings"]
    return folder, run_script(script, folder, *options, recipe="fsdd", **small)


def test_what_a_run_leaves(finished):
    output = finished[0] / "speech_recognition_output"
    names = "curves.png logs metrics.json model.keras pipeline saved_model sound_1.png sound_2.png sound_3.png"
    assert sorted(path.name for path in output.iterdir()) == names.split()
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["ctc_wer"] < 0.2 and metrics["wer"] < 0.2
    assert metrics["wer"] == pytest.approx(1 - metrics["word_accuracy"]) and len(metrics["val_ctc_wer"]) == 13
    assert metrics["parameters"] == keras.saving.load_model(output / "model.keras").count_params()
    for name in ("curves.png", "sound_1.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_what_a_run_prints(finished):
    printed = finished[1]
    assert "1 of 201 recordings cannot be read and are left out: broken.wav must be a sound file" in printed
    assert "180 recordings to train on, 20 held out (a tenth of the recordings)" in printed
    assert "Epoch 13/13" in printed and "val_ctc_wer" in printed
    assert "saved_model hears:" in printed and printed.count("(said: ") == 5


def test_saved_model_and_pipeline_agree(finished):
    import tensorflow as tf
    import tensorflow_text  # noqa: F401

    output = finished[0] / "speech_recognition_output"
    recordings, _ = kt.pipelines.read_recordings(finished[0] / "tones", 8000)
    pipeline = kt.pipelines.load(output / "pipeline")
    chosen = recordings[:6]
    answers = pipeline.predict([recording.sound for recording in chosen])
    by_ctc = kt.pipelines.ctc_texts(
        pipeline.generator.model, pipeline.source, pipeline.target, [recording.sound for recording in chosen]
    )
    assert sum(answer == recording.text for answer, recording in zip(by_ctc, chosen, strict=True)) >= 4
    sounds = np.zeros((6, max(len(recording.sound) for recording in chosen)), "float32")
    for row, recording in zip(sounds, chosen, strict=True):
        row[: len(recording.sound)] = recording.sound
    served = tf.saved_model.load(output / "saved_model").signatures["serving_default"](sounds=tf.constant(sounds))
    assert [text.decode() for text in served["text"].numpy()] == answers


BAD_INPUT = {
    "no data": ([], "--data must be given: a folder or .tar of recordings. --help tells where"),
    "missing data": (["--data", "absent.tar"], "There is nothing at absent.tar. Recordings are a folder, or a .tar"),
    "unknown format": (["--data", "mine"], "mine holds no recordings that can be told"),
    "no transcript": (["--data", "empty"], "transcripts.tsv, line 1: a line must hold the name of a file"),
    "one speaker": (["--data", "one"], "Two speakers or more are needed to hold one out; received 1"),
    "no digits": (["--data", "one", "--held-out", "test"], "'test' is a part of the Free Spoken Digit Dataset"),
    "unknown recipe": (["--data", "one", "--recipe", "huge"], "invalid choice: 'huge'"),
    "no epochs": (["--data", "one", "--epochs", "0"], "--epochs must be at least 1; received 0"),
    "output holds other things": (["--data", "one", "--output", "mine"], "--output must be a new or an empty"),
}


@pytest.mark.parametrize("arguments, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(script, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    (tmp_path / "empty" / "transcripts.tsv").write_text("a.wav\t\n")
    write_tones(tmp_path / "one", 3)
    monkeypatch.setattr(sys, "argv", ["speech_recognition.py", *arguments])
    with pytest.raises(SystemExit) as error:
        script.main()
    assert error.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "speech_recognition_output").exists()
