"""Images as sequences: patches in a row, and learned tokens in front of them."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_transformer")
class PatchEmbedding(keras.layers.Layer):
    """Cuts images into patches that do not overlap and projects each to one vector, row by row.

    Args:
        patch_size: int, or pair of height and width of a patch.
        dim: int. Width of the vectors.
        use_bias: boolean. Whether the projection has a bias.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of shape `[B, height, width, channels]`.

    Returns:
        Tensor of shape `[B, height / patch height * width / patch width, dim]`.

    Raises:
        ValueError: if `patch_size` or `dim` is not positive, `x` is not a batch of images with channels last, or the
            patches do not fill the images. (Of a size that TensorFlow only knows at run time the rest is left out.)

    Reference: [An Image is Worth 16x16 Words](https://arxiv.org/abs/2010.11929), equation 1.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> tuple(kt.layers.PatchEmbedding(16, 192)(np.zeros((2, 224, 224, 3), "float32")).shape)
    (2, 196, 192)
    """

    def __init__(self, patch_size, dim, use_bias=True, **kwargs):
        super().__init__(**kwargs)
        pair = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(
                f"`patch_size` must be a positive number, or a pair of them; received patch_size={patch_size}."
            )
        if dim < 1:
            raise ValueError(f"`dim` must be a positive width; received dim={dim}.")
        self.patch_size = pair
        self.dim = dim
        self.use_bias = use_bias

    def build(self, input_shape):
        self._check(input_shape)
        self.projection = keras.layers.Conv2D(
            self.dim,
            self.patch_size,
            strides=self.patch_size,
            use_bias=self.use_bias,
            data_format="channels_last",
            name="projection",
            dtype=self.dtype_policy,
        )
        self.projection.build(input_shape)

    def call(self, x):
        self._check(x.shape)
        patches = self.projection(x)  # [B, height, width, dim]
        return ops.reshape(patches, (ops.shape(patches)[0], -1, self.dim))

    def _check(self, shape):
        if len(shape) != 4:
            raise ValueError(f"`x` must have shape (batch, height, width, channels); received {tuple(shape)}.")
        if any(size is not None and size % patch for size, patch in zip(shape[1:3], self.patch_size, strict=True)):
            raise ValueError(
                f"`patch_size` must divide the height and width of the images; received images of {shape[1]} x "
                f"{shape[2]} for patch_size={self.patch_size}. Resize or pad them."
            )

    def compute_output_shape(self, input_shape):
        self._check(input_shape)
        counts = [
            None if size is None else size // patch
            for size, patch in zip(input_shape[1:3], self.patch_size, strict=True)
        ]
        return (input_shape[0], None if None in counts else counts[0] * counts[1], self.dim)

    def get_config(self):
        patch_size = self.patch_size[0] if len(set(self.patch_size)) == 1 else list(self.patch_size)
        return {**super().get_config(), "patch_size": patch_size, "dim": self.dim, "use_bias": self.use_bias}


@keras.saving.register_keras_serializable(package="keras_transformer")
class PrefixTokens(keras.layers.Layer):
    """Puts learned vectors in front of a sequence: class and distillation tokens, registers.

    If `x` carries a mask, the result carries one in which the new tokens are real.

    Args:
        count: int. Number of vectors.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of shape `[B, T, dim]`.

    Returns:
        Tensor of shape `[B, count + T, dim]`.

    Raises:
        ValueError: if `count` is not positive.

    References: [An Image is Worth 16x16 Words](https://arxiv.org/abs/2010.11929), equation 1;
    [DeiT](https://arxiv.org/abs/2012.12877), section 4;
    [Vision Transformers Need Registers](https://arxiv.org/abs/2309.16588).

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> tuple(kt.layers.PrefixTokens()(np.zeros((2, 196, 192), "float32")).shape)
    (2, 197, 192)
    """

    def __init__(self, count=1, **kwargs):
        super().__init__(**kwargs)
        if count < 1:
            raise ValueError(f"`count` must be a positive number of tokens; received count={count}.")
        self.count = count
        self.supports_masking = True

    def build(self, input_shape):
        self.tokens = self.add_weight(
            name="tokens",
            shape=(self.count, input_shape[-1]),
            initializer=keras.initializers.RandomNormal(stddev=0.02),
        )

    def call(self, x):
        tokens = ops.broadcast_to(ops.convert_to_tensor(self.tokens), (ops.shape(x)[0], self.count, x.shape[-1]))
        return ops.concatenate([tokens, x], axis=1)

    def compute_mask(self, inputs, previous_mask):
        if previous_mask is None:
            return None
        # Padded as numbers: ONNX pads nothing else.
        mask = ops.pad(ops.cast(previous_mask, "int32"), ((0, 0), (self.count, 0)), constant_values=1)
        return ops.cast(mask, "bool")

    def compute_output_shape(self, input_shape):
        batch, length, dim = input_shape
        return (batch, None if length is None else self.count + length, dim)

    def get_config(self):
        return {**super().get_config(), "count": self.count}
