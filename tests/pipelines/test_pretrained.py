"""Text to text with a checkpoint's own tokenizer, as transformers does it."""

import pytest
from reference_checkpoints import make
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

import keras_transformer as kt

TEXTS = ["a man reads a book", "two dogs", "a book of two dogs reads a man on a train"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def write_tokenizer(directory, template):
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=SPECIAL))
    ids = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    tokenizer.enable_truncation(3)  # What a pipeline must not do.
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    return tokenizer


def theirs(model, tokenizer, count, **options):
    import torch

    results = []
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        new = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, **options)[0].tolist()
        results.append(tokenizer.decode(new if model.config.is_encoder_decoder else new[len(ids) :]))
    return results


def test_going_on_with_a_text(tmp_path):
    sizes = {"vocab_size": 16, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 40}
    model = make("GPT2LMHeadModel", {**sizes, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, tmp_path)
    tokenizer = write_tokenizer(tmp_path, "<s> $A")
    pipeline = kt.pipelines.load_pretrained(tmp_path, max_new_tokens=7)
    assert pipeline.predict(TEXTS, batch_size=2) == theirs(model, tokenizer, 7)
    with pytest.raises(ValueError, match="`texts` must be a list of strings"):
        pipeline.predict("one text")


def test_one_text_to_another(tmp_path):
    sizes = {"vocab_size": 16, "d_model": 32, "max_position_embeddings": 40, "pad_token_id": 0}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    special = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    model = make("BartForConditionalGeneration", {**sizes, **special}, tmp_path)
    tokenizer = write_tokenizer(tmp_path, "<s> $A </s>")
    model.final_logits_bias[:, : len(SPECIAL)] = -10.0  # Words, and neither an end at once nor ids without a word.
    model.final_logits_bias[:, tokenizer.get_vocab_size() :] = -10.0
    model.save_pretrained(tmp_path)
    pipeline = kt.pipelines.load_pretrained(tmp_path, max_new_tokens=7)
    assert pipeline.predict(TEXTS) == theirs(model, tokenizer, 7)
    assert all(pipeline.predict(TEXTS))


def test_what_a_pipeline_cannot_do_without(tmp_path):
    sizes = {"vocab_size": 16, "n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 40}
    make("GPT2LMHeadModel", {**sizes, "bos_token_id": 1, "eos_token_id": 2}, tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        kt.pipelines.load_pretrained(tmp_path)
    write_tokenizer(tmp_path, "$A")
    with pytest.raises(ValueError, match="`max_new_tokens` must be a positive integer; received 0"):
        kt.pipelines.load_pretrained(tmp_path, max_new_tokens=0)
    with pytest.raises(ValueError, match="number 1 has none"):
        kt.pipelines.load_pretrained(tmp_path).predict(["a", ""])
