"""Cuts the graph of a functional model in two: what depends on the decoder's tokens, and what can be computed once."""

import inspect
from numbers import Number

import keras
from keras import ops

from keras_transformer import scopes
from keras_transformer.layers import Bias, CrossAttention, MultiHeadSelfAttention
from keras_transformer.models.functional import (
    ELEMENTWISE_OPERATIONS,
    MIXING_LAYERS,
    POSITIONWISE_LAYERS,
    check_functional,
    functional_graph,
)
from keras_transformer.ops.masks import get_mask, set_mask

SEGMENTS = "segment_ids"


class Step:
    """One operation of the graph, with the keys of the tensors that go in and come out."""

    def __init__(self, operation, node, inputs, outputs):
        self.operation = operation
        self.inputs = inputs
        self.outputs = outputs
        self._node = node

    def run(self, values):
        products = scopes.products()
        if products is not None:
            result = self._fast(values, products)
            if result is not None:
                values[self.outputs[0]] = result
                return
        tensors = {id(x): values[key] for x, key in zip(self._node.input_tensors, self.inputs, strict=True)}
        args, kwargs = self._node.arguments.fill_in(tensors)
        results = keras.tree.flatten(self.operation(*args, **kwargs))
        values.update(zip(self.outputs, results, strict=True))

    def is_tied_output(self):
        """Whether this is an embedding read backwards, as the output projection."""
        return self._reads_backwards() and self.operation.tie_weights

    def is_positionwise(self):
        """Whether this is known to make each position of one sequence from that position of another alone."""
        if len(self.inputs) != 1:
            return False
        if isinstance(self.operation, keras.layers.Layer):
            last_axis = len(self._node.input_tensors[0].shape) - 1
            axes = keras.tree.flatten(getattr(self.operation, "axis", -1))
            known = type(self.operation) in (*POSITIONWISE_LAYERS, Bias) or self._reads_backwards()
            return known and all(axis in (-1, last_axis) for axis in axes)
        arguments = keras.tree.flatten([self._node.arguments.args, self._node.arguments.kwargs])
        numbers = sum(isinstance(argument, Number) for argument in arguments)
        return type(self.operation).__name__ in ELEMENTWISE_OPERATIONS and numbers == len(arguments) - 1

    def _reads_backwards(self):
        is_embedding = isinstance(self.operation, keras.layers.ReversibleEmbedding)
        return is_embedding and bool(self._node.arguments.kwargs.get("reverse"))

    def _fast(self, values, products):
        """The result by `products`, or None where the operation is to compute it."""
        if type(self.operation) is keras.layers.Dense:
            x = values[self.inputs[0]]
            return set_mask(products.dense(self.operation, x), get_mask(x))
        return products.tied_output(self.operation, values[self.inputs[0]]) if self.is_tied_output() else None

    def reads_as_context(self, key):
        """Whether this is cross-attention, or a block with one, and the tensor of this key its context or its mask."""
        cross_attention = getattr(self.operation, "cross_attention", self.operation)
        if not isinstance(cross_attention, CrossAttention):
            return False
        arguments = self._node.arguments
        given = inspect.signature(self.operation.call).bind(*arguments.args, **arguments.kwargs).arguments
        context = [id(given.get(name)) for name in ("context", "context_mask")]
        pairs = zip(self._node.input_tensors, self.inputs, strict=True)
        return all(id(x) in context for x, own in pairs if own == key)

    def layers(self):
        """The operation, if it is a layer, and all layers in it."""
        if not isinstance(self.operation, keras.layers.Layer):
            return []
        return list(self.operation._flatten_layers())


class DecodingGraph:
    """A functional model in two halves, around the input that holds the decoder's tokens.

    Args:
        model: functional `keras.Model`; models nested in it are opened.

    Attributes:
        token_input: str. Name of the input that reaches a causal self-attention.
        mask_input: str. Name of the input that says which of these tokens are real, or None (see `mask_name`).
        segment_input: str. Name of the input that says which of these tokens belong to a prefix (0) and which follow it
            (1), `segment_ids`, or None.
        source_inputs: dict from name to symbolic tensor of all other inputs.

    Raises:
        ValueError: if there is no such input, or several, or the model cannot be decoded token by token.
    """

    def __init__(self, model):
        check_functional(model)
        self.model = model
        self._steps = []
        self._tensors = {}  # By their keys, which have their ids: they must stay alive.
        keys = {x.name: self._key((), x) for x in model.inputs}
        outputs = self._open(model, (), {key: key for key in keys.values()})
        self._output = outputs[_logits_index(model)]
        self.token_input = self._find_token_input(keys)
        self._token_key = keys[self.token_input]
        self.mask_input = mask_name(self.token_input) if mask_name(self.token_input) in keys else None
        self.segment_input = SEGMENTS if SEGMENTS in keys and self.token_input == "token_ids" else None
        own = (self.token_input, self.mask_input, self.segment_input)
        self._source_keys = {name: key for name, key in keys.items() if name not in own}
        self.source_inputs = {x.name: x for x in model.inputs if x.name not in own}
        self._beside = {x.name: (keys[x.name], x.dtype) for x in model.inputs if x.name in own[1:]}
        depends = {keys[name] for name in own if name is not None}
        for step in self._steps:
            if depends.intersection(step.inputs):
                depends.update(step.outputs)
        self._decoder = [step for step in self._steps if depends.intersection(step.outputs)]
        self._encoder = [step for step in self._steps if not depends.intersection(step.outputs)]
        read = {key for step in self._decoder for key in step.inputs} | {self._output}
        self._boundary = sorted(read - depends)
        self._tail = self._positionwise_tail()
        self._check_decodable(depends)

    def encode(self, sources):
        """Runs what does not depend on the tokens: dict from name to tensor -> list of tensors, masks attached."""
        values = {key: sources[name] for name, key in self._source_keys.items()}
        for step in self._encoder:
            step.run(values)
        return [values[key] for key in self._boundary]

    def decode(self, tokens, boundary, segments=None, last=False):
        """Runs the rest: tokens [B, T] and what `encode` returned -> logits [B, T, vocabulary].

        Where the model asks for segments [B, T] and none are given, the tokens follow the prefix. With `last` there are
        logits of the last token alone, [B, 1, vocabulary]: those of a long prompt can be larger than all else.
        """
        values = {self._token_key: tokens, **dict(zip(self._boundary, boundary, strict=True))}
        for name, (key, dtype) in self._beside.items():  # Which tokens are padding is said by the scope.
            given = segments if name == self.segment_input else None
            values[key] = ops.ones_like(tokens, dtype=dtype) if given is None else ops.cast(given, dtype)
        tail = self._tail if last else []
        for step in self._decoder[: len(self._decoder) - len(tail)]:
            step.run(values)
        if tail:
            values[tail[0].inputs[0]] = values[tail[0].inputs[0]][:, -1:]
        for step in tail:
            step.run(values)
        return values[self._output][:, -1:] if last else values[self._output]

    def boundary_tensors(self):
        """The symbolic tensors of what `encode` returns, in its order."""
        return [self._tensors[key] for key in self._boundary]

    def context_alone(self):
        """For each tensor that `encode` returns, whether nothing but cross-attention reads it, which caches it."""
        readers = [[step for step in self._decoder if key in step.inputs] for key in self._boundary]
        return [
            key != self._output and all(step.reads_as_context(key) for step in steps)
            for key, steps in zip(self._boundary, readers, strict=True)
        ]

    def consumers(self, name):
        """The operations that read the input called `name`."""
        key = self._token_key if name == self.token_input else self._source_keys[name]
        return [step.operation for step in self._steps if key in step.inputs]

    def decoder_layers(self):
        """All layers in the half that depends on the tokens."""
        return [layer for step in self._decoder for layer in step.layers()]

    def tied_outputs(self):
        """The embeddings that the tokens' half also reads backwards."""
        return [step.operation for step in self._decoder if step.is_tied_output()]

    def _key(self, scope, x):
        key = f"{'/'.join(map(str, scope))}:{id(x)}"
        self._tensors[key] = x
        return key

    def _open(self, model, scope, alias):
        """Appends the steps of `model`, with those of the models nested in it, and returns the keys of its outputs."""

        def resolve(x):
            key = self._key(scope, x)
            return alias.get(key, key)

        for depth in sorted(model._nodes_by_depth, reverse=True):
            for node in model._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                inputs = [resolve(x) for x in node.input_tensors]
                inner = functional_graph(node.operation)
                if inner is None:
                    outputs = [self._key(scope, x) for x in node.outputs]
                    self._steps.append(Step(node.operation, node, inputs, outputs))
                    continue
                inner_scope = (*scope, id(node))
                given = keras.tree.flatten(
                    node.arguments.args[0] if node.arguments.args else node.arguments.kwargs["inputs"]
                )
                inner_alias = {self._key(inner_scope, x): resolve(y) for x, y in zip(inner.inputs, given, strict=True)}
                results = self._open(inner, inner_scope, inner_alias)
                alias.update({self._key(scope, x): key for x, key in zip(node.outputs, results, strict=True)})
        return [resolve(x) for x in model.outputs]

    def _positionwise_tail(self):
        """The last steps of the tokens' half, each of which makes what the next one reads, position by position."""
        tail, key = [], self._output
        for step in reversed(self._decoder):
            if step.outputs != [key] or not step.is_positionwise():
                break
            tail.insert(0, step)
            key = step.inputs[0]
        return tail

    def _find_token_input(self, keys):
        made_by = {key: step for step in self._steps for key in step.outputs}
        names = {key: name for name, key in keys.items()}
        found = set()
        for step in self._steps:
            if any(isinstance(layer, MultiHeadSelfAttention) and layer.causal for layer in step.layers()):
                # The first tensor of a block is its sequence; what else goes in is context.
                open_keys = [step.inputs[0]]
                while open_keys:
                    key = open_keys.pop()
                    if key in names:
                        found.add(names[key])
                    elif key in made_by:
                        open_keys.extend(made_by[key].inputs)
        dtypes = {x.name: keras.backend.standardize_dtype(x.dtype) for x in self.model.inputs}
        tokens = sorted(name for name in found if "int" in dtypes[name])
        if len(tokens) > 1:
            tokens = [name for name in tokens if name in ("target_ids", "token_ids")] or tokens
        if len(tokens) != 1:
            raise ValueError(
                "`model` must have exactly one integer input that reaches a causal MultiHeadSelfAttention (as in a "
                f"DecoderBlock); received one with {tokens or 'none'}, among the inputs {sorted(keys)}."
            )
        return tokens[0]

    def _check_decodable(self, depends):
        for layer in self.decoder_layers():
            mixes = isinstance(layer, MIXING_LAYERS)
            if mixes or (isinstance(layer, MultiHeadSelfAttention) and not layer.causal):
                raise ValueError(
                    f"`model` cannot be decoded token by token: `{layer.name}` ({type(layer).__name__}) reads later "
                    f"or all positions of what comes from `{self.token_input}`. Use causal attention on its side."
                )
        if self._output not in depends:
            raise ValueError(f"The output of `model` does not depend on its tokens, the input `{self.token_input}`.")


def mask_name(name):
    """Name of the input that says which tokens of the input `name` are real: `x_padding_mask` for `x_ids`."""
    return "padding_mask" if name == "token_ids" else f"{name.removesuffix('_ids')}_padding_mask"


def _logits_index(model):
    if len(model.outputs) == 1:
        return 0
    if isinstance(model.output, dict) and "logits" in model.output:
        return next(i for i, x in enumerate(model.outputs) if x is model.output["logits"])
    raise ValueError(
        "`model` must have one output, or a dict of outputs with 'logits' in it; received the outputs "
        f"{[x.name for x in model.outputs]}."
    )


def probe(x, rows=1):
    """A small tensor that fits a symbolic input."""
    return ops.ones([rows if axis == 0 else size or 4 for axis, size in enumerate(x.shape)], x.dtype)
