"""Blocks that torch.nn's layers became compute what these compute, and go back."""

import keras
import numpy as np
import pytest
import torch

import keras_transformer as kt

RANDOM = np.random.default_rng(0)
X, CONTEXT = (RANDOM.normal(size=(2, length, 16)).astype("float32") for length in (5, 7))
REAL, CONTEXT_REAL = np.arange(5)[None] < [[5], [3]], np.arange(7)[None] < [[4], [7]]
OPTIONS = [
    {},
    {"norm_first": True, "activation": "gelu"},
    {"bias": False, "layer_norm_eps": 0.1},
    {"activation": torch.nn.GELU(), "nhead": 4},
]


def make(kind, options):
    torch.manual_seed(0)
    options = {"nhead": 2, "dim_feedforward": 24, "dropout": 0.1, "batch_first": True, **options}
    layer = kind(16, **options).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return layer


def theirs(layer):
    causal = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    padding = {"src_key_padding_mask": torch.tensor(~REAL)}
    with torch.no_grad():
        if isinstance(layer, torch.nn.TransformerEncoderLayer):
            return layer(torch.tensor(X), **padding).numpy()
        context = {"memory_key_padding_mask": torch.tensor(~CONTEXT_REAL)}
        padding = {"tgt_key_padding_mask": torch.tensor(~REAL)}
        return layer(torch.tensor(X), torch.tensor(CONTEXT), tgt_mask=causal, **padding, **context).numpy()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer])
def test_there_and_back(kind, options):
    layer = make(kind, options)
    block = kt.pretrained.from_torch(layer)
    arguments = {"mask": REAL}
    if kind is torch.nn.TransformerDecoderLayer:
        arguments |= {"context": CONTEXT, "context_mask": CONTEXT_REAL}
    found = keras.ops.convert_to_numpy(block(X, **arguments))
    np.testing.assert_allclose(found[REAL], theirs(layer)[REAL], atol=1e-5)
    assert block.dropout == block.self_attention.dropout == block.feed_forward.dropout == 0.1

    fresh = make(kind, options)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict({name: torch.tensor(value) for name, value in kt.pretrained.to_torch(block).items()})
    for name, value in layer.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kt.pretrained.from_torch(torch.nn.Linear(2, 2)), "`layer` must be one of .*received Linear"),
        (
            lambda: kt.pretrained.from_torch(make(torch.nn.TransformerEncoderLayer, {"activation": torch.nn.SiLU()})),
            "activation relu or gelu .*SiLU",
        ),
        (
            lambda: kt.pretrained.from_torch(
                make(torch.nn.TransformerEncoderLayer, {"activation": torch.nn.GELU("tanh")})
            ),
            "activation relu or gelu .*tanh",
        ),
    ],
)
def test_what_has_no_counterpart(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_without_a_place_in_torch():
    block = kt.layers.EncoderBlock(2, kt.layers.FeedForward(8, gated=True))
    block(X)
    with pytest.raises(ValueError, match="feed_forward/gate"):
        kt.pretrained.to_torch(block)
