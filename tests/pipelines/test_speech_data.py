"""Recordings read from every format, with what cannot be read named; frames that padding does not change."""

import io
import re
import struct
import tarfile
import warnings

import keras
import numpy as np
import pytest
import soundfile
import tensorflow as tf

import keras_transformer as kt
from keras_transformer.pipelines import (
    CepstrumReader,
    Recording,
    WaveReader,
    change_speed,
    error_rate,
    read_recordings,
    speech_batches,
    split_recordings,
)


def tone(seconds=0.3, pitch=440, rate=8000):
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)).astype("float32")


def write_cepstra(path, frames):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(">i", frames.size) + frames.astype(">f4").tobytes())


def digits(folder):
    for name, pitch in (("3_ann_0", 300), ("3_ann_11", 310), ("0_bob_2", 500)):
        soundfile.write(folder / f"{name}.wav", tone(pitch=pitch), 8000)
    return [("0_bob_2.wav", "zero", "bob"), ("3_ann_0.wav", "three", "ann"), ("3_ann_11.wav", "three", "ann")]


def table(folder):
    (folder / "kim").mkdir()
    soundfile.write(folder / "kim" / "1.wav", np.stack([tone(rate=16000)] * 2, axis=-1), 16000)
    soundfile.write(folder / "2.flac", tone(), 8000)
    (folder / "transcripts.tsv").write_text("2.flac\tgood  day\n\nkim/1.wav\ttschüss\n", encoding="utf-8")
    return [("2.flac", "good day", ""), ("kim/1.wav", "tschüss", "kim")]


def sphinx(folder):
    (folder / "etc").mkdir()
    lines = "YES (an1-fash-b)\n<s> U M  SIX </s> (an2-mk-b)\n"
    (folder / "etc" / "an4_train.transcription").write_text(lines)
    write_cepstra(folder / "feat" / "clstk" / "fash" / "an1-fash-b.mfc", np.arange(39.0).reshape(3, 13))
    write_cepstra(folder / "feat" / "clstk" / "mk" / "an2-mk-b.mfc", np.ones((5, 13)))
    names = ("feat/clstk/fash/an1-fash-b.mfc", "feat/clstk/mk/an2-mk-b.mfc")
    return [(names[0], "YES", "fash"), (names[1], "U M  SIX", "mk")]


def packed(folder, path):
    with tarfile.open(path, "w") as archive:
        archive.add(folder, "./data")
    return path


@pytest.mark.parametrize("make", [digits, table, sphinx])
@pytest.mark.parametrize("as_tar", [False, True])
def test_formats(make, as_tar, tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    expected = make(folder)
    path, prefix = (packed(folder, tmp_path / "all.tar"), "data/") if as_tar else (folder, "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recordings, rate = read_recordings(path)
    found = [(r.name.removeprefix(prefix), r.text, r.speaker) for r in recordings]
    expected = [(name, text, speaker or prefix.rstrip("/")) for name, text, speaker in expected]
    assert found == expected
    assert rate == (None if make is sphinx else 8000)
    if make is sphinx:
        np.testing.assert_array_equal(recordings[0].sound, np.arange(39.0).reshape(3, 13))
    for recording in recordings:
        assert recording.sound.dtype == np.float32
        # What was recorded at 16 kHz in stereo has as many samples now as what was recorded at 8 kHz.
        assert make is sphinx or recording.sound.shape == (2400,)


def test_another_sampling_rate_is_resampled(tmp_path):
    soundfile.write(tmp_path / "1_ann_0.wav", tone(), 8000)
    (recording,), rate = read_recordings(tmp_path, sampling_rate=16000)
    assert rate == 16000 and len(recording.sound) == 4800
    assert np.abs(recording.sound - tone(rate=16000))[200:-200].max() < 0.01


def test_what_cannot_be_read_is_named_and_counted(tmp_path):
    digits(tmp_path)
    (tmp_path / "4_eve_0.wav").write_bytes(b"no wave")
    soundfile.write(tmp_path / "5_eve_0.wav", np.zeros(0), 8000)
    message = r"2 of 5 recordings cannot be read and are left out: 4_eve_0.wav must be a sound.*; 5_eve_0.wav must hold"
    with pytest.warns(UserWarning, match=message):
        recordings, _ = read_recordings(tmp_path)
    assert len(recordings) == 3
    sphinx(tmp_path)
    broken = tmp_path / "feat" / "clstk" / "mk" / "an2-mk-b.mfc"
    broken.write_bytes(broken.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="1 of 2 recordings .*an2-mk-b.mfc must hold 4 bytes"):
        assert len(read_recordings(tmp_path)[0]) == 1


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text)


BAD_DATA = {
    "nothing there": ({}, "absent", FileNotFoundError, "There is nothing at .*absent. Recordings are a folder"),
    "no tar": ({"x.tar": "x"}, "x.tar", ValueError, "x.tar is not a whole tar file.*transcripts.tsv"),
    "unknown format": ({"x.txt": "x"}, "", ValueError, "holds no recordings that can be told.*CMU's AN4"),
    "no tab": ({"transcripts.tsv": "a.wav hi\n"}, "", ValueError, "transcripts.tsv, line 1: .*received 'a.wav hi'"),
    "no transcript": ({"transcripts.tsv": "a.wav\t \n"}, "", ValueError, "line 1: a line must hold the name of a file"),
    "missing file": (
        {"transcripts.tsv": "a.wav\thi\n"},
        "",
        ValueError,
        "None of the 1 .* The first: a.wav is missing",
    ),
    "no name": ({"a.transcription": "YES\n"}, "", ValueError, "line 1: .*in parentheses; received 'YES'"),
}


@pytest.mark.parametrize(("files", "path", "error", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data(files, path, error, message, tmp_path):
    write(tmp_path, files)
    with pytest.raises(error, match=f"(?s){message}"):
        read_recordings(tmp_path / path)


def noise(*lengths, columns=None):
    random = np.random.default_rng(0)
    return [random.uniform(-1, 1, (n,) if columns is None else (n, columns)).astype("float32") for n in lengths]


READERS = {
    "waves": (WaveReader(8000, num_mels=20), noise(4000, 805, 1234, 50), [50, 11, 16, 1], 20),
    "cepstra": (CepstrumReader(5), noise(50, 11, 16, 1, columns=5), [50, 11, 16, 1], 15),
    "no slopes": (CepstrumReader(5, slopes=0), noise(33, 7, columns=5), [33, 7], 5),
}


@pytest.mark.parametrize(("reader", "sounds", "lengths", "width"), READERS.values(), ids=READERS)
def test_padding_gives_frames_of_zeros_and_changes_no_other(reader, sounds, lengths, width):
    batch = reader(sounds)["features"]
    assert batch.shape == (len(sounds), 64, width)
    for i, (row, length) in enumerate(zip(reader.rows(sounds), lengths, strict=True)):
        # A single frame of cepstra is its own mean, and so nothing.
        assert len(row) == length and (row.any() or (length == 1 and isinstance(reader, CepstrumReader)))
        np.testing.assert_allclose(batch[i, :length], row, atol=1e-4)
        assert not batch[i, length:].any()
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(reader))
    np.testing.assert_array_equal(again(sounds)["features"], batch)
    in_graph = reader.in_graph(None)
    longest = max(map(len, sounds))
    padded = np.stack([np.pad(x, [(0, longest + 7 - len(x)), *[(0, 0)] * (x.ndim - 1)]) for x in sounds])
    served = tf.function(in_graph, input_signature=in_graph.signature)(padded)["features"].numpy()
    np.testing.assert_allclose(served[:, : batch.shape[1]], batch, atol=1e-4)
    assert not served[:, batch.shape[1] :].any()


def test_spectra_show_the_pitch_whatever_the_loudness(tmp_path):
    reader = WaveReader(8000, num_mels=40)
    soundfile.write(tmp_path / "low.wav", tone(pitch=300, rate=16000), 16000)
    low, quiet, high = reader.rows([str(tmp_path / "low.wav"), 0.01 * tone(pitch=300), tone(pitch=2000)])
    assert low.mean(axis=0).argmax() == quiet.mean(axis=0).argmax() < high.mean(axis=0).argmax()
    np.testing.assert_allclose(low[2:-4].mean(axis=0), quiet[2:-4].mean(axis=0), atol=0.05)


def test_cepstra_are_normalized_and_have_their_slopes():
    ramp = np.arange(20.0)[:, None] * [1, 100, -3] + [5, 0, 0]
    row = CepstrumReader(3).rows([ramp])[0]
    np.testing.assert_allclose(row[:, :3].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(row[:, :3].std(axis=0), 1, atol=1e-3)
    np.testing.assert_allclose(row[3:-3, 3:6], np.diff(row[:, :3], axis=0)[3:-2], atol=1e-4)
    with pytest.raises(ValueError, match=r"must be an array \[frames, 3\] of finite numbers; received .* \(4, 2\)"):
        CepstrumReader(3)([np.zeros((4, 2))])


def test_parts_of_recordings():
    names = [f"{d}_{s}_{i}.wav" for d in (3, 8) for s in ("ann", "bob", "eve") for i in (0, 4, 5, 9, 10, 49)]
    recordings = [Recording(name, None, name[0], name.split("_")[1]) for name in names]

    def numbers(part):
        return {int(re.search(r"_(\d+)\.", recording.name)[1]) for recording in part}

    train, held_out = split_recordings(recordings, "test")
    assert (numbers(train), numbers(held_out)) == ({5, 9, 10, 49}, {0, 4}) and len(train + held_out) == 36
    train, held_out = split_recordings(recordings, "tuning")
    assert (numbers(train), numbers(held_out)) == ({10, 49}, {5, 9})
    train, held_out = split_recordings(recordings, "speakers")
    assert len({r.speaker for r in held_out}) == 1 and not {r.speaker for r in held_out} & {r.speaker for r in train}
    train, held_out = split_recordings(recordings, "recordings", share=0.25)
    assert len(held_out) == 9 and not set(held_out) & set(train)
    for part, chosen, message in (
        ("all", recordings, "must be one of 'speakers', 'recordings', 'test', 'tuning'; received 'all'"),
        ("test", [Recording("a.wav", None, "x", "y")], "a part of the Free Spoken Digit Dataset; received a.wav"),
        ("tuning", train[:0], "'tuning' would leave 0 recordings to train on and 0 held out"),
        ("speakers", recordings[:2], "Two speakers or more are needed .* received 1"),
    ):
        with pytest.raises(ValueError, match=message):
            split_recordings(chosen, part)


def test_error_rates():
    assert error_rate(["a b c", "d"], ["a x c", ""]) == 0.5
    assert error_rate(["ab"], ["äb"], letters=True) == 0.5
    assert error_rate(["one"], ["one two three"]) == 2
    for texts, answers in (([], []), (["a"], []), ([" "], ["a"])):
        with pytest.raises(ValueError, match="`texts` and `answers` must be as many, with a word among them"):
            error_rate(texts, answers)


def test_speech_that_is_faster_is_shorter_and_higher():
    fast, slow = change_speed(tone(0.5), 1.25), change_speed(tone(0.5), 0.8)
    assert (len(fast), len(slow)) == (3200, 5000)
    for sound, pitch in ((fast, 550), (slow, 352)):
        assert np.abs(np.fft.rfft(sound)).argmax() * 8000 / len(sound) == pytest.approx(pitch, rel=0.01)
    frames = np.arange(30.0).reshape(10, 3).astype("float32")
    stretched = change_speed(frames, 0.5)
    assert stretched.shape == (20, 3)
    np.testing.assert_array_equal(stretched[[0, -1]], frames[[0, -1]])


def test_batches_are_those_of_both_losses():
    lengths = [40, 20, 70, 33, 10]
    frames, ids = noise(*lengths, columns=4), [[4], [5, 6], [7, 8, 9, 4], [5], [6, 6]]
    batches = speech_batches(frames, ids, frames_per_batch=128, seed=1)
    epochs = [[(x, y) for x, y in batches.as_numpy_iterator()] for _ in range(2)]
    assert len(epochs[0]) == int(batches.cardinality())
    for epoch in epochs:
        found = {}
        for inputs, labels in epoch:
            assert inputs["features"].shape[1] % 32 == 0 and np.prod(inputs["features"].shape[:2]) <= 128
            rows = zip(inputs["features"], inputs["target_ids"], labels["logits"], labels["ctc_logits"], strict=True)
            for features, target, said, spelled in rows:
                text = [i for i in spelled.tolist() if i]
                assert [i for i in target.tolist() if i] == [1, *text]
                assert [i for i in said.tolist() if i] == [*text, 2]
                found[int(features.any(axis=-1).sum())] = text
        assert found == dict(zip(lengths, ids, strict=True))
    with pytest.raises(ValueError, match="`frames_per_batch` must be at least 96.*number 2.*received 64"):
        speech_batches(frames, ids, 64)
    with pytest.raises(ValueError, match="must have one entry for each sound, at least one; received 5 and 4"):
        speech_batches(frames, ids[1:], 128)


def test_a_pipeline_of_sounds_is_saved_and_exported(tmp_path):
    tokenizer = kt.pipelines.train_subwords(["yes", "no"])
    model = kt.models.speech_recognizer(6, 20, dim=8, depth=1, num_heads=2, hidden_dim=8)
    generator = kt.generation.Generator(model, 1, 2, jit_compile=False)
    pipeline = kt.pipelines.Pipeline(generator, WaveReader(8000, num_mels=20), tokenizer, max_new_tokens=3)
    sounds = noise(4000, 801)
    texts = pipeline.predict(sounds)
    assert pipeline.predict(sounds[1:]) == texts[1:]
    pipeline.save(tmp_path / "pipeline")
    assert kt.pipelines.load(tmp_path / "pipeline").predict(sounds) == texts
    pipeline.export(tmp_path / "saved_model")
    recognize = tf.saved_model.load(tmp_path / "saved_model").signatures["serving_default"]
    padded = np.stack([sounds[0], np.pad(sounds[1], (0, 3199))])
    assert [text.decode() for text in recognize(sounds=tf.constant(padded))["text"].numpy()] == texts


def test_what_ctc_writes():
    """A model whose frames say what their one feature counts: blanks part equal tokens, repetitions are one token."""
    tokenizer = kt.pipelines.train_subwords(["yes", "no"])  # 4 is "no", 5 is "yes".
    features = keras.Input((None, 1), name="features")
    target_ids = keras.Input((None,), dtype="int32", name="target_ids")
    logits = keras.layers.Lambda(lambda x: keras.ops.one_hot(keras.ops.cast(x[..., 0], "int32"), 6))(features)
    model = keras.Model([features, target_ids], {"ctc_logits": logits, "logits": target_ids})

    def read(sounds):
        return {"features": np.array(sounds, "float32")[..., None]}

    sounds = [[4, 4, 0, 4, 5, 5], [0, 5, 0, 0, 0, 0], [0] * 6]
    assert kt.pipelines.ctc_texts(model, read, tokenizer, sounds, batch_size=2) == ["no no yes", "yes", ""]


def test_the_formats_are_listed():
    from keras_transformer.pipelines.speech_data import FORMATS

    assert all(word in FORMATS for word in ("transcripts.tsv", "{digit}_{speaker}_{number}.wav", ".mfc", ".tar"))
    assert re.search(r"github.com/\S+", FORMATS) and io.StringIO(FORMATS).readline().startswith("a folder")
