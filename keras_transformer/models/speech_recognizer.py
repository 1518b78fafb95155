import keras
import numpy as np
from keras import ops

from keras_transformer.layers import (
    CrossAttention,
    DecoderBlock,
    Dropout,
    EncoderBlock,
    FeedForward,
    FrameSubsampling,
    MultiHeadSelfAttention,
    PositionalEmbedding,
    ReversibleEmbedding,
)
from keras_transformer.ops.masks import SURELY_NOT


def speech_recognizer(
    vocabulary_size,
    num_features,
    dim=144,
    depth=(6, 2),
    num_heads=4,
    hidden_dim=576,
    position=None,
    augmentation=None,
    dropout=0.1,
    ctc=True,
    remat=False,
    name="speech_recognizer",
):
    """An encoder of spectra and a decoder of text, with a second answer straight from the encoder.

    Frames whose features are all zero are padding, which changes nothing. Token id 0 is padding as well, and the blank
    of CTC. For `fit`, give the losses of the two answers by their names: `{"logits": SmoothedCrossEntropy(),
    "ctc_logits": CTCLoss()}`.

    Args:
        vocabulary_size: int. Number of tokens, padding included.
        num_features: int. Number of features of a frame, such as bands of a spectrum.
        dim: int. Width of the model.
        depth: pair of ints, the number of blocks of encoder and decoder, or one int for both.
        num_heads: int. Heads of each attention.
        hidden_dim: int. Width inside the feed-forward networks.
        position: layer such as `RotaryEmbedding()` or `RelativePositionBias(...)`, from which the attention of the
            encoder learns where frames are; None for sinusoidal positions that are added to them.
        augmentation: layer such as `SpecAugment()` that changes the features in training, or None.
        dropout: float. Dropout of the embeddings, inside feed-forward networks and of each sublayer's result.
        ctc: boolean. Whether there is the second answer.
        remat: boolean. Whether blocks keep nothing for the gradient but what comes in, as in `EncoderBlock`.
        name: str. Name of the model.

    Returns:
        `keras.Model` with inputs `features` float [B, T, num_features] and `target_ids` int32 [B, L], to a dict:

        - `logits` [B, L, vocabulary_size]: those at position t are for the token after `target_ids[:, t]`.
        - `ctc_logits` [B, T / 4, vocabulary_size], the quarter rounded up: those of each encoded frame for a token or
          the blank. Frames of padding are sure to be blank, so that losses and decoders may read all of them.

        Without `ctc`, to `logits` alone.

    Raises:
        ValueError: if `depth` is no number of blocks.

    References: [Speech-Transformer](https://ieeexplore.ieee.org/document/8462506);
    [Hybrid CTC/Attention Architecture for End-to-End Speech Recognition](https://ieeexplore.ieee.org/document/8068205);
    [SpecAugment](https://arxiv.org/abs/1904.08779).

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> model = kt.models.speech_recognizer(30, 80, dim=32, depth=(2, 1), num_heads=2, hidden_dim=64)
    >>> inputs = {"features": np.ones((2, 50, 80), "float32"), "target_ids": np.ones((2, 5), "int32")}
    >>> sorted((name, tuple(output.shape)) for name, output in model(inputs).items())
    [('ctc_logits', (2, 13, 30)), ('logits', (2, 5, 30))]
    """
    depths = (depth, depth) if isinstance(depth, int) else tuple(depth)
    if len(depths) != 2 or min(depths) < 1:
        raise ValueError(
            f"`depth` must be a positive number of blocks, or a pair of them for encoder and decoder; received {depth}."
        )

    def norm(name=None):
        return keras.layers.LayerNormalization(epsilon=1e-6, name=name)

    def dropped(x, name):
        return Dropout(dropout, name=name)(x)

    features = keras.Input((None, num_features), name="features")
    target_ids = keras.Input((None,), dtype="int32", name="target_ids")
    x = keras.layers.Masking(name="real_frames")(features)
    if augmentation is not None:
        x = augmentation(x)
    x = FrameSubsampling(dim, name="subsampling")(x)  # [B, T / 4, dim]
    if position is None:
        x = PositionalEmbedding(name="source_position")(x)
    context = dropped(x, "source_dropout")
    for i in range(depths[0]):
        attention = MultiHeadSelfAttention(num_heads, position=position)
        feed_forward = FeedForward(hidden_dim, dropout=dropout)
        options = {"dropout": dropout, "remat": remat}
        context = EncoderBlock(attention, feed_forward, norm(), name=f"encoder_block_{i}", **options)(context)
    context = norm("encoder_norm")(context)

    initializer = keras.initializers.RandomNormal(stddev=dim**-0.5)
    embedding = ReversibleEmbedding(
        vocabulary_size, dim, embeddings_initializer=initializer, mask_zero=True, name="target_embedding"
    )
    x = PositionalEmbedding(scale=dim**0.5, name="target_position")(embedding(target_ids))
    x = dropped(x, "target_dropout")
    for i in range(depths[1]):
        x = DecoderBlock(
            MultiHeadSelfAttention(num_heads, causal=True),
            FeedForward(hidden_dim, dropout=dropout),
            CrossAttention(num_heads),
            norm(),
            dropout=dropout,
            remat=remat,
            name=f"decoder_block_{i}",
        )(x, context)
    logits = embedding(norm("decoder_norm")(x), reverse=True)
    if not ctc:
        return keras.Model([features, target_ids], logits, name=name)
    frame_logits = keras.layers.Dense(vocabulary_size, name="ctc_projection")(context)
    outputs = {"logits": logits, "ctc_logits": with_blank_padding(frame_logits, features)}
    return keras.Model([features, target_ids], outputs, name=name)


def with_blank_padding(logits, features):
    """Logits of which those that belong to padding give all of the probability to the blank, number 0."""
    real = ops.any(ops.not_equal(features, 0), axis=-1, keepdims=True)[:, ::4]
    # A mask of the logits would be lost on a loss that has one value for a whole sequence.
    is_blank = np.arange(logits.shape[-1]) == 0
    return ops.where(ops.logical_or(real, is_blank), ops.where(real, logits, 0.0), SURELY_NOT)
