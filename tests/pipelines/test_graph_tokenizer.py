"""Tokenizers in a TensorFlow graph, held to those of the checkpoint; and what has no counterpart there."""

import json

import numpy as np
import pytest
import tensorflow as tf
from reference_tokenizers import (
    SENTENCES,
    write_byte_pairs,
    write_clip,
    write_gemma,
    write_json,
    write_llama,
    write_marian,
    write_t5,
    write_word_pieces,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

import keras_transformer as kt
from keras_transformer.pipelines.graph_decoder import GraphDecoder
from keras_transformer.pipelines.graph_tokenizer import GraphTokenizer

ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
MASK = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
# name -> (what writes the vocabulary, `tokenizer_config.json`, whether it writes texts)
KINDS = {
    "gpt2": (write_byte_pairs, {"tokenizer_class": "GPT2Tokenizer"}, True),
    "gpt2, space first": (write_byte_pairs, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, True),
    "qwen2": (write_byte_pairs, {"tokenizer_class": "Qwen2Tokenizer"}, True),
    "roberta": (lambda path: write_byte_pairs(path, ROBERTA), {"mask_token": MASK}, True),
    "clip": (write_clip, {}, False),
    "bert": (write_word_pieces, {"do_lower_case": True}, False),
    "bert, cased": (lambda path: write_word_pieces(path, False), {"do_lower_case": False}, False),
    "t5": (write_t5, {"tokenizer_class": "T5Tokenizer", "clean_up_tokenization_spaces": True}, True),
    "llama": (write_llama, {**LLAMA, "legacy": False}, True),
    "llama, legacy": (write_llama, {**LLAMA, "legacy": True, "add_eos_token": True}, True),
    "gemma": (write_gemma, {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}, True),
    "marian": (write_marian, {}, True),
}
SCRAPS = [
    "a", "B", " ", "  ", "\n", "é", "日", "🙂", "'s", "1", "٣", "-", "  .", "\u00a0", "e\u0301", "ß", "Σ", "<", "tw",
    "man", "train", "\t", "▁", "ﬀ", "\u200b", "İ", "</s>", "<mask>", "<|endoftext|>", "[SEP]", ">>deu<<", "\x00",
]  # fmt: skip


def assert_same(tokenizer, writes=True):
    random = np.random.default_rng(1)
    texts = [*SENTENCES, *("".join(random.choice(SCRAPS, random.integers(1, 12))) for _ in range(150))]
    tokenize = tf.function(GraphTokenizer.of(tokenizer), autograph=False)
    assert tokenize(tf.constant(texts)).to_list() == [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    if writes:
        rows = random.integers(0, 300, (60, 9)).tolist()
        found = tf.function(GraphDecoder.of(tokenizer), autograph=False)(tf.constant(rows, "int32")).numpy()
        assert [text.decode() for text in found] == tokenizer.decode_batch(rows)


@pytest.mark.parametrize("name", KINDS)
def test_tokens_and_texts_are_those_outside_of_the_graph(name, tmp_path):
    write, settings, writes = KINDS[name]
    write(tmp_path)
    write_json(tmp_path, "tokenizer_config.json", settings)
    assert_same(kt.pipelines.read_tokenizer(tmp_path), writes)


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def llama3(spec):
    spec["model"]["ignore_merges"] = True
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, letters]}
    ids = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    begin, text = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [begin, text], "pair": [text, text], "special_tokens": ids}
    spec["post_processor"] = {"type": "Sequence", "processors": [letters, template]}


def llama2(spec):
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES]}
    spec["pre_tokenizer"] = None


def t5(spec):
    several = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    spec["normalizer"] = {"type": "Sequence", "normalizers": [spec["normalizer"], strip, several]}
    spec["pre_tokenizer"] = spec["pre_tokenizer"]["pretokenizers"][1]


@pytest.mark.filterwarnings("ignore:tokenizer_config.json does not say")
@pytest.mark.parametrize("write, change", [(write_byte_pairs, llama3), (write_llama, llama2), (write_t5, t5)])
def test_other_forms_of_tokenizer_json(write, change, tmp_path):
    write(tmp_path)
    spec = json.loads(kt.pipelines.read_tokenizer(tmp_path).to_str())
    change(spec)
    assert_same(Tokenizer.from_str(json.dumps(spec)))


def byte_pairs(tmp_path):
    write_byte_pairs(tmp_path)
    return kt.pipelines.read_tokenizer(tmp_path)


def with_normalizer(tokenizer):
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Nmt()])


def with_pre_tokenizer(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), tokenizer.pre_tokenizer])


def with_pattern(tokenizer):
    from tokenizers import Regex

    words = pre_tokenizers.Split(Regex(r"\w+(?=\s)|."), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(use_regex=False)])


def with_word(tokenizer):
    tokenizer.add_tokens([AddedToken("<new>", single_word=True)])


REFUSALS = {
    "its normalizer Nmt has no": with_normalizer,
    "its pre-tokenizer Digits has no": with_pre_tokenizer,
    r"its pattern .*\(\?=": with_pattern,
    r"its added token <new> \(single_word\) has no": with_word,
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_has_no_counterpart_is_named(message, tmp_path):
    tokenizer = byte_pairs(tmp_path)
    REFUSALS[message](tokenizer)
    with pytest.raises(ValueError, match=f"cannot be exported: {message}"):
        GraphTokenizer.of(tokenizer)


def test_models_and_decoders_that_have_no_counterpart_are_named(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    with pytest.raises(ValueError, match="its model WordLevel has no"):
        GraphTokenizer.of(words)
    with pytest.raises(ValueError, match="its decoder which parts tokens by spaces has no"):
        GraphDecoder.of(words)
    words.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="its decoder WordPiece has no"):
        GraphDecoder.of(words)
    letters = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    with pytest.raises(ValueError, match="its model BPE without a token for each byte has no"):
        GraphTokenizer.of(letters)


def test_a_difference_is_refused():
    """SentencePiece merges whatever makes a piece, `tokenizers` the pairs that it was given."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + list("manred sbok.A▁") + ["an", "ma", "man"]
    merges = [("a", "n"), ("m", "a"), ("ma", "n")]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True)
    tokenizer = Tokenizer(model)
    assert tokenizer.encode("man", add_special_tokens=False).tokens == ["m", "an"]
    with pytest.raises(ValueError, match="cannot be exported: in a TensorFlow graph, the text 'A man reads a book.'"):
        GraphTokenizer.of(tokenizer)
