"""What encoders of images, and CLIP's of texts, are made of: patches behind learned tokens, and pre-norm blocks."""

import keras

from keras_transformer.layers import EncoderBlock, FeedForward, PatchEmbedding, PositionalEmbedding, PrefixTokens
from keras_transformer.pretrained.families import parts


def patch_sequence(fields, tokens=("class_token",), patch_size=16, use_bias=True, prefix=""):
    """Images as a sequence: learned tokens, then patches row by row, with learned positions.

    Args:
        fields: `Fields`.
        tokens: names of the learned tokens, in their order.
        patch_size: int. Default of the field.
        use_bias: boolean. Whether patches are projected with a bias.
        prefix: str. What the names of layers begin with.

    Returns:
        Symbolic `images` `[B, height, width, channels]`, and tensor `[B, T, dim]`.
    """
    height, width = _pair(fields.take("image_size", default=224))
    patch_height, patch_width = patch_size = _pair(fields.take("patch_size", default=patch_size))
    rows, columns = height // patch_height, width // patch_width
    images = keras.Input((height, width, fields.take("num_channels", default=3)), name="images")
    x = images
    if (height, width) != (rows * patch_height, columns * patch_width):  # What fills no patch is left away.
        x = x[:, : rows * patch_height, : columns * patch_width]
    x = PatchEmbedding(patch_size, dim(fields), use_bias, name=f"{prefix}patches")(x)
    for name in reversed(tokens):
        x = PrefixTokens(name=f"{prefix}{name}")(x)
    return images, PositionalEmbedding("learned", rows * columns + len(tokens), name=f"{prefix}position")(x)


def encoder_blocks(
    fields, x, attention, hidden_dim=3072, activation="gelu", epsilon=1e-12, dropout=0.0, prefix="", mask=None
):
    """Pre-norm blocks, one after the other: a list of `x` and what each of them makes of it.

    `hidden_dim`, `activation` and `epsilon` are defaults of the fields.
    """
    feed_forward = FeedForward(
        fields.take("intermediate_size", default=hidden_dim), parts.activation(fields, "hidden_act", activation)
    )
    states = [x]
    for i in range(fields.take("num_hidden_layers", default=12)):
        name = f"{prefix}encoder_block_{i}"
        block = EncoderBlock(attention, feed_forward, norm(fields, epsilon), dropout=dropout, name=name)
        states.append(block(states[-1], mask=mask))
    return states


def norm(fields, epsilon=1e-12, name=None):
    return keras.layers.LayerNormalization(epsilon=fields.take("layer_norm_eps", default=epsilon), name=name)


def dim(fields, default=768):
    return fields.take("hidden_size", default=default)


def _pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)
