"""Gemma: LLaMA with scaled embeddings, GeGLU, wide heads, and norms that store what their scale has more than 1."""

import dataclasses

from keras_transformer.pretrained.families import llama
from keras_transformer.pretrained.weights import Stored

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
}
TANH = "gelu_pytorch_tanh"


def attention(fields, **options):
    bias = fields.take("attention_bias", default=False)
    return llama.attention(fields, use_bias=bias, **options)


def feed_forward(fields, name):
    return llama.feed_forward(fields, name=name, default=TANH)


def language_model(fields):
    fields.fill(DEFAULTS)
    _correct_activation(fields)

    def block(i):
        return llama.block(fields, i, attention(fields), feed_forward(fields, "hidden_act"))

    return decoder(fields, block)


def _correct_activation(fields):
    """The first released files say "gelu" and mean its approximation by tanh; some say it twice."""
    fields.values = {**fields.values, "hidden_act": _meant(fields.take("hidden_act", default=TANH))}
    other = fields.take("hidden_activation", default=fields.values["hidden_act"])
    if _meant(other) != fields.values["hidden_act"]:
        raise ValueError(
            f"`hidden_activation` of a {fields.family} checkpoint must be what `hidden_act` is; received {other!r} and "
            f"{fields.values['hidden_act']!r}."
        )


def _meant(name):
    return TANH if name == "gelu" else name


def decoder(fields, block, soft_cap=None):
    return llama.decoder(fields, block, tied=True, scale=fields.need("hidden_size") ** 0.5, soft_cap=soft_cap)


def above_one(weights):
    """A table in which all norms store what their scale has more than 1."""
    return {path: Stored(name, offset=1.0) if path.endswith("_norm") else name for path, name in weights.items()}


def causal_family(name, language_model, weights):
    """As LLaMA's, and causal: only a model of images and texts that this is a part of may read its prompt both ways."""
    family = llama.causal_family(name, language_model, above_one(weights))

    def build(fields, task, stored):
        fields.only("use_bidirectional_attention", None, False)
        return family.build(fields, task, stored)

    return dataclasses.replace(family, build=build)


FAMILY = causal_family("Gemma", language_model, llama.WEIGHTS)
