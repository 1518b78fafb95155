"""Mixtral and gpt-oss, held to what transformers computes with the same checkpoint."""

import json

import keras
import numpy as np
import pytest
from reference_checkpoints import DECODER, expected, make, text_batch

import keras_transformer as kt
from keras_transformer.pretrained.checkpoint import Checkpoint, read_json, write_checkpoint

EXPERTS = {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}
MIXTRAL = ("MixtralForCausalLM", EXPERTS)
GPT_OSS = ("GptOssForCausalLM", {**EXPERTS, "head_dim": 8, "sliding_window": 4})
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8, "truncate": True,
}  # fmt: skip

# name -> (architecture, configuration)
MODELS = {
    "mixtral": MIXTRAL,
    "mixtral, bare": ("MixtralModel", EXPERTS),
    "mixtral, windowed": (MIXTRAL[0], {**EXPERTS, "sliding_window": 4, "num_experts_per_tok": 3, "head_dim": 16}),
    "mixtral, others": (
        MIXTRAL[0],
        {
            **EXPERTS,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "hidden_act": "gelu",
            "rms_norm_eps": 0.1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "gpt_oss": GPT_OSS,
    "gpt_oss, bare": ("GptOssModel", GPT_OSS[1]),
    "gpt_oss, others": (
        GPT_OSS[0],
        {
            **GPT_OSS[1],
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 3,
            "attention_bias": False,
            "swiglu_alpha": 1.1,
            "swiglu_limit": 0.3,
            "head_dim": 16,
            "rms_norm_eps": 0.1,
            "rope_parameters": YARN,
        },
    ),
}


def logits_of(model, batch):
    result = model({name: batch[name] for name in ("token_ids", "padding_mask")})
    return keras.ops.convert_to_numpy(result["hidden_states"] if isinstance(result, dict) else result)


def theirs(reference, batch):
    (value,) = expected(reference, batch, positions=True).values()
    return value


def assert_close(found, wanted, real=slice(None), tolerance=1e-5):
    assert np.abs(found - wanted)[real].max() <= tolerance * np.abs(wanted[real]).max()


@pytest.mark.filterwarnings("error:The configuration of")
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_what_is_saved_are_those_of_transformers(name, tmp_path):
    reference = make(*MODELS[name], tmp_path / "theirs")
    model = kt.pretrained.load(tmp_path / "theirs")
    for padding in ("none", "right", "left"):
        batch = text_batch(reference, padding)
        real = batch["padding_mask"].astype(bool)
        assert_close(logits_of(model, batch), theirs(reference, batch), real)
    kt.pretrained.save(model, tmp_path / "ours")
    again, report = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(theirs(again.eval(), batch), theirs(reference, batch), real, 1e-6)
    first, second = Checkpoint(tmp_path / "theirs"), Checkpoint(tmp_path / "ours")
    assert set(first) == set(second)
    for tensor in first:
        np.testing.assert_array_equal(first[tensor], second[tensor], err_msg=tensor)
    model.save(tmp_path / "model.keras")
    assert_close(logits_of(keras.models.load_model(tmp_path / "model.keras"), batch), theirs(reference, batch), real)


def rewritten(directory, **changes):
    """A checkpoint with other fields in its configuration, or without those that are None here."""
    configuration = {**read_json(directory, "config.json"), **changes}
    configuration = {name: value for name, value in configuration.items() if name not in changes or value is not None}
    (directory / "config.json").write_text(json.dumps(configuration))


@pytest.mark.parametrize("model", [MIXTRAL, GPT_OSS], ids=["mixtral", "gpt_oss"])
def test_fields_that_are_left_out_are_those_of_the_classes(model, tmp_path):
    """Nothing but sizes is written, and positions far enough apart to tell bases and scalings from each other."""
    import transformers

    architecture, configuration = model
    # As the classes have it: 8 key-value heads.
    configuration = {**configuration, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    for name in ("sliding_window", "num_experts_per_tok", "num_local_experts", "max_position_embeddings"):
        configuration.pop(name, None)
    configuration["num_local_experts"] = getattr(transformers, architecture).config_class().num_local_experts
    reference = make(architecture, {**configuration, "hidden_size": 16, "intermediate_size": 8}, tmp_path)
    sizes = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    kept = sizes | {"model_type", "architectures"} | ({"head_dim"} if architecture == MIXTRAL[0] else set())
    written = read_json(tmp_path, "config.json")
    rewritten(tmp_path, **{name: None for name in written if name not in kept})
    batch = text_batch(reference, "none", rows=2, length=150)
    assert_close(logits_of(kt.pretrained.load(tmp_path), batch), theirs(reference, batch))


@pytest.mark.parametrize("model", [MIXTRAL, GPT_OSS], ids=["mixtral", "gpt_oss"])
def test_the_older_spelling_of_positions(model, tmp_path):
    architecture, configuration = model
    reference = make(architecture, {**configuration, "head_dim": 8, "rope_parameters": YARN}, tmp_path)
    scaling = dict(YARN)
    base = scaling.pop("rope_theta")
    rewritten(tmp_path, rope_parameters=None, rope_theta=base, rope_scaling=scaling)
    batch = text_batch(reference, "none")
    assert_close(logits_of(kt.pretrained.load(tmp_path), batch), theirs(reference, batch))


@pytest.mark.parametrize("model", [MIXTRAL, GPT_OSS], ids=["mixtral", "gpt_oss"])
def test_load_balancing_is_that_of_transformers(model, tmp_path):
    """Of one block; of several, transformers takes the balance of all together, and here each has its own."""
    architecture, configuration = model
    configuration = {**configuration, "num_hidden_layers": 1, "router_aux_loss_coef": 0.5}
    reference = make(architecture, {**configuration, "output_router_logits": True}, tmp_path)
    batch = text_batch(reference, "right")
    model = kt.pretrained.load(tmp_path)
    model({name: batch[name] for name in ("token_ids", "padding_mask")}, training=True)
    import torch

    names = {"token_ids": "input_ids", "padding_mask": "attention_mask"}
    with torch.no_grad():
        wanted = reference(**{theirs: torch.tensor(batch[ours]).long() for ours, theirs in names.items()}).aux_loss
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model.losses[0]), 0.5 * float(wanted), rtol=1e-5)
    rewritten(tmp_path, output_router_logits=False)
    model = kt.pretrained.load(tmp_path)
    model({name: batch[name] for name in ("token_ids", "padding_mask")}, training=True)
    assert model.losses == []


def test_jitter_is_for_training(tmp_path):
    make(MIXTRAL[0], {**EXPERTS, "router_jitter_noise": 0.3}, tmp_path)
    model = kt.pretrained.load(tmp_path)
    assert [model.get_layer(f"decoder_block_{i}").feed_forward.router_jitter for i in range(2)] == [0.3, 0.3]


def test_what_is_refused(tmp_path):
    make(*GPT_OSS, tmp_path)
    configuration, tensors = read_json(tmp_path, "config.json"), dict(Checkpoint(tmp_path))
    layer = "model.layers.0.mlp.experts"
    cases = {
        r"`quantization_config.quant_method` of a gpt_oss .* must be 'mxfp4' here; received 'awq'": (
            {"quantization_config": {"quant_method": "awq"}},
            tensors,
        ),
        r"down_proj_blocks in .* must come with model.layers.0.mlp.experts.down_proj_scales, which is missing": (
            {},
            {**tensors, f"{layer}.down_proj_blocks": np.zeros((4, 32, 2, 16), "uint8")},
        ),
        r"received \[\(4, 32, 2, 16\), \(4, 32, 1\)\] of \['uint8', 'uint8'\]": (
            {},
            {
                **tensors,
                f"{layer}.down_proj_blocks": np.zeros((4, 32, 2, 16), "uint8"),
                f"{layer}.down_proj_scales": np.zeros((4, 32, 1), "uint8"),
            },
        ),
        r"`layer_types` of a gpt_oss checkpoint .* each of its 2 layers; received \['chunked": (
            {"layer_types": ["chunked_attention", "full_attention"]},
            tensors,
        ),
        r"wrong shape: model.layers.0.mlp.experts.gate_up_proj \(4, 32, 64\), where \(4, 32, 128\) is expected": (
            {},
            {**tensors, f"{layer}.gate_up_proj": tensors[f"{layer}.gate_up_proj"][..., ::2]},
        ),
    }
    for i, (message, (changes, held)) in enumerate(cases.items()):
        write_checkpoint(tmp_path / str(i), {**configuration, **changes}, held)
        with pytest.raises(ValueError, match=message):
            kt.pretrained.load(tmp_path / str(i))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_packed_experts_are_those_that_transformers_unpacks(tmp_path):
    import transformers

    make(*GPT_OSS, tmp_path / "floats")
    tensors, random = dict(Checkpoint(tmp_path / "floats")), np.random.default_rng(3)
    for name in [name for name in tensors if name.endswith("_proj")]:
        experts, inputs, outputs = tensors.pop(name).shape
        # All 256 bytes, and exponents that make for weights of ordinary size.
        tensors[f"{name}_blocks"] = random.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype("uint8")
        tensors[f"{name}_scales"] = random.integers(120, 126, (experts, outputs, inputs // 32)).astype("uint8")
    configuration = {**read_json(tmp_path / "floats", "config.json"), "quantization_config": {"quant_method": "mxfp4"}}
    write_checkpoint(tmp_path / "packed", configuration, tensors)
    kind = transformers.GptOssForCausalLM
    options = {"quantization_config": transformers.Mxfp4Config(dequantize=True), "dtype": "float32"}
    reference = kind.from_pretrained(tmp_path / "packed", **options).eval()
    model = kt.pretrained.load(tmp_path / "packed")
    batch = text_batch(reference, "right")
    real = batch["padding_mask"].astype(bool)
    assert_close(logits_of(model, batch), theirs(reference, batch), real)
    kt.pretrained.save(model, tmp_path / "ours")
    assert "quantization_config" not in read_json(tmp_path / "ours", "config.json")
    again = kind.from_pretrained(tmp_path / "ours").eval()
    assert_close(theirs(again, batch), theirs(reference, batch), real, 1e-6)
    assert set(Checkpoint(tmp_path / "ours")) == set(Checkpoint(tmp_path / "floats"))


def test_each_expert_is_checked(tmp_path):
    make(*MIXTRAL, tmp_path / "whole")
    configuration, tensors = read_json(tmp_path / "whole", "config.json"), dict(Checkpoint(tmp_path / "whole"))
    prefix = "model.layers.1.block_sparse_moe.experts"
    del tensors[f"{prefix}.3.w2.weight"]
    tensors[f"{prefix}.2.w1.weight"] = tensors[f"{prefix}.2.w1.weight"].T
    write_checkpoint(tmp_path / "damaged", configuration, tensors)
    with pytest.raises(ValueError) as error:
        kt.pretrained.load(tmp_path / "damaged")
    lines = str(error.value).splitlines()[1:]
    assert lines == [
        "  missing: layers.1.block_sparse_moe.experts.3.w2.weight (32, 64)",
        f"  wrong shape: {prefix}.2.w1.weight (32, 64), where (64, 32) is expected",
    ]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_half_precision(name, tmp_path):
    reference = make(*MODELS[name], tmp_path)
    model = kt.pretrained.load(tmp_path, dtype="bfloat16")
    assert {keras.backend.standardize_dtype(weight.dtype) for weight in model.weights} == {"bfloat16"}
    batch = text_batch(reference, "none")
    found, wanted = logits_of(model, batch).astype("float32"), theirs(reference, batch)
    # Rounding may turn a token to other experts: most are close, not all.
    assert np.median(np.abs(found - wanted)) <= 0.03 * np.abs(wanted).max()
