"""Tiny random checkpoints written by transformers, and what transformers computes with them."""

import contextlib

import keras
import numpy as np

BASE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DECODER = {**BASE, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
BERT = {**BASE, "max_position_embeddings": 40, "pad_token_id": 0}
GPT2 = {
    "vocab_size": 99,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 40,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
DISTILBERT = {
    "vocab_size": 99, "dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 64, "max_position_embeddings": 40,
}  # fmt: skip

# name -> (architecture, configuration)
TEXT_MODELS = {
    "bert": ("BertModel", BERT),
    "bert, masked": ("BertForMaskedLM", BERT),
    "bert, sequence": ("BertForSequenceClassification", {**BERT, "num_labels": 3}),
    "bert, tokens": ("BertForTokenClassification", {**BERT, "num_labels": 5}),
    "bert, answers": ("BertForQuestionAnswering", BERT),
    "roberta": ("RobertaModel", {**BERT, "pad_token_id": 1, "type_vocab_size": 1}),
    "roberta, masked": ("RobertaForMaskedLM", {**BERT, "pad_token_id": 1, "type_vocab_size": 1}),
    "roberta, sequence": ("RobertaForSequenceClassification", {**BERT, "pad_token_id": 1, "num_labels": 3}),
    "roberta, tokens": ("RobertaForTokenClassification", {**BERT, "pad_token_id": 1, "num_labels": 5}),
    "roberta, answers": ("RobertaForQuestionAnswering", {**BERT, "pad_token_id": 1}),
    "distilbert": ("DistilBertModel", DISTILBERT),
    "distilbert, masked": ("DistilBertForMaskedLM", DISTILBERT),
    "distilbert, sequence": ("DistilBertForSequenceClassification", {**DISTILBERT, "num_labels": 3}),
    "distilbert, tokens": ("DistilBertForTokenClassification", {**DISTILBERT, "num_labels": 5}),
    "distilbert, answers": ("DistilBertForQuestionAnswering", DISTILBERT),
    "gpt2, bare": ("GPT2Model", GPT2),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "llama, bare": ("LlamaModel", DECODER),
    "llama": ("LlamaForCausalLM", DECODER),
    "mistral": ("MistralForCausalLM", {**DECODER, "sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", DECODER),
    "gemma": ("GemmaForCausalLM", {**DECODER, "num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", {**DECODER, "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 12}),
}


def make(architecture, configuration, directory, seed=0):
    """Writes a tiny model with noise on every parameter, so that each one matters, and returns it."""
    import torch
    import transformers

    kind = getattr(transformers, architecture)
    torch.manual_seed(seed)
    with quiet():
        model = kind(kind.config_class(**configuration)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(directory)
    return model


@contextlib.contextmanager
def quiet():
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def text_batch(model, padding, rows=3, length=11, seed=1):
    """Token ids, mask and segments with rows of different lengths, padded on a side or not at all."""
    random = np.random.default_rng(seed)
    ids = random.integers(5, 99, (rows, length)).astype("int32")
    lengths = np.full(rows, length) if padding == "none" else np.array([length, length - 4, 2])[:rows]
    slots = np.arange(length)[None]
    real = slots < lengths[:, None] if padding != "left" else slots >= length - lengths[:, None]
    pad = model.config.pad_token_id or 0
    return {
        "token_ids": np.where(real, ids, pad).astype("int32"),
        "padding_mask": real.astype("int32"),
        "segment_ids": (random.integers(0, 2, ids.shape) * real).astype("int32"),
    }


def expected(model, batch, positions=False):
    """What transformers computes: logits, or hidden states and pooled, as arrays in a dict."""
    import torch

    names = {"token_ids": "input_ids", "padding_mask": "attention_mask", "segment_ids": "token_type_ids"}
    feed = {names[name]: torch.tensor(value).long() for name, value in batch.items()}
    if getattr(model.config, "type_vocab_size", 0) < 2:
        feed.pop("token_type_ids", None)
    if positions:  # As `generate` counts them, from the first real token on.
        feed["position_ids"] = (feed["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        result = model(**feed)
    if "start_logits" in result:
        return {"logits": torch.stack([result.start_logits, result.end_logits], -1).numpy()}
    found = {"logits": result.get("logits"), "hidden_states": result.get("last_hidden_state")}
    found["pooled"] = result.get("pooler_output")
    return {name: value.numpy() for name, value in found.items() if value is not None}


def outputs_of(model, batch):
    """What our model computes, under the same names."""
    names = [x.name for x in model.inputs]
    result = model({name: batch[name] for name in names})
    result = result if isinstance(result, dict) else {"logits": result}
    return {name: keras.ops.convert_to_numpy(value) for name, value in result.items()}


def assert_close(found, wanted, real, tolerance=1e-5):
    """Holds outputs to others within a share of the largest value, those of tokens where these are `real`."""
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        by_token = value.ndim == 3
        value, own = (x[real] if by_token else x for x in (value, found[name]))
        assert np.abs(own - value).max() <= tolerance * np.abs(value).max(), name
