import keras
from keras import ops

from keras_transformer.layers import (
    Dropout,
    EncoderBlock,
    FeedForward,
    MultiHeadSelfAttention,
    PositionalEmbedding,
    PrefixTokens,
)

POOLINGS = ("mean", "class_token", "last_token")


def text_classifier(
    vocabulary_size,
    num_classes,
    dim=128,
    depth=2,
    num_heads=4,
    hidden_dim=512,
    max_length=None,
    pooling="mean",
    norm_position="pre",
    dropout=0.1,
    remat=False,
    name="text_classifier",
):
    """An encoder of text that tells classes apart, as a functional model.

    Token id 0 is padding, which nothing attends to and no pooling reads.

    Args:
        vocabulary_size: int. Number of tokens, padding included.
        num_classes: int. Number of classes.
        dim: int. Width of the model.
        depth: int. Number of blocks; 0 for a bag of words.
        num_heads: int. Heads of each attention.
        hidden_dim: int. Width inside the feed-forward networks.
        max_length: int. How many tokens a text may have, each place with a learned position; None for sinusoidal
            positions, which have no limit.
        pooling: `"mean"` of all real tokens; `"class_token"`, a learned vector in front that reads the others, as in
            BERT; or `"last_token"`, with attention to earlier tokens alone, as in GPT.
        norm_position: `"pre"`, `"post"` or `"sandwich"`, as in `EncoderBlock`.
        dropout: float. Dropout of the embeddings, of each sublayer's result and of the pooled vector.
        remat: boolean. Whether blocks keep nothing for the gradient but what comes in, as in `EncoderBlock`.
        name: str. Name of the model.

    Returns:
        `keras.Model` from `token_ids` int32 [B, T] to `logits` [B, num_classes]. A text needs at least one token.

    Raises:
        ValueError: if `pooling` is unknown, or a number is out of range.

    References: [BERT](https://arxiv.org/abs/1810.04805), section 3.2, for the class token;
    [GPT](https://openai.com/research/language-unsupervised), section 3.2, for the last token.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> model = kt.models.text_classifier(100, 3, dim=16, depth=1, num_heads=2, hidden_dim=32)
    >>> tuple(model(np.array([[5, 6, 7, 0], [8, 9, 0, 0]])).shape)
    (2, 3)
    """
    if pooling not in POOLINGS:
        raise ValueError(f"`pooling` must be one of {POOLINGS}; received pooling={pooling!r}.")
    if num_classes < 2:
        raise ValueError(f"`num_classes` must be at least 2; received num_classes={num_classes}.")
    if depth < 0:
        raise ValueError(f"`depth` must be a number of blocks, 0 or more; received depth={depth}.")

    def norm(name=None):
        return keras.layers.LayerNormalization(epsilon=1e-6, name=name)

    initializer = keras.initializers.RandomNormal(stddev=0.02 if max_length else dim**-0.5)
    embedding = keras.layers.Embedding(
        vocabulary_size, dim, embeddings_initializer=initializer, mask_zero=True, name="embedding"
    )
    if max_length is None:
        position = PositionalEmbedding(scale=dim**0.5, name="position")
    else:
        position = PositionalEmbedding("learned", max_length, name="position")
    attention = MultiHeadSelfAttention(num_heads, causal=pooling == "last_token", dropout=dropout)
    feed_forward = FeedForward(hidden_dim, dropout=dropout)

    token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    x = position(embedding(token_ids))
    if pooling == "class_token":
        x = PrefixTokens(name="class_token")(x)
    x = Dropout(dropout, name="embedding_dropout")(x)
    for i in range(depth):
        options = {"norm_position": norm_position, "dropout": dropout, "remat": remat}
        x = EncoderBlock(attention, feed_forward, norm(), name=f"encoder_block_{i}", **options)(x)
    if norm_position != "post":
        x = norm("encoder_norm")(x)
    x = pool(x, token_ids, pooling)
    x = Dropout(dropout, name="pooled_dropout")(x)
    return keras.Model(token_ids, keras.layers.Dense(num_classes, name="logits")(x), name=name)


def pool(x, token_ids, pooling):
    """One vector for each text, `[B, dim]`."""
    if pooling == "mean":
        return keras.layers.GlobalAveragePooling1D(name="mean")(x)
    if pooling == "class_token":
        return x[:, 0]
    places = ops.cumsum(ops.ones_like(token_ids), axis=-1) - 1
    last = ops.max(ops.where(ops.not_equal(token_ids, 0), places, 0), axis=-1)  # [B]
    return ops.take_along_axis(x, ops.reshape(last, (-1, 1, 1)), axis=1)[:, 0]
