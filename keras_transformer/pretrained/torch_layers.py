"""The Transformer layers of torch.nn, as blocks of this library and back."""

import keras

from keras_transformer.layers import CrossAttention, DecoderBlock, EncoderBlock, FeedForward, MultiHeadSelfAttention
from keras_transformer.pretrained.loading import whole_tensors
from keras_transformer.pretrained.weights import match, packed


def _attention(ours, theirs):
    parts = {f"{ours}/{name}": packed(f"{theirs}.in_proj", i) for i, name in enumerate(("query", "key", "value"))}
    return {**parts, f"{ours}/output": f"{theirs}.out_proj"}


ENCODER = {
    **_attention("self_attention", "self_attn"),
    "self_attention_norm": "norm1",
    "feed_forward/up": "linear1",
    "feed_forward/down": "linear2",
    "feed_forward_norm": "norm2",
}
DECODER = {
    **ENCODER,
    **_attention("cross_attention", "multihead_attn"),
    "cross_attention_norm": "norm2",
    "feed_forward_norm": "norm3",
}
ACTIVATIONS = {"relu": "relu", "ReLU": "relu", "gelu": "gelu", "GELU": "gelu"}


def from_torch(layer):
    """Makes a block with the weights of a `torch.nn.TransformerEncoderLayer` or `TransformerDecoderLayer`.

    The decoder's self-attention is causal here; in torch that is a mask given at each call.

    Args:
        layer: the layer of torch, whose activation is ReLU or GELU.

    Returns:
        `EncoderBlock` or `DecoderBlock`, built, with a copy of the weights.

    Raises:
        ValueError: if `layer` is another kind of module, or its activation is another.

    Example:

    >>> import numpy as np, torch, keras_transformer as kt
    >>> layer = torch.nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, batch_first=True)
    >>> block = kt.pretrained.from_torch(layer)
    >>> tuple(block(np.ones((1, 3, 16), "float32")).shape)
    (1, 3, 16)
    """
    kinds = {"TransformerEncoderLayer": EncoderBlock, "TransformerDecoderLayer": DecoderBlock}
    kind = kinds.get(type(layer).__name__)
    if kind is None:
        raise ValueError(f"`layer` must be one of torch.nn's {sorted(kinds)}; received {type(layer).__name__}.")
    activation = layer.activation
    name = getattr(activation, "__name__", type(activation).__name__)
    if name not in ACTIVATIONS or getattr(activation, "approximate", "none") != "none":
        raise ValueError(f"`layer` must have the activation relu or gelu (exact); received {activation}.")

    def options(attention):
        return {"use_bias": attention.in_proj_bias is not None, "dropout": attention.dropout}

    heads, norm = layer.self_attn.num_heads, layer.norm1
    causal = kind is DecoderBlock
    parts = {
        "self_attention": MultiHeadSelfAttention(heads, causal=causal, **options(layer.self_attn)),
        "feed_forward": FeedForward(
            layer.linear1.out_features,
            ACTIVATIONS[name],
            use_bias=layer.linear1.bias is not None,
            dropout=layer.dropout.p,
        ),
    }
    if kind is DecoderBlock:
        parts["cross_attention"] = CrossAttention(layer.multihead_attn.num_heads, **options(layer.multihead_attn))
    block = kind(
        **parts,
        norm=keras.layers.LayerNormalization(epsilon=norm.eps, center=norm.bias is not None),
        norm_position="pre" if layer.norm_first else "post",
        dropout=layer.dropout1.p,
    )
    shape = (None, None, layer.linear1.in_features)
    block.build(shape, shape) if kind is DecoderBlock else block.build(shape)
    state = {_spelled(name): value.detach().cpu().numpy() for name, value in layer.state_dict().items()}
    for variable, stored in _places(block).values():
        (name,) = stored.tensor_names(variable.name, tuple(variable.shape))
        variable.assign(stored.to_ours([state[name]], tuple(variable.shape), variable.name))
    return block


def to_torch(block):
    """The weights of a block under the names of torch.nn's layers, for `load_state_dict`.

    Args:
        block: `EncoderBlock` or `DecoderBlock`, built, of layers that torch.nn's have as well.

    Returns:
        dict from name to array.

    Raises:
        ValueError: if the block has weights for which there is no place in torch's layer.

    Example:

    >>> import numpy as np, keras_transformer as kt
    >>> block = kt.layers.EncoderBlock(2, 32)
    >>> output = block(np.ones((1, 3, 16), "float32"))
    >>> kt.pretrained.to_torch(block)["self_attn.in_proj_weight"].shape
    (48, 16)
    """
    return {name.replace("in_proj.", "in_proj_"): value for name, value in whole_tensors(_places(block)).items()}


def _spelled(name):
    return name.replace("in_proj_", "in_proj.")


def _places(block):
    prefix = f"{block.path}/"
    variables = {variable.path.removeprefix(prefix): variable for variable in block.weights}
    try:
        entries = match(sorted(variables), DECODER if isinstance(block, DecoderBlock) else ENCODER)
    except KeyError as error:
        raise ValueError(
            f"`block` must have the weights of torch.nn's layers alone; received one with {error}."
        ) from None
    return {path: (variable, entries[path]) for path, variable in variables.items()}
