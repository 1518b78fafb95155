"""Writes the tables of families/arguments.md from the models themselves: `python docs/families_table.py`.

Each family is built two blocks deep and without values, as the default configuration of its class in transformers says
or a released model whose fields are here, and its layers are asked for their arguments.
"""

import os
import pathlib
import re

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402

from keras_transformer import layers as own  # noqa: E402
from keras_transformer.pretrained.family import find_family  # noqa: E402
from keras_transformer.pretrained.fields import Fields  # noqa: E402
from keras_transformer.pretrained.loading import _without_values  # noqa: E402

PAGE = pathlib.Path(__file__).parent / "families" / "arguments.md"
# What stands between a table's name and the end of its directive is written anew.
TABLE = r"(<!-- {} -->\n:::{{table}}\n:class: arguments\n\n).*?(:::\n)"

LLAMA3 = {
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
QWEN2 = {
    "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
OPUS = {
    "d_model": 512, "encoder_attention_heads": 8, "decoder_attention_heads": 8, "activation_function": "swish",
    "scale_embedding": True,
}  # fmt: skip
# (page, name of the family, of the model, what its configuration has other than the defaults)
MODELS = [
    ("bert", "BERT", "base", {}),
    ("roberta", "RoBERTa", "base", {"layer_norm_eps": 1e-5, "type_vocab_size": 1}),
    ("distilbert", "DistilBERT", "base", {}),
    ("gpt2", "GPT-2", "small", {}),
    ("llama", "LLaMA", "7B", {}),
    ("llama", "Llama 3.1", "8B", LLAMA3),
    ("mistral", "Mistral", "7B", {"rms_norm_eps": 1e-5}),
    ("qwen2", "Qwen2", "7B", QWEN2),
    ("gemma", "Gemma", "2B", {"hidden_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 1}),
    ("gemma2", "Gemma 2", "2B", {}),
    ("mixtral", "Mixtral", "8x7B", {}),
    ("gpt_oss", "gpt-oss", "120b", {}),
    ("t5", "T5", "small", {}),
    ("t5", "T5 1.1", "small", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_heads": 6}),
    ("bart", "BART", "large", {}),
    ("marian", "Marian", "OPUS-MT", OPUS),
    ("vit", "ViT", "base", {}),
    ("deit", "DeiT", "base", {}),
    ("clip", "CLIP", "B/32", {}),
    ("whisper", "Whisper", "tiny", {}),
    ("llava", "LLaVA", "7B", {}),
    ("paligemma", "PaliGemma", "3B", {}),
]
TASKS = ("causal_lm", "seq2seq", "masked_lm", "distilled_image_classification", "image_classification", "bare")
DEPTHS = "num_hidden_layers n_layers n_layer num_layers num_decoder_layers encoder_layers decoder_layers".split()
STACKS = {"encoder": "encoder", "decoder": "decoder", "text_encoder": "texts", "image_encoder": "images"}
# What only a file can tell: that there is a bias of the logits, and that T5 1.1 has a kernel of its own for them.
STORED = {"final_logits_bias", "lm_head.weight"}


def build(kind, changes):
    """The model of a configuration, two blocks deep, whose variables have no values."""
    from transformers import AutoConfig

    values = shallow(AutoConfig.for_model(kind, **changes).to_dict())
    family = find_family(values)
    task = next(task for task in TASKS if task in family.tasks.values())
    with _without_values():
        return family.build(Fields(values, kind), task, STORED)


def shallow(values):
    """A configuration, and those in it, of two blocks."""
    values = {name: shallow(value) if isinstance(value, dict) else value for name, value in values.items()}
    if isinstance(values.get("layer_types"), list):
        values["layer_types"] = values["layer_types"][:2]
    return {name: 2 if name in DEPTHS and value else value for name, value in values.items()}


def stacks(model):
    """The blocks of each stack of a model, by what the stack is called."""
    found = {}
    for layer in model.layers:
        if isinstance(layer, own.EncoderBlock | own.DecoderBlock):
            found.setdefault(STACKS[layer.name.rsplit("_block_", 1)[0]], []).append(layer)
    return found


def attention(block):
    layer = block.self_attention
    head_dim = layer.query.units // layer.num_heads
    return {
        "`causal`": "but for a prefix" if opens_prefix(block) else layer.causal,
        "`num_heads`": layer.num_heads,
        "`num_key_value_heads`": layer.num_key_value_heads if layer.num_key_value_heads != layer.num_heads else None,
        "`head_dim`": head_dim,
        "`position`": None if layer.position is None else position(layer.position),
        "`sliding_window`": layer.sliding_window,
        "`use_bias`": layer.use_bias if isinstance(layer.use_bias, bool) else ", ".join(layer.use_bias),
        "`scale`": None if layer.scale in (None, head_dim**-0.5) else layer.scale,
        "`softmax`": None if layer.softmax is None else softmax(layer.softmax),
    }


def opens_prefix(block):
    return any(node.arguments.kwargs.get("prefix_mask") is not None for node in block._inbound_nodes)


def position(layer):
    if isinstance(layer, own.RelativePositionBias):
        return f"a bias for each of {layer.num_buckets} distances"
    if isinstance(layer, own.RotaryEmbedding):
        return f"rotary, {layer.base:,.0f}" + (f", {layer.scaling['rope_type']}" if layer.scaling else "")
    offset = f", from {layer.offset}" if layer.offset else ""
    return layer.kind + offset + ("" if layer.kind == "learned" or layer.interleaved else ", in halves")


def softmax(layer):
    return f"SoftCap, {layer.cap:g}" if isinstance(layer, own.SoftCap) else "sinks"


def rest(block):
    layer, norm = block.feed_forward, block.feed_forward_norm
    activation = keras.activations.serialize(layer.activation)
    if isinstance(activation, dict):
        activation = activation["config" if activation["class_name"] == "function" else "class_name"]
    return {
        "`norm`": "RMS" if isinstance(norm, keras.layers.RMSNormalization) else "layer",
        "`epsilon`": f"{norm.epsilon:g}",
        "`norm_position`": block.norm_position,
        "`cross_attention`": getattr(block, "cross_attention", None) is not None,
        "`activation`": activation.rpartition(">")[2],
        "`gated`": layer.gated,
        "`use_bias`": layer.use_bias,
        "experts": f"{layer.top_k} of {layer.num_experts}" if isinstance(layer, own.MixtureOfExperts) else None,
    }


def around(model):
    """What stands before the blocks and behind them."""
    kinds = keras.layers.Embedding | keras.layers.Conv1D | own.PatchEmbedding | own.Placeholders
    positions = [x for x in model.layers if isinstance(x, own.PositionalEmbedding | own.RelativePositionBias)]
    scales = [x.scale for x in model.layers if x.name.endswith(("embedding_scale", "position")) and hasattr(x, "scale")]
    return {
        "reads with": join(type(x).__name__ for x in model.layers if isinstance(x, kinds)),
        "embedding times": join(f"{scale:.3g}" for scale in scales if scale != 1),
        "positions": join(position(x) for x in positions),
        "tokens in front": sum(x.count for x in model.layers if isinstance(x, own.PrefixTokens)),
        "norms": join(norms(model.layers)),
        "logits": join(logits(model)),
    }


def norms(layers):
    """Where norms stand that are of no block."""
    for layer in layers:
        if isinstance(layer, keras.layers.LayerNormalization | keras.layers.RMSNormalization):
            head = "in the head" if layer.name == "transform_norm" else "behind"
            yield "before" if layer.name.endswith("embedding_norm") else head


def logits(model):
    """What makes logits of hidden states."""
    names = {"logits": "own kernel", "logits_bias": "bias", "logits_scale": "scale", "logit_scale": "LogitScale"}
    for layer in model.operations:
        if any(node.arguments.kwargs.get("reverse") for node in layer._inbound_nodes):
            yield "the embedding"
        elif layer.name.endswith("_labels") or layer.name == "labels":
            yield "labels of the tokens in front"
        elif layer.name in names:
            yield names[layer.name]
        elif type(layer).__name__ == "Tanh":
            yield "cap"


def join(parts):
    return ", ".join(dict.fromkeys(parts))


def shown(values):
    """A cell: the values of the blocks of a stack, each of which may be missing."""
    found = dict.fromkeys("✓" if value is True else str(value or "") for value in values)
    return " / ".join(text or "none" for text in found) if len(found) > 1 else next(iter(found))


def table(rows):
    """A table of rows, each a list of dicts from column to value: one, or one for each block of a stack."""
    rows = [{key: shown([x[key] for x in blocks]) for key in blocks[0]} for blocks in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def tables():
    """The three tables, by their names."""
    rows = {"attention": [], "rest of the blocks": [], "around the blocks": []}
    for page, family, size, changes in MODELS:
        model = build(page, changes)
        names = {"Model": f"[{family}]({page}.md) {size}"}
        rows["around the blocks"].append([{**names, **around(model)}])
        found = stacks(model)
        for stack, blocks in found.items():
            names = {**names, "Blocks of": stack if len(found) > 1 else ""}
            rows["attention"].append([{**names, **attention(block)} for block in blocks])
            rows["rest of the blocks"].append([{**names, **rest(block)} for block in blocks])
    return {name: table(found) for name, found in rows.items()}


def written(text):
    """The text of the page with the tables as they are to be."""
    for name, found in tables().items():
        text, count = re.subn(
            TABLE.format(name), lambda match, found=found: match[1] + found + match[2], text, flags=re.S
        )
        assert count == 1, f"{PAGE} has no place for the table of {name}"
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
