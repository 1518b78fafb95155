"""A trace as one HTML file, which asks nothing of anywhere."""

import base64
import hashlib
import html
import json
from importlib import resources

import keras
import numpy as np

from keras_transformer import layers
from keras_transformer.inspection.attention_formulas import score_scale
from keras_transformer.inspection.formulas import formula
from keras_transformer.inspection.text import OF_HEADS, answer_shares

TABS = {"encoder": "Encoder", "decoder": "Decoder", "cross": "Cross-attention"}


class Budget:
    """Arrays as base64, in float32 while there is room, then in half precision, then left out."""

    def __init__(self, size):
        self.left = size
        self.arrays, self.halved, self.omitted = [], [], []

    def add(self, name, array):
        """Number of the array, or None if it was left out."""
        array = np.ascontiguousarray(array)
        if array.dtype in (np.uint8, np.bool_):
            array, kind = array.astype("u1"), "u1"
        elif array.dtype.kind == "i":
            array, kind = array.astype("<i4"), "i4"
        else:
            array, kind = array.astype("<f4"), "f4"
        if kind == "f4" and 4 * array.nbytes / 3 > 0.1 * self.left:
            array, kind = array.astype("<f2"), "f2"
        size = 4 * array.nbytes // 3 + 64
        if size > self.left:
            self.omitted.append(name)
            return None
        if kind == "f2":
            self.halved.append(name)
        self.left -= size
        self.arrays.append({"text": base64.b64encode(array.tobytes()).decode(), "kind": kind})
        return len(self.arrays) - 1


def page(trace, row, wide, size, title):
    """The file's text.

    Args:
        trace: whole `Trace`.
        row: int. Row of the batch.
        wide: list of paths of layers whose steps go before those of others, or None.
        size: int. Bytes that the file may have.
        title: str.
    """
    parts = {name: resources.files(__package__).joinpath(f"page.{name}").read_text("utf-8") for name in ("js", "css")}
    frame = _frame(parts, title)
    budget = Budget(size - len(frame.encode()) - 400 * len(trace) - 2000)
    tabs = _tabs(trace, row, budget)
    if not tabs:
        raise ValueError(f"The page must have room for the weights of one layer; received max_bytes={size}.")
    weights = {f"{at['path']}/weights": at["weights"] for tab in tabs for at in tab["layers"]}
    data = {
        "title": title,
        "tokens": {name: [str(x) for x in names] for name, names in trace.tokens.items()},
        "tabs": tabs,
        "image": _image(trace, row, budget),
        "answers": _answers(trace, row),
        "steps": _steps(trace, row, wide or [], weights, budget),
    }
    data["arrays"] = budget.arrays
    data["notes"] = _notes(budget)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # No end of a script, no comment, whatever the tokens are.
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return frame.replace("@DATA@", text, 1)


def _frame(parts, title):
    def digest(text):
        return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    policy = f"default-src 'none'; script-src '{digest(parts['js'])}'; style-src '{digest(parts['css'])}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{parts['css']}</style>\n</head>\n<body>\n"
        '<h1 id="heading"></h1>\n<div id="tabs"></div>\n<div id="tokens"></div>\n<main>\n<section>\n'
        '<h2>All heads</h2>\n<div id="grid"></div>\n<h2 id="title"></h2>\n<div id="value"></div>\n'
        '<canvas id="large"></canvas>\n<canvas id="picture" hidden></canvas>\n'
        '<div id="next"><h2>Likeliest answers</h2><div id="answers"></div></div>\n'
        '<h2>Notes</h2>\n<ul id="notes"></ul>\n</section>\n'
        '<section>\n<h2>Step by step</h2>\n<div id="walk"></div>\n</section>\n</main>\n'
        '<script type="application/json" id="trace">@DATA@</script>\n'
        f"<script>{parts['js']}</script>\n</body>\n</html>\n"
    )


def _of_row(array, row):
    """A batch's row, or the one row that stands for all."""
    return array[min(row, len(array) - 1)]


def _tabs(trace, row, budget):
    found = {}
    for step in trace.steps:
        if step.name != "weights":
            continue
        place = step.path.removesuffix("/weights")
        query, key = (trace.belongs.get(f"{place}/{name}") for name in ("query", "key"))
        kind = "decoder" if getattr(step.layer, "causal", False) else "encoder"
        kind = "cross" if isinstance(step.layer, layers.CrossAttention) else kind
        weights = _of_row(step.array, row)
        number = budget.add(step.path, weights)
        if number is None:
            continue
        heads, rows, columns = weights.shape
        at = {"path": place, "query": query, "key": key, "weights": number, "heads": heads, "rows": rows}
        found.setdefault(kind, []).append({**at, "columns": columns, "label": str(len(found.get(kind, [])))})
    return [{"name": TABS[kind], "layers": found[kind]} for kind in TABS if kind in found]


def _steps(trace, row, wide, weights, budget):
    places = {step.path: i for i, step in enumerate(trace.steps)}
    steps = []
    for step in trace.steps:
        array, axis = _row_of_step(step, row)
        known = formula(step.layer, step.name, step.sources)
        steps.append(
            {
                "path": step.path,
                "name": step.name,
                "of": trace.belongs[step.path],
                "shape": list(array.shape),
                "axis": axis,
                "formula": known.text if known else "",
                "sources": [places.get(x) if isinstance(x, str) else None for x in step.sources],
                "array": None,
                "left": False,
                **_example(step, budget, known),
            }
        )

    def order(pair):
        path = pair[0].path
        return not any(path.startswith(f"{place}/") for place in wide), pair[0].name == "mask"

    for step, told in sorted(zip(trace.steps, steps, strict=True), key=order):
        if told["of"] is None or step.array.ndim > 4 or (step.array.ndim == 4 and told["axis"] is None):
            continue
        told["array"] = weights.get(step.path)
        if told["array"] is None:
            told["array"] = budget.add(step.path, _row_of_step(step, row)[0])
            told["left"] = told["array"] is None
    return steps


def _row_of_step(step, row):
    """What a step has for one row of the batch, and the axis of positions in it, or None."""
    array = step.array
    if step.name in OF_HEADS or step.name == "mask":
        return _of_row(array, row), 1
    if step.name in ("router_scores", "chosen_experts", "expert_weights") and array.ndim < 3:
        return array, None
    if step.name == "positions":
        return (array if array.ndim == 1 else _of_row(array, row)), 0
    if step.name == "encoded" and array.ndim == 2:
        return array, 0
    if array.ndim == 3 or (array.ndim == 2 and step.name == "input"):
        return _of_row(array, row), 0
    return (_of_row(array, row), None) if array.ndim else (array, None)


def _example(step, budget, known):
    """What the page needs to put numbers into a formula."""
    told = {"kind": known.kind if known else None, "column": None, "start": None, "factor": None}
    if told["kind"] == "scaled":
        told["factor"] = score_scale(step.layer)
    if told["kind"] == "affine":
        told["column"] = budget.add(f"{step.path}, kernel", keras.ops.convert_to_numpy(known.dense.kernel)[:, 0])
        if known.dense.bias is not None:
            told["start"] = float(keras.ops.convert_to_numpy(known.dense.bias)[0])
    return told


def _image(trace, row, budget):
    """The image that patches were cut from, with the grid of the patches."""
    patches = next((step for step in trace.steps if isinstance(step.layer, layers.PatchEmbedding)), None)
    source = next((x for x in (patches.sources if patches else ()) if isinstance(x, str)), None)
    if source is None or not source.endswith("/input") or trace[source].shape[-1] not in (1, 3):
        return None
    pixels = _of_row(trace[source], row)
    low, high = pixels.min(), pixels.max()
    height, width, channels = pixels.shape
    down, across = height // patches.layer.patch_size[0], width // patches.layer.patch_size[1]
    length = next(step.array.shape[1] for step in reversed(trace.steps) if step.name == "joined_heads")
    scaled = np.round(255 * (pixels - low) / max(high - low, 1e-9)).astype("uint8")
    number = budget.add(source, scaled)
    if number is None:
        return None
    sizes = {"width": width, "height": height, "channels": channels, "down": down, "across": across}
    return {"input": source.removesuffix("/input"), "pixels": number, "front": length - down * across, **sizes}


def _answers(trace, row):
    """The five likeliest answers at each position, where the last step scores some."""
    shares, last = answer_shares(trace, row), trace.steps[-1]
    if shares is None:
        return None
    rows = [
        [(trace.answer(i), round(float(line[i]), 6)) for i in np.argsort(-line, kind="stable")[:5]] for line in shares
    ]
    return {"of": trace.belongs[last.path] if last.array.ndim == 3 else None, "rows": rows}


def _notes(budget):
    notes = [
        "Arrow keys choose token and layer, with Shift the head. Of wide steps the lines show one head's first numbers."
    ]
    if budget.halved:
        notes.append(f"In half precision, 3 digits, to save room: {len(budget.halved)} arrays: " + _some(budget.halved))
    if budget.omitted:
        notes.append(f"Left out, for there was no room: {len(budget.omitted)} arrays: " + _some(budget.omitted))
    return notes


def _some(names, count=12):
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
