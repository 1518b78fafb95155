"""Products of a step's few rows with the weights, in the order that XLA's CPU compiler is quick at."""

import functools

import keras
import numpy as np
from keras import ops

from keras_transformer.ops.looping import compiled_by_xla_for_cpu

PARTS = 4
TERMS = 8
FEW_ROWS = (4, 64)
FEW_STEPS = 16


class StepProducts:
    """What `Dense` layers and tied output projections compute, as XLA is quick at it.

    XLA leaves the product of one row with a matrix to a single core; as a batch of products of parts of both, all cores
    share it. For one row it also widens int8 weights to int32, four bytes to read for each of one; written out as sums
    of a few terms, it reads them as they are. And it would transpose a tied embedding anew at each step, which is done
    here once, before the first. Several rows are multiplied with the weights on the left where that is quicker: kernels
    are transposed for it, once as well, and embeddings lie so already.

    Args:
        graph: `DecodingGraph`, whose tied embeddings are transposed.
        weights_first: boolean. Whether the weights are on the left for several rows; then it is the kernels that are.
    """

    def __init__(self, graph, weights_first=False):
        self._on_the_left, self._on_the_right = {}, {}  # [M, N] and [N, M], by the ids of their layers.
        tied = graph.tied_outputs()
        if not weights_first:
            tied = [layer for layer in tied if layer.quantization_mode is None or is_int8(layer)]
            self._on_the_right = {id(layer): ops.transpose(layer.embeddings) for layer in tied}
            return
        dense = [layer for layer in graph.decoder_layers() if isinstance(layer, keras.layers.Dense)]
        kernels = {id(layer): ops.transpose(layer.kernel) for layer in dense if layer.quantization_mode is None}
        embeddings = {id(layer): layer.embeddings for layer in tied if layer.quantization_mode is None}
        self._on_the_left = kernels | {key: ops.convert_to_tensor(x) for key, x in embeddings.items()}

    @staticmethod
    def pay(jit):
        """Whether XLA compiles for a CPU, and for no others beside it: elsewhere the usual products are as quick."""
        return bool(jit) and keras.distribution.distribution() is None and compiled_by_xla_for_cpu()

    @staticmethod
    def weights_come_first(rows, steps, dtype):
        """Whether products of `rows`, None for any number but one, are quicker with the weights on the left.

        They are on a processor whose vectors hold 8 floats, 16 rows 2.6 times; with AVX-512 the usual order was as
        quick as this one is there. There must be enough steps to make up for transposing the kernels.
        """
        few = rows is None or FEW_ROWS[0] <= rows <= FEW_ROWS[1]
        return few and steps >= FEW_STEPS and dtype == "float32" and has_vectors_of_8()

    def dense(self, layer, x):
        """`layer(x)` for a `keras.layers.Dense`."""
        weights = self._on_the_left.get(id(layer))
        if not is_one_row(x):
            can = weights is not None and is_of(weights, x) and len(x.shape) == 3
            return finish(layer, from_the_left(weights, x)) if can else layer(x)
        if is_int8(layer) and can_sum(x):
            kernel = ops.convert_to_tensor(layer.kernel)
            return finish(layer, by_sums(x, layer.inputs_quantizer, kernel, layer.kernel_scale))
        if layer.quantization_mode is not None or not can_split(x) or not is_of(layer.kernel, x):
            return layer(x)
        return finish(layer, by_parts(x, ops.convert_to_tensor(layer.kernel)))

    def tied_output(self, layer, x):
        """`layer(x, reverse=True)` for a `keras.layers.ReversibleEmbedding`, or None where the layer is to do it."""
        left, right = self._on_the_left.get(id(layer)), self._on_the_right.get(id(layer))
        if (left is None and right is None) or layer.reverse_dtype is not None:
            return None
        if is_int8(layer):
            if not is_one_row(x) or not can_sum(x):
                return None
            logits = by_sums(x, layer.inputs_quantizer, right, ops.transpose(layer.embeddings_scale))
        elif not is_of(layer.embeddings, x):
            return None
        elif left is not None:
            logits = from_the_left(left, x)
        else:
            logits = by_parts(x, right) if is_one_row(x) and can_split(x) else ops.matmul(x, right)
        cap = layer.logit_soft_cap
        return logits if cap is None else ops.tanh(logits / cap) * cap


def from_the_left(weights, x):
    """`weights` [M, N] by `x` [B, T, N]: `[B, T, M]`. XLA turns no operand of a product of this form around."""
    return ops.einsum("mn,btn->btm", weights, x)


def by_parts(x, kernel):
    """`x` [1, 1, N] by `kernel` [N, M]: `[1, 1, M]`."""
    size, units = kernel.shape
    x = ops.reshape(x, (PARTS, 1, size // PARTS))
    kernel = ops.reshape(kernel, (PARTS, size // PARTS, units))
    return ops.sum(ops.matmul(x, kernel), axis=0, keepdims=True)


def finish(layer, y):
    """What a `Dense` layer makes of the product with its kernel."""
    y = y if layer.bias is None else y + ops.cast(layer.bias, y.dtype)
    return y if layer.activation is None else layer.activation(y)


def is_one_row(x):
    """Whether `x` is known to be one token of one sequence: `[1, 1, N]`."""
    return tuple(x.shape[:-1]) == (1, 1)


def can_split(x):
    """Whether the last axis has equal parts."""
    return x.shape[-1] % PARTS == 0


def by_sums(x, quantizer, kernel, scale):
    """`x` [1, 1, N], which is quantized, by an int8 `kernel` [N, M], whose scale is broadcast to `[M]`: `[1, 1, M]`.

    Sums of `TERMS` products, small integers, which float32 holds exactly, are computed as XLA reads the kernel. Sums of
    those are a product with ones, of two rows: that of one row would be merged with them, and be slow.
    """
    size, units = kernel.shape
    x, x_scale = quantizer(x, axis=-1)
    nothing = ops.reshape(ops.cast(ops.isnan(x_scale), "int8"), (1, 1))  # Lest XLA widen the kernel before all steps.
    kernel = ops.reshape(kernel + nothing, (size // TERMS, TERMS, units))
    x = ops.reshape(x, (size // TERMS, TERMS, 1))
    sums = ops.sum(ops.cast(kernel, "float32") * ops.cast(x, "float32"), axis=1)
    return ops.matmul(ops.ones((2, size // TERMS)), sums)[None, :1] / (x_scale * scale)


def can_sum(x):
    """Whether float32 numbers in the last axis have equal groups of `TERMS`."""
    return x.shape[-1] % TERMS == 0 and keras.backend.standardize_dtype(x.dtype) == "float32"


def is_int8(layer):
    """Whether a layer multiplies what it quantizes with weights in int8, and adds nothing to them."""
    return layer.quantization_mode == "int8" and layer.inputs_quantizer is not None and not layer.lora_enabled


def is_of(weights, x):
    """Whether both have one dtype, so that nothing needs casting."""
    return keras.backend.standardize_dtype(weights.dtype) == keras.backend.standardize_dtype(x.dtype)


@functools.cache
def has_vectors_of_8():
    """Whether this processor has AVX2 and not AVX-512."""
    found = np.show_config(mode="dicts")["SIMD Extensions"]
    names = {*found.get("baseline", ()), *found.get("found", ())}
    return bool(names & {"AVX2", "X86_V3"}) and not names & {"AVX512F", "X86_V4"}
