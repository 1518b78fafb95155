import functools

import keras
from keras import ops

from keras_transformer import scopes
from keras_transformer.layers.checks import check_explicit, check_rate, check_sequence_masks, check_width
from keras_transformer.layers.cloning import clone_layer, quantization_config, quantized_dtype
from keras_transformer.layers.dropout import Dropout
from keras_transformer.layers.initialization import RESIDUAL, SCORING, kernel_initializer
from keras_transformer.layers.position import PositionEncoding
from keras_transformer.layers.softmax import AttentionSoftmax
from keras_transformer.layers.sublayers import project, project_all
from keras_transformer.ops import check_mask, dot_product_attention, make_attention_mask
from keras_transformer.ops.masks import with_head_axis

PROJECTIONS = ("query", "key", "value", "output")


class Attention(keras.layers.Layer):
    """What self-attention and cross-attention share: projections, heads, and the way through the attention function."""

    def __init__(self, num_heads, head_dim, num_key_value_heads, query_key_norm, use_bias, scale, dropout, **kwargs):
        super().__init__(**kwargs)
        key_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        if num_heads < 1 or key_heads < 1 or num_heads % key_heads:
            raise ValueError(
                "`num_heads` must be a positive multiple of `num_key_value_heads`; received "
                f"num_heads={num_heads}, num_key_value_heads={num_key_value_heads}."
            )
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"`head_dim` must be a positive width, or None; received head_dim={head_dim}.")
        if not isinstance(use_bias, bool) and not set(use_bias) <= set(PROJECTIONS):
            raise ValueError(
                f"`use_bias` must be True, False or a list of names out of {PROJECTIONS}; received {use_bias}."
            )
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_key_value_heads = num_key_value_heads
        self.use_bias = use_bias if isinstance(use_bias, bool) else [name for name in PROJECTIONS if name in use_bias]
        self.scale = scale
        self.dropout = check_rate(dropout, "dropout")
        self.query_norm = self.key_norm = self.softmax = None
        if query_key_norm is not None:
            self.query_norm = clone_layer(query_key_norm, "query_norm", self.dtype_policy, "query_key_norm")
            self.key_norm = clone_layer(query_key_norm, "key_norm", self.dtype_policy, "query_key_norm")
        self.supports_masking = True

    def build_projections(self, x_shape, source_shape):
        head_dim = self.head_dim or check_width(x_shape[-1], self.num_heads)
        key_heads = self.num_key_value_heads or self.num_heads
        self.query = self._projection("query", self.num_heads * head_dim, x_shape)
        self.key = self._projection("key", key_heads * head_dim, source_shape)
        self.value = self._projection("value", key_heads * head_dim, source_shape)
        # Not `self.output`: that is what Keras calls a layer's symbolic result.
        self.output_projection = self._projection("output", x_shape[-1], (*x_shape[:-1], self.num_heads * head_dim))
        if self.query_norm is not None:
            self.query_norm.build((x_shape[0], self.num_heads, x_shape[1], head_dim))
            self.key_norm.build((source_shape[0], key_heads, source_shape[1], head_dim))
        self.weights_dropout = Dropout(self.dropout, name="weights_dropout", dtype=self.dtype_policy)

    def _projection(self, name, units, input_shape):
        use_bias = self.use_bias if isinstance(self.use_bias, bool) else name in self.use_bias
        initializer = kernel_initializer(SCORING if name in ("query", "key") else RESIDUAL)
        layer = keras.layers.Dense(
            units,
            use_bias=use_bias,
            kernel_initializer=initializer,
            quantization_config=quantization_config(self.dtype_policy, name),
            name=name,
            dtype=self.dtype_policy,
        )
        layer.build(input_shape)
        return layer

    def project(self, x, training):
        """Queries, keys and values of one sequence."""
        query, key, value = project_all((self.query, self.key, self.value), x, training)
        return self._as_query(query, x), *self._as_key_value(key, value, x)

    def project_query(self, x):
        return self._as_query(project(self.query, x), x)

    def project_key_value(self, source, training=False):
        return self._as_key_value(*project_all((self.key, self.value), source, training), source)

    def _as_query(self, query, x):
        query = scopes.record(self, "query", split_heads(query, self.num_heads), x)  # [B, H, T, D]
        return self._normalized("query", query, self.query_norm)

    def _as_key_value(self, key, value, source):
        key_heads = self.num_key_value_heads or self.num_heads
        key, value = split_heads(key, key_heads), split_heads(value, key_heads)  # [B, K, S, D]
        key = scopes.record(self, "key", key, source)
        value = scopes.record(self, "value", value, source)
        return self._normalized("key", key, self.key_norm), value

    def _normalized(self, name, x, norm):
        return x if norm is None else scopes.record(self, f"normalized_{name}", norm(x), x)

    def attend(self, query, key, value, mask, bias, training, causal=False, padding=None, sliding_window=None):
        """Attention of projected heads, the heads joined and projected: `[B, T, dim]`."""
        recording = scopes.recording()
        attended = dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            scale=self.scale,
            dropout=self.weights_dropout if training and self.dropout else None,
            softmax=None if self.softmax is None else self.softmax.to_weights,
            record=None if recording is None else functools.partial(scopes.record, self),
            causal=causal,
            padding=padding,
            sliding_window=sliding_window,
            training=bool(training),
        )
        joined = scopes.record(self, "joined_heads", join_heads(attended), attended)
        return scopes.record(self, "output", project(self.output_projection, joined), joined)

    def shared_config(self):
        return {
            **quantized_dtype(self),
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "num_key_value_heads": self.num_key_value_heads,
            "query_key_norm": None if self.query_norm is None else keras.saving.serialize_keras_object(self.query_norm),
            "use_bias": self.use_bias,
            "scale": self.scale,
            "dropout": self.dropout,
        }


def split_heads(x, num_heads):
    """`[B, T, heads * D]` to `[B, heads, T, D]`."""
    batch, length, width = ops.shape(x)
    return ops.transpose(ops.reshape(x, (batch, length, num_heads, width // num_heads)), (0, 2, 1, 3))


def join_heads(x):
    """`[B, heads, T, D]` to `[B, T, heads * D]`."""
    batch, num_heads, length, head_dim = ops.shape(x)
    return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (batch, length, num_heads * head_dim))


def combine(attention_mask, mask):
    """An explicit mask and one made from positions and padding, each of which may be None, as one for all heads.

    Returns:
        Boolean tensor of shape `[B|1, 1, T|1, S]`, or None.
    """
    if attention_mask is None or mask is None:
        mask = mask if attention_mask is None else attention_mask
    else:
        mask = ops.logical_and(attention_mask, mask)
    return None if mask is None else with_head_axis(mask)


@keras.saving.register_keras_serializable(package="keras_transformer")
class MultiHeadSelfAttention(Attention):
    """Multi-head self-attention: each position of a sequence reads from the others.

    One layer for multi-head, grouped-query and multi-query attention, causal or not, over all positions or a sliding
    window, with positions put in by rotation or by bias. Under a `DecodingScope` it keeps its keys and values from
    call to call.

    Args:
        num_heads: int. Number of query heads.
        head_dim: int. Width of a head; by default the width of the input divided by `num_heads`.
        num_key_value_heads: int. Number of key and value heads, a divisor of `num_heads`, which is the default: fewer
            is grouped-query, 1 multi-query attention.
        causal: boolean. Whether a position sees only itself and earlier ones.
        sliding_window: int. A position sees only those less than this many away.
        position: `RotaryEmbedding`, `RelativePositionBias`, `AlibiBias` or None.
        query_key_norm: a layer that normalizes the last axis, cloned for queries and for keys of each head, or None.
        use_bias: boolean, or a list of the projections with a bias out of `"query"`, `"key"`, `"value"`, `"output"`.
        scale: float. Factor of the scores; by default `head_dim ** -0.5`.
        dropout: float between 0 and 1. Dropout of the attention weights.
        softmax: `SoftCap`, `AttentionSinks` or None: how scores become weights, by default the softmax alone.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of shape `[B, T, dim]`.
        mask: boolean tensor of shape `[B, T]`, True for real positions: no position attends to padding. By default the
            mask that `x` carries (from `Embedding(mask_zero=True)`, say).
        attention_mask: boolean tensor of shape `[B|1, T, T]`, True where a position may attend to another.
        attention_bias: float tensor of shape `[B|1, heads|1, T, T]`, added to the scores.
        prefix_mask: boolean tensor of shape `[B, T]`, True for positions that see each other in both directions, though
            the attention is causal or has a window: a prefix language model. Padding stays unseen.
        training: boolean. Whether dropout acts.

    Returns:
        Tensor of shape `[B, T, dim]`. A position that may attend to nothing gets what the output projection makes of 0.

    Raises:
        ValueError: if heads and widths do not fit, a mask is not boolean or has the wrong shape.

    References: [Attention Is All You Need](https://arxiv.org/abs/1706.03762), section 3.2;
    [GQA](https://arxiv.org/abs/2305.13245); [Longformer](https://arxiv.org/abs/2004.05150) and
    [Mistral 7B](https://arxiv.org/abs/2310.06825) for the window; [T5](https://arxiv.org/abs/1910.10683),
    section 3.2.1, for the prefix; [query-key normalization](https://arxiv.org/abs/2010.04245).

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> rotary = kt.layers.RotaryEmbedding()
    >>> layer = kt.layers.MultiHeadSelfAttention(8, num_key_value_heads=2, causal=True, position=rotary)
    >>> tuple(layer(np.ones((2, 5, 64), "float32")).shape)
    (2, 5, 64)
    """

    def __init__(
        self,
        num_heads,
        head_dim=None,
        num_key_value_heads=None,
        causal=False,
        sliding_window=None,
        position=None,
        query_key_norm=None,
        use_bias=True,
        scale=None,
        dropout=0.0,
        softmax=None,
        **kwargs,
    ):
        super().__init__(num_heads, head_dim, num_key_value_heads, query_key_norm, use_bias, scale, dropout, **kwargs)
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(f"`sliding_window` must be a positive number; received sliding_window={sliding_window}.")
        self.causal = causal
        self.sliding_window = sliding_window
        self.position = None if position is None else clone_layer(position, "position", self.dtype_policy, "position")
        if not isinstance(self.position, PositionEncoding | None):
            raise ValueError(
                "`position` must be a `RotaryEmbedding`, `RelativePositionBias` or `AlibiBias`, which attention "
                f"applies itself; received {position!r}."
            )
        if softmax is not None:
            self.softmax = clone_layer(softmax, "softmax", self.dtype_policy, "softmax")
        if not isinstance(self.softmax, AttentionSoftmax | None):
            raise ValueError(f"`softmax` must be a `SoftCap` or `AttentionSinks`; received {softmax!r}.")
        for name, part in (("position", self.position), ("softmax", self.softmax)):
            heads = getattr(part, "num_heads", num_heads)
            if heads != num_heads:
                raise ValueError(
                    f"`{name}` must be made for the {num_heads} heads of the attention; received one for {heads}."
                )

    def build(self, x_shape):
        self.build_projections(x_shape, x_shape)
        if self.position is not None:
            self.position.check_width(self.query.units // self.num_heads)
            if not self.position.built:
                self.position.build(x_shape)
        if self.softmax is not None and not self.softmax.built:
            self.softmax.build((x_shape[0], self.num_heads, x_shape[1], x_shape[1]))

    def call(
        self, x, mask=None, x_mask=None, attention_mask=None, attention_bias=None, prefix_mask=None, training=None
    ):
        mask = x_mask if mask is None else mask  # Keras passes `x_mask` where other tensors came along with `x`.
        check_sequence_masks(x, mask, prefix_mask)
        scope = scopes.decoding()
        name = None if scope is None else scope.call_name(self)
        length = ops.shape(x)[1]
        query, key, value = self.project(x, training)
        query_positions = ops.arange(length, dtype="int32") if scope is None else scope.positions(length)
        if self.position is not None:
            total = self._total_length(scope, name, length, mask) if self.position.depends_on_length else None
            query = self._rotated("query", query, query_positions, total)
            key = self._rotated("key", key, query_positions, total)
        if scope is not None:
            self._check_causal()
            key, value, mask = scope.append(name, key, value, mask)
        check_explicit(attention_mask, attention_bias, x.shape[1], key.shape[2])
        key_positions = query_positions if scope is None else scope.key_positions(length)
        if self.position is not None:
            bias = self.position.add_bias(attention_bias, query_positions, key_positions)
            if bias is not attention_bias:
                scopes.record(self, "bias", bias, key, *([] if attention_bias is None else [attention_bias]))
            attention_bias = bias
        if scope is None and prefix_mask is None and scopes.recording() is None:
            told = self.causal, mask, self.sliding_window  # Kernels know these without a mask.
            return self.attend(query, key, value, attention_mask, attention_bias, training, *told)
        prefix = None
        if prefix_mask is not None:
            prefix = (prefix_mask, prefix_mask if scope is None else scope.spread(prefix_mask, ops.shape(key)[2]))
        allowed = make_attention_mask(query_positions, key_positions, self.causal, self.sliding_window, mask, prefix)
        allowed = allowed if scope is None else scope.among_branches(allowed)
        parts = (query_positions, key_positions, mask, *(prefix or (None, None)), attention_mask)
        mask = scopes.record(self, "mask", combine(attention_mask, allowed), query, *parts)
        return self.attend(query, key, value, mask, attention_bias, training)

    def _rotated(self, name, x, positions, total):
        rotated = self.position.rotate(x, positions, total)
        return x if rotated is x else scopes.record(self, f"rotated_{name}", rotated, x)

    @staticmethod
    def _total_length(scope, name, length, mask):
        """Length of the whole sequence so far: a number, or one for each row `[B]` where there is padding."""
        if scope is None:
            return length if mask is None else ops.sum(ops.cast(mask, "int32"), axis=-1)
        padding = scope.padding_before(f"{name}/position", mask)
        total = scope.total(length)
        return total if padding is None else total - padding[:, 0]

    def _check_causal(self):
        if not self.causal:
            raise ValueError(
                f"`{self.name}` is not causal, so it cannot decode token by token: each new token would change the "
                "earlier ones. Make it with `causal=True`, or call it outside of `DecodingScope`."
            )

    def compute_output_spec(
        self, x, mask=None, x_mask=None, attention_mask=None, attention_bias=None, prefix_mask=None, training=None
    ):
        check_sequence_masks(x, x_mask if mask is None else mask, prefix_mask)
        check_explicit(attention_mask, attention_bias, x.shape[1], x.shape[1])
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)

    def get_config(self):
        shared = self.shared_config()
        return {
            **super().get_config(),
            **{name: shared.pop(name) for name in ("num_heads", "head_dim", "num_key_value_heads")},
            "causal": self.causal,
            "sliding_window": self.sliding_window,
            "position": None if self.position is None else keras.saving.serialize_keras_object(self.position),
            **shared,
            "softmax": None if self.softmax is None else keras.saving.serialize_keras_object(self.softmax),
        }


@keras.saving.register_keras_serializable(package="keras_transformer")
class CrossAttention(Attention):
    """Multi-head attention from one sequence to another: queries from `x`, keys and values from `context`.

    Under a `DecodingScope` keys, values and mask of the context are computed at the first call and kept.

    Args:
        num_heads: int. Number of query heads.
        head_dim: int. Width of a head; by default the width of `x` divided by `num_heads`.
        num_key_value_heads: int. Number of key and value heads, a divisor of `num_heads`, which is the default.
        query_key_norm: a layer that normalizes the last axis, cloned for queries and for keys of each head, or None.
        use_bias: boolean, or a list of the projections with a bias out of `"query"`, `"key"`, `"value"`, `"output"`.
        scale: float. Factor of the scores; by default `head_dim ** -0.5`.
        dropout: float between 0 and 1. Dropout of the attention weights.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of shape `[B, T, dim]`.
        context: float tensor of shape `[B, S, context_dim]`.
        context_mask: boolean tensor of shape `[B, S]`, True for real positions of the context. By default the mask that
            `context` carries.
        attention_mask: boolean tensor of shape `[B|1, T, S]`, True where a position of `x` may attend to one of
            `context`.
        attention_bias: float tensor of shape `[B|1, heads|1, T, S]`, added to the scores.
        training: boolean. Whether dropout acts.

    Returns:
        Tensor of shape `[B, T, dim]`.

    Raises:
        ValueError: if heads and widths do not fit, a mask is not boolean or has the wrong shape.

    Reference: [Attention Is All You Need](https://arxiv.org/abs/1706.03762), section 3.2.3.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> layer = kt.layers.CrossAttention(4)
    >>> x, context = np.ones((2, 5, 64), "float32"), np.ones((2, 9, 32), "float32")
    >>> context_mask = np.arange(9)[None, :] < np.array([[9], [4]])
    >>> tuple(layer(x, context, context_mask=context_mask).shape)
    (2, 5, 64)
    """

    def __init__(
        self,
        num_heads,
        head_dim=None,
        num_key_value_heads=None,
        query_key_norm=None,
        use_bias=True,
        scale=None,
        dropout=0.0,
        **kwargs,
    ):
        super().__init__(num_heads, head_dim, num_key_value_heads, query_key_norm, use_bias, scale, dropout, **kwargs)

    def build(self, x_shape, context_shape):
        self.build_projections(x_shape, context_shape)

    def call(self, x, context, context_mask=None, attention_mask=None, attention_bias=None, training=None):
        self._check(x, context, context_mask, attention_mask, attention_bias)
        query = self.project_query(x)

        def source():
            key, value = self.project_key_value(context, training)
            return {"context_key": key, "context_value": value, "context_mask": context_mask}

        scope = scopes.decoding()
        kept = source() if scope is None else scope.once(scope.call_name(self), source)
        mask = kept.get("context_mask")
        key, value = kept["context_key"], kept["context_value"]
        if scopes.recording() is None:
            return self.attend(query, key, value, attention_mask, attention_bias, training, padding=mask)
        allowed = combine(attention_mask, None if mask is None else ops.expand_dims(mask, 1))  # [B, 1, S]
        scopes.record(self, "mask", allowed, query, None, None, mask, None, None, attention_mask)
        return self.attend(query, key, value, allowed, attention_bias, training)

    @staticmethod
    def _check(x, context, context_mask, attention_mask, attention_bias):
        if context_mask is not None:
            check_mask(context_mask, "context_mask", (context.shape[0], context.shape[1]), "`context`")
        check_explicit(attention_mask, attention_bias, x.shape[1], context.shape[1])

    def compute_output_spec(
        self, x, context, context_mask=None, attention_mask=None, attention_bias=None, training=None
    ):
        self._check(x, context, context_mask, attention_mask, attention_bias)
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)

    def get_config(self):
        return {**super().get_config(), **self.shared_config()}
