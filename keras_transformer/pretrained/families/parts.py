"""What several families build alike."""

import keras
from keras import ops

from keras_transformer.layers import RotaryEmbedding, gelu_tanh, quick_gelu, relu_squared

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_python_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_accurate": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": "relu",
    "relu2": relu_squared,
    "relu6": "relu6",
    "silu": "silu",
    "swish": "silu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "mish": "mish",
    "linear": "linear",
}


def activation(fields, name, default):
    return ACTIVATIONS[fields.one_of(name, ACTIVATIONS, default)]


def text_inputs():
    """Symbolic `token_ids` and `padding_mask` [B, T], and the latter as a boolean mask."""
    token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
    return token_ids, padding_mask, ops.not_equal(padding_mask, 0)


def number_of_labels(fields):
    labels = fields.take("id2label")
    return fields.take("num_labels", "_num_labels", default=2) if labels is None else len(labels)


def rotary(fields, default_base=10000.0):
    """Rotary positions, in the spelling of either generation of configurations."""
    longest = fields.take("max_position_embeddings")
    base = fields.take("rope_theta", default=default_base)
    options = dict(fields.take("rope_parameters", "rope_scaling", default={}))
    base = options.pop("rope_theta", base)
    kind = options.pop("rope_type", options.pop("type", "default"))
    options.pop("type", None)
    if options.pop("partial_rotary_factor", 1.0) != 1.0 or fields.take("partial_rotary_factor", default=1.0) != 1.0:
        raise ValueError(f"`partial_rotary_factor` of a {fields.family} checkpoint must be 1.0 here.")
    if kind == "default":
        return RotaryEmbedding(base)
    if kind == "dynamic":
        options["original_max_position_embeddings"] = longest  # Which is what counts, whatever else is written.
    elif kind in ("yarn", "llama3"):
        options.setdefault("original_max_position_embeddings", longest)
    elif kind == "linear":
        options.pop("original_max_position_embeddings", None)
    options = {name: value for name, value in options.items() if value is not None}
    return RotaryEmbedding(base, scaling={"rope_type": kind, **options})


def keeps_mask(layer):
    """A layer that works on each position by itself, and need not warn of a mask that it does not know."""
    layer.supports_masking = True
    return layer


def causal_lm(fields, task, size, dim, blocks, norm, embed=None, soft_cap=None, tied=False):
    """A decoder-only model: embedding, blocks, norm, and logits if `task` has them.

    Args:
        fields: `Fields`.
        task: `"causal_lm"` or `"bare"`.
        size: int. Number of tokens.
        dim: int. Width of the model.
        blocks: list of `DecoderBlock`.
        norm: normalization layer of the end.
        embed: function of the embedded tokens and the mask, for what comes before the first block, or None.
        soft_cap: float. Bound of the logits (`cap * tanh(logits / cap)`), or None.
        tied: boolean. Whether the embedding is also the output projection.
    """
    token_ids, padding_mask, mask = text_inputs()
    embedding = keeps_mask(keras.layers.ReversibleEmbedding(size, dim, name="embedding"))
    x = embedding(token_ids)
    x = x if embed is None else embed(x, mask)
    for block in blocks:
        x = block(x, mask=mask)
    x = keeps_mask(norm)(x)
    if task == "bare":
        return keras.Model([token_ids, padding_mask], {"hidden_states": x}, name=fields.family)
    logits = embedding(x, reverse=True) if tied else keras.layers.Dense(size, use_bias=False, name="logits")(x)
    if soft_cap is not None:
        logits = ops.tanh(logits / soft_cap) * soft_cap
    return keras.Model([token_ids, padding_mask], logits, name=fields.family)
