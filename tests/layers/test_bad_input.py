"""Each mistake meets an error that names the argument, what came, and what would be right."""

import keras
import numpy as np
import pytest
from harness import BACKEND, lengths, random

import keras_transformer as kt
from keras_transformer.layers import (
    AlibiBias,
    AttentionSinks,
    ClampedSwiGLU,
    CrossAttention,
    DecoderBlock,
    EncoderBlock,
    FeedForward,
    MixtureOfExperts,
    MultiHeadSelfAttention,
    PatchEmbedding,
    Placeholders,
    PositionalEmbedding,
    PrefixTokens,
    RelativePositionBias,
    RotaryEmbedding,
    SoftCap,
)

X = random(2, 5, 8)
CONTEXT = random(2, 7, 8)
LINEAR = {"rope_type": "linear", "factor": 2.0}

CONSTRUCTION = [
    (lambda: MultiHeadSelfAttention(8, num_key_value_heads=3), "num_heads=8, num_key_value_heads=3"),
    (lambda: CrossAttention(2, num_key_value_heads=4), "multiple of `num_key_value_heads`.*num_key_value_heads=4"),
    (lambda: MultiHeadSelfAttention(0), "num_heads=0"),
    (lambda: MultiHeadSelfAttention(4, num_key_value_heads=0), "num_key_value_heads=0"),
    (lambda: MultiHeadSelfAttention(4, head_dim=0), "`head_dim` must be .* received head_dim=0"),
    (lambda: CrossAttention(4, head_dim=-8), "head_dim=-8"),
    (lambda: MultiHeadSelfAttention(4, sliding_window=0), "`sliding_window` must be a positive.*sliding_window=0"),
    (lambda: MultiHeadSelfAttention(4, use_bias=["query", "out"]), "`use_bias` must be .*'output'.*'out'"),
    (lambda: CrossAttention(4, use_bias="query"), "`use_bias` must be True, False or a list"),
    (lambda: MultiHeadSelfAttention(4, position=AlibiBias(8)), "`position` must be made for the 4 heads.*for 8"),
    (lambda: MultiHeadSelfAttention(4, position=RelativePositionBias(2)), "4 heads.*for 2"),
    (lambda: MultiHeadSelfAttention(4, position="rotary"), "`position` must be .*'rotary'"),
    (lambda: MultiHeadSelfAttention(4, position=PositionalEmbedding()), "`position` must be .*PositionalEmbedding"),
    (lambda: MultiHeadSelfAttention(4, softmax=AttentionSinks(2)), "`softmax` must be made for the 4 heads.*for 2"),
    (lambda: MultiHeadSelfAttention(4, softmax=keras.layers.Softmax()), "`softmax` must be a `SoftCap`.*Softmax"),
    (lambda: MultiHeadSelfAttention(4, softmax=50.0), "`softmax` must be a Keras layer; received 50.0"),
    (lambda: SoftCap(0.0), "`cap` must be a positive number.*cap=0.0"),
    (lambda: AttentionSinks(0), "`num_heads` must be positive; received num_heads=0"),
    (lambda: MultiHeadSelfAttention(4, query_key_norm=True), "`query_key_norm` must be a Keras layer; received True"),
    (lambda: EncoderBlock(2, 16, norm="layer"), "`norm` must be a Keras layer; received 'layer'"),
    (lambda: EncoderBlock(2, 16.5), "`feed_forward` must be .* 16.5"),
    (lambda: DecoderBlock(None, 16), "`self_attention` must be .* None"),
    (lambda: DecoderBlock(2, 16, "cross"), "`cross_attention` must be .* 'cross'"),
    (lambda: EncoderBlock(2, 16, norm_position="before"), r"`norm_position` must be one of .*'sandwich'.* 'before'"),
    *(
        (lambda make=make, rate=rate: make(rate), f"`{name}` must be a rate .*{name}={rate}")
        for rate in (-0.1, 1.0, 1.5)
        for name, make in (
            ("dropout", lambda rate: MultiHeadSelfAttention(2, dropout=rate)),
            ("dropout", lambda rate: CrossAttention(2, dropout=rate)),
            ("dropout", lambda rate: FeedForward(8, dropout=rate)),
            ("dropout", lambda rate: EncoderBlock(2, 8, dropout=rate)),
            ("drop_path", lambda rate: DecoderBlock(2, 8, drop_path=rate)),
        )
    ),
    (lambda: FeedForward(0), "`hidden_dim` must be a positive width; received hidden_dim=0"),
    (lambda: FeedForward(8, ClampedSwiGLU()), "`activation=ClampedSwiGLU` combines two.*`gated=True`"),
    (lambda: MixtureOfExperts(4, 8, activation=ClampedSwiGLU(), gated=False), "needs `gated=True`"),
    (lambda: ClampedSwiGLU(limit=0.0), "`limit` must be a positive number; received limit=0.0"),
    (lambda: MixtureOfExperts(4, 8, top_k=5), "`top_k` must be at least 1 and at most.*top_k=5, num_experts=4"),
    (lambda: MixtureOfExperts(4, 8, top_k=0), "top_k=0"),
    (lambda: MixtureOfExperts(4, 0), "hidden_dim=0"),
    (lambda: MixtureOfExperts(4, 8, load_balancing=-1.0), "`load_balancing` must be 0 or more.*-1.0"),
    (lambda: MixtureOfExperts(4, 8, router_jitter=1.0), "`router_jitter` must be .*router_jitter=1.0"),
    (lambda: PositionalEmbedding("rotary"), "`kind` must be one of .*'sinusoidal'.*kind='rotary'"),
    (lambda: PositionalEmbedding("learned"), "`max_length` must be given for learned positions"),
    (lambda: PositionalEmbedding(offset=-1), "`offset` must be .*offset=-1"),
    (lambda: PatchEmbedding(0, 8), "`patch_size` must be a positive number.*patch_size=0"),
    (lambda: PatchEmbedding((4, 4, 3), 8), r"or a pair of them.*patch_size=\(4, 4, 3\)"),
    (lambda: PatchEmbedding(4, 0), "`dim` must be a positive width; received dim=0"),
    (lambda: Placeholders(-1), "`token_id` must be the number of a token; received token_id=-1"),
    (lambda: PrefixTokens(0), "`count` must be a positive.*count=0"),
    (lambda: RotaryEmbedding(base=0), "`base` must be positive; received base=0"),
    (lambda: RotaryEmbedding(dim=3), "`dim` must be even.*dim=3"),
    (lambda: RotaryEmbedding(scaling={"factor": 2.0}), "`scaling` must name its 'rope_type'.*linear.*'factor': 2.0"),
    (lambda: RotaryEmbedding(scaling={**LINEAR, "rope_type": "longrope"}), "must name its 'rope_type'.*longrope"),
    (
        lambda: RotaryEmbedding(scaling={**LINEAR, "beta_fast": 3}),
        r"'linear' takes \['factor'\].*unknown \['beta_fast'\]",
    ),
    (lambda: RotaryEmbedding(scaling={"rope_type": "linear"}), r"missing \['factor'\]"),
    (
        lambda: RotaryEmbedding(scaling={**LINEAR, "rope_type": "yarn"}),
        r"missing \['original_max_position_embeddings'\]",
    ),
    (lambda: RotaryEmbedding(scaling={**LINEAR, "rope_type": "llama3"}), r"missing \['high_freq_factor', 'low_freq"),
    (lambda: RotaryEmbedding(scaling={**LINEAR, "factor": 0.5}), "'factor' of at least 1.*0.5"),
    (lambda: RelativePositionBias(2, 31), "`num_buckets` must be a multiple of 2.*num_buckets=31"),
    (lambda: RelativePositionBias(2, 32, 8), "max_distance=8"),
    (lambda: RelativePositionBias(0), "`num_heads` must be positive; received num_heads=0"),
    (lambda: AlibiBias(0), "num_heads=0"),
    (lambda: kt.scopes.DecodingScope(), "`DecodingScope` needs a `cache` .* or the `max_length`"),
]


@pytest.mark.parametrize(("make", "message"), CONSTRUCTION, ids=[message for _, message in CONSTRUCTION])
def test_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


ONES = np.ones((2, 5), "float32")
ADDITIVE = np.where(lengths(5, 3, size=5), 0.0, -1e9).astype("float32")
BOOLEAN = r"must be boolean \(True = attend\); received dtype "
CALLS = [
    # A width that the heads do not divide names the nearest that they do.
    (lambda x, c: MultiHeadSelfAttention(3)(x), "num_heads=3 for a width of 8.* 6 and 9"),
    (lambda x, c: CrossAttention(5)(x, c), "num_heads=5 for a width of 8.* 5 and 10"),
    (lambda x, c: EncoderBlock(16, 8)(x), "num_heads=16 for a width of 8.* 16"),
    (lambda x, c: MultiHeadSelfAttention(8, position=RotaryEmbedding())(x), "even number of features.*dim=1"),
    (lambda x, c: MultiHeadSelfAttention(2, position=RotaryEmbedding(dim=6))(x), "dim=6 for heads of 4"),
    *(
        (lambda x, c, call=call, mask=mask: call(x, c, mask), f"`{name}` {BOOLEAN}{mask.dtype}")
        for mask in (ONES, ADDITIVE, ONES.astype("int32"))
        for name, call in (
            ("mask", lambda x, c, mask: MultiHeadSelfAttention(2)(x, mask=mask)),
            ("mask", lambda x, c, mask: EncoderBlock(2, 8)(x, mask=mask)),
            ("mask", lambda x, c, mask: DecoderBlock(2, 8, 2)(x, c, mask=mask)),
            ("context_mask", lambda x, c, mask: CrossAttention(2)(x, x, context_mask=mask)),
            ("context_mask", lambda x, c, mask: DecoderBlock(2, 8, 2)(x, x, context_mask=mask)),
            (
                "attention_mask",
                lambda x, c, mask: MultiHeadSelfAttention(2)(x, attention_mask=mask[:, None] + 0 * mask[..., None]),
            ),
            (
                "attention_mask",
                lambda x, c, mask: EncoderBlock(2, 8)(x, attention_mask=mask[:, None] + 0 * mask[..., None]),
            ),
        )
    ),
    # A mask of the wrong length, and that of the target where that of the context belongs.
    (
        lambda x, c: MultiHeadSelfAttention(2)(x, mask=lengths(5, 3, size=6)),
        r"`mask` must have shape \((batch|2), 5\) to match `x`.*, 6\)",
    ),
    (lambda x, c: EncoderBlock(2, 8)(x, mask=lengths(3, 3, size=4)), r"`mask` must have shape \((batch|2), 5\).*, 4\)"),
    (
        lambda x, c: DecoderBlock(2, 8, 2)(x, c, mask=lengths(7, 3, size=7)),
        r"`mask` must have shape .* 5\) to match `x`.*, 7\)",
    ),
    (
        lambda x, c: CrossAttention(2)(x, c, context_mask=lengths(5, 3, size=5)),
        r"`context_mask` must .*, 7\) to match `context`.*, 5\)",
    ),
    (
        lambda x, c: DecoderBlock(2, 8, 2)(x, c, context_mask=lengths(5, 3, size=5)),
        r"`context_mask` must .*, 7\) to match `context`.*, 5\)",
    ),
    (
        lambda x, c: DecoderBlock(2, 8)(x, prefix_mask=lengths(7, 3, size=7)),
        r"`prefix_mask` must have shape .* 5\) to match `x`.*, 7\)",
    ),
    (
        lambda x, c: MultiHeadSelfAttention(2)(x, prefix_mask=np.ones((2, 5), "int32")),
        r"`prefix_mask` must be boolean \(True = attend\); received dtype int32",
    ),
    (
        lambda x, c: Placeholders(9)(x, np.full((2, 5), 9), c[..., :3]),
        r"`vectors` must have shape \(batch, count, 8\).*received .*, 7, 3\)",
    ),
    (
        lambda x, c: MultiHeadSelfAttention(2)(x, attention_mask=np.ones((2, 5, 7), bool)),
        r"`attention_mask` must have shape \(batch, 5, 5\).*5, 7\)",
    ),
    (
        lambda x, c: CrossAttention(2)(x, c, attention_mask=np.ones((2, 5, 5), bool)),
        r"`attention_mask` must have shape \(batch, 5, 7\).*5, 5\)",
    ),
    (
        lambda x, c: EncoderBlock(2, 8)(x, attention_mask=np.ones((2, 5), bool)),
        r"`attention_mask` must have shape \(batch, 5, 5\).*5\)",
    ),
    (
        lambda x, c: DecoderBlock(2, 8, 2)(x, c, cross_attention_mask=np.ones((2, 5, 5), bool)),
        r"`cross_attention_mask` must have shape \(batch, 5, 7\) to match `x` and `context`; .*5, 5\)",
    ),
    (
        lambda x, c: EncoderBlock(2, 8)(x, attention_bias=np.zeros((1, 2, 5, 6), "float32")),
        r"`attention_bias` must have shape .*5, 5\).*5, 6\)",
    ),
    (
        lambda x, c: CrossAttention(2)(x, c, attention_bias=np.zeros((5, 7), "float32")),
        r"`attention_bias` must have shape .*5, 7\)",
    ),
    (lambda x, c: DecoderBlock(2, 8)(x, c), "`context` was given to a block without cross-attention"),
    (lambda x, c: DecoderBlock(2, 8, 2)(x), "`context` is missing"),
    (lambda x, c: PositionalEmbedding("learned", 4)(x), "max_length=4; received length 5"),
    (lambda x, c: PositionalEmbedding(max_length=3)(x), "max_length=3; received length 5"),
]


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize(("call", "message"), CALLS, ids=[message for _, message in CALLS])
def test_call(call, message, symbolic):
    inputs = [keras.Input(x.shape[1:]) for x in (X, CONTEXT)] if symbolic else (X, CONTEXT)
    with pytest.raises(ValueError, match=message):
        call(*inputs)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_input_longer_than_the_positions_with_lengths_known_at_run_time_alone(kind):
    inputs = keras.Input((None, 8))
    model = keras.Model(inputs, PositionalEmbedding(kind, max_length=4, name="positions")(inputs))
    assert tuple(model(X[:, :4]).shape) == (2, 4, 8)
    with pytest.raises(ValueError, match="`positions` must not be longer than max_length=4; received length 5"):
        model(X)
    if BACKEND != "tensorflow":  # The others compile anew for each length, and know it then.
        with pytest.raises(ValueError, match="max_length=4; received length 5"):
            model.predict(X, verbose=0)
        return
    import tensorflow as tf

    traced = tf.function(model, input_signature=[tf.TensorSpec((None, None, 8))])
    assert tuple(traced(X[:, :4]).shape) == (2, 4, 8)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?s)max_length=4; received length.*5"):
        traced(X)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("wrong", ["mask", "context_mask"])
def test_masks_of_the_wrong_length_with_lengths_known_at_run_time_alone(wrong, traced):
    inputs = {"x": keras.Input((None, 8)), "context": keras.Input((None, 8))}
    inputs |= {name: keras.Input((None,), dtype="bool") for name in ("mask", "context_mask")}
    model = keras.Model(inputs, DecoderBlock(2, 8, 2)(**inputs))
    values = {"x": X, "context": CONTEXT, "mask": lengths(5, 3, size=5), "context_mask": lengths(7, 4, size=7)}
    call = model
    if traced and BACKEND == "tensorflow":
        import tensorflow as tf

        signature = {name: tf.TensorSpec([None] * value.ndim, value.dtype) for name, value in values.items()}
        signature |= {name: tf.TensorSpec((None, None, 8)) for name in ("x", "context")}
        call = tf.function(model, input_signature=[signature])
    values = {name: keras.ops.convert_to_tensor(value) for name, value in values.items()}
    call(values)
    values[wrong] = values[wrong][:, :3]
    with pytest.raises(Exception, match=r"(?s)5.*3|3.*5|7.*3|3.*7"):
        call(values)
