"""Where a token stands, told to attention: by rotating queries and keys, or by a bias on the scores."""

import math

import keras
import numpy as np
from keras import ops

from keras_transformer import scopes


class PositionEncoding(keras.layers.Layer):
    """What attention asks of its `position`: to rotate queries and keys, to add to the bias, or both."""

    depends_on_length = False

    def check_width(self, head_dim):
        """Refuses heads whose width this encoding cannot take."""

    def rotate(self, x, positions, length=None):
        """Queries or keys `[B, heads, T, D]` at `positions` `[T]`, rotated.

        `length` is that of the whole sequence so far, one number or `[B]`, given where `depends_on_length`.
        """
        return x

    def add_bias(self, bias, query_positions, key_positions):
        """The bias `[1|B, heads|1, T, S]`, or None, with what this encoding adds."""
        return bias


@keras.saving.register_keras_serializable(package="keras_transformer")
class RotaryEmbedding(PositionEncoding):
    """Rotary position embedding: each pair of features turns by an angle that grows with the position.

    With `"dynamic"` scaling the angles depend on the length of the sequence. Keys in a cache keep those of the moment
    they came, so that beyond the length of training decoding with a cache is not the same as without.

    Args:
        base: float. The wavelengths grow from `2 pi` to `2 pi * base`.
        dim: int. How many leading features of a head are rotated; by default all.
        interleaved: boolean. Whether a pair is two neighbours (GPT-J) or one of each half (LLaMA, the default).
        scaling: dict or None. How to go beyond the length of training, in the spelling of checkpoints: `"rope_type"` is
            `"linear"`, `"dynamic"` (NTK), `"yarn"` or `"llama3"`, with `"factor"`, and as the type needs
            `"original_max_position_embeddings"`, `"low_freq_factor"` and `"high_freq_factor"` (Llama 3), `"beta_fast"`,
            `"beta_slow"`, `"attention_factor"`, `"mscale"`, `"mscale_all_dim"`, `"truncate"` (YaRN).
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of shape `[B, heads, T, head_dim]`.
        positions: int tensor of shape `[T]`; by default counted from 0.

    Returns:
        Tensor of the shape of `x`.

    Raises:
        ValueError: if the features cannot be paired, or `scaling` lacks a field, has one unknown, or one out of range.

    References: [RoFormer](https://arxiv.org/abs/2104.09864), equation 34;
    [linear scaling](https://arxiv.org/abs/2306.15595); [YaRN](https://arxiv.org/abs/2309.00071), which also describes
    dynamic NTK; [The Llama 3 Herd of Models](https://arxiv.org/abs/2407.21783).

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> layer = kt.layers.RotaryEmbedding(scaling={"rope_type": "linear", "factor": 2.0})
    >>> x = np.ones((1, 1, 3, 2), "float32")
    >>> [round(float(number), 3) for number in layer(x)[0, 0, :, 0]]  # cos - sin of half the position
    [1.0, 0.398, -0.301]
    """

    def __init__(self, base=10000.0, dim=None, interleaved=False, scaling=None, **kwargs):
        super().__init__(**kwargs)
        if base <= 0:
            raise ValueError(f"`base` must be positive; received base={base}.")
        if dim is not None and (dim < 2 or dim % 2):
            raise ValueError(f"`dim` must be even, as features turn in pairs; received dim={dim}.")
        self.base = base
        self.dim = dim
        self.interleaved = interleaved
        self.scaling = None if scaling is None else dict(scaling)
        _check_scaling(self.scaling)
        self.depends_on_length = self.scaling is not None and self.scaling["rope_type"] == "dynamic"

    def check_width(self, head_dim):
        dim = self.dim or head_dim
        if dim % 2 or dim > head_dim:
            raise ValueError(
                f"A rotary embedding needs an even number of features, at most those of a head; received dim={dim} "
                f"for heads of {head_dim}."
            )

    def call(self, x, positions=None):
        length = ops.shape(x)[2]
        if positions is None:
            return self.rotate(x, ops.arange(length, dtype="int32"), length)
        return self.rotate(x, positions, ops.max(positions) + 1)

    def rotate(self, x, positions, length=None):
        self.check_width(x.shape[-1])
        dim = self.dim or x.shape[-1]
        frequencies, factor = self._frequencies(dim, length)
        frequencies = ops.convert_to_tensor(frequencies, "float32")  # [(B, 1, 1,) dim / 2]
        angles = ops.expand_dims(ops.cast(positions, "float32"), -1) * frequencies  # [(B, 1,) T, dim / 2]
        cos, sin = (ops.cast(part(angles) * factor, x.dtype) for part in (ops.cos, ops.sin))
        rotated, rest = x[..., :dim], x[..., dim:]
        if self.interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = rotated[..., : dim // 2], rotated[..., dim // 2 :]
        turned = (first * cos - second * sin, second * cos + first * sin)
        if self.interleaved:
            rotated = ops.reshape(ops.stack(turned, axis=-1), (*ops.shape(first)[:-1], dim))
        else:
            rotated = ops.concatenate(turned, axis=-1)
        return rotated if dim == x.shape[-1] else ops.concatenate([rotated, rest], axis=-1)

    def _frequencies(self, dim, length):
        """Angle for each step, `[dim / 2]` (or `[B, 1, 1, dim / 2]` where rows differ in length), and a factor."""
        frequencies = self.base ** -(np.arange(0, dim, 2) / dim)
        if self.scaling is None:
            return frequencies, 1.0
        kind, options = self.scaling["rope_type"], self.scaling
        if kind == "dynamic":
            return _dynamic(self.base, dim, length, **_fields(options)), 1.0
        if kind == "linear":
            return frequencies / options["factor"], 1.0
        if kind == "llama3":
            return _llama3(frequencies, **_fields(options)), 1.0
        return _yarn(frequencies, self.base, dim, **_fields(options))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "base": self.base,
            "dim": self.dim,
            "interleaved": self.interleaved,
            "scaling": self.scaling,
        }


SCALING_FIELDS = {  # rope_type: (required, optional)
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor", "original_max_position_embeddings"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"},
    ),
}


def _fields(scaling):
    return {name: value for name, value in scaling.items() if name != "rope_type"}


def _check_scaling(scaling):
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if kind not in SCALING_FIELDS:
        raise ValueError(f"`scaling` must name its 'rope_type', one of {sorted(SCALING_FIELDS)}; received {scaling}.")
    required, optional = SCALING_FIELDS[kind]
    missing, unknown = required - set(_fields(scaling)), set(_fields(scaling)) - required - optional
    if missing or unknown:
        raise ValueError(
            f"`scaling` of type {kind!r} takes {sorted(required)}"
            + (f" and may have {sorted(optional)}" if optional else "")
            + f"; received {scaling}, with missing {sorted(missing)} and unknown {sorted(unknown)}."
        )
    if scaling["factor"] < 1:
        raise ValueError(f"`scaling` must have a 'factor' of at least 1; received {scaling}.")


def _dynamic(base, dim, length, factor, original_max_position_embeddings):
    original = float(original_max_position_embeddings)
    length = ops.maximum(ops.cast(length, "float32"), original)
    length = ops.reshape(length, (-1, 1, 1, 1)) if len(length.shape) else length
    stretched = base * (factor * length / original - (factor - 1)) ** (dim / (dim - 2))
    return ops.power(stretched, ops.convert_to_tensor(-np.arange(0, dim, 2) / dim, "float32"))


def _llama3(frequencies, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)  # within the length of training
    smooth = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return smooth * frequencies + (1 - smooth) * frequencies / factor


def _yarn(
    frequencies,
    base,
    dim,
    factor,
    original_max_position_embeddings,
    beta_fast=32.0,
    beta_slow=1.0,
    attention_factor=None,
    mscale=None,
    mscale_all_dim=None,
    truncate=True,
):
    def pair_that_turns(times):
        return dim * math.log(original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(base))

    def attention_scale(weight=1.0):
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    interpolated = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    if attention_factor is None:
        both = mscale and mscale_all_dim
        attention_factor = attention_scale(mscale) / attention_scale(mscale_all_dim) if both else attention_scale()
    return interpolated * frequencies / factor + (1 - interpolated) * frequencies, attention_factor


class ScoreBias(PositionEncoding):
    """A position encoding that adds a bias for each head, made from where the query and the key stand."""

    def __init__(self, num_heads, **kwargs):
        super().__init__(**kwargs)
        if num_heads < 1:
            raise ValueError(f"`num_heads` must be positive; received num_heads={num_heads}.")
        self.num_heads = num_heads

    def call(self, x):
        """Bias for self-attention over `x`: `[1, heads, T, S]`, S = T, or what a call under a scope may attend to."""
        length = ops.shape(x)[1]
        scope = scopes.decoding()
        if scope is None:
            positions = key_positions = ops.arange(length, dtype="int32")
        else:
            positions, key_positions = scope.positions(length), scope.key_positions(length)
        return ops.cast(self.bias(positions, key_positions), self.compute_dtype)

    def bias(self, query_positions, key_positions):
        """Bias of keys at `key_positions` [S] for queries at `query_positions` [T]: `[1, heads, T, S]`."""
        raise NotImplementedError

    def add_bias(self, bias, query_positions, key_positions):
        own = self.bias(query_positions, key_positions)
        return own if bias is None else ops.cast(bias, own.dtype) + own

    def compute_output_spec(self, x):
        return keras.KerasTensor((1, self.num_heads, x.shape[1], x.shape[1]), dtype=self.compute_dtype)

    def get_config(self):
        return {**super().get_config(), "num_heads": self.num_heads}


@keras.saving.register_keras_serializable(package="keras_transformer")
class RelativePositionBias(ScoreBias):
    """T5's relative position bias: a learned number for each head and each bucket of distances.

    Half of the buckets stand for one distance each, the others for ranges that grow logarithmically up to
    `max_distance`. As `position=` of an attention it is that layer's own; called on a sequence, its result can be the
    `attention_bias` of several layers, as T5 has it.

    Args:
        num_heads: int. Heads of the attention.
        num_buckets: int. Number of buckets; even if `bidirectional`.
        max_distance: int. All distances from here on share a bucket.
        bidirectional: boolean. Whether later keys have buckets of their own (an encoder) or count as distance 0 (a
            decoder).
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of shape `[B, T, dim]`; only its length matters.

    Returns:
        Tensor of shape `[1, heads, T, T]`; under a `DecodingScope` `[1, heads, T, max_length]`.

    Raises:
        ValueError: if the buckets cannot be laid out.

    Reference: [T5](https://arxiv.org/abs/1910.10683), section 2.1.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> bias = kt.layers.RelativePositionBias(4)(np.ones((2, 6, 8), "float32"))
    >>> tuple(bias.shape)
    (1, 4, 6, 6)
    """

    def __init__(self, num_heads, num_buckets=32, max_distance=128, bidirectional=True, **kwargs):
        super().__init__(num_heads, **kwargs)
        directions = 2 if bidirectional else 1
        if num_buckets % directions or num_buckets < 2 * directions or max_distance <= num_buckets // directions // 2:
            raise ValueError(
                f"`num_buckets` must be a multiple of {directions}, at least {2 * directions}, and `max_distance` "
                f"greater than the distances with a bucket of their own; received num_buckets={num_buckets}, "
                f"max_distance={max_distance}."
            )
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def build(self, input_shape=None):
        self.bias_table = self.add_weight(
            name="bias_table",
            shape=(self.num_buckets, self.num_heads),
            initializer=keras.initializers.RandomNormal(stddev=0.02),
        )

    def bias(self, query_positions, key_positions):
        distance = ops.expand_dims(query_positions, -1) - ops.expand_dims(
            key_positions, -2
        )  # [T, S], > 0: earlier keys
        rows = ops.take(self.bias_table, self._bucket(distance), axis=0)  # [T, S, heads]
        return ops.expand_dims(ops.transpose(rows, (2, 0, 1)), 0)

    def _bucket(self, distance):
        buckets, offset = self.num_buckets, 0
        if self.bidirectional:
            buckets //= 2
            offset = ops.where(distance < 0, buckets, 0)
            distance = ops.abs(distance)
        else:
            distance = ops.maximum(distance, 0)
        exact = buckets // 2
        ratio = ops.cast(ops.maximum(distance, 1), "float32") / exact
        growth = ops.log(ratio) / math.log(self.max_distance / exact) * (buckets - exact)
        far = ops.minimum(exact + ops.cast(growth, "int32"), buckets - 1)
        return offset + ops.where(distance < exact, distance, far)

    def get_config(self):
        return {
            **super().get_config(),
            "num_buckets": self.num_buckets,
            "max_distance": self.max_distance,
            "bidirectional": self.bidirectional,
        }


@keras.saving.register_keras_serializable(package="keras_transformer")
class AlibiBias(ScoreBias):
    """Attention with linear biases: each head's scores fall with the distance, at its own slope; nothing is learned.

    Args:
        num_heads: int. Heads of the attention.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of shape `[B, T, dim]`; only its length matters.

    Returns:
        Tensor of shape `[1, heads, T, T]`; under a `DecodingScope` `[1, heads, T, max_length]`.

    Raises:
        ValueError: if `num_heads` is not positive.

    Reference: [Train Short, Test Long](https://arxiv.org/abs/2108.12409), section 3. Without a causal mask the bias is
    symmetric.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> bias = kt.layers.AlibiBias(8)(np.ones((1, 3, 8), "float32"))
    >>> keras.ops.convert_to_numpy(bias)[0, 0].tolist()
    [[-0.0, -0.5, -1.0], [-0.5, -0.0, -0.5], [-1.0, -0.5, -0.0]]
    """

    def bias(self, query_positions, key_positions):
        distance = ops.abs(ops.expand_dims(query_positions, -1) - ops.expand_dims(key_positions, -2))
        slopes = ops.reshape(ops.convert_to_tensor(alibi_slopes(self.num_heads), "float32"), (1, -1, 1, 1))
        return -ops.cast(distance, "float32") * slopes


def alibi_slopes(num_heads):
    """The paper's slopes: a geometric sequence, filled up from the next longer one if the heads are no power of 2."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * (num_heads - power), 2))
    return np.concatenate([slopes, between])
