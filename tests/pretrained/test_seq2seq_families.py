"""Each family of encoder-decoder models, held to what transformers computes with the same checkpoint."""

import json

import keras
import numpy as np
import pytest
from reference_checkpoints import make, quiet

import keras_transformer as kt
from keras_transformer.pretrained.checkpoint import Checkpoint, write_checkpoint
from keras_transformer.pretrained.family import find_family
from keras_transformer.pretrained.fields import Fields

BART = {
    "vocab_size": 99, "d_model": 32, "max_position_embeddings": 40,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48,
}  # fmt: skip
OTHER_SIZES = {
    "vocab_size": 111, "d_model": 24, "max_position_embeddings": 30, "activation_function": "relu",
    "encoder_layers": 1, "encoder_attention_heads": 3, "encoder_ffn_dim": 40,
    "decoder_layers": 2, "decoder_attention_heads": 6, "decoder_ffn_dim": 56,
}  # fmt: skip
MARIAN = {
    **BART, "pad_token_id": 98, "decoder_start_token_id": 98, "eos_token_id": 0, "scale_embedding": True,
    "activation_function": "swish",
}  # fmt: skip
TWO_VOCABULARIES = {
    **MARIAN, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 90, "pad_token_id": 89,
    "decoder_start_token_id": 89,
}  # fmt: skip
T5 = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
T5_OTHER_SIZES = {
    "vocab_size": 111, "d_model": 24, "d_kv": 10, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 3,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "layer_norm_epsilon": 1e-2,
    "decoder_start_token_id": 0,
}  # fmt: skip

# name -> (architecture, configuration)
MODELS = {
    "bart": ("BartForConditionalGeneration", BART),
    "bart, bare": ("BartModel", BART),
    "bart, other sizes": ("BartForConditionalGeneration", {**OTHER_SIZES, "scale_embedding": True}),
    "marian": ("MarianMTModel", MARIAN),
    "marian, bare": ("MarianModel", MARIAN),
    "marian, other sizes": ("MarianMTModel", {**MARIAN, **OTHER_SIZES, "scale_embedding": False}),
    "marian, a size that is not used": ("MarianMTModel", {**MARIAN, "decoder_vocab_size": 120}),
    "marian, two vocabularies": ("MarianMTModel", TWO_VOCABULARIES),
    "marian, two vocabularies, own head": ("MarianMTModel", {**TWO_VOCABULARIES, "tie_word_embeddings": False}),
    "marian, two vocabularies, bare": ("MarianModel", TWO_VOCABULARIES),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5, bare": ("T5Model", T5),
    "t5, other sizes": ("T5ForConditionalGeneration", T5_OTHER_SIZES),
    "t5, gated": (
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "t5, gated, own head": (
        "T5ForConditionalGeneration",
        {**T5_OTHER_SIZES, "feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
    ),
}
POSITIONS = {"encoder.embed_positions.weight", "decoder.embed_positions.weight"}


def reference(name, directory):
    """A checkpoint that transformers wrote with noise on all that is learned, and the model that it reads from it."""
    import torch

    architecture, configuration = MODELS[name]
    model = make(architecture, configuration, directory)
    with torch.no_grad(), quiet():
        for module in model.modules():
            if hasattr(module, "create_weight"):  # Sinusoids, which are not learned.
                module.weight.copy_(module.create_weight())
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
        if name.startswith("t5") and name.endswith("own head"):
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
        model.save_pretrained(directory)
        return type(model).from_pretrained(directory).eval()


def batch(model, padding, lengths=(25, 18, 3), target_length=20):
    random = np.random.default_rng(1)
    size = model.config.vocab_size
    target_size = min(size, getattr(model.config, "decoder_vocab_size", size))
    rows, length = len(lengths), max(lengths)
    lengths = np.full(rows, length) if padding == "none" else np.array(lengths)
    slots = np.arange(length)[None]
    real = slots < lengths[:, None] if padding != "left" else slots >= length - lengths[:, None]
    return {
        "source_ids": np.where(real, random.integers(3, size, (rows, length)), model.config.pad_token_id),
        "source_padding_mask": real.astype("int32"),
        "target_ids": random.integers(3, target_size, (rows, target_length)),
    }


def expected(model, inputs):
    import torch

    names = {"source_ids": "input_ids", "source_padding_mask": "attention_mask", "target_ids": "decoder_input_ids"}
    with torch.no_grad():
        result = model(**{names[name]: torch.tensor(value).long() for name, value in inputs.items()})
    if "logits" in result:
        return {"logits": result.logits.numpy()}
    return {"hidden_states": result.last_hidden_state.numpy(), "context": result.encoder_last_hidden_state.numpy()}


def outputs_of(model, inputs):
    result = model(inputs)
    result = result if isinstance(result, dict) else {"logits": result}
    return {name: keras.ops.convert_to_numpy(value) for name, value in result.items()}


def assert_close(found, wanted, inputs, tolerance=1e-5):
    assert set(found) == set(wanted)
    real = inputs["source_padding_mask"].astype(bool)
    for name, value in wanted.items():
        value, own = (x[real] if name == "context" else x for x in (value, found[name]))
        assert np.abs(own - value).max() <= tolerance * np.abs(value).max(), name


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_what_is_saved_are_those_of_transformers(name, tmp_path):
    model = reference(name, tmp_path / "theirs")
    ours = kt.pretrained.load(tmp_path / "theirs")
    # transformers counts the positions of BART and Marian from the first slot on, be it padding or not.
    for padding in ("none", "right", *(["left"] if name.startswith("t5") else [])):
        inputs = batch(model, padding)
        assert_close(outputs_of(ours, inputs), expected(model, inputs), inputs)
    kt.pretrained.save(ours, tmp_path / "ours")
    with quiet():
        again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["mismatched_keys"] and report["missing_keys"] <= POSITIONS
    assert_close(expected(again.eval(), inputs), expected(model, inputs), inputs, 1e-6)
    shapes = [{n: c.shape(n) for n in c} for c in (Checkpoint(tmp_path / "theirs"), Checkpoint(tmp_path / "ours"))]
    assert {n: shape for n, shape in shapes[0].items() if n not in POSITIONS or "bart" in name} == shapes[1]


@pytest.mark.parametrize("name", ["bart", "marian"])
def test_padding_on_the_left_of_the_source_shifts_no_position(name, tmp_path):
    model = reference(name, tmp_path)
    left = batch(model, "left", lengths=(9, 5))
    row = {name: x[1:] for name, x in left.items()}
    row["source_ids"], row["source_padding_mask"] = row["source_ids"][:, 4:], row["source_padding_mask"][:, 4:]
    found = outputs_of(kt.pretrained.load(tmp_path), left)["logits"][1:]
    assert_close({"logits": found}, expected(model, row), row)


class Recorder(Fields):
    """Fields that remember what each one is taken for where it is missing."""

    def __init__(self, *args):
        super().__init__(*args)
        self.defaults = {}

    def take(self, *names, default=None):
        self.defaults[names[0]] = default
        return super().take(*names, default=default)


@pytest.mark.parametrize("name", ["bart", "marian", "marian, two vocabularies, own head", "t5", "t5, gated"])
def test_a_field_that_is_missing_has_the_default_of_transformers(name):
    import transformers

    architecture, configuration = MODELS[name]
    kind = getattr(transformers, architecture).config_class
    values = kind(**configuration).to_dict()
    fields = Recorder(values, values["model_type"])
    find_family(values).build(fields, "seq2seq", {"final_logits_bias"})
    assert fields.unknown() == []
    compared = set()
    for field, default in fields.defaults.items():
        left_out = kind(**{key: value for key, value in configuration.items() if key != field})
        if hasattr(left_out, field) and field not in ("tie_word_embeddings", "scale_decoder_outputs"):
            compared.add(field)
            assert default == getattr(left_out, field), field
    assert set(configuration) - compared <= {
        "pad_token_id", "eos_token_id", "decoder_start_token_id", "tie_word_embeddings",
    }  # fmt: skip


def test_dropout_acts_where_the_fields_say(tmp_path):
    rates = {"dropout": 0.3, "attention_dropout": 0.2, "activation_dropout": 0.1}
    for name, (architecture, configuration), wanted in (
        ("bart", MODELS["bart"], (0.3, 0.2, 0.1)),
        ("t5", MODELS["t5"], (0.4, 0.4, 0.4)),
    ):
        make(architecture, {**configuration, **rates, "dropout_rate": 0.4}, tmp_path / name)
        model = kt.pretrained.load(tmp_path / name)
        for side in ("encoder", "decoder"):
            block = model.get_layer(f"{side}_block_0")
            assert (block.dropout, block.self_attention.dropout, block.feed_forward.dropout) == wanted
            assert model.get_layer(f"{side}_embedding_dropout").rate == wanted[0]
        assert block.cross_attention.dropout == wanted[1]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bart", {"tie_word_embeddings": False}),
        ("bart", {"normalize_before": True}),
        ("bart", {"add_final_layer_norm": True}),
        ("bart", {"normalize_embedding": False}),
        ("bart", {"static_position_embeddings": True}),
        ("bart", {"activation_function": "gelu_10"}),
        ("marian", {"tie_word_embeddings": False}),
        ("marian", {"normalize_embedding": True}),
        ("marian", {"static_position_embeddings": False}),
        ("marian", {"is_decoder": True}),
        ("t5", {"is_decoder": True}),
        ("t5", {"feed_forward_proj": "gated-maxout"}),
        ("t5", {"is_gated_act": True}),
        ("t5", {"dense_act_fn": "silu"}),
    ],
)
def test_what_cannot_be_followed_is_refused(name, change):
    family, field = find_family({"model_type": name}), next(iter(change))
    with pytest.raises(ValueError, match=f"`{field}` of a {name} checkpoint must be"):
        family.build(Fields({**MODELS[name][1], **change}, name), "seq2seq", set())


def rewritten(source, target, change, configuration_change=()):
    """A checkpoint with other tensors and fields."""
    checkpoint = Checkpoint(source)
    configuration = {**json.loads((source / "config.json").read_text()), **dict(configuration_change)}
    tensors = change({name: np.array(checkpoint[name]) for name in checkpoint})
    write_checkpoint(target, {name: x for name, x in configuration.items() if x != "left out"}, tensors)
    return target


@pytest.mark.parametrize(
    ("name", "base", "embedding", "old"),
    [
        ("bart", "model.", "model.shared.weight", {"model.encoder.version": (1,), "model.decoder.version": (1,)}),
        ("marian", "model.", "model.shared.weight", {"model.encoder.embed_positions.weight": (40, 32)}),
        (
            "t5",
            "",
            "shared.weight",
            {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (32, 4)},
        ),
    ],
)
def test_the_shared_embedding_may_stand_under_any_of_its_names(name, base, embedding, old, tmp_path):
    model = reference(name, tmp_path / "theirs")
    inputs = batch(model, "right")
    names = [f"{base}encoder.embed_tokens.weight", f"{base}decoder.embed_tokens.weight", "lm_head.weight"]
    extra = {name: np.ones(shape, "float32") for name, shape in old.items()}

    def also(tensors):
        return {**tensors, **extra, **{alias: tensors[embedding] for alias in names}}

    def only(alias):
        return lambda tensors: {alias if name == embedding else name: x for name, x in tensors.items()}

    for i, change in enumerate((also, *map(only, names))):
        ours = kt.pretrained.load(rewritten(tmp_path / "theirs", tmp_path / str(i), change))
        assert_close(outputs_of(ours, inputs), expected(model, inputs), inputs)
    for alias in names:
        rewritten(tmp_path / "theirs", tmp_path / alias, lambda x, a=alias: {**x, a: x[embedding] + 1})
        with pytest.raises(ValueError, match=f"{alias} is {embedding}, but they differ"):
            kt.pretrained.load(tmp_path / alias)


def test_a_target_embedding_tied_to_the_head_may_be_missing(tmp_path):
    model = reference("marian, two vocabularies", tmp_path / "theirs")
    inputs = batch(model, "right")

    def head_alone(tensors):
        return {**tensors, "lm_head.weight": tensors.pop("model.decoder.embed_tokens.weight")}

    ours = kt.pretrained.load(rewritten(tmp_path / "theirs", tmp_path / "changed", head_alone))
    assert_close(outputs_of(ours, inputs), expected(model, inputs), inputs)


def test_without_a_bias_of_the_logits_in_the_file_there_is_none(tmp_path):
    import torch

    model = reference("bart", tmp_path / "theirs")
    inputs = batch(model, "right")
    bare = rewritten(
        tmp_path / "theirs",
        tmp_path / "bare",
        lambda x: {n.removeprefix("model."): value for n, value in x.items() if n != "final_logits_bias"},
        {"architectures": ["BartModel"]},
    )
    model.final_logits_bias = torch.zeros_like(model.final_logits_bias)
    assert_close(outputs_of(kt.pretrained.load(bare, task="seq2seq"), inputs), expected(model, inputs), inputs)


def test_versions_of_t5_are_told_apart_in_older_configurations(tmp_path):
    older = {"scale_decoder_outputs": "left out"}
    for name, tied in (("t5, gated, own head", False), ("t5, gated", False), ("t5", True)):
        model = reference(name, tmp_path / name)
        inputs = batch(model, "right")
        changes = {**older, "tie_word_embeddings": tied}
        directory = rewritten(tmp_path / name, tmp_path / f"{name}, older", lambda x: x, changes)
        assert_close(outputs_of(kt.pretrained.load(directory), inputs), expected(model, inputs), inputs)
