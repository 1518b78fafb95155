"""Tokenizers of checkpoint directories, held to those that transformers makes of the same files."""

import json

import numpy as np
import pytest
from reference_tokenizers import (
    write_byte_pairs,
    write_clip,
    write_gemma,
    write_json,
    write_llama,
    write_marian,
    write_t5,
    write_word_pieces,
)

import keras_transformer as kt

TEXTS = [
    "A man reads.", "", "  two  spaces ", "Café  naïve\n x", "日本 🙂 ẞ", "don't <mask> it", "a</s>b <s> c",
    "ＡＢＣ ﬁ ① Ünïcödé\u0301", "x\u00a0y\u2003z\t\ttab\r\n\r\n\n\nend", "[MASK] [CLS]x", "<|endoftext|> a", "▁a ▁",
    "THE MAN'S 1,234.5", "<extra_id_0> b <extra_id_99>", "<0x41>", "zzqq\x00\ufffd", ">>deu<< a cat",
    ">>xyz<<a <unk> x", "<new> word<new>", "'quoted'  .",
]  # fmt: skip
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
NEW = {"content": "<new>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False, "special": False}
EXTRA = [f"<extra_id_{i}>" for i in range(100)]
LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}

# name -> (what writes the vocabulary, `model_type`, `tokenizer_config.json`)
KINDS = {
    "gpt2": (write_byte_pairs, "gpt2", {"model_max_length": 1024}),
    "gpt2, no config": (write_byte_pairs, "gpt2", None),
    "gpt2, space first": (write_byte_pairs, "gpt2", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
    "qwen2": (write_byte_pairs, "qwen2", {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None}),
    "roberta": (lambda path: write_byte_pairs(path, ROBERTA), "roberta", {}),
    "bart": (lambda path: write_byte_pairs(path, ROBERTA), "bart", {"tokenizer_class": "BartTokenizer"}),
    "clip": (write_clip, "clip", None),
    "bert": (write_word_pieces, "bert", {"do_lower_case": True, "clean_up_tokenization_spaces": True}),
    "bert, cased": (lambda path: write_word_pieces(path, False), "bert", {"do_lower_case": False}),
    "distilbert": (
        write_word_pieces,
        "distilbert",
        {"tokenizer_class": "DistilBertTokenizer", "strip_accents": False, "tokenize_chinese_chars": False},
    ),
    "t5": (write_t5, "t5", {"tokenizer_class": "T5Tokenizer", "extra_ids": 10, "clean_up_tokenization_spaces": True}),
    "t5, no config": (write_t5, "t5", None),
    "t5, as published": (
        write_t5,
        "t5",
        {"additional_special_tokens": EXTRA, "extra_ids": 100, "eos_token": "</s>", "pad_token": "<pad>"},
    ),
    "llama": (write_llama, "llama", LLAMA),
    "llama, legacy": (write_llama, "llama", {**LLAMA, "legacy": True, "add_eos_token": True, "add_bos_token": False}),
    "llama, no space": (write_llama, "llama", {**LLAMA, "add_prefix_space": False}),
    "gemma": (write_gemma, "gemma", {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}),
    "marian": (write_marian, "marian", {"tokenizer_class": "MarianTokenizer", "source_lang": "en"}),
}


def write(name, directory):
    make, model_type, settings = KINDS[name]
    vocabulary = make(directory)
    write_json(directory, "config.json", {"model_type": model_type})
    if settings is not None:
        write_json(directory, "tokenizer_config.json", settings)
    return vocabulary


def theirs(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def assert_same(tokenizer, reference):
    for text in TEXTS:
        ids = reference(text)["input_ids"]
        assert tokenizer.encode_batch([text])[0].ids == ids, text
        assert tokenizer.decode_batch([ids]) == [reference.decode(ids, skip_special_tokens=True)], text


@pytest.mark.filterwarnings("ignore:Recommended")
@pytest.mark.parametrize("name", KINDS)
def test_encodings_and_decodings_are_those_of_transformers(name, tmp_path):
    write(name, tmp_path)
    tokenizer, reference = kt.pipelines.read_tokenizer(tmp_path), theirs(tmp_path)
    assert_same(tokenizer, reference)
    assert tokenizer.encode_batch(TEXTS)[0].ids == reference(TEXTS[0])["input_ids"]
    if name != "clip":  # Which writes nothing, and so may keep what space it likes around a text.
        random = np.random.default_rng(0)
        for ids in random.integers(0, len(reference), (20, 12)).tolist():
            assert tokenizer.decode_batch([ids]) == [reference.decode(ids, skip_special_tokens=True)]


@pytest.mark.parametrize("name", ["gpt2", "roberta", "bert", "t5", "llama", "qwen2"])
def test_what_transformers_saves_reads_the_same(name, tmp_path):
    write(name, tmp_path / "old")
    reference = theirs(tmp_path / "old")
    reference.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer.json").is_file()
    assert_same(kt.pipelines.read_tokenizer(tmp_path / "new"), reference)


@pytest.mark.parametrize("name", ["gpt2", "roberta", "bert, cased", "llama"])
@pytest.mark.parametrize("place", ["added_tokens_decoder", "added_tokens.json"])
def test_added_and_special_tokens(name, place, tmp_path):
    vocabulary = write(name, tmp_path)
    size = vocabulary.get_piece_size() if name == "llama" else len(vocabulary)
    settings = {**(KINDS[name][2] or {}), "pad_token": "<new pad>"}
    if place == "added_tokens.json":
        write_json(tmp_path, "added_tokens.json", {"<new>": size, "<new pad>": size + 1})
        write_json(tmp_path, "special_tokens_map.json", {"additional_special_tokens": ["<new>"], "mask_token": {**NEW}})
    else:
        pad = {**NEW, "content": "<new pad>", "special": True}
        settings["added_tokens_decoder"] = {str(size + 1): pad, str(size): NEW}
    write_json(tmp_path, "tokenizer_config.json", settings)
    tokenizer = kt.pipelines.read_tokenizer(tmp_path)
    assert_same(tokenizer, theirs(tmp_path))
    assert [tokenizer.token_to_id(token) for token in ("<new>", "<new pad>")] == [size, size + 1]


def test_tokens_that_do_not_fit_their_ids(tmp_path):
    size = len(write("gpt2", tmp_path))
    write_json(tmp_path, "added_tokens.json", {"<new>": size + 3})
    with pytest.raises(ValueError, match=f"'<new>' must have the id {size + 3}, and would have {size}"):
        kt.pipelines.read_tokenizer(tmp_path)


def test_a_tokenizer_whose_class_is_not_known_is_refused(tmp_path):
    write("gpt2", tmp_path)
    write_json(tmp_path, "tokenizer_config.json", {"tokenizer_class": "BlenderbotTokenizer"})
    with pytest.raises(ValueError, match="`tokenizer_class` must be one of .*'GPT2Tokenizer'.*'BlenderbotTokenizer'"):
        kt.pipelines.read_tokenizer(tmp_path)


def test_llama_without_a_word_on_its_beginning_is_warned_of(tmp_path):
    write_llama(tmp_path)
    with pytest.warns(UserWarning, match="does not say `add_bos_token`, so no text begins with '<s>'"):
        kt.pipelines.read_tokenizer(tmp_path)


DAMAGES = {
    "merges.txt": ("gpt2", b"#version: 0.2\na b c\n", "merges.txt, line 2: a line must have two parts"),
    "merges.txt, unknown": ("gpt2", "日 本\n".encode(), "must fit each other"),
    "vocab.json": ("gpt2", b"{", "vocab.json"),
    "vocab.txt": ("bert", b"\xff\xfe", "vocab.txt must be UTF-8"),
    "spiece.model": ("t5", b"no model at all", "spiece.model must be a SentencePiece model"),
    "source.spm": ("marian", b"no model at all", "must be a SentencePiece model"),
    "tokenizer.json": ("gpt2", b'{"version": "1.0"}', "tokenizer.json must be what `tokenizers` writes"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files_are_named(case, tmp_path):
    name, content, message = DAMAGES[case]
    write(name, tmp_path)
    (tmp_path / case.partition(",")[0]).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        kt.pipelines.read_tokenizer(tmp_path)


def test_all_files_that_would_do_are_listed(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({}))  # Alone, it is of no use.
    with pytest.raises(FileNotFoundError) as error:
        kt.pipelines.read_tokenizer(tmp_path)
    for name in ("tokenizer.json", "source.spm with target.spm and vocab.json", "vocab.json with merges.txt",
                 "vocab.txt", "spiece.model", "tokenizer.model"):  # fmt: skip
        assert name in str(error.value)
