"""How kernels begin: small enough that a young block passes on what its input says of each position."""

import keras

SCORING = 0.5  # Query and key: Glorot's variance for query, key and value as one matrix, of which each is a third.
RESIDUAL = 0.25  # What adds to the residual stream.


def kernel_initializer(share):
    """Glorot's uniform initializer at a share of its variance.

    At its full variance what the sublayers of a deep post-norm stack add outweighs what they were given. Uniform
    attention adds the same to all positions, so a young encoder makes them alike, block by block (a standard deviation
    over positions of 0.13 after four blocks, out of 1.06), and cross-attention never learns where to look: the rank
    collapse of Dong et al., 2021 (https://arxiv.org/abs/2103.03404). Half the deviation keeps them apart, as DeepNet's
    beta does (https://arxiv.org/abs/2203.00555, section 4).

    Each kernel needs an initializer of its own: one instance gives equal weights wherever it is used.
    """
    return keras.initializers.VarianceScaling(share, mode="fan_avg", distribution="uniform")
