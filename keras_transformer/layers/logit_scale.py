import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_transformer")
class LogitScale(keras.layers.Layer):
    """Multiplies similarities by a learned number, so that they can be the logits of a softmax.

    What is learned is the logarithm of the factor, the inverse of the softmax's temperature.

    Args:
        initial_value: float. The logarithm at first; by default that of `1 / 0.07`.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of any shape, such as cosines `[images, texts]`.

    Returns:
        Tensor of the shape of `x`.

    Reference: [CLIP](https://arxiv.org/abs/2103.00020), section 2.5.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> logits = kt.layers.LogitScale()(np.array([[1.0, 0.5]], "float32"))
    >>> [round(float(number), 1) for number in logits[0]]
    [14.3, 7.1]
    """

    def __init__(self, initial_value=2.6592, **kwargs):
        super().__init__(**kwargs)
        self.initial_value = initial_value

    def build(self, input_shape):
        # Rounded to half precision, a logarithm would be a factor of some percent more or less.
        self.logit_scale = self.add_weight(
            name="logit_scale", shape=(), initializer=keras.initializers.Constant(self.initial_value), autocast=False
        )

    def call(self, x):
        return x * ops.cast(ops.exp(ops.convert_to_tensor(self.logit_scale)), x.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "initial_value": self.initial_value}
