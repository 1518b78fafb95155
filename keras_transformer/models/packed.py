import keras

from keras_transformer.layers import (
    CrossAttention,
    DecoderBlock,
    EncoderBlock,
    MultiHeadSelfAttention,
    PositionalEmbedding,
    PrefixTokens,
)
from keras_transformer.layers.segments import SegmentMask, SegmentPositions
from keras_transformer.models.functional import MIXING_LAYERS, functional_graph

TOKEN_INPUTS = ("token_ids", "source_ids", "target_ids")


def packed(model):
    """A model of the same layers that reads rows into which several texts are packed, and keeps them apart.

    The layers are shared: what the packed model learns, `model` knows, and it is `model` that generates. Self-attention
    stays within a text, cross-attention within a pair of source and target, and positions begin anew at each text.

    Args:
        model: functional `keras.Model` from token ids to something for each token, such as `causal_lm` or
            `transformer`.

    Returns:
        `keras.Model` with the inputs of `model`, and for each of `token_ids`, `source_ids` and `target_ids` another
        one, `token_segments`, `source_segments` or `target_segments`, int32 [B, T]: the number of the text that a
        token belongs to, from 1; a source and its target have the same. Not compiled.

    Raises:
        ValueError: if `model` is not functional, has no token ids or other inputs beside them, or a layer that reads
            several positions at once in a way that a mask cannot stop.

    Reference: [Efficient Sequence Packing without Cross-contamination](https://arxiv.org/abs/2107.02027), section 3.2.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> model = kt.models.causal_lm(10, dim=8, depth=1, num_heads=2)
    >>> row = {"token_ids": np.array([[4, 5, 6, 7, 8]]), "token_segments": np.array([[1, 1, 1, 2, 2]])}
    >>> logits, alone = kt.models.packed(model)(row), model(np.array([[7, 8]]))
    >>> bool(np.allclose(keras.ops.convert_to_numpy(logits[:, 3:]), keras.ops.convert_to_numpy(alone), atol=1e-5))
    True
    """
    graph = functional_graph(model)
    names = [] if graph is None else [x.name for x in graph.inputs]
    others = [name for name in names if name not in TOKEN_INPUTS and not name.endswith("padding_mask")]
    if others or not names:
        raise ValueError(
            f"`model` must be a functional keras.Model whose inputs are of {TOKEN_INPUTS}, or masks of their padding; "
            f"received {'a model without a graph' if graph is None else f'the inputs {names}'}."
        )
    inputs = {x.name: keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name) for x in graph.inputs}
    segments = _Segments()
    for name in [name for name in inputs if name in TOKEN_INPUTS]:
        given = keras.Input(inputs[name].shape[1:], dtype="int32", name=f"{name.removesuffix('_ids')}_segments")
        inputs[given.name] = segments.of[id(inputs[name])] = given
    outputs = _run(graph, [inputs[x.name] for x in graph.inputs], segments)
    for x in keras.tree.flatten(outputs):
        if segments.find(x) is None or len(x.shape) < 3:
            raise ValueError(f"`model` must have an output for each token; received one of shape {x.shape}.")
    return keras.Model(inputs, outputs, name=f"packed_{model.name}")


def _run(graph, inputs, segments):
    def called(operation):
        def call(*args, **kwargs):
            inner = functional_graph(operation)
            if inner is not None:
                return _run(inner, kwargs["inputs"] if "inputs" in kwargs else args[0], segments)
            if isinstance(operation, (*MIXING_LAYERS, PrefixTokens)):
                raise ValueError(
                    f"`model` cannot read packed rows: `{operation.name}` ({type(operation).__name__}) reads several "
                    "positions at once, and so several texts."
                )
            outputs = operation(*args, **{**kwargs, **segments.arguments(operation, args, kwargs)})
            segments.keep(outputs, args, kwargs)
            return outputs

        return call

    return graph._run_through_graph(inputs, operation_fn=called)


class _Segments:
    """Which segments the positions of each tensor belong to, and the masks and positions that follow from them."""

    def __init__(self):
        self.of = {}  # From the id of a tensor.
        self._alive = []
        self._made = {}

    def find(self, x):
        return self.of.get(id(x))

    def keep(self, outputs, args, kwargs):
        """A result has the segments of the first tensor that has any."""
        found = (self.find(x) for x in keras.tree.flatten((args, kwargs)))
        found = next((segments for segments in found if segments is not None), None)
        for x in keras.tree.flatten(outputs):
            self._alive.append(x)
            if found is not None:
                self.of[id(x)] = found

    def arguments(self, operation, args, kwargs):
        """What an operation of this library is to be called with beside its own arguments."""
        own = {name: x for name, x in zip(("x", "context"), args, strict=False)} | kwargs
        queries, keys = self.find(own.get("x")), self.find(own.get("context"))
        if isinstance(operation, PositionalEmbedding) and queries is not None:
            return {"positions": self._position(queries)}
        masks = {}
        if isinstance(operation, EncoderBlock | DecoderBlock | MultiHeadSelfAttention) and queries is not None:
            masks["attention_mask"] = self._mask(queries, queries)
        if isinstance(operation, DecoderBlock | CrossAttention) and keys is not None:
            name = "attention_mask" if isinstance(operation, CrossAttention) else "cross_attention_mask"
            masks[name] = self._mask(queries, keys)
        return {name: self._both(mask, kwargs.get(name)) for name, mask in masks.items()}

    def _mask(self, queries, keys):
        pair = queries.name, keys.name
        if pair not in self._made:
            name = "_to_".join(dict.fromkeys(side.removesuffix("_segments") for side in pair))
            self._made[pair] = SegmentMask(name=f"{name}_segment_mask")(queries, keys)
        return self._made[pair]

    def _position(self, segments):
        if segments.name not in self._made:
            name = f"{segments.name.removesuffix('s')}_positions"
            self._made[segments.name] = SegmentPositions(name=name)(segments)
        return self._made[segments.name]

    @staticmethod
    def _both(mask, given):
        return mask if given is None else keras.ops.logical_and(mask, given)
