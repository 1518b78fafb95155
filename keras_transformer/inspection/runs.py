"""Runs models under a `RecordingScope`, operation by operation, so that every tensor of the graph has a path."""

import keras
from keras import ops

from keras_transformer import layers, scopes
from keras_transformer.models.functional import functional_graph
from keras_transformer.ops.masks import get_mask

RECORDED = (
    layers.MultiHeadSelfAttention,
    layers.CrossAttention,
    layers.FeedForward,
    layers.MixtureOfExperts,
    layers.PositionalEmbedding,
)


class Source:
    """Stands for what made a tensor where that is an operation without weights or an input: it has a name alone."""

    path = None

    def __init__(self, name):
        self.name = name


def run_recorded(model, inputs, names=None):
    """The `RecordingScope` of a model that read `inputs`.

    Raises:
        ValueError: if the model has none of the layers that record, or `inputs` does not fit.
        RuntimeError: inside a compiled function.
    """
    _check_model(model)
    _check_eager()
    scope = scopes.RecordingScope(names)
    graph = functional_graph(model)
    if graph is None:
        inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
        if not model.built:
            model(inputs)  # What it is built by has no numbers.
    with scope:
        if graph is None:  # A subclassed model: its layers record, what it does between them is its own.
            model(inputs, training=False)
        else:
            _run(graph, _tensors(graph, inputs), scope, "")
    return scope


def _run(graph, inputs, scope, prefix):
    calls = {}
    if not prefix:
        for x, value in zip(graph.inputs, inputs, strict=True):
            scope.record(Source(x.name), "input", value)

    def called(operation):
        count = calls[operation.name] = calls.get(operation.name, -1) + 1
        path = scopes.numbered(f"{prefix}{operation.name}", count)
        inner = functional_graph(operation)

        def call(*args, **kwargs):
            if inner is not None:
                given = kwargs["inputs"] if "inputs" in kwargs else args[0]
                return _run(inner, _tensors(inner, given), scope, f"{path}/")
            if isinstance(operation, keras.layers.Layer):
                kwargs = {**kwargs, **({"training": False} if operation._call_has_training_arg else {})}
            with scope.renamed(operation, path):
                results = operation(*args, **kwargs)
                sources = _sources(operation, args, kwargs)
                flat = keras.tree.flatten(results)
                for i, result in enumerate(flat):
                    scope.record(operation, "output" if len(flat) == 1 else f"output_{i}", result, sources)
                if isinstance(operation, keras.layers.ReversibleEmbedding) and get_mask(results) is not None:
                    # It makes its mask inside its call; of other layers the graph has the operation that does.
                    scope.record(operation, "padding_mask", get_mask(results), sources)
            return results

        return call

    return graph._run_through_graph(inputs, operation_fn=called)


def _sources(operation, args, kwargs):
    """What a result was made from: a layer's tensors; all that an operation was called with, which has no weights."""
    if isinstance(operation, keras.layers.Layer):
        return [x for x in keras.tree.flatten((args, kwargs)) if ops.is_tensor(x)]
    sources = []
    for argument in (*args, *kwargs.values()):
        inner = [x for x in keras.tree.flatten(argument) if ops.is_tensor(x)]
        sources += inner or ([] if isinstance(argument, str) else [argument])  # A string would be a path.
    return sources


def inputs_by_name(graph, inputs):
    """The inputs of a graph as a dict in its order; a list is in that order, and anything else is the only one."""
    names = [x.name for x in graph.inputs]
    if isinstance(inputs, dict):
        if not set(names) <= set(inputs):
            raise ValueError(f"`inputs` must hold {names}; received {sorted(inputs)}.")
        return {name: inputs[name] for name in names}
    if len(names) == 1 and not isinstance(inputs, list | tuple):
        inputs = [inputs]
    if len(inputs) != len(names):
        raise ValueError(f"`inputs` must be a dict of {names}, or a list in that order; received {len(inputs)}.")
    return dict(zip(names, inputs, strict=True))


def _tensors(graph, inputs):
    """The inputs of a graph in its order, as tensors of its dtypes."""
    given = inputs_by_name(graph, inputs).values()
    return [ops.convert_to_tensor(x, dtype=like.dtype) for x, like in zip(given, graph.inputs, strict=True)]


def _check_model(model):
    found = isinstance(model, keras.layers.Layer) and any(
        isinstance(layer, RECORDED) for layer in model._flatten_layers()
    )
    if not found:
        raise ValueError(
            "`model` must hold layers that say what they do: "
            f"{', '.join(kind.__name__ for kind in RECORDED)}; received {model!r}."
        )


def _check_eager():
    try:
        ops.convert_to_numpy(ops.ones(1) + 1)
    except Exception as error:  # Each backend has its own.
        raise RuntimeError(
            "A trace holds numbers, which there are none of inside a compiled function; call it outside, or run the "
            "model with `run_eagerly=True`."
        ) from error
