"""SavedModels that take raw inputs and return texts, loaded in a fresh process that knows nothing of Keras."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from reference_checkpoints import make
from reference_tokenizers import write_byte_pairs, write_gemma, write_json, write_marian, write_word_pieces

import keras_transformer as kt
from keras_transformer.pipelines.graph_readers import GraphImages

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}
SQUARE = {"height": 16, "width": 16}
TEXTS = ["A man reads", "Two dogs run in  the park, don't they?", "naïve\n🙂"]
IMAGES = np.random.default_rng(0).integers(0, 255, (3, 40, 31, 3), "uint8")
SOUNDS = 0.2 * np.sin(np.arange(16000) * np.array([[0.03], [0.05]])).astype("float32")


def marian(directory):
    vocabulary = write_marian(directory)
    sizes = {"vocab_size": len(vocabulary), "d_model": 32, "max_position_embeddings": 64}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    pad = vocabulary["<pad>"]
    make("MarianMTModel", {**sizes, "eos_token_id": 0, "pad_token_id": pad, "decoder_start_token_id": pad}, directory)
    texts = [*TEXTS, ">>deu<< the train", ""]
    return texts, {"text": texts}


def bert(directory):
    size = len(write_word_pieces(directory))
    labels = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    make("BertForSequenceClassification", {**SIZES, "vocab_size": size, **labels}, directory)
    return TEXTS, {"text": TEXTS}


def paligemma(directory):
    pieces = write_gemma(directory)
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "bos_token": "<bos>"}
    write_json(directory, "tokenizer_config.json", settings)
    write_json(directory, "preprocessor_config.json", {"image_processor_type": "SiglipImageProcessor", "size": SQUARE})
    text = {**SIZES, "model_type": "gemma", "vocab_size": 500, "num_key_value_heads": 1, "head_dim": 8}
    configuration = {"text_config": text, "vision_config": {"model_type": "siglip_vision_model", **VISION}}
    fields = {"image_token_index": pieces.piece_to_id("<image>"), "projection_dim": 32}
    make("PaliGemmaForConditionalGeneration", {**configuration, **fields}, directory)
    texts = ["caption en", "", "<image>what is  it?"]
    return list(zip(IMAGES, texts, strict=True)), {"images": IMAGES.tolist(), "text": texts}


def whisper(directory):
    size = len(write_byte_pairs(directory, ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>")))
    sizes = {"vocab_size": size, "num_mel_bins": 80, "d_model": 32, "max_source_positions": 50}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    make("WhisperForConditionalGeneration", {**sizes, **ids, "begin_suppress_tokens": None}, directory)
    values = {"feature_extractor_type": "WhisperFeatureExtractor", "chunk_length": 1}
    write_json(directory, "preprocessor_config.json", values)
    settings = {**ids, "lang_to_id": {"<|en|>": 2, "<|de|>": 3}, "is_multilingual": True, "suppress_tokens": [0, 7]}
    write_json(directory, "generation_config.json", settings)
    short = np.concatenate([SOUNDS[:, :9000], np.zeros_like(SOUNDS[:, :3000])], axis=1)
    return list(SOUNDS[:, :9000]), {"sounds": short.tolist()}


KINDS = [marian, bert, paligemma, whisper]
LOADER = """
import json, sys
import tensorflow as tf, tensorflow_text
kinds = {"text": "string", "images": "uint8", "sounds": "float32"}
found = {}
for directory, feed in json.load(open(sys.argv[1])).items():
    answer = tf.saved_model.load(directory).signatures["serving_default"]
    feed = {name: tf.constant(value, kinds[name]) for name, value in feed.items()}
    found[directory] = [text.decode() for text in answer(**feed)["text"].numpy()]
assert "keras_transformer" not in sys.modules
json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a SavedModel is a TensorFlow graph")
def test_a_fresh_process_gives_the_same_texts(tmp_path):
    feeds, wanted = {}, {}
    for kind in KINDS:
        raw_inputs, feed = kind(tmp_path / kind.__name__)
        options = {} if kind is bert else {"jit_compile": False}
        pipeline = kt.pipelines.load_pretrained(tmp_path / kind.__name__, max_new_tokens=5, **options)
        exported = str(tmp_path / kind.__name__ / "saved model")
        pipeline.export(exported)
        feeds[exported], wanted[exported] = feed, pipeline.predict(raw_inputs)
    write_json(tmp_path, "feeds.json", feeds)
    (tmp_path / "load.py").write_text(LOADER)
    command = [sys.executable, tmp_path / "load.py", tmp_path / "feeds.json", tmp_path / "found.json"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    assert json.loads((tmp_path / "found.json").read_text()) == wanted
    assert all(any(texts) for texts in wanted.values())
    with pytest.raises(FileExistsError, match="vocab.txt"):
        kt.pipelines.load_pretrained(tmp_path / "bert").export(tmp_path / "bert")


RESIZED = [{"size": (32, 24)}, {"size": 30, "crop": (40, 28)}, {"size": (28, 28), "background": (9, 5, 3)}]


@pytest.mark.parametrize("resample", [1, 2, 3])
@pytest.mark.parametrize("options", RESIZED)
def test_images_of_a_graph_are_within_a_shade(resample, options):
    preprocessor = kt.pipelines.ImagePreprocessor(resample=resample, mean=0.5, std=0.25, **options)
    y, x = np.mgrid[:150, :200]
    waves = np.stack([127 + 110 * np.sin(x / (3 + i) + y / (7 - i)) for i in range(3)], axis=-1)
    for image in (waves, waves[:, :90], waves[:22, :26]):
        image = image.astype("uint8")[None]
        shades = 255 * 0.25 * np.abs(GraphImages(preprocessor)(image)["images"].numpy() - preprocessor(image))
        assert shades.max() < 1.01 and shades.mean() < 0.1


def test_filters_that_tensorflow_does_not_have_are_named():
    with pytest.raises(ValueError, match="`resample` must be one of .1, 2, 3. for TensorFlow; received 5"):
        GraphImages(kt.pipelines.ImagePreprocessor(size=(8, 8), resample=5))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a SavedModel is a TensorFlow graph")
def test_sampling_parameters_are_inputs(tmp_path):
    import tensorflow as tf

    tokenizer = kt.pipelines.train_word_piece(["one two three four five six seven"], 40)
    model = kt.models.causal_lm(tokenizer.vocabulary_size(), dim=8, depth=1, num_heads=2, hidden_dim=8)
    options = {"start_id": 1, "end_id": 2, "jit_compile": False}
    texts = ["one two", "three"]

    def pipeline(sampler):
        return kt.pipelines.Pipeline(kt.generation.Generator(model, sampler=sampler, **options), *[tokenizer] * 2, 6)

    own = pipeline(kt.generation.Sampling(0.9, top_k=20, seed=3))
    own.export(tmp_path / "sampled")
    loaded = tf.saved_model.load(tmp_path / "sampled")

    def sample(**values):
        dtypes = {"temperature": "float32", "top_p": "float32"}
        values = {name: tf.constant(value, dtypes.get(name, "int32")) for name, value in values.items()}
        return [text.decode() for text in loaded.sample(tf.constant(texts), **values)["text"].numpy()]

    assert sample() == own.predict(texts)
    assert sample(top_k=1) == pipeline("greedy").predict(texts)
    given = {"temperature": 1.5, "top_p": 0.7, "seed": 5}
    assert sample(top_k=0, **given) == pipeline(kt.generation.Sampling(**given)).predict(texts)
    assert len({str(sample(seed=-1, temperature=9.0, top_k=0)) for _ in range(3)}) > 1
    assert sample(max_new_tokens=1) != sample()
    signature = loaded.signatures["sample"].structured_input_signature[1]
    assert set(signature) == {"text", "temperature", "top_k", "top_p", "max_new_tokens", "seed"}
    with pytest.raises(tf.errors.InvalidArgumentError, match="`temperature` must be positive"):
        sample(temperature=0.0)


def test_what_is_no_saved_pipeline_of_this_version_is_named(tmp_path):
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(FileNotFoundError, match="holds a SavedModel, which `export` has written and `tf.saved_model"):
        kt.pipelines.load(tmp_path)
    write_json(tmp_path, "pipeline.json", {"format": 99, "versions": {"keras_transformer": "9.0", "keras": "5.0"}})
    written = "has format 99, written by keras_transformer 9.0 and keras 5.0"
    with pytest.raises(ValueError, match=f"must hold a pipeline of format 1, which this version .* {written}"):
        kt.pipelines.load(tmp_path)
    write_json(tmp_path, "pipeline.json", ["no pipeline"])
    with pytest.raises(ValueError, match="must hold a saved pipeline; .*pipeline.json is none"):
        kt.pipelines.load(tmp_path)


def test_what_other_versions_wrote_and_this_one_cannot_read_is_told_so(tmp_path):
    versions = {"keras_transformer": kt.__version__, "keras": "99.0"}
    write_json(tmp_path, "pipeline.json", {"format": 1, "versions": versions})
    (tmp_path / "model.keras").touch()
    with pytest.raises(ValueError, match=f"that .* keras {keras.__version__} can read; .*, written by .* keras 99.0: "):
        kt.pipelines.load(tmp_path)
