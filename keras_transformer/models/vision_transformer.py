import keras
from keras import ops

from keras_transformer.layers import (
    Dropout,
    EncoderBlock,
    FeedForward,
    MultiHeadSelfAttention,
    PatchEmbedding,
    PositionalEmbedding,
    PrefixTokens,
)

POOLINGS = ("class_token", "mean", "sequence")


def vision_transformer(
    image_shape,
    num_classes,
    patch_size=None,
    convolutions=None,
    dim=128,
    depth=4,
    num_heads=4,
    hidden_dim=512,
    head_dim=None,
    pooling="class_token",
    num_registers=0,
    dropout=0.1,
    drop_path=0.0,
    remat=False,
    name="vision_transformer",
):
    """An encoder of images that tells classes apart, as a functional model.

    Images become a sequence in one of two ways: cut into patches, or by convolutions, each of which is followed by a
    pooling that halves the image. Positions are learned, and can be moved to images of other sizes by
    `resize_positions`.

    Args:
        image_shape: tuple `(height, width, channels)`.
        num_classes: int. Number of classes.
        patch_size: int, or pair of height and width of a patch, which must divide those of the images.
        convolutions: int. Number of convolutions in place of patches. The last one is `dim` wide, and each before it
            half as wide as the next.
        dim: int. Width of the model.
        depth: int. Number of blocks.
        num_heads: int. Heads of each attention.
        hidden_dim: int. Width inside the feed-forward networks.
        head_dim: int. Width of each head; `dim / num_heads` by default.
        pooling: `"class_token"`, a learned vector in front that reads the others, as in ViT; `"mean"` of all patches;
            or `"sequence"`, their mean by learned weights, as in CCT.
        num_registers: int. Learned vectors without a meaning of their own, in which the model can keep what concerns
            no patch.
        dropout: float. Dropout of the embeddings, of attention weights and of each sublayer's result.
        drop_path: float. How often the last block's sublayers are skipped in training; the first block's never are, and
            those between as often as lies between.
        remat: boolean. Whether blocks keep nothing for the gradient but what comes in, as in `EncoderBlock`.
        name: str. Name of the model.

    Returns:
        `keras.Model` from `images` float [B, height, width, channels] to `logits` [B, num_classes].

    Raises:
        ValueError: if not one of `patch_size` and `convolutions` is given, the patches do not fill the images,
            `pooling` is unknown, or a number is out of range.

    References: [An Image is Worth 16x16 Words](https://arxiv.org/abs/2010.11929), section 3.1;
    [Escaping the Big Data Paradigm with Compact Transformers](https://arxiv.org/abs/2104.05704), section 3;
    [Vision Transformers Need Registers](https://arxiv.org/abs/2309.16588).

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> model = kt.models.vision_transformer((32, 48, 3), 10, patch_size=16, dim=32, depth=1)
    >>> tuple(model(np.zeros((2, 32, 48, 3), "float32")).shape)
    (2, 10)
    """
    if pooling not in POOLINGS:
        raise ValueError(f"`pooling` must be one of {POOLINGS}; received pooling={pooling!r}.")
    if num_classes < 2 or depth < 1 or num_registers < 0:
        raise ValueError(
            "`num_classes` must be at least 2, `depth` at least 1 and `num_registers` at least 0; received "
            f"num_classes={num_classes}, depth={depth}, num_registers={num_registers}."
        )

    def norm(name=None):
        return keras.layers.LayerNormalization(epsilon=1e-6, name=name)

    images = keras.Input(image_shape, name="images")
    x = image_sequence(images, patch_size, convolutions, dim)
    if pooling == "class_token":
        x = PrefixTokens(name="class_token")(x)
    x = PositionalEmbedding("learned", x.shape[1], name="position")(x)
    if num_registers:
        x = PrefixTokens(num_registers, name="registers")(x)
    x = Dropout(dropout, name="embedding_dropout")(x)
    attention = MultiHeadSelfAttention(num_heads, head_dim, dropout=dropout)
    for i in range(depth):
        x = EncoderBlock(
            attention,
            FeedForward(hidden_dim, dropout=dropout),
            norm(),
            dropout=dropout,
            drop_path=drop_path * i / max(1, depth - 1),
            remat=remat,
            name=f"encoder_block_{i}",
        )(x)
    x = norm("encoder_norm")(x)
    logits = keras.layers.Dense(num_classes, name="logits")(pool(x[:, num_registers:], pooling))
    return keras.Model(images, logits, name=name)


def image_sequence(images, patch_size, convolutions, dim):
    """Images as a sequence `[B, T, dim]`, by whichever of `patch_size` and `convolutions` is given."""
    if (patch_size is None) == (convolutions is None):
        raise ValueError(
            "Either `patch_size` or `convolutions` must be given, to make a sequence of an image; received "
            f"patch_size={patch_size}, convolutions={convolutions}."
        )
    if convolutions is None:
        check_patches(images.shape[1:], patch_size)
        return PatchEmbedding(patch_size, dim, name="patches")(images)
    if convolutions < 1 or dim % 2 ** (convolutions - 1):
        raise ValueError(
            "`convolutions` must be at least 1, and `dim` even for each one before the last; received convolutions="
            f"{convolutions}, dim={dim}."
        )
    return convolutional_stem(images, convolutions, dim)


def check_patches(image_shape, patch_size):
    """Raises where patches do not fill the images, with the sizes nearest to theirs that would do."""
    pair = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    if min(pair) < 1:
        raise ValueError(f"`patch_size` must be positive; received patch_size={patch_size}.")
    if any(size % patch for size, patch in zip(image_shape, pair, strict=False)):
        sizes = zip(image_shape, pair, strict=False)
        nearest = [sorted({max(patch, size // patch * patch), -(-size // patch) * patch}) for size, patch in sizes]
        heights, widths = (" or ".join(map(str, choices)) for choices in nearest)
        raise ValueError(
            f"`patch_size` must divide the images' height and width; received image_shape={tuple(image_shape)}, "
            f"patch_size={patch_size}. The nearest sizes that would do: {heights} high, {widths} wide."
        )


def convolutional_stem(images, count, dim):
    """Images as a sequence `[B, T, dim]`, by convolutions that see over the borders of patches."""
    x = images
    for i in range(count):
        options = {"padding": "same", "activation": "relu", "use_bias": False, "kernel_initializer": "he_normal"}
        x = keras.layers.Conv2D(dim // 2 ** (count - 1 - i), 3, name=f"convolution_{i}", **options)(x)
        x = keras.layers.MaxPooling2D(3, 2, padding="same", name=f"pooling_{i}")(x)
    return keras.layers.Reshape((-1, dim), name="patches")(x)


def pool(x, pooling):
    """One vector for each image, `[B, dim]`."""
    if pooling == "class_token":
        return x[:, 0]
    if pooling == "mean":
        return ops.mean(x, axis=1)
    weights = ops.softmax(keras.layers.Dense(1, name="pooling_scores")(x), axis=1)  # [B, T, 1]
    return ops.sum(weights * x, axis=1)
