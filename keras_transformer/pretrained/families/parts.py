"""What several families build alike."""

import dataclasses
from collections.abc import Callable

import keras
from keras import ops

from keras_transformer.layers import Placeholders, RotaryEmbedding, gelu_tanh, quick_gelu, relu_squared

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


@dataclasses.dataclass
class LanguageModel:
    """The layers of a decoder-only model, before they are one.

    Args:
        size: int. Number of tokens.
        dim: int. Width of the model.
        blocks: list of `DecoderBlock`.
        norm: normalization layer of the end.
        embed: function of the embedded tokens and the mask, for what comes before the first block, or None.
        soft_cap: float. Bound of the logits (`cap * tanh(logits / cap)`), or None.
        tied: boolean. Whether the embedding is also the output projection.
    """

    size: int
    dim: int
    blocks: list
    norm: keras.layers.Layer
    embed: Callable | None = None
    soft_cap: float | None = None
    tied: bool = False

    def model(self, name, task, sight=None):
        """The functional model: `task` is `"causal_lm"` or `"bare"`, `sight` a `Sight` where it sees images."""
        token_ids, padding_mask, mask = text_inputs()
        inputs, masks = [token_ids, padding_mask], {"mask": mask}
        embedding = keeps_mask(keras.layers.ReversibleEmbedding(self.size, self.dim, name="embedding"))
        if sight is not None and sight.token_id >= self.size:  # A placeholder that has no embedding of its own.
            x = embedding(ops.where(ops.equal(token_ids, sight.token_id), 0, token_ids))
        else:
            x = embedding(token_ids)
        x = x if self.embed is None else self.embed(x, mask)
        if sight is not None:
            x = Placeholders(sight.token_id, name="image_placeholders")(x, token_ids, sight.vectors)
            inputs = [sight.images, *inputs]
        if sight is not None and sight.prefix:
            segment_ids = keras.Input((None,), dtype="int32", name="segment_ids")
            inputs, masks["prefix_mask"] = [*inputs, segment_ids], ops.equal(segment_ids, 0)
        for block in self.blocks:
            x = block(x, **masks)
        x = keeps_mask(self.norm)(x)
        if task == "bare":
            return keras.Model(inputs, {"hidden_states": x}, name=name)
        if self.tied:
            logits = embedding(x, reverse=True)
        else:
            logits = keras.layers.Dense(self.size, use_bias=False, name="logits")(x)
        if self.soft_cap is not None:
            logits = ops.tanh(logits / self.soft_cap) * self.soft_cap
        return keras.Model(inputs, logits, name=name)


@dataclasses.dataclass
class Sight:
    """What a language model sees.

    Args:
        images: symbolic tensor `[B, height, width, channels]`.
        vectors: symbolic tensor `[B, count, dim]`, made from it.
        token_id: int. The token that holds a place for each of the vectors.
        prefix: boolean. Whether tokens of segment 0 see each other in both directions.
    """

    images: keras.KerasTensor
    vectors: keras.KerasTensor
    token_id: int
    prefix: bool = False
