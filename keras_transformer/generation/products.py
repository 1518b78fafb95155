"""Products of a step's few rows with the weights, in the order that XLA's CPU compiler is quick at."""

import keras
from keras import ops

from keras_transformer.ops.looping import compiled_by_xla_for_cpu

PARTS = 4


class StepProducts:
    """What `Dense` layers and tied output projections compute, as XLA is quick at it.

    XLA leaves the product of one row with a matrix to a single core; as a batch of products of parts of both, all cores
    share it. For one row it also widens int8 weights to int32, four bytes to read for each of one; for two rows it
    reads them as they are. And it would transpose a tied embedding anew at each step, which is done here once, before
    the first.

    Args:
        graph: `DecodingGraph`, whose tied embeddings are transposed.
    """

    def __init__(self, graph):
        self._transposed = {
            id(layer): ops.transpose(ops.convert_to_tensor(layer.embeddings))
            for layer in graph.tied_outputs()
            if layer.quantization_mode is None
        }

    @staticmethod
    def pay(jit):
        """Whether XLA compiles for a CPU, and for no others beside it: elsewhere the usual products are as quick."""
        return bool(jit) and keras.distribution.distribution() is None and compiled_by_xla_for_cpu()

    def dense(self, layer, x):
        """`layer(x)` for a `keras.layers.Dense`."""
        if not is_one_row(x):
            return layer(x)
        if layer.quantization_mode == "int8":
            return by_two_rows(layer, x)
        if layer.quantization_mode is not None or not can_split(x) or not is_of(layer.kernel, x):
            return layer(x)
        y = self._product(x, ops.convert_to_tensor(layer.kernel))
        y = y if layer.bias is None else y + ops.cast(layer.bias, y.dtype)
        return y if layer.activation is None else layer.activation(y)

    def tied_output(self, layer, x):
        """`layer(x, reverse=True)` for a `keras.layers.ReversibleEmbedding`, or None where the layer is to do it."""
        if layer.quantization_mode == "int8" and is_one_row(x):
            return by_two_rows(layer, x, reverse=True)
        if id(layer) not in self._transposed or layer.reverse_dtype is not None or not is_of(layer.embeddings, x):
            return None
        kernel = self._transposed[id(layer)]
        logits = self._product(x, kernel) if is_one_row(x) and can_split(x) else ops.matmul(x, kernel)
        cap = layer.logit_soft_cap
        return logits if cap is None else ops.tanh(logits / cap) * cap

    @staticmethod
    def _product(x, kernel):
        """`x` [1, 1, N] by `kernel` [N, M]: `[1, 1, M]`."""
        size, units = kernel.shape
        x = ops.reshape(x, (PARTS, 1, size // PARTS))
        kernel = ops.reshape(kernel, (PARTS, size // PARTS, units))
        return ops.sum(ops.matmul(x, kernel), axis=0, keepdims=True)


def is_one_row(x):
    """Whether `x` is known to be one token of one sequence: `[1, 1, N]`."""
    return tuple(x.shape[:-1]) == (1, 1)


def can_split(x):
    """Whether the last axis has equal parts."""
    return x.shape[-1] % PARTS == 0


def by_two_rows(layer, x, **options):
    """`layer(x)` of `x` [1, 1, N], which a row of zeros keeps company."""
    return layer(ops.pad(x, ((0, 0), (0, 1), (0, 0))), **options)[:, :1]


def is_of(weights, x):
    """Whether both have one dtype, so that nothing needs casting."""
    return keras.backend.standardize_dtype(weights.dtype) == keras.backend.standardize_dtype(x.dtype)
