"""Products of a step's few rows with the weights, in the order that XLA's CPU compiler is quick at."""

import keras
from keras import ops

PARTS = 4


class StepProducts:
    """What `Dense` layers and tied output projections compute, in another order of additions.

    XLA leaves the product of one row with a matrix to a single core; as a batch of products of parts of both, all cores
    share it. And it would transpose a tied embedding anew at each step, which is done here once, before the first.

    Args:
        graph: `DecodingGraph`, whose tied embeddings are transposed.
    """

    def __init__(self, graph):
        self._transposed = {
            id(layer): ops.transpose(ops.convert_to_tensor(layer.embeddings)) for layer in graph.tied_outputs()
        }

    @staticmethod
    def pay(jit):
        """Whether XLA compiles for a CPU: elsewhere the usual products are as quick."""
        if not jit or keras.backend.backend() != "tensorflow":
            return False
        import tensorflow as tf

        return not tf.config.list_logical_devices("GPU")

    def dense(self, layer, x):
        """`layer(x)` for a `keras.layers.Dense`."""
        if layer.quantization_mode is not None or not self._is_one_row(x) or not is_of(layer.kernel, x):
            return layer(x)
        y = self._product(x, ops.convert_to_tensor(layer.kernel))
        y = y if layer.bias is None else y + ops.cast(layer.bias, y.dtype)
        return y if layer.activation is None else layer.activation(y)

    def tied_output(self, layer, x):
        """`layer(x, reverse=True)` for a `keras.layers.ReversibleEmbedding`, or None where the layer is to do it."""
        if id(layer) not in self._transposed or layer.reverse_dtype is not None or not is_of(layer.embeddings, x):
            return None
        kernel = self._transposed[id(layer)]
        logits = self._product(x, kernel) if self._is_one_row(x) else ops.matmul(x, kernel)
        cap = layer.logit_soft_cap
        return logits if cap is None else ops.tanh(logits / cap) * cap

    @staticmethod
    def _is_one_row(x):
        return tuple(x.shape[:-1]) == (1, 1) and x.shape[-1] % PARTS == 0

    @staticmethod
    def _product(x, kernel):
        """`x` [1, 1, N] by `kernel` [N, M]: `[1, 1, M]`."""
        size, units = kernel.shape
        x = ops.reshape(x, (PARTS, 1, size // PARTS))
        kernel = ops.reshape(kernel, (PARTS, size // PARTS, units))
        return ops.sum(ops.matmul(x, kernel), axis=0, keepdims=True)


def is_of(weights, x):
    """Whether both have one dtype, so that nothing needs casting."""
    return keras.backend.standardize_dtype(weights.dtype) == keras.backend.standardize_dtype(x.dtype)
