"""Weights split over devices: the same training and the same tokens as on one device, each with a part.

The runs on several devices are JAX's own, in a process of theirs; what the map says is seen on every backend.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_transformer as kt


@pytest.fixture(scope="module")
def runs():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": flags}
    command = [sys.executable, str(Path(__file__).with_name("parallel_run.py"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", ["data 8", "tensor 8", "2 x 4"])
def test_it_trains_and_generates_as_on_one_device(runs, name):
    np.testing.assert_allclose(runs[name]["losses"], runs["one"]["losses"], rtol=0, atol=1e-5)
    assert runs["one"]["losses"][-1] < runs["one"]["losses"][0] - 0.5
    assert runs[name]["tokens"] == runs["one"]["tokens"]


@pytest.mark.parametrize("name, size", [("data 8", 1), ("tensor 8", 8), ("2 x 4", 4)])
def test_each_device_holds_its_part(runs, name, size):
    shapes, parts = runs[name]["shapes"], runs[name]["parts"]
    split = {path: [n // m for n, m in zip(shapes[path], part, strict=True)] for path, part in parts.items()}
    columns, rows = ["query", "key", "value", "up"], ["output", "down"]
    for path, by in split.items():
        owner, variable = path.split("/")[-2:]
        if owner in columns and variable == "kernel":
            assert by == [1, size], path
        elif owner in columns and variable == "bias":
            assert by == [size], path
        elif (owner in rows and variable == "kernel") or variable == "embeddings":
            assert by == [size, 1], path
        else:
            assert set(by) == {1}, path
    # Momentum and velocity are split as what they belong to.
    optimizer = {path.split("/")[1]: part for path, part in runs[name]["optimizer_parts"].items()}
    for path, part in parts.items():
        for kind in ("momentum", "velocity"):
            assert optimizer[f"{path.replace('/', '_')}_{kind}"] == part


def mesh_of(batch, model, axes=("batch", "model")):
    return keras.distribution.DeviceMesh((batch, model), axes, [f"cpu:{i}" for i in range(batch * model)])


def layouts(model, size):
    return {path: layout.axes for path, layout in kt.distribution.layout_map(model, mesh_of(1, size)).items()}


def test_grouped_heads_gates_experts_and_final_projections_are_split():
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    x = keras.layers.Embedding(30, 16, name="embedding")(tokens)
    attention = kt.layers.MultiHeadSelfAttention(8, num_key_value_heads=4, causal=True, use_bias=False)
    experts = kt.layers.MixtureOfExperts(4, 24, use_bias=True)
    for name, feed_forward in (("gated", kt.layers.FeedForward(32, "silu", gated=True)), ("experts", experts)):
        x = kt.layers.DecoderBlock(attention, feed_forward, name=name)(x)
    model = keras.Model(tokens, keras.layers.Dense(40, name="logits")(x))
    found = layouts(model, 4)
    assert found.pop("embedding/embeddings") == (None, "model")  # 30 words do not divide by 4, 16 numbers do.
    assert found.pop("logits/kernel") == (None, "model") and found.pop("logits/bias") == ("model",)
    expected = {"gated/feed_forward/gate/kernel": (None, "model"), "gated/feed_forward/gate/bias": ("model",)}
    expected |= {"gated/feed_forward/up/kernel": (None, "model"), "gated/feed_forward/up/bias": ("model",)}
    expected |= {"gated/feed_forward/down/kernel": ("model", None)}
    for name in ("up", "gate"):
        expected |= {f"experts/feed_forward/{name}": (None, None, "model")}
        expected |= {f"experts/feed_forward/{name}_bias": (None, "model")}
    expected |= {"experts/feed_forward/down": (None, "model", None)}
    for block in ("gated", "experts"):
        for name in ("query", "key", "value"):
            expected |= {f"{block}/self_attention/{name}/kernel": (None, "model")}
        expected |= {f"{block}/self_attention/output/kernel": ("model", None)}
    assert found == expected


def test_adapters_are_split_as_their_projection():
    model = kt.models.causal_lm(32, dim=16, depth=1, num_heads=4)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dense) and layer.name in ("query", "down"):
            layer.enable_lora(2)
    found = {path.split("/", 1)[1]: axes for path, axes in layouts(model, 2).items() if "lora" in path}
    assert found == {
        "self_attention/query/lora_kernel_b": (None, "model"),
        "feed_forward/down/lora_kernel_a": ("model", None),
    }


def test_bad_input():
    model = kt.models.causal_lm(32, dim=24, depth=1, num_heads=6)
    with pytest.raises(ValueError, match=r"`num_heads` of `.*self_attention` must be a multiple of the 4 devices"):
        layouts(model, 4)
    with pytest.raises(ValueError, match=r"must have an axis called 'model'.*\['batch', 'heads'\]"):
        kt.distribution.layout_map(model, mesh_of(1, 2, ("batch", "heads")))
    with pytest.raises(ValueError, match="must have attention or feed-forward layers of keras_transformer"):
        layouts(keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)]), 2)
    tokens = keras.Input((None,), dtype="int32")
    hidden = kt.layers.EncoderBlock(2, 7)(keras.layers.Embedding(10, 8)(tokens))
    with pytest.raises(ValueError, match=r"`hidden_dim` of `.*feed_forward` .* received hidden_dim=7"):
        layouts(keras.Model(tokens, hidden), 2)
