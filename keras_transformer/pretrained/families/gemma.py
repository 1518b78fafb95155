"""Gemma: LLaMA with scaled embeddings, GeGLU, wide heads, and norms that store what their scale has more than 1."""

from keras_transformer.pretrained.families import llama
from keras_transformer.pretrained.weights import Stored


def attention(fields, key_value_heads, **options):
    fields.only("use_bidirectional_attention", None, False)
    bias = fields.take("attention_bias", default=False)
    head_dim = fields.take("head_dim", default=256)
    return llama.attention(fields, key_value_heads, head_dim=head_dim, use_bias=bias, **options)


def build(fields, task, stored):
    activation = "hidden_activation" if fields.take("hidden_activation") else "hidden_act"

    def block(i):
        feed_forward = llama.feed_forward(fields, name=activation, default="gelu_pytorch_tanh")
        return llama.block(fields, i, attention(fields, 16), feed_forward)

    return llama.decoder(fields, task, block, tied=True, scale=fields.need("hidden_size") ** 0.5)


def above_one(weights):
    """A table in which all norms store what their scale has more than 1."""
    return {path: Stored(name, offset=1.0) if path.endswith("_norm") else name for path, name in weights.items()}


FAMILY = llama.causal_family("Gemma", build, above_one(llama.WEIGHTS))
