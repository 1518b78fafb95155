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
from keras_transformer.models.vision_transformer import image_sequence


def image_captioner(
    image_shape,
    vocabulary_size,
    patch_size=None,
    convolutions=None,
    dim=128,
    depth=(4, 2),
    num_heads=4,
    hidden_dim=512,
    dropout=0.1,
    remat=False,
    name="image_captioner",
):
    """An encoder of images and a decoder that writes what is in them, as a functional model.

    The encoder is that of `vision_transformer`, whose positions `resize_positions` moves to images of other sizes. The
    decoder reads all of its vectors. Token id 0 is padding, which nothing attends to.

    Args:
        image_shape: tuple `(height, width, channels)`.
        vocabulary_size: int. Number of tokens, padding included.
        patch_size: int, or pair of height and width of a patch, which must divide those of the images.
        convolutions: int. Number of convolutions in place of patches.
        dim: int. Width of the model.
        depth: pair of ints, the number of blocks of encoder and decoder, or one int for both.
        num_heads: int. Heads of each attention.
        hidden_dim: int. Width inside the feed-forward networks.
        dropout: float. Dropout of the embeddings, inside feed-forward networks and of each sublayer's result.
        remat: boolean. Whether blocks keep nothing for the gradient but what comes in, as in `EncoderBlock`.
        name: str. Name of the model.

    Returns:
        `keras.Model` with inputs `images` float [B, height, width, channels] and `target_ids` int32 [B, T], to
        `logits` [B, T, vocabulary_size]: those at position t are for the token after `target_ids[:, t]`.

    Raises:
        ValueError: if not one of `patch_size` and `convolutions` is given, the patches do not fill the images, or
            `depth` is no number of blocks.

    References: [CPTR: Full Transformer Network for Image Captioning](https://arxiv.org/abs/2101.10804);
    [Show, Attend and Tell](https://arxiv.org/abs/1502.03044), for a decoder that looks at places of an image.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> model = kt.models.image_captioner((16, 48, 1), 14, convolutions=2, dim=32, depth=1)
    >>> images, target_ids = np.zeros((2, 16, 48, 1), "float32"), np.ones((2, 5), "int32")
    >>> tuple(model({"images": images, "target_ids": target_ids}).shape)
    (2, 5, 14)
    """
    depths = (depth, depth) if isinstance(depth, int) else tuple(depth)
    if len(depths) != 2 or min(depths) < 1:
        raise ValueError(
            f"`depth` must be a positive number of blocks, or a pair of them for encoder and decoder; received {depth}."
        )

    def norm(name=None):
        return keras.layers.LayerNormalization(epsilon=1e-6, name=name)

    images = keras.Input(image_shape, name="images")
    target_ids = keras.Input((None,), dtype="int32", name="target_ids")
    x = image_sequence(images, patch_size, convolutions, dim)
    x = PositionalEmbedding("learned", x.shape[1], name="position")(x)
    context = Dropout(dropout, name="source_dropout")(x)
    feed_forward = FeedForward(hidden_dim, dropout=dropout)
    for i in range(depths[0]):
        options = {"dropout": dropout, "remat": remat}
        context = EncoderBlock(num_heads, feed_forward, norm(), name=f"encoder_block_{i}", **options)(context)
    context = norm("encoder_norm")(context)

    initializer = keras.initializers.RandomNormal(stddev=dim**-0.5)
    embedding = ReversibleEmbedding(
        vocabulary_size, dim, embeddings_initializer=initializer, mask_zero=True, name="target_embedding"
    )
    x = PositionalEmbedding(scale=dim**0.5, name="target_position")(embedding(target_ids))
    x = Dropout(dropout, name="target_dropout")(x)
    for i in range(depths[1]):
        x = DecoderBlock(
            MultiHeadSelfAttention(num_heads, causal=True),
            feed_forward,
            CrossAttention(num_heads),
            norm(),
            dropout=dropout,
            remat=remat,
            name=f"decoder_block_{i}",
        )(x, context)
    logits = embedding(norm("decoder_norm")(x), reverse=True)
    return keras.Model([images, target_ids], logits, name=name)
