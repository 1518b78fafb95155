"""What every layer asks of its arguments, and how it says no."""

from keras_transformer.ops.masks import check_mask


def check_rate(rate, name):
    """Returns `rate` if it is a share that dropout can take."""
    if not 0 <= rate < 1:
        raise ValueError(f"`{name}` must be a rate of at least 0 and less than 1; received {name}={rate}.")
    return rate


def check_width(dim, num_heads):
    """Returns the width of a head, if the heads divide the width of the model."""
    if dim % num_heads:
        below = dim // num_heads * num_heads
        nearest = f"{below} and {below + num_heads}" if below else f"{num_heads}"
        raise ValueError(
            f"`num_heads` must divide the width of the input, or `head_dim` be given; received num_heads={num_heads} "
            f"for a width of {dim}. The nearest widths that {num_heads} divides: {nearest}."
        )
    return dim // num_heads


def check_sequence_masks(x, mask, prefix_mask):
    """Checks the masks that have one value for each position of `x`."""
    for name, each in (("mask", mask), ("prefix_mask", prefix_mask)):
        if each is not None:
            check_mask(each, name, tuple(x.shape[:2]), "`x`")


def check_explicit(attention_mask, attention_bias, length, key_length):
    """Checks the mask and bias of scores `[B, heads, length, key_length]`.

    Sizes that are not known yet (None) pass: where they turn out wrong, the backend's own shape error stops the call.
    """
    if attention_mask is not None:
        check_mask(attention_mask, "attention_mask", (None, length, key_length), "queries and keys")
    if attention_bias is not None:
        shape = tuple(attention_bias.shape)
        matches = len(shape) == 4 and all(
            size is None or wanted is None or size == wanted
            for size, wanted in zip(shape[2:], (length, key_length), strict=True)
        )
        if not matches:
            raise ValueError(
                f"`attention_bias` must have shape (1 or batch, 1 or heads, {length}, {key_length}) to match queries "
                f"and keys; received {shape}."
            )


def check_context(context, cross_attention):
    """Checks that a block gets a context exactly if it has a layer to read it with."""
    if context is None and cross_attention is not None:
        raise ValueError("`context` is missing: a block with `cross_attention` is called as `block(x, context)`.")
    if context is not None and cross_attention is None:
        raise ValueError(
            "`context` was given to a block without cross-attention; make the block with `cross_attention=` (8, say, "
            "for 8 heads), or call it as `block(x)`."
        )
