import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_transformer")
class Bias(keras.layers.Layer):
    """Adds one learned vector to the last axis.

    It stands beside an output projection that has no bias of its own because its kernel is the embedding's: the bias of
    BERT's masked language model, or BART's of the final logits.

    Args:
        initializer: str, configuration or `keras.initializers.Initializer` of the vector.
        **kwargs: `name`, `dtype`, `trainable` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: float tensor of shape `[..., dim]`.

    Returns:
        Tensor of the shape of `x`.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> logits = kt.layers.Bias(initializer="ones")(np.zeros((1, 3), "float32"))
    >>> [float(number) for number in logits[0]]
    [1.0, 1.0, 1.0]
    """

    def __init__(self, initializer="zeros", **kwargs):
        super().__init__(**kwargs)
        self.initializer = keras.initializers.get(initializer)
        self.supports_masking = True

    def build(self, input_shape):
        self.bias = self.add_weight(name="bias", shape=(input_shape[-1],), initializer=self.initializer)

    def call(self, x):
        return x + ops.convert_to_tensor(self.bias)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "initializer": keras.initializers.serialize(self.initializer)}
