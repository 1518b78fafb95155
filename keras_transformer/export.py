"""Models as files that other runtimes read, ONNX and LiteRT, by the exporters of Keras and of torch."""

import contextlib
import functools
import importlib.util
import os
import re
import uuid
from pathlib import Path
from unittest import mock

import keras
import numpy as np

__all__ = ["litert", "onnx"]

NOT_NAMED = re.compile(r"(keras_tensor|input_layer|input)(_\d+)?")
# What the exporters import, by backend.
ONNX_PACKAGES = {"tensorflow": ["tf2onnx", "onnx"], "torch": ["onnxscript", "onnx"]}


def onnx(model, path):
    """Writes a model as ONNX, for onnxruntime and others, with batch and lengths as open as its inputs.

    Inputs have the names of the model's inputs, outputs those of its dict of outputs, or `output_0` and so on.

    Args:
        model: functional `keras.Model` with named inputs.
        path: str or path of the file, as a rule with the ending `.onnx`. It appears when all is written.

    Raises:
        ValueError: if an input has no name, or there is something that ONNX has no operation for, with its name.
        ImportError: if a package is missing, all of which `pip install "keras-transformer-layers[export]"` brings.
        RuntimeError: if the backend is JAX; or torch, and lengths of inputs have to agree, or ONNX has no operation for
            something.

    Example:

    >>> import tempfile
    >>> tokens = keras.Input((None,), dtype="int32")
    >>> model = keras.Model(tokens, keras.layers.Embedding(5, 4)(tokens))
    >>> kt.export.onnx(model, tempfile.mkdtemp() + "/model.onnx")
    Traceback (most recent call last):
    ...
    ValueError: `model` must have inputs with names, as of `keras.Input((None,), name="token_ids")`; ...
    """
    check_names(model)
    backend = keras.backend.backend()
    if backend not in ONNX_PACKAGES:
        _refuse("onnx", "model.onnx", f"knows of no exporter from {backend} that leaves batch and lengths open")
    missing = [name for name in ONNX_PACKAGES[backend] if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Exporting ONNX from {backend} needs {' and '.join(missing)}: `pip install "
            '"keras-transformer-layers[export]"`.'
        )
    outputs = model.output
    if not isinstance(outputs, dict):
        outputs = {f"output_{i}": x for i, x in enumerate(model.outputs)}
    named = keras.Model(model.input, outputs)
    with _written_at_once(path) as staging:
        (_onnx_of_tensorflow if backend == "tensorflow" else _onnx_of_torch)(named, staging)
        _check_onnx(staging, model)


def litert(model, path):
    """Writes a model for LiteRT, of its built-in operations alone, with batch and lengths as open as its inputs.

    The file's signature `serving_default` takes the model's inputs and returns its dict of outputs by their names, or
    `output_0` and so on.

    Args:
        model: functional `keras.Model` with named inputs.
        path: str or path of the file, which ends with `.tflite`. It appears when all is written.

    Raises:
        ValueError: if an input has no name, or `path` another ending.
        RuntimeError: if the backend is not TensorFlow; or from TensorFlow, if LiteRT has no operation for something.

    Example:

    >>> import tempfile, pathlib
    >>> model = kt.models.text_classifier(20, 2, dim=8, depth=1, num_heads=2, hidden_dim=8)
    >>> path = pathlib.Path(tempfile.mkdtemp(), "classifier.tflite")
    >>> if keras.backend.backend() == "tensorflow":
    ...     kt.export.litert(model, path)
    """
    check_names(model)
    if Path(path).suffix != ".tflite":
        raise ValueError(f"`path` must end with `.tflite`; received {path}.")
    if keras.backend.backend() != "tensorflow":
        reason = f"knows of no exporter from {keras.backend.backend()} that leaves batch and lengths open"
        _refuse("litert", "model.tflite", reason)
    import tensorflow as tf

    built_in = {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}
    with _written_at_once(path) as staging:
        model.export(staging, format="litert", verbose=False, target_spec=built_in)


def check_names(model):
    """Refuses a model whose inputs have no names of their own, by which whoever runs the file would have to feed it."""
    if not isinstance(model, keras.Model) or not hasattr(model, "operations"):
        raise ValueError(f"`model` must be a functional keras.Model, built from `keras.Input`; received {model!r}.")
    names = [x.name for x in model.inputs]
    if any(NOT_NAMED.fullmatch(name) for name in names):
        raise ValueError(
            '`model` must have inputs with names, as of `keras.Input((None,), name="token_ids")`; received one with '
            f"{names}."
        )


def _refuse(name, file, reason):
    raise RuntimeError(
        f'`kt.export.{name}` {reason}. Save the model here by `model.save("model.keras")`, and export it in a process '
        f'with KERAS_BACKEND=tensorflow: `kt.export.{name}(keras.saving.load_model("model.keras"), "{file}")`.'
    )


def _onnx_of_tensorflow(model, path):
    signature = [keras.tree.map_structure(lambda x: keras.InputSpec(x.dtype, x.shape, name=x.name), model.input)]
    with _mended_tf2onnx():
        model.export(path, format="onnx", verbose=False, input_signature=signature)


def _onnx_of_torch(model, path):
    """By torch's own exporter: the older one that Keras takes for open sizes fails at the norms of Keras."""
    import torch

    names = [x.name for x in model.inputs]

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *tensors):
            given = dict(zip(names, tensors, strict=True))
            outputs = self.model(keras.tree.map_structure(lambda x: given[x.name], model.input), training=False)
            return tuple(outputs[name] for name in model.output)

    flat = Flat().eval()
    # Each length another one, for torch may take equal ones for the same, and long enough that no part of the model
    # makes 1 of it, which torch takes for fixed.
    samples = tuple(
        keras.ops.ones(
            [2 if x.shape[0] is None else x.shape[0], *(size or 13 + 6 * i for size in x.shape[1:])], x.dtype
        )
        for i, x in enumerate(model.inputs)
    )
    try:
        with torch.no_grad():
            flat(*samples)
    except Exception:
        reason = "takes no inputs from torch whose lengths have to agree, as those of `decoding_step` do"
        _refuse("onnx", "model.onnx", reason)
    open_axes = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(x.shape) if size is None} for x in model.inputs
    )
    with torch.no_grad():
        program = torch.onnx.export(
            flat,
            samples,
            dynamo=True,
            dynamic_shapes=(open_axes,),
            input_names=names,
            output_names=[*model.output],
            verbose=False,
        )
    program.save(path, external_data=False)  # One file, or none.


@contextlib.contextmanager
def _written_at_once(path):
    """Yields the path of a file beside `path` that takes its place when the block has ended without an error."""
    path = Path(os.path.abspath(path))
    staging = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        yield staging
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


@contextlib.contextmanager
def _mended_tf2onnx():
    """Lets tf2onnx know of `Erfc`, which TensorFlow makes `gelu` of, and keeps it from merging reshapes wrongly.

    It writes `[0, 0, heads, size]` for the shape of a reshape, where 0 is the size of its input, and then merges it
    with the reshape before, whose input has other sizes.
    """
    from tf2onnx.optimizer import back_to_back_optimizer

    _register_erfc()
    merges = back_to_back_optimizer._func_map
    with mock.patch.dict(merges):
        merges.pop(("Reshape",), None)
        yield


@functools.cache
def _register_erfc():
    from tf2onnx.handler import tf_op
    from tf2onnx.utils import make_name, map_onnx_to_numpy_type

    @tf_op("Erfc")
    class Erfc:
        @classmethod
        def version_9(cls, graph, node, **_):
            dtype, shape = graph.get_dtype(node.input[0]), graph.get_shape(node.input[0])
            one = graph.make_const(make_name("one"), np.array(1, map_onnx_to_numpy_type(dtype)))
            erf = graph.make_node("Erf", node.input, dtypes=[dtype], shapes=[shape])
            graph.remove_node(node.name)
            inputs = [one.output[0], erf.output[0]]
            graph.make_node("Sub", inputs, outputs=node.output, name=node.name, dtypes=[dtype], shapes=[shape])


def _check_onnx(path, model):
    """Refuses a file with operations that are none, or with other inputs: exporters only warn of these."""
    import onnx

    found = onnx.load(path, load_external_data=False)
    unknown = sorted({x.op_type for x in _nodes(found.graph) if not x.domain and not onnx.defs.has(x.op_type)})
    if unknown:
        raise ValueError(f"`model` has operations that ONNX has no counterpart of: {', '.join(unknown)}.")
    inputs, own = {x.name for x in found.graph.input}, {x.name for x in model.inputs}
    if inputs - own:
        raise ValueError(
            f"`model` has tensors in its graph that are neither inputs nor variables, which ONNX would read as inputs: "
            f"{sorted(inputs - own)}. Put them in as numpy arrays, or make them weights of a layer."
        )


def _nodes(graph):
    """The nodes of an ONNX graph, with those of the graphs that its conditions and loops have."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(inner)
