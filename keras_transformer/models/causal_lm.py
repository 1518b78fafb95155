import keras

from keras_transformer.layers import (
    DecoderBlock,
    Dropout,
    FeedForward,
    MultiHeadSelfAttention,
    PositionalEmbedding,
    ReversibleEmbedding,
    RotaryEmbedding,
)

POSITIONS = ("rotary", "learned", "sinusoidal")


def causal_lm(
    vocabulary_size,
    dim=256,
    depth=4,
    num_heads=4,
    hidden_dim=None,
    max_length=None,
    position="rotary",
    activation="gelu",
    gated=False,
    dropout=0.1,
    tied_output=True,
    remat=False,
    mask_zero=True,
    name="causal_lm",
):
    """A language model: a decoder that reads tokens and tells which comes next, as a functional model.

    Token id 0 is padding, which nothing attends to, unless `mask_zero=False`.

    Args:
        vocabulary_size: int. Number of tokens, padding included.
        dim: int. Width of the model.
        depth: int. Number of blocks.
        num_heads: int. Heads of each attention.
        hidden_dim: int. Width inside the feed-forward networks; by default four times `dim`.
        max_length: int. How many tokens there are positions for; only learned positions need and have such a limit.
        position: `"rotary"`, by which attention sees how far tokens are apart, as in LLaMA; `"learned"`, a vector
            for each place, as in GPT-2; or `"sinusoidal"`.
        activation: str or callable. Activation of the feed-forward networks.
        gated: boolean. Whether the activation gates a second projection, as with `"silu"` in LLaMA.
        dropout: float. Dropout of the embeddings, of attention weights and of each sublayer's result.
        tied_output: boolean. Whether the embedding is also the output projection.
        remat: boolean. Whether blocks keep nothing for the gradient but what comes in, as in `EncoderBlock`.
        mask_zero: boolean. Whether token id 0 is padding. Windows of a text have none, and without a mask a step of
            training GPT-2 on a GPU with JAX takes an eighth less time. The loss has a `pad_id` of its own.
        name: str. Name of the model.

    Returns:
        `keras.Model` from `token_ids` int32 [B, T] to `logits` [B, T, vocabulary_size]: those at position t are for
        the token after `token_ids[:, t]`.

    Raises:
        ValueError: if `position` is unknown, `depth` is not positive, or `max_length` is missing for learned positions
            or given for others.

    References: [GPT-2](https://openai.com/research/better-language-models), section 2.3;
    [LLaMA](https://arxiv.org/abs/2302.13971), section 2.2.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> model = kt.models.causal_lm(100, dim=32, depth=2)
    >>> tuple(model(np.ones((2, 7), "int32")).shape)
    (2, 7, 100)
    """
    if position not in POSITIONS:
        raise ValueError(f"`position` must be one of {POSITIONS}; received position={position!r}.")
    if depth < 1:
        raise ValueError(f"`depth` must be a positive number of blocks; received depth={depth}.")
    if (max_length is not None) != (position == "learned"):
        raise ValueError(
            "`max_length` must be given for learned positions, and for no others, which have no limit; received "
            f"position={position!r}, max_length={max_length}."
        )

    def norm(name=None):
        return keras.layers.LayerNormalization(epsilon=1e-5, name=name)

    kind = ReversibleEmbedding if tied_output else keras.layers.Embedding
    initializer = keras.initializers.RandomNormal(stddev=0.02)
    embedding = kind(vocabulary_size, dim, embeddings_initializer=initializer, mask_zero=mask_zero, name="embedding")
    rotary = RotaryEmbedding() if position == "rotary" else None
    attention = MultiHeadSelfAttention(num_heads, causal=True, position=rotary, dropout=dropout)
    feed_forward = FeedForward(hidden_dim or 4 * dim, activation, gated=gated)

    token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    x = embedding(token_ids)
    if position != "rotary":
        x = PositionalEmbedding(position, max_length, name="position")(x)
    x = Dropout(dropout, name="embedding_dropout")(x)
    for i in range(depth):
        options = {"norm": norm(), "dropout": dropout, "remat": remat}
        x = DecoderBlock(attention, feed_forward, name=f"decoder_block_{i}", **options)(x)
    x = norm("decoder_norm")(x)
    if tied_output:
        logits = embedding(x, reverse=True)
    else:
        logits = keras.layers.Dense(vocabulary_size, use_bias=False, name="logits")(x)
    return keras.Model(token_ids, logits, name=name)
