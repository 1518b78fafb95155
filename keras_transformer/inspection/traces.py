"""Every number on the way from a token to its contextual output."""

import difflib
import html
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

from keras_transformer.inspection.formulas import formula
from keras_transformer.inspection.page import page
from keras_transformer.inspection.plots import plot_heads
from keras_transformer.inspection.runs import inputs_by_name, run_recorded
from keras_transformer.inspection.text import sequences, walk

TOLERANCES = {"float16": 5e-3, "bfloat16": 4e-2}


class Step(NamedTuple):
    """One array of a trace.

    Attributes:
        path: str. Path of the layer, and the name of the array.
        array: array, of the shape that the layer made.
        sources: tuple of what it was made from: paths of earlier steps, or what has none: arrays, the numbers that an
            operation was called with, and None for what had no part in it.
        layer: the layer or operation that made it.
        name: str. The last part of the path.
        dtype: str. What the layer made it in, `"bfloat16"` included, which is float32 in `array`.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> model = kt.models.causal_lm(20, dim=8, depth=1, num_heads=2, hidden_dim=16)
    >>> step = kt.inspection.trace(model, np.array([[3, 1]])).steps[1]
    >>> step.path, step.array.shape, step.sources
    ('embedding/output', (1, 2, 8), ('token_ids/input',))
    """

    path: str
    array: np.ndarray
    sources: tuple
    layer: object
    name: str
    dtype: str


class Verification(NamedTuple):
    """What `Trace.verify` went through: three lists of paths.

    Attributes:
        recomputed: steps that numpy computed again, all equal.
        given: inputs, which are not made from other steps.
        unknown: steps of operations that there is no formula for.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> model = kt.models.causal_lm(20, dim=8, depth=1, num_heads=2, hidden_dim=16)
    >>> kt.inspection.trace(model, np.array([[3, 1]])).verify().given
    ['token_ids/input']
    """

    recomputed: list
    given: list
    unknown: list


def trace(model, inputs, tokens=None, generate=None, vocabulary=None):
    """Runs a model and keeps every step on the way, from each layer of this library and each operation between them.

    Args:
        model: a `keras.Model`, functional, sequential or subclassed, that holds layers of this library. Of a subclassed
            one only these layers are seen.
        inputs: what the model takes, with a batch axis.
        tokens: names of the positions of the first row: a list of strings for all inputs of that length, or a dict from
            an input's name to such a list. Generated positions are named by the vocabulary.
        generate: int. Go on for this many tokens, each the likeliest one, which is appended to the input `target_ids`
            or `token_ids`; None to run the model once.
        vocabulary: names of the answers, which are numbers otherwise: a list of strings, or a function from number to
            string, such as a tokenizer's `id_to_token`.

    Returns:
        `Trace`; with `generate` a list of them, one for each generated token, the last step of which chose it.

    Raises:
        ValueError: if the model holds no layer of this library, or the tokens are not as many as the positions.
        RuntimeError: inside a compiled function.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> model = kt.models.causal_lm(20, dim=8, depth=1, num_heads=2, hidden_dim=16)
    >>> steps = kt.inspection.trace(model, np.array([[3, 1, 4]]), tokens=["three", "one", "four"])
    >>> steps["decoder_block_0/self_attention/weights"].shape
    (1, 2, 3, 3)
    >>> len(steps.verify().recomputed) > 15
    True
    """
    if generate is not None:
        return _generated(model, inputs, tokens, generate, vocabulary)
    scope = run_recorded(model, inputs)
    steps = []
    for path, value in scope.records.items():
        layer, name, sources = scope.origins[path]
        sources = tuple(_numpy(source) if keras.ops.is_tensor(source) else source for source in sources)
        steps.append(Step(path, _numpy(value), sources, layer, name, keras.backend.standardize_dtype(value.dtype)))
    return Trace(steps, tokens, vocabulary)


def _generated(model, inputs, tokens, count, vocabulary):
    names = [x.name for x in getattr(model, "inputs", None) or ()]
    name = next((name for name in ("target_ids", "token_ids") if name in names), None)
    if name is None:
        raise ValueError(
            f"`generate` needs a model with an input `target_ids` or `token_ids`; received one with {names}."
        )
    given = inputs_by_name(model, inputs)
    ids, traces = np.asarray(given[name]), []
    if tokens is not None and not isinstance(tokens, dict):
        tokens = {name: tokens}
    for _ in range(count):
        more = (
            {name: [*tokens[name], *(_answer_name(vocabulary, i) for i in ids[0, len(tokens[name]) :])]}
            if name in (tokens or {})
            else {}
        )
        traces.append(trace(model, {**given, name: ids}, tokens and {**tokens, **more}, vocabulary=vocabulary))
        chosen = traces[-1].steps[-1].array[:, -1].argmax(axis=-1)
        ids = np.concatenate([ids, chosen[:, None].astype(ids.dtype)], axis=1)
    return traces


def attention_maps(model, inputs):
    """The attention weights of all layers of this library in a model.

    Args:
        model: a `keras.Model` as of `trace`.
        inputs: what the model takes, with a batch axis.

    Returns:
        Dict from the path of each attention layer to an array `[B, heads, T, S]`, in the order of computation.

    Raises:
        ValueError: if the model holds no layer of this library.
        RuntimeError: inside a compiled function.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> model = kt.models.causal_lm(20, dim=8, depth=2, num_heads=2, hidden_dim=16)
    >>> maps = kt.inspection.attention_maps(model, np.array([[3, 1, 4]]))
    >>> {path: weights.shape for path, weights in maps.items()}
    {'decoder_block_0/self_attention': (1, 2, 3, 3), 'decoder_block_1/self_attention': (1, 2, 3, 3)}
    """
    scope = run_recorded(model, inputs, ["weights"])
    return {path.removesuffix("/weights"): _numpy(value) for path, value in scope.records.items()}


class Trace(Mapping):
    """A read-only mapping from path to array, in the order of computation, as `trace` makes it.

    `print(trace)` walks through the steps of one token, the last one of the first row; `trace.token(2)` through those
    of another.

    Attributes:
        steps: list of `Step`.
        tokens: dict from the name of an input to the names of its positions.
        belongs: dict from path to the name of the input whose positions the step has, or None.
        vocabulary: names of the answers, as given to `trace`.
        whole: boolean. Whether this is the trace of a model rather than of a layer in it.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> model = kt.models.causal_lm(20, dim=8, depth=1, num_heads=2, hidden_dim=16)
    >>> steps = kt.inspection.trace(model, np.array([[3, 1, 4]]))
    >>> [path for path in steps][:2]
    ['token_ids/input', 'embedding/output']
    """

    def __init__(self, steps, tokens=None, vocabulary=None, belongs=None):
        self.steps = list(steps)
        self.vocabulary = vocabulary
        self.whole = belongs is None
        self.belongs = sequences(self.steps) if belongs is None else belongs
        self._steps = {step.path: step for step in self.steps}
        self.tokens = _token_names(self.steps, tokens) if self.whole else tokens
        for step in self.steps:
            step.array.setflags(write=False)

    def __getitem__(self, path):
        if path not in self._steps:
            near = difflib.get_close_matches(str(path), self._steps, n=3, cutoff=0.3)
            raise KeyError(f"There is no step {path!r}. The nearest are {near}.")
        return self._steps[path].array

    def __iter__(self):
        return iter(self._steps)

    def __len__(self):
        return len(self._steps)

    def __str__(self):
        return walk(self, None)

    __repr__ = __str__

    def token(self, position, row=0, of=None):
        """The walk through the steps of one token, as text.

        Args:
            position: int. Place of the token; a negative one counts from the end.
            row: int. Row of the batch.
            of: str. The input that it is a token of; by default the one whose positions the output has.

        Returns:
            str, whose lines have at most 100 columns.
        """
        return walk(self, position, row, of)

    def layer(self, path):
        """The steps of one layer and what is inside it, as a `Trace`.

        Raises:
            KeyError: if no step is of such a layer, with the nearest ones.
        """
        found = [step for step in self.steps if step.path.startswith(f"{path}/")]
        if not found:
            known = {part for step in self.steps for part in _parents(step.path)}
            raise KeyError(
                f"No step is of {path!r}. The nearest are {difflib.get_close_matches(path, known, cutoff=0.3)}."
            )
        return Trace(found, self.tokens, self.vocabulary, self.belongs)

    def to_html(self, path, row=0, layers=None, title="Attention, step by step", max_bytes=2_000_000):
        """Writes the trace as one page: all heads, and the walk of each token through the steps, with their numbers.

        The file needs no network: it may be sent, and opened anywhere. Weights go in first, then the steps; what there
        is no room for is listed on the page.

        Args:
            path: str or path of the file.
            row: int. Row of the batch.
            layers: list of paths of layers, such as `["decoder_block_5"]`, whose steps go in before those of others.
            title: str.
            max_bytes: int. The largest size of the file.

        Raises:
            ValueError: if not even the weights of one layer have room, or this is a part of a trace.
        """
        if not self.whole:
            raise ValueError(
                "`to_html` shows a whole trace; received that of a layer. Call it on what `trace` returned."
            )
        text = page(self, row, layers, max_bytes, title)
        Path(path).write_text(text, encoding="utf-8")

    def plot_attention(self, layer, row=0):
        """A matplotlib figure of the weights of one attention layer, a map for each head.

        Args:
            layer: str. Path of the attention layer.
            row: int. Row of the batch.

        Returns:
            `matplotlib.figure.Figure`.

        Raises:
            KeyError: if no such layer has weights, with the nearest ones.
        """
        weights = self[f"{layer}/weights"]
        names = [
            self.names(self.belongs.get(f"{layer}/{part}"), count)
            for part, count in zip(("query", "key"), weights.shape[2:], strict=True)
        ]
        return plot_heads(weights[row], *names, layer)

    def names(self, of, count):
        """Names of the positions of an input: those given, or numbers."""
        given = self.tokens.get(of)
        return [str(i) for i in range(count)] if given is None else [str(name) for name in given]

    def answer(self, number):
        """Name of an answer, such as the next token, by its number."""
        return _answer_name(self.vocabulary, number)

    def _repr_html_(self):
        """What notebooks show: the page of a whole trace, or the text of a part."""
        if not self.whole or not any(step.name == "weights" for step in self.steps):
            return f"<pre>{html.escape(str(self))}</pre>"
        text = html.escape(page(self, 0, None, 2_000_000, "Attention, step by step"))
        return f'<iframe style="width: 100%; height: 900px; border: 0" srcdoc="{text}"></iframe>'

    def verify(self, changed=None, tolerance=None):
        """Computes every step once more, in plain numpy, from the steps before it and the weights.

        Args:
            changed: dict from path to array, to put in place of what the trace holds first.
            tolerance: float. The largest difference, in units of the step's largest number, or of 1 below it; by
                default 1e-5, and what half precision leaves where a layer computes in it.

        Returns:
            `Verification`.

        Raises:
            ValueError: at the first step that differs.
        """
        arrays = {
            **{step.path: step.array for step in self.steps},
            **{k: np.asarray(v) for k, v in (changed or {}).items()},
        }
        result = Verification([], [], [])
        for step in self.steps:
            known = formula(step.layer, step.name, step.sources)
            if known is None:
                (result.unknown if step.sources else result.given).append(step.path)
                continue
            sources = [_double(arrays.get(x) if isinstance(x, str) else x) for x in step.sources]
            dtypes = (step.dtype, getattr(step.layer, "compute_dtype", None))  # An operation has none of its own.
            allowed = tolerance or max(TOLERANCES.get(dtype, 1e-5) for dtype in dtypes)
            _check(step, known, known.compute(step.layer, *sources), arrays[step.path], allowed)
            result.recomputed.append(step.path)
        return result


def _answer_name(vocabulary, number):
    if vocabulary is None:
        return str(number)
    return str(vocabulary(int(number)) if callable(vocabulary) else vocabulary[int(number)])


def _check(step, known, expected, found, tolerance):
    expected = np.broadcast_to(expected, found.shape)
    finite = np.isfinite(expected)
    unit = max(1.0, np.abs(expected[finite]).max(initial=0.0))
    same = np.array_equal(finite, np.isfinite(found))
    difference = np.abs(np.where(finite, expected, 0) - np.where(finite, found, 0)).max(initial=0.0)
    if not same or difference > tolerance * unit:
        raise ValueError(
            f"{step.path} differs: by {known.text!r} of {[x for x in step.sources if isinstance(x, str)]} it would be "
            f"up to {difference:.3g} away, where numbers are up to {unit:.3g}."
        )


def _double(source):
    is_float = isinstance(source, np.ndarray) and source.dtype.kind == "f"
    return source.astype("float64") if is_float else source


def _numpy(tensor):
    array = np.array(keras.ops.convert_to_numpy(tensor))
    return array.astype("float32") if array.dtype.name == "bfloat16" else array  # Of which NumPy knows little.


def _parents(path):
    parts = path.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _token_names(steps, tokens):
    inputs = {step.path.removesuffix("/input"): step.array for step in steps if step.path.endswith("/input")}
    if tokens is None or isinstance(tokens, dict) and not inputs:
        return dict(tokens or {})
    if not isinstance(tokens, dict):
        tokens = {
            name: tokens for name, array in inputs.items() if array.ndim > 1 and array.shape[1] == len(tokens)
        } or {next(iter(inputs)): tokens}
    for name, names in tokens.items():
        if name not in inputs:
            raise ValueError(f"`tokens` must name inputs out of {sorted(inputs)}; received {name!r}.")
        if inputs[name].ndim < 2 or len(names) != inputs[name].shape[1]:
            raise ValueError(
                f"`tokens` of {name!r} must be as many as its positions; received {len(names)} for an input of shape "
                f"{inputs[name].shape}."
            )
    return {name: list(names) for name, names in tokens.items()}
