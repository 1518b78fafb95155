"""The steps of a trace, computed once more in plain numpy: each from what went in and the weights of its layer."""

import keras
import numpy as np

from keras_transformer import layers
from keras_transformer.inspection.arithmetic import (
    Formula,
    activation,
    affine,
    affine_formula,
    array,
    norm_formula,
    output,
    sigmoid,
    softmax,
)
from keras_transformer.inspection.attention_formulas import ATTENTION, mask_formula
from keras_transformer.inspection.convolution_formulas import subsampling_formula
from keras_transformer.inspection.keras_formulas import KERAS_LAYERS, operation_formula


def formula(layer, name, sources):
    """The `Formula` of what `layer` records as `name`, made from `sources`, or None where there is none."""
    if not sources:
        return None
    if isinstance(layer, layers.EncoderBlock | layers.DecoderBlock):
        return _of_block(layer, name)
    if isinstance(layer, layers.MultiHeadSelfAttention | layers.CrossAttention) and name == "mask":
        return mask_formula(layer, *sources)
    if not isinstance(layer, keras.layers.Layer):
        return operation_formula(layer, sources)
    for kind, formulas in FORMULAS.items():
        if isinstance(layer, kind) and name in formulas:
            found = formulas[name]
            return found(layer) if not isinstance(found, Formula) else found
    return None


def _hidden(layer):
    name = getattr(layer.activation, "__name__", type(layer.activation).__name__)
    if isinstance(layer.activation, layers.ClampedSwiGLU):
        alpha, limit = layer.activation.alpha, layer.activation.limit

        def clamped(_, up, gate):
            gate = np.minimum(gate, limit)
            return (np.clip(up, -limit, limit) + 1) * gate * sigmoid(alpha * gate)

        return Formula("(clip(up) + 1) · min(gate) · sigmoid(α · min(gate))", clamped)
    function = activation(layer.activation)
    if function is None:
        return None
    if layer.gated:
        return Formula(f"{name}(gate) · up", lambda _, up, gate: function(gate) * up)
    return Formula(f"{name}(up)", lambda _, up: function(up))


def _of_block(layer, name):
    if name.endswith("_residual"):
        return Formula("x + y", lambda _, x, y: x + y, "sum")
    if name.endswith("_scaled"):
        return Formula("y · layer scale", lambda _, y: y * array(getattr(layer, name.removesuffix("d"))))
    if name.endswith("_norm"):
        return norm_formula(getattr(layer, name))
    return None


def _sinusoids(positions, dim, interleaved):
    angles = positions[..., None] * 10000.0 ** -(np.arange(0, dim, 2) / dim)
    waves = np.stack([np.sin(angles), np.cos(angles)], axis=-1 if interleaved else -2)
    return waves.reshape(*positions.shape, -1)[..., :dim]


def _patches(layer, images):
    height, width = layer.patch_size
    batch, rows, columns, channels = images.shape
    cut = images.reshape(batch, rows // height, height, columns // width, width, channels)
    cut = cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, height * width * channels)
    result = cut @ array(layer.projection.kernel).reshape(-1, layer.dim)
    return result if layer.projection.bias is None else result + array(layer.projection.bias)


def _with_prefix(layer, x):
    tokens = np.broadcast_to(array(layer.tokens), (len(x), layer.count, x.shape[-1]))
    return np.concatenate([tokens, x], axis=1)


def _experts(layer):
    def compute(_, x, weights, chosen):
        tokens = x.reshape(-1, x.shape[-1])
        parts = [None if part is None else array(part) for part in layer._kernels_and_biases()]
        up, up_bias, gate, gate_bias, down, down_bias = parts
        hidden = _hidden(layer)
        result = np.zeros_like(tokens)
        for row, (token, shares, experts) in enumerate(zip(tokens, weights, chosen, strict=True)):
            for share, expert in zip(shares, experts, strict=True):
                inner = [token @ up[expert] + (0 if up_bias is None else up_bias[expert])]
                if gate is not None:
                    inner.append(token @ gate[expert] + (0 if gate_bias is None else gate_bias[expert]))
                out = hidden.compute(layer, *inner) @ down[expert]
                result[row] += share * (out + (0 if down_bias is None else down_bias[expert]))
        return result.reshape(x.shape)

    return None if _hidden(layer) is None else Formula("Σ weight · expert(x)", compute)


def _best(layer, scores):
    return np.argsort(-scores, axis=-1, kind="stable")[:, : layer.top_k]


def _shares(layer, scores, chosen):
    return softmax(np.take_along_axis(scores, chosen, axis=-1))


def _router(layer, x):
    return affine(layer.router, x.reshape(-1, x.shape[-1]))


def _positions(layer, x, real=None):
    places = np.arange(x.shape[1])
    if real is None:
        return places
    before = [next((i for i, each in enumerate(row) if each), len(row)) for row in real]
    return np.array([[max(0, place - count) for place in places] for count in before])


def _encoded(layer):
    if layer.kind == "learned":
        return Formula(
            "row of the table for the position",
            lambda _, positions, x: array(layer.position_table)[positions + layer.offset],
        )
    return Formula(
        "sine and cosine of position · frequency",
        lambda _, positions, x: _sinusoids(positions + layer.offset, x.shape[-1], layer.interleaved),
    )


def _filled(layer, x, token_ids, vectors):
    result = np.array(x)
    for row, ids in enumerate(token_ids):
        places = np.flatnonzero(ids == layer.token_id)[: vectors.shape[1]]
        result[row, places] = vectors[row, : len(places)]
    return result


FORMULAS = {
    layers.MultiHeadSelfAttention: ATTENTION,
    layers.CrossAttention: ATTENTION,
    layers.FeedForward: {
        "up": affine_formula("up", lambda layer: layer.up),
        "gate": affine_formula("gate", lambda layer: layer.gate),
        "hidden": _hidden,
        "output": affine_formula("down", lambda layer: layer.down, "hidden"),
    },
    layers.MixtureOfExperts: {
        "router_scores": Formula("x · W_router", _router),
        "chosen_experts": Formula("the experts with the highest scores", _best),
        "expert_weights": Formula("softmax(scores of the chosen experts)", _shares),
        "output": _experts,
    },
    layers.PositionalEmbedding: {
        "positions": Formula("0, 1, 2, … from the first real position on", _positions),
        "encoded": _encoded,
        "scaled": Formula("x · scale", lambda layer, x: x * layer.scale),
        "output": Formula("x + position", lambda _, x, encoded: x + encoded, "sum"),
    },
    layers.PatchEmbedding: output("patches · W + b", _patches),
    layers.FrameSubsampling: {"output": subsampling_formula},
    layers.PrefixTokens: output("learned tokens in front of x", _with_prefix),
    layers.Placeholders: output("the vectors where the text holds a place for them", _filled),
    layers.Bias: output("x + b", lambda layer, x: x + array(layer.bias)),
    layers.LogitScale: output("x · e^scale", lambda layer, x: x * np.exp(array(layer.logit_scale))),
    **KERAS_LAYERS,
}
