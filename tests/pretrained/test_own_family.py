"""A family from outside of the package: registered, loaded, saved, and refused where there is one of its name."""

import keras
import numpy as np
import pytest
from reference_checkpoints import DECODER, assert_close, expected, make, outputs_of, text_batch

import keras_transformer as kt
from keras_transformer.layers import DecoderBlock, FeedForward, MultiHeadSelfAttention, RotaryEmbedding
from keras_transformer.pretrained import Family, Fields, Stored, packed
from keras_transformer.pretrained import family as registry
from keras_transformer.pretrained.checkpoint import Checkpoint, write_checkpoint


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "REGISTERED", {})


def build_phi3(fields, task, stored):
    """Phi-3 without what makes its context long."""
    token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
    mask = keras.ops.not_equal(padding_mask, 0)
    size, dim, heads = (fields.need(name) for name in ("vocab_size", "hidden_size", "num_attention_heads"))
    fields.ignore("pad_token_id max_position_embeddings original_max_position_embeddings rope_parameters")
    fields.ignore("resid_pdrop embd_pdrop attention_dropout sliding_window")
    fields.only("hidden_act", "silu")
    fields.only("tie_word_embeddings", False)
    epsilon = fields.take("rms_norm_eps", default=1e-5)
    attention = MultiHeadSelfAttention(
        heads,
        num_key_value_heads=fields.take("num_key_value_heads", default=heads),
        causal=True,
        position=RotaryEmbedding(),
        use_bias=False,
    )
    feed_forward = FeedForward(fields.need("intermediate_size"), "silu", gated=True, use_bias=False)
    x = keras.layers.Embedding(size, dim, name="embedding")(token_ids)
    for i in range(fields.need("num_hidden_layers")):
        norm = keras.layers.RMSNormalization(epsilon=epsilon)
        x = DecoderBlock(attention, feed_forward, norm=norm, name=f"block_{i}")(x, mask=mask)
    norm = keras.layers.RMSNormalization(epsilon=epsilon, name="norm")
    norm.supports_masking = True
    x = norm(x)
    outputs = {"hidden_states": x} if task == "bare" else keras.layers.Dense(size, use_bias=False, name="logits")(x)
    return keras.Model([token_ids, padding_mask], outputs)


def phi3(configuration):
    """The family of Phi-3, whose packed tensor has a part for all queries of a key."""
    heads = configuration["num_attention_heads"]
    shares = (heads, *2 * [configuration.get("num_key_value_heads") or heads])
    block, theirs = "block_{i}", "layers.{i}"
    projections = {
        f"{block}/self_attention/{name}": packed(f"{theirs}.self_attn.qkv_proj", i, shares)
        for i, name in enumerate(("query", "key", "value"))
    }
    return Family(
        build=build_phi3,
        tasks={"Phi3Model": "bare", "Phi3ForCausalLM": "causal_lm"},
        weights={
            "embedding": "embed_tokens",
            **projections,
            f"{block}/self_attention/output": f"{theirs}.self_attn.o_proj",
            f"{block}/self_attention_norm": f"{theirs}.input_layernorm",
            f"{block}/feed_forward/gate": packed(f"{theirs}.mlp.gate_up_proj", 0, 2),
            f"{block}/feed_forward/up": packed(f"{theirs}.mlp.gate_up_proj", 1, 2),
            f"{block}/feed_forward/down": f"{theirs}.mlp.down_proj",
            f"{block}/feed_forward_norm": f"{theirs}.post_attention_layernorm",
            "norm": "norm",
        },
        heads={"logits": "lm_head"},
        prefix="model.",
    )


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_family_from_outside_is_held_to_transformers(key_heads, tmp_path):
    reference = make("Phi3ForCausalLM", {**DECODER, "num_key_value_heads": key_heads}, tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"(?s)must be one of .*'bert'.*received 'phi3'.*kt\.pretrained\.register"):
        kt.pretrained.load(tmp_path / "theirs")
    kt.pretrained.register("phi3", phi3)
    model = kt.pretrained.load(tmp_path / "theirs")
    batch = text_batch(reference, "right")
    real = batch["padding_mask"].astype(bool)
    assert_close(outputs_of(model, batch), expected(reference, batch), real)
    kt.pretrained.save(model, tmp_path / "ours")
    with Checkpoint(tmp_path / "theirs") as theirs, Checkpoint(tmp_path / "ours") as ours:
        assert set(theirs) == set(ours)
        for name in theirs:
            np.testing.assert_array_equal(theirs[name], ours[name])


@pytest.fixture
def vectors():
    def build(fields, task, stored):
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        vectors = keras.layers.Embedding(fields.need("vocab_size"), fields.need("dim"), name="embedding")
        return keras.Model(token_ids, {"hidden_states": vectors(token_ids)})

    return Family(build, {"WordVectors": "bare"}, {"embedding": "vectors"})


def test_each_name_has_one_family(vectors):
    kt.pretrained.register("word_vectors", vectors)
    for name in ("word_vectors", "bert"):
        with pytest.raises(ValueError, match=rf"`model_type` must be one that has no family yet; received '{name}'"):
            kt.pretrained.register(name, vectors)
    assert registry.find_family({"model_type": "word_vectors"}) is vectors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", lambda configuration: None), r"`model_type` must be a name, .*; received ''"),
        ((3, lambda configuration: None), r"`model_type` must be a name, .*; received 3"),
        (("word_vectors", {"embedding": "vectors"}), r"`family` must be a `Family`, or a function .*'vectors'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        kt.pretrained.register(*arguments)
    assert not registry.REGISTERED


def test_table_and_builder_that_disagree(vectors, tmp_path):
    """A weight without a place in files is named, and so is a tensor without a place in the model."""
    configuration = {"model_type": "word_vectors", "architectures": ["WordVectors"], "vocab_size": 9, "dim": 4}
    write_checkpoint(tmp_path, configuration, {"vectors.weight": np.ones((9, 4), "float32")})
    kt.pretrained.register("word_vectors", Family(vectors.build, vectors.tasks, {"embeddings": "vectors"}))
    with pytest.raises(ValueError, match="embedding/embeddings"):
        kt.pretrained.load(tmp_path)
    kt.pretrained.register("other_vectors", Family(vectors.build, vectors.tasks, {"embedding": "words"}))
    write_checkpoint(
        tmp_path / "other",
        {**configuration, "model_type": "other_vectors"},
        {"vectors.weight": np.ones((9, 4), "float32")},
    )
    with pytest.raises(ValueError, match=r"(?s)missing: words\.weight \(9, 4\).*unexpected: vectors\.weight"):
        kt.pretrained.load(tmp_path / "other")


def test_fields_that_the_builder_does_not_ask_for_are_warned_of(vectors, tmp_path):
    configuration = {"model_type": "word_vectors", "architectures": ["WordVectors"], "vocab_size": 9, "dim": 4}
    tensors = {"vectors.weight": np.ones((9, 4), "float32")}
    write_checkpoint(tmp_path, {**configuration, "scale": 2.0}, tensors)
    kt.pretrained.register("word_vectors", vectors)
    with pytest.warns(UserWarning, match=r"unknown here.*'scale'"):
        kt.pretrained.load(tmp_path)
    assert Fields({**configuration, "scale": 2.0}, "word_vectors").unknown() == ["dim", "scale", "vocab_size"]


@pytest.mark.parametrize(("count", "sizes"), [(3, (4, 4, 4)), ((4, 1, 1), (8, 2, 2)), ((1, 2), (4, 8))])
def test_parts_of_a_packed_tensor_are_put_together_again(count, sizes):
    whole = np.arange(12 * 5, dtype="float32").reshape(12, 5)
    entries = [packed("qkv", i, count) for i in range(len(sizes))]
    parts = [entry.to_ours([whole], (5, size), "kernel") for entry, size in zip(entries, sizes, strict=True)]
    assert [part.shape for part in parts] == [(5, size) for size in sizes]
    assert all(entry.file_shape(part.shape, "kernel") == (12, 5) for entry, part in zip(entries, parts, strict=True))
    files = [entry.to_file(part, "kernel")[0] for entry, part in zip(entries, parts, strict=True)]
    np.testing.assert_array_equal(Stored("qkv", part=(0, count, 0)).whole(files), whole)
