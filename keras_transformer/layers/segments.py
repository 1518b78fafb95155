"""What keeps several texts in a row apart: masks that block the attention, and positions that begin anew."""

import keras

from keras_transformer.ops.masks import segment_mask, segment_positions


@keras.saving.register_keras_serializable(package="keras_transformer")
class SegmentMask(keras.layers.Layer):
    """The mask by which texts of a packed row attend to themselves alone, or to the source that belongs to them.

    Call arguments:
        query_segments: int tensor of shape `[B, T]`, the number of each position's text.
        key_segments: int tensor of shape `[B, S]`.

    Returns:
        Boolean tensor of shape `[B, T, S]`, for `attention_mask` or `cross_attention_mask` of blocks.

    Example:

    >>> import numpy as np
    >>> from keras_transformer.layers.segments import SegmentMask
    >>> segments = np.array([[1, 1, 2]])
    >>> keras.ops.convert_to_numpy(SegmentMask()(segments, segments))[0].tolist()
    [[True, True, False], [True, True, False], [False, False, True]]
    """

    def build(self, query_segments_shape, key_segments_shape):
        pass

    def call(self, query_segments, key_segments):
        return segment_mask(query_segments, key_segments)

    def compute_output_spec(self, query_segments, key_segments):
        return keras.KerasTensor((*query_segments.shape, key_segments.shape[1]), dtype="bool")


@keras.saving.register_keras_serializable(package="keras_transformer")
class SegmentPositions(keras.layers.Layer):
    """Positions that begin anew at each text of a packed row.

    Call arguments:
        segments: int tensor of shape `[B, T]`, the number of each position's text. The positions of a text are
            neighbours.

    Returns:
        int32 tensor of shape `[B, T]`, for `positions` of `PositionalEmbedding`.

    Example:

    >>> import numpy as np
    >>> from keras_transformer.layers.segments import SegmentPositions
    >>> keras.ops.convert_to_numpy(SegmentPositions()(np.array([[1, 1, 2, 2, 2, 0]]))).tolist()
    [[0, 1, 0, 1, 2, 0]]
    """

    def call(self, segments):
        return segment_positions(segments)

    def compute_output_spec(self, segments):
        return keras.KerasTensor(segments.shape, dtype="int32")
