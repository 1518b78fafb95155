"""Floating-point operations that a training step cannot do without: forward once, backward twice as much.

They are six for each weight of a matrix and token, output projection included, and those of attention, of which a
causal one counts half. `sizes` are those of the case.
"""


def matmul(sizes):
    return 2 * sizes["size"] ** 3


def encoder(sizes):
    tokens, length = sizes["batch"] * sizes["length"], sizes["length"]
    return tokens * sizes["depth"] * (6 * block_weights(sizes) + 12 * length * sizes["dim"])


def causal_lm(sizes):
    tokens, dim, depth = sizes["batch"] * sizes["length"], sizes["dim"], sizes["depth"]
    weights = depth * block_weights(sizes) + dim * sizes["vocabulary"]
    return tokens * (6 * weights + 12 * depth * sizes["length"] * dim / 2)


def vision_transformer(sizes):
    patches, dim = (sizes["image"] // sizes["patch"]) ** 2, sizes["dim"]
    blocks = encoder({**sizes, "batch": 1, "length": patches + 1})
    return sizes["batch"] * (blocks + 6 * patches * 3 * sizes["patch"] ** 2 * dim + 6 * dim * sizes["classes"])


def encoder_decoder(sizes):
    dim, depth, length = sizes["dim"], sizes["depth"], sizes["length"]
    weights = depth * (2 * block_weights(sizes) + 4 * dim**2) + dim * sizes["vocabulary"]
    attention = 12 * depth * length * dim * (1 + 1 / 2 + 1)  # Encoder, causal decoder, from decoder to encoder.
    return sizes["batch"] * length * (6 * weights + attention)


def block_weights(sizes):
    """Those of self-attention and feed-forward network, which is four times as wide inside where nothing is told."""
    return 4 * sizes["dim"] ** 2 + 2 * sizes["dim"] * sizes.get("hidden", 4 * sizes["dim"])
