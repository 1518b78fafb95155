import keras

from keras_transformer.layers import (
    CrossAttention,
    DecoderBlock,
    Dropout,
    EncoderBlock,
    FeedForward,
    MultiHeadSelfAttention,
    PositionalEmbedding,
    ReversibleEmbedding,
)


def transformer(
    source_vocabulary_size,
    target_vocabulary_size,
    dim=512,
    depth=6,
    num_heads=8,
    hidden_dim=2048,
    activation="relu",
    norm_position="post",
    dropout=0.1,
    attention_dropout=0.0,
    shared_embedding=False,
    tied_output=True,
    remat=False,
    name="transformer",
):
    """The encoder-decoder of "Attention Is All You Need", as a functional model.

    The defaults are the paper's base model. Token id 0 is padding, which nothing attends to.

    Args:
        source_vocabulary_size: int. Number of source tokens, padding included.
        target_vocabulary_size: int. Number of target tokens, padding included.
        dim: int. Width of the model.
        depth: int, or a pair of ints where encoder and decoder differ. Number of blocks.
        num_heads: int. Heads of each attention.
        hidden_dim: int. Width inside the feed-forward networks.
        activation: str or callable. Activation of the feed-forward networks.
        norm_position: `"post"` as in the paper, `"pre"`, which trains without warm-up, or `"sandwich"`. The latter two
            end each stack with one more norm.
        dropout: float. Dropout of the embeddings and of each sublayer's result.
        attention_dropout: float. Dropout of attention weights.
        shared_embedding: boolean. Whether source and target share one embedding, for a joint vocabulary.
        tied_output: boolean. Whether the target embedding is also the output projection.
        remat: boolean. Whether blocks keep nothing for the gradient but what comes in, as in `EncoderBlock`.
        name: str. Name of the model.

    Returns:
        `keras.Model` with inputs `source_ids` [B, S] and `target_ids` [B, T], both int32, to `logits` [B, T, target
        vocabulary]: those at position t are for the token after `target_ids[:, t]`.

    Raises:
        ValueError: if `shared_embedding` is asked for with vocabularies of different sizes, or `depth` is no number of
            blocks.

    Reference: [Attention Is All You Need](https://arxiv.org/abs/1706.03762).

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> model = kt.models.transformer(100, 80, dim=32, depth=2, num_heads=4, hidden_dim=64)
    >>> source, target = np.ones((2, 7), "int32"), np.ones((2, 5), "int32")
    >>> tuple(model({"source_ids": source, "target_ids": target}).shape)
    (2, 5, 80)
    """
    if shared_embedding and source_vocabulary_size != target_vocabulary_size:
        raise ValueError(
            "`shared_embedding` needs one vocabulary for both sides; received "
            f"source_vocabulary_size={source_vocabulary_size}, target_vocabulary_size={target_vocabulary_size}."
        )
    depths = (depth, depth) if isinstance(depth, int) else tuple(depth)
    if len(depths) != 2 or min(depths) < 1:
        raise ValueError(
            f"`depth` must be a positive number of blocks, or a pair of them for encoder and decoder; received {depth}."
        )
    encoder_depth, decoder_depth = depths

    def embedding(size, name):
        initializer = keras.initializers.RandomNormal(stddev=dim**-0.5)
        reversible = tied_output and name != "source_embedding"
        kind = ReversibleEmbedding if reversible else keras.layers.Embedding
        return kind(size, dim, embeddings_initializer=initializer, mask_zero=True, name=name)

    def embed(ids, layer, side):
        x = PositionalEmbedding(scale=dim**0.5, name=f"{side}_position")(layer(ids))
        return Dropout(dropout, name=f"{side}_dropout")(x)

    def norm(**kwargs):
        return keras.layers.LayerNormalization(epsilon=1e-6, **kwargs)

    attention = {"num_heads": num_heads, "dropout": attention_dropout}
    block = {"norm": norm(), "norm_position": norm_position, "dropout": dropout, "remat": remat}
    target_embedding = embedding(target_vocabulary_size, "embedding" if shared_embedding else "target_embedding")
    source_embedding = target_embedding if shared_embedding else embedding(source_vocabulary_size, "source_embedding")

    source_ids = keras.Input((None,), dtype="int32", name="source_ids")
    target_ids = keras.Input((None,), dtype="int32", name="target_ids")
    context = embed(source_ids, source_embedding, "source")
    for i in range(encoder_depth):
        feed_forward = FeedForward(hidden_dim, activation)
        self_attention = MultiHeadSelfAttention(**attention)
        context = EncoderBlock(self_attention, feed_forward, name=f"encoder_block_{i}", **block)(context)
    if norm_position != "post":
        context = norm(name="encoder_norm")(context)
    x = embed(target_ids, target_embedding, "target")
    for i in range(decoder_depth):
        x = DecoderBlock(
            MultiHeadSelfAttention(causal=True, **attention),
            FeedForward(hidden_dim, activation),
            CrossAttention(**attention),
            name=f"decoder_block_{i}",
            **block,
        )(x, context)
    if norm_position != "post":
        x = norm(name="decoder_norm")(x)
    if tied_output:
        logits = target_embedding(x, reverse=True)
    else:
        logits = keras.layers.Dense(target_vocabulary_size, name="logits")(x)
    return keras.Model([source_ids, target_ids], logits, name=name)
