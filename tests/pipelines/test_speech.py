"""Sound to text: features, prompts and transcripts are those of transformers."""

import types

import keras
import numpy as np
import pytest
from reference_checkpoints import make, quiet
from reference_tokenizers import write_byte_pairs, write_json

import keras_transformer as kt
from keras_transformer.pipelines.sounds import read_sound

RATE = 16000
FEATURES = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80, "sampling_rate": RATE,
            "hop_length": 160, "n_fft": 400, "chunk_length": 30, "n_samples": 480000, "nb_max_frames": 3000,
            "padding_side": "right", "padding_value": 0.0, "processor_class": "WhisperProcessor",
            "return_attention_mask": False}  # fmt: skip


def sound(seconds, rate=RATE, seed=0):
    """A tone that rises, some noise, and a silence in the middle."""
    t = np.arange(int(seconds * rate)) / rate
    wave = 0.4 * np.sin(2 * np.pi * (200 + 150 * seed + 400 * t) * t)
    wave += 0.01 * np.random.default_rng(seed).normal(size=t.size)
    wave[t.size // 3 : t.size // 2] = 0
    return wave.astype("float32")


@pytest.mark.filterwarnings("error:The preprocessor")
@pytest.mark.parametrize("changes", [{}, {"feature_size": 128}, {"chunk_length": 2, "hop_length": 80, "n_fft": 320}])
def test_features_are_those_of_transformers(changes, tmp_path):
    from transformers import WhisperFeatureExtractor

    write_json(tmp_path, "preprocessor_config.json", {**FEATURES, **changes})
    reference = WhisperFeatureExtractor.from_pretrained(tmp_path)
    preprocessor = kt.pipelines.SoundPreprocessor.from_directory(tmp_path)
    sounds = [sound(1.3), np.zeros(900, "float32"), np.eye(1, 8000, 500, dtype="float64")[0], sound(2.0, seed=1)]
    wanted = reference(sounds, sampling_rate=RATE, return_tensors="np")["input_features"]
    np.testing.assert_allclose(preprocessor(sounds), wanted.transpose(0, 2, 1), atol=1e-4)


def test_files_are_resampled_and_their_channels_averaged(tmp_path):
    import soundfile

    wave = sound(1.0)
    soundfile.write(tmp_path / "same.wav", wave, RATE, subtype="FLOAT")
    np.testing.assert_array_equal(read_sound(tmp_path / "same.wav", RATE), wave)
    soundfile.write(tmp_path / "short.flac", wave, RATE)
    np.testing.assert_allclose(read_sound(str(tmp_path / "short.flac"), RATE), wave, atol=1e-4)
    t = np.arange(44100) / 44100
    tone = np.sin(2 * np.pi * 440 * t)
    soundfile.write(tmp_path / "stereo.wav", np.stack([tone, 0.5 * tone], axis=-1), 44100, subtype="FLOAT")
    found = read_sound(tmp_path / "stereo.wav", RATE)
    expected = 0.75 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert abs(len(found) - RATE) <= 1
    np.testing.assert_allclose(found[500:-500], expected[500 : len(found) - 500], atol=1e-3)


NOT_SOUNDS = {
    "integers": np.zeros(100, "int16"),
    "two channels": np.zeros((100, 2), "float32"),
    "empty": np.zeros(0, "float32"),
    "not a number": np.array([0.0, np.nan]),
}


@pytest.mark.parametrize("name", NOT_SOUNDS)
def test_what_is_no_sound(name):
    with pytest.raises(ValueError, match="A sound must be a path, or a non-empty array of finite floats"):
        read_sound(NOT_SOUNDS[name], RATE)


def test_files_that_cannot_be_read_are_named(tmp_path):
    import soundfile

    (tmp_path / "text.wav").write_text("no sound")
    soundfile.write(tmp_path / "silent.wav", np.zeros(0), RATE)
    for name in ("text.wav", "missing.wav", "silent.wav"):
        with pytest.raises(ValueError, match=f"{name} must"):
            read_sound(tmp_path / name, RATE)


def test_what_is_longer_than_the_window_is_refused(tmp_path):
    import soundfile

    soundfile.write(tmp_path / "long.wav", sound(2.5), RATE)
    preprocessor = kt.pipelines.SoundPreprocessor(seconds=2)
    with pytest.raises(ValueError, match="at most 2 seconds long.*long.wav of 2.5 seconds"):
        preprocessor([tmp_path / "long.wav"])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"feature_extractor_type": "Wav2Vec2FeatureExtractor"}, "`feature_extractor_type`.*Whisper.*'Wav2Vec2"),
        ({**FEATURES, "padding_value": 1.0}, "`padding_value`.*received 1.0"),
        ({**FEATURES, "dither": 0.1}, "`dither`.*received 0.1"),
    ],
)
def test_fields_of_sound_that_are_not_supported_are_named(values, message, tmp_path):
    write_json(tmp_path, "preprocessor_config.json", values)
    with pytest.raises(ValueError, match=message):
        kt.pipelines.SoundPreprocessor.from_directory(tmp_path)


# Ten tokens behind the vocabulary: `START`, two languages, two tasks, `SILENT`, and time stamps.
ADDED = ["<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>"]
SIZE = 390
IDS = {token: SIZE + i for i, token in enumerate(ADDED)}
START, ENGLISH, GERMAN, TRANSLATE, TRANSCRIBE, SILENT = IDS.values()
MANY_LANGUAGES = {
    "decoder_start_token_id": START, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0, "max_length": 40,
    "begin_suppress_tokens": [5, 0], "suppress_tokens": [7, 8, 9], "no_timestamps_token_id": SILENT,
    "is_multilingual": True, "lang_to_id": {"<|en|>": ENGLISH, "<|de|>": GERMAN},
    "task_to_id": {"translate": TRANSLATE, "transcribe": TRANSCRIBE},
    "forced_decoder_ids": [[1, None], [2, TRANSCRIBE]], "return_timestamps": False,
}  # fmt: skip
ONE_LANGUAGE = {
    **{name: MANY_LANGUAGES[name] for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id", "max_length")},
    "begin_suppress_tokens": [5, 0], "no_timestamps_token_id": SILENT, "is_multilingual": False,
    "forced_decoder_ids": [[1, SILENT]],
}  # fmt: skip
OLD = {"decoder_start_token_id": START, "eos_token_id": 0, "pad_token_id": 0,
       "forced_decoder_ids": [[1, GERMAN], [2, TRANSLATE], [3, SILENT]]}  # fmt: skip
# name -> (generation settings, options of the pipeline)
PROMPTS = {
    "detected": (MANY_LANGUAGES, {}),
    "German": (MANY_LANGUAGES, {"language": "de"}),
    "German, translated": (MANY_LANGUAGES, {"language": "<|DE|>", "task": "translate"}),
    "detected, translated": (MANY_LANGUAGES, {"task": "translate"}),
    "detected, nothing forced": ({**MANY_LANGUAGES, "forced_decoder_ids": None}, {}),
    "settings": ({**MANY_LANGUAGES, "language": "en", "task": "translate"}, {}),
    "one language": (ONE_LANGUAGE, {}),
    "old": (OLD, {}),
}
TINY = {
    "vocab_size": 400, "num_mel_bins": 80, "d_model": 32, "max_source_positions": 100, "max_target_positions": 40,
    "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_layers": 2,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "decoder_start_token_id": START, "begin_suppress_tokens": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Whisper of 2 seconds, whose directory is ready but for its generation settings."""
    directory = tmp_path_factory.mktemp("whisper")
    reference = make("WhisperForConditionalGeneration", TINY, directory)
    vocabulary = write_byte_pairs(directory, size=SIZE)
    # What the training stopped short of.
    vocabulary |= {f"Ġfill{i}": len(vocabulary) + i for i in range(SIZE - len(vocabulary))}
    write_json(directory, "vocab.json", vocabulary)
    write_json(directory, "added_tokens.json", {**IDS, "<|0.00|>": SIZE + 6, "<|0.02|>": SIZE + 7})
    write_json(directory, "special_tokens_map.json", {"additional_special_tokens": ADDED, "eos_token": "<|endoftext|>"})
    write_json(directory, "tokenizer_config.json", {"tokenizer_class": "WhisperTokenizer"})
    write_json(directory, "preprocessor_config.json", {**FEATURES, "chunk_length": 2})
    return directory, reference


def with_settings(checkpoint, settings):
    """The checkpoint with these generation settings, as transformers has it."""
    from transformers import GenerationConfig

    directory, reference = checkpoint
    write_json(directory, "generation_config.json", settings)
    reference.generation_config = GenerationConfig.from_pretrained(directory)
    return reference


@pytest.fixture(scope="module")
def model(checkpoint):
    return kt.pretrained.load(checkpoint[0])


SOUNDS = [sound(1.5), sound(0.7, seed=3), sound(2.0, seed=5)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PROMPTS)
def test_decoders_begin_as_in_transformers(name, checkpoint, model):
    import torch

    settings, options = PROMPTS[name]
    reference = with_settings(checkpoint, settings)
    features = kt.pipelines.SoundPreprocessor.from_directory(checkpoint[0])(SOUNDS)
    asked = {key: value.strip("<|>").lower() for key, value in options.items()}
    with quiet():
        wanted = reference.generate(
            torch.tensor(features.transpose(0, 2, 1)), max_new_tokens=1, return_dict_in_generate=True, **asked
        )
    prompt = kt.pipelines.SpeechPrompt.from_directory(checkpoint[0], **options)
    found = keras.ops.convert_to_numpy(prompt(model, features))
    assert found.tolist() == wanted.sequences[:, :-1].tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["detected", "one language"])
def test_tokens_and_transcripts_are_those_of_transformers(name, checkpoint):
    from transformers import AutoProcessor

    settings, options = PROMPTS[name]
    reference = with_settings(checkpoint, settings)
    pipeline = kt.pipelines.load_pretrained(checkpoint[0], max_new_tokens=12, jit_compile=False, **options)
    with quiet():
        processor = AutoProcessor.from_pretrained(checkpoint[0])
        features = processor(SOUNDS, sampling_rate=RATE, return_tensors="pt")["input_features"]
        wanted = reference.generate(features, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    inputs = pipeline.read(SOUNDS)
    new = wanted.sequences[:, inputs["target_ids"].shape[1] :].tolist()
    assert pipeline.answer.generator.generate(inputs, 12).tolist() == new
    texts = processor.batch_decode(new, skip_special_tokens=True)
    assert pipeline.predict(SOUNDS) == texts and all(texts)


def test_time_stamps_are_left_out_of_the_text(checkpoint):
    tokenizer = kt.pipelines.read_tokenizer(checkpoint[0])
    rows = np.array([[SIZE + 6, 40, SIZE + 7, 0, 0]])
    generator = types.SimpleNamespace(pad_id=0, generate=lambda inputs, count: rows)
    answer = kt.pipelines.GeneratedText(generator, tokenizer, max_new_tokens=5)
    assert answer({"features": None}) == [tokenizer.id_to_token(40)]


@pytest.mark.parametrize(
    "settings, options, message",
    [
        (MANY_LANGUAGES, {"language": "fr"}, r"`language` must be one that the checkpoint knows \(de, en\).*'fr'"),
        (MANY_LANGUAGES, {"task": "sing"}, r"`task` must be one .*\(transcribe, translate\).*'sing'"),
        (ONE_LANGUAGE, {"language": "en"}, "must not be given for a checkpoint of one language"),
        ({**MANY_LANGUAGES, "return_timestamps": True}, {}, "`return_timestamps` .* must be false"),
        ({**OLD, "forced_decoder_ids": [[2, TRANSCRIBE]]}, {}, "`forced_decoder_ids` must give the places from 1 on"),
    ],
)
def test_prompts_that_cannot_be(settings, options, message, checkpoint):
    with_settings(checkpoint, settings)
    with pytest.raises(ValueError, match=message):
        kt.pipelines.SpeechPrompt.from_directory(checkpoint[0], **options)
