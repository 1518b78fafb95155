"""A trace as text: the walk of one token through the steps, at most 100 columns wide."""

import keras
import numpy as np

from keras_transformer.inspection.arithmetic import softmax
from keras_transformer.inspection.formulas import formula

WIDTH = 100
NUMBERS = 9  # in a line
OF_HEADS = (
    "query key value normalized_query normalized_key rotated_query rotated_key attended "
    "scores scaled_scores biased_scores masked_scores weights"
).split()
# Layers whose result, if it is a model's, scores answers.
SCORING = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.ReversibleEmbedding,
    keras.layers.Softmax,
    keras.layers.Activation,
)
OF_PAIRS = ("scores", "scaled_scores", "biased_scores", "masked_scores", "weights")


def sequences(steps):
    """From each step's path to the input whose positions it has, or None."""
    found = {}
    for step in steps:
        if step.path.endswith("/input"):
            found[step.path] = step.path.removesuffix("/input")
        else:
            known = (found.get(source) for source in step.sources if isinstance(source, str))
            found[step.path] = next((name for name in known if name), None)
    return found


def walk(trace, position=None, row=0, of=None):
    """The steps of the token at `position` of the input `of`, with its numbers."""
    belongs = trace.belongs
    of = of or next((belongs[step.path] for step in reversed(trace.steps) if belongs[step.path]), None)
    lengths = [_length(step) for step in trace.steps if belongs[step.path] == of]
    length = next((x for x in reversed(lengths) if x), 1)
    position = length - 1 if position is None else position
    if not -length <= position < length:
        raise IndexError(f"`position` must be one of the {length} positions of {of}; received {position}.")
    position %= length
    names = trace.tokens.get(of)
    title = f"{len(trace)} steps. Row {row}, position {position} of {length}" + (f" in {of}" if of else "")
    lines, place, others = [_cut(f"{title}: {names[position]!r}" if names else title)], None, []
    for step in trace.steps:
        if belongs[step.path] not in (of, None):
            others.append(belongs[step.path])
            continue
        if others:
            lines += ["", *(f"({others.count(x)} steps of {x})" for x in dict.fromkeys(others))]
            others, place = [], None
        if step.path.rsplit("/", 1)[0] != place:
            place = step.path.rsplit("/", 1)[0]
            lines += ["", _cut(place)]
        known = formula(step.layer, step.name, step.sources)
        shape = "[" + ", ".join(map(str, step.array.shape)) + "]"
        lines.append(_cut(f"  {step.name:<24} {shape:<18} {known.text if known else ''}".rstrip()))
        lines += _numbers(step, trace, position, row, length) if belongs[step.path] else []
    return "\n".join(lines + (_answer(trace, position, row) if trace.whole else []))


def _length(step):
    if step.name in OF_HEADS:
        return step.array.shape[2]
    is_row = step.array.ndim == 3 or (step.array.ndim == 2 and step.name == "input")
    return step.array.shape[1] if is_row else None


def _numbers(step, trace, position, row, length):
    array = step.array
    if (_length(step) or length) != length:
        return []  # Learned tokens came in front, or positions were pooled.
    if step.name in OF_HEADS:
        row = min(row, len(array) - 1)
        heads = array[row, :, position]
        if step.name not in OF_PAIRS:
            return [_line(f"head {i}", values) for i, values in enumerate(heads)]
        place = step.path.rsplit("/", 1)[0] + "/key"
        return _pairs(step, heads, trace.names(trace.belongs.get(place), heads.shape[-1]))
    if step.name == "mask":
        return [_line("", array[min(row, len(array) - 1), 0, min(position, array.shape[2] - 1)])]
    if array.ndim == 3:
        return [_line("", array[min(row, len(array) - 1), position])]
    if array.ndim == 2 and step.name == "input":
        return [_line("", array[row, position : position + 1])]
    if step.name == "positions" and array.ndim == 2:
        array = array[min(row, len(array) - 1)]
    if step.name == "positions" or (array.ndim == 2 and step.name == "encoded"):
        return [_line("", array[position])] if len(array) == length else []
    if array.ndim == 2 and step.name in ("router_scores", "chosen_experts", "expert_weights"):
        rows = array.reshape(-1, *array.shape[1:])
        return [_line("", rows[row * (len(rows) // _rows(trace)) + position])]
    return [_line("", array[row])] if array.ndim == 2 else []


def _rows(trace):
    return next((len(step.array) for step in trace.steps if step.array.ndim >= 3), 1)


def _pairs(step, heads, names):
    if len(names) <= NUMBERS:
        labels = [_cut(str(name), 8) for name in names]
        return [
            " " * 12 + " ".join(f"{label:>8}" for label in labels),
            *(_line(f"head {i}", values) for i, values in enumerate(heads)),
        ]
    if step.name != "weights":
        return [_line(f"head {i}", values) for i, values in enumerate(heads)]
    lines = []
    for i, values in enumerate(heads):
        best = np.argsort(-values, kind="stable")[:4]
        told = "  ".join(f"{_cut(str(names[j]), 8)} [{j}] {_number(values[j])}" for j in best)
        lines.append(_cut(f"    head {i:<2} {told}  …"))
    return lines


def _line(label, values):
    shown = " ".join(f"{_number(value):>8}" for value in np.atleast_1d(values)[:NUMBERS])
    return f"    {label:<8}{shown}" + (" …" if np.size(values) > NUMBERS else "")


def _number(value):
    if isinstance(value, np.bool_ | np.integer):
        return str(value)
    text = f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 or value == 0 or not np.isfinite(value) else f"{value:.1e}"
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def answer_shares(trace, row):
    """The share of each answer, `[T, answers]` or `[1, answers]`, where the last step scores answers, or None."""
    last = trace.steps[-1]
    scores = isinstance(last.layer, SCORING) or trace.vocabulary is not None
    if not scores or last.array.dtype.kind != "f" or last.array.ndim not in (2, 3) or last.array.shape[-1] < 2:
        return None
    array = np.atleast_2d(last.array[row]).astype("float64")
    is_share = (array >= 0).all() and np.allclose(array.sum(-1), 1, atol=1e-4)
    return array if is_share else softmax(array)


def _answer(trace, position, row):
    """The likeliest answers, where the last step scores some."""
    shares = answer_shares(trace, row)
    if shares is None:
        return []
    shares = shares[min(position, len(shares) - 1)]
    best = np.argsort(-shares, kind="stable")[:5]
    told = "   ".join(f"{trace.answer(i)}: {shares[i]:.4f}" for i in best)
    return ["", f"probabilities (softmax of the last step), the largest of {len(shares)}", _cut(f"    {told}")]


def _cut(text, width=WIDTH):
    return text if len(text) <= width else text[: width - 1] + "…"
