import inspect

import keras

from keras_transformer import scopes
from keras_transformer.layers.attention import CrossAttention, MultiHeadSelfAttention
from keras_transformer.layers.checks import check_context, check_explicit, check_rate, check_sequence_masks
from keras_transformer.layers.cloning import clone_layer
from keras_transformer.layers.dropout import Dropout
from keras_transformer.layers.feed_forward import FeedForward
from keras_transformer.layers.rematerialization import rematerializable
from keras_transformer.layers.sublayers import normalize
from keras_transformer.ops import check_mask

NORM_POSITIONS = ("pre", "post", "sandwich")


class ResidualBlock(keras.layers.Layer):
    """Sublayers in a row, each with a residual connection and a norm: what encoder and decoder blocks share."""

    def __init__(self, sublayers, norm, norm_position, dropout, drop_path, layer_scale, remat, **kwargs):
        super().__init__(**kwargs)
        if norm_position not in NORM_POSITIONS:
            raise ValueError(f"`norm_position` must be one of {NORM_POSITIONS}; received {norm_position!r}.")
        norm = keras.layers.LayerNormalization() if norm is None else norm
        self.sublayer_names = []
        for name, layer in sublayers.items():
            self.sublayer_names.append(name)
            setattr(self, name, clone_layer(layer, name, self.dtype_policy, name))
            for norm_name in (
                (f"{name}_norm", f"{name}_post_norm") if norm_position == "sandwich" else (f"{name}_norm",)
            ):
                clone = clone_layer(norm, norm_name, self.dtype_policy, "norm")
                clone.supports_masking = (
                    True  # RMSNormalization, which Keras forgot, would warn of a mask that is lost.
                )
                setattr(self, norm_name, clone)
        # Experts leave padding out of their loss; most feed-forwards take each position by itself and know no mask.
        self.feed_forward_takes_mask = "mask" in inspect.signature(self.feed_forward.call).parameters
        self.norm_position = norm_position
        self.dropout = check_rate(dropout, "dropout")
        self.drop_path = check_rate(drop_path, "drop_path")
        self.layer_scale = layer_scale
        self.remat = remat
        self.supports_masking = True

    def build_sublayers(self, x_shape, context_shape=None):
        for name in self.sublayer_names:
            shapes = (x_shape, context_shape) if name == "cross_attention" else (x_shape,)
            getattr(self, name).build(*shapes)
            for norm in (f"{name}_norm", f"{name}_post_norm"):
                if hasattr(self, norm):
                    getattr(self, norm).build(x_shape)
            if self.layer_scale is not None:
                initializer = keras.initializers.Constant(self.layer_scale)
                scale = self.add_weight(name=f"{name}_scale", shape=(x_shape[-1],), initializer=initializer)
                setattr(self, f"{name}_scale", scale)
        self.residual_dropout = Dropout(self.dropout, name="residual_dropout", dtype=self.dtype_policy)
        # One draw a row: the whole sublayer is skipped for it.
        self.path_dropout = Dropout(
            self.drop_path, noise_shape=(None, 1, 1), name="path_dropout", dtype=self.dtype_policy
        )

    def residual(self, x, name, training, **kwargs):
        """`x` and what the sublayer `name` makes of it, with the norms where `norm_position` has them."""
        sublayer, norm = getattr(self, name), getattr(self, f"{name}_norm")
        seen = x
        if self.norm_position != "post":
            seen = scopes.record(self, f"{name}_norm", normalize(norm, x, training), x)
        y = scopes.record(sublayer, "output", sublayer(seen, training=training, **kwargs), seen)
        if self.norm_position == "sandwich":
            post_norm = getattr(self, f"{name}_post_norm")
            y = scopes.record(self, f"{name}_post_norm", normalize(post_norm, y, training), y)
        if self.layer_scale is not None:
            scale = getattr(self, f"{name}_scale")
            y = scopes.record(self, f"{name}_scaled", y * keras.ops.cast(scale, y.dtype), y)
        y = self.path_dropout(self.residual_dropout(y, training=training), training=training)
        total = scopes.record(self, f"{name}_residual", x + y, x, y)
        if self.norm_position != "post":
            return total
        return scopes.record(self, f"{name}_norm", normalize(norm, total, training), total)

    def residual_feed_forward(self, x, mask, training):
        masks = {"mask": mask} if self.feed_forward_takes_mask else {}
        return self.residual(x, "feed_forward", training, **masks)

    def shared_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            "norm": serialize(self.feed_forward_norm),
            "norm_position": self.norm_position,
            "dropout": self.dropout,
            "drop_path": self.drop_path,
            "layer_scale": self.layer_scale,
            "remat": self.remat,
        }


@keras.saving.register_keras_serializable(package="keras_transformer")
class EncoderBlock(ResidualBlock):
    """Self-attention and feed-forward, each with residual connection and norm.

    A block is composed: the layers that it is made of are handed in, and cloned.

    Args:
        self_attention: an attention layer such as `MultiHeadSelfAttention`, or a number of heads: 8 is short for
            `MultiHeadSelfAttention(8)`.
        feed_forward: a layer such as `FeedForward`, or a width: 2048 is short for `FeedForward(2048)`.
        norm: a normalization layer, cloned for each place; None is short for `keras.layers.LayerNormalization()`.
        norm_position: `"pre"`, `x + f(norm(x))`; `"post"`, `norm(x + f(x))`, as in the original paper; or `"sandwich"`,
            `x + norm(f(norm(x)))`.
        dropout: float between 0 and 1. Dropout of each sublayer's result.
        drop_path: float between 0 and 1. Rate at which a sublayer is skipped for a whole row (stochastic depth).
        layer_scale: float. Initial value of a trained factor for each feature of each sublayer's result, or None.
        remat: boolean. Whether training computes what is inside the block a second time, for the gradient, and keeps
            only what comes in: less memory for a third more arithmetic. Also an attribute, to set before training.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of shape `[B, T, dim]`.
        mask: boolean tensor of shape `[B, T]`, True for real positions. By default the mask that `x` carries.
        attention_mask: boolean tensor of shape `[B|1, T, T]`, True where a position may attend to another.
        attention_bias: float tensor of shape `[B|1, heads|1, T, T]`, added to the scores.
        prefix_mask: boolean tensor of shape `[B, T]`, True for positions that see each other in both directions, as in
            `MultiHeadSelfAttention`.
        training: boolean. Whether dropout acts.

    Returns:
        Tensor of shape `[B, T, dim]`.

    Raises:
        ValueError: if an argument is out of range, a mask is not boolean or has the wrong shape.

    References: [Attention Is All You Need](https://arxiv.org/abs/1706.03762), figure 1;
    [pre-norm](https://arxiv.org/abs/2002.04745); [sandwich norm](https://arxiv.org/abs/2105.13290);
    [stochastic depth](https://arxiv.org/abs/1603.09382); [layer scale](https://arxiv.org/abs/2103.17239).

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> tuple(kt.layers.EncoderBlock(8, 2048)(np.ones((2, 5, 64), "float32")).shape)
    (2, 5, 64)
    """

    def __init__(
        self,
        self_attention,
        feed_forward,
        norm=None,
        norm_position="pre",
        dropout=0.0,
        drop_path=0.0,
        layer_scale=None,
        remat=False,
        **kwargs,
    ):
        sublayers = {
            "self_attention": _from_number(self_attention, MultiHeadSelfAttention),
            "feed_forward": _from_number(feed_forward, FeedForward),
        }
        super().__init__(sublayers, norm, norm_position, dropout, drop_path, layer_scale, remat, **kwargs)

    def build(self, x_shape):
        self.build_sublayers(x_shape)

    @rematerializable
    def call(
        self, x, mask=None, x_mask=None, attention_mask=None, attention_bias=None, prefix_mask=None, training=None
    ):
        mask = x_mask if mask is None else mask  # Keras passes `x_mask` where other tensors came along with `x`.
        extra = _self_attention_masks(mask, attention_mask, attention_bias, prefix_mask)
        x = self.residual(x, "self_attention", training, **extra)
        return self.residual_feed_forward(x, mask, training)

    def compute_output_spec(
        self, x, mask=None, x_mask=None, attention_mask=None, attention_bias=None, prefix_mask=None, training=None
    ):
        _check_self_attention(x, x_mask if mask is None else mask, attention_mask, attention_bias, prefix_mask)
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "self_attention": serialize(self.self_attention),
            "feed_forward": serialize(self.feed_forward),
            **self.shared_config(),
        }


@keras.saving.register_keras_serializable(package="keras_transformer")
class DecoderBlock(ResidualBlock):
    """Causal self-attention, cross-attention if there is a context, and feed-forward, each with residual and norm.

    Without `cross_attention` this is the block of a decoder-only language model.

    Args:
        self_attention: an attention layer such as `MultiHeadSelfAttention`, or a number of heads: 8 is short for
            `MultiHeadSelfAttention(8, causal=True)`.
        feed_forward: a layer such as `FeedForward`, or a width: 2048 is short for `FeedForward(2048)`.
        cross_attention: a layer such as `CrossAttention`, or a number of heads: 8 is short for `CrossAttention(8)`;
            None for a block without context.
        norm: a normalization layer, cloned for each place; None is short for `keras.layers.LayerNormalization()`.
        norm_position: `"pre"`, `"post"` or `"sandwich"`, as in `EncoderBlock`.
        dropout: float between 0 and 1. Dropout of each sublayer's result.
        drop_path: float between 0 and 1. Rate at which a sublayer is skipped for a whole row (stochastic depth).
        layer_scale: float. Initial value of a trained factor for each feature of each sublayer's result, or None.
        remat: boolean. Whether training computes what is inside the block a second time, for the gradient, and keeps
            only what comes in: less memory for a third more arithmetic. Also an attribute, to set before training.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of shape `[B, T, dim]`.
        context: float tensor of shape `[B, S, context_dim]`, given exactly if the block has cross-attention.
        mask: boolean tensor of shape `[B, T]`, True for real positions. By default the mask that `x` carries.
        context_mask: boolean tensor of shape `[B, S]`, True for real positions. By default the mask that `context`
            carries.
        attention_mask: boolean tensor of shape `[B|1, T, T]` for the self-attention, on top of causality and padding.
        cross_attention_mask: boolean tensor of shape `[B|1, T, S]` for the cross-attention, on top of padding.
        attention_bias: float tensor of shape `[B|1, heads|1, T, T]`, added to the scores of the self-attention.
        prefix_mask: boolean tensor of shape `[B, T]`, True for positions that see each other in both directions, as in
            `MultiHeadSelfAttention`: a prefix language model.
        training: boolean. Whether dropout acts.

    Returns:
        Tensor of shape `[B, T, dim]`.

    Raises:
        ValueError: if an argument is out of range, a mask is not boolean or has the wrong shape, or a context is
            missing or cannot be read.

    Reference: [Attention Is All You Need](https://arxiv.org/abs/1706.03762), figure 1.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> x, context = np.ones((2, 5, 64), "float32"), np.ones((2, 9, 64), "float32")
    >>> tuple(kt.layers.DecoderBlock(8, 2048, cross_attention=8)(x, context).shape)
    (2, 5, 64)
    """

    def __init__(
        self,
        self_attention,
        feed_forward,
        cross_attention=None,
        norm=None,
        norm_position="pre",
        dropout=0.0,
        drop_path=0.0,
        layer_scale=None,
        remat=False,
        **kwargs,
    ):
        sublayers = {"self_attention": _from_number(self_attention, MultiHeadSelfAttention, causal=True)}
        if cross_attention is not None:
            sublayers["cross_attention"] = _from_number(cross_attention, CrossAttention)
        sublayers["feed_forward"] = _from_number(feed_forward, FeedForward)
        super().__init__(sublayers, norm, norm_position, dropout, drop_path, layer_scale, remat, **kwargs)
        if cross_attention is None:
            self.cross_attention = None

    def build(self, x_shape, context_shape=None):
        check_context(context_shape, self.cross_attention)
        self.build_sublayers(x_shape, context_shape)

    @rematerializable
    def call(
        self,
        x,
        context=None,
        mask=None,
        x_mask=None,
        context_mask=None,
        attention_mask=None,
        cross_attention_mask=None,
        attention_bias=None,
        prefix_mask=None,
        training=None,
    ):
        check_context(context, self.cross_attention)
        mask = x_mask if mask is None else mask  # Keras passes `x_mask` where other tensors came along with `x`.
        extra = _self_attention_masks(mask, attention_mask, attention_bias, prefix_mask)
        x = self.residual(x, "self_attention", training, **extra)
        if self.cross_attention is not None:
            _check_cross_attention_mask(cross_attention_mask, x, context)
            masks = {"context_mask": context_mask}
            if cross_attention_mask is not None:  # An attention that is not of this library need not know of it.
                masks["attention_mask"] = cross_attention_mask
            x = self.residual(x, "cross_attention", training, context=context, **masks)
        return self.residual_feed_forward(x, mask, training)

    def compute_output_spec(
        self,
        x,
        context=None,
        mask=None,
        x_mask=None,
        context_mask=None,
        attention_mask=None,
        cross_attention_mask=None,
        attention_bias=None,
        prefix_mask=None,
        training=None,
    ):
        check_context(context, self.cross_attention)
        _check_self_attention(x, x_mask if mask is None else mask, attention_mask, attention_bias, prefix_mask)
        if context_mask is not None:
            check_mask(context_mask, "context_mask", tuple(context.shape[:2]), "`context`")
        _check_cross_attention_mask(cross_attention_mask, x, context)
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "self_attention": serialize(self.self_attention),
            "feed_forward": serialize(self.feed_forward),
            "cross_attention": None if self.cross_attention is None else serialize(self.cross_attention),
            **self.shared_config(),
        }


def _from_number(layer, kind, **kwargs):
    return kind(layer, **kwargs) if isinstance(layer, int) else layer


def _self_attention_masks(mask, attention_mask, attention_bias, prefix_mask):
    masks = {"mask": mask, "attention_mask": attention_mask, "attention_bias": attention_bias}
    # An attention that is not of this library need not know of prefixes, unless one is given.
    return masks if prefix_mask is None else {**masks, "prefix_mask": prefix_mask}


def _check_self_attention(x, mask, attention_mask, attention_bias, prefix_mask):
    check_sequence_masks(x, mask, prefix_mask)
    check_explicit(attention_mask, attention_bias, x.shape[1], x.shape[1])


def _check_cross_attention_mask(mask, x, context):
    if mask is not None:
        check_mask(mask, "cross_attention_mask", (None, x.shape[1], context.shape[1]), "`x` and `context`")
