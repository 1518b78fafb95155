"""Raw inputs to text with a checkpoint, as transformers does it."""

import numpy as np
import pytest
from PIL import Image
from reference_checkpoints import make, quiet
from reference_tokenizers import (
    SENTENCES,
    write_byte_pairs,
    write_clip,
    write_gemma,
    write_json,
    write_llama,
    write_marian,
    write_word_pieces,
)

import keras_transformer as kt

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
TEXTS = ["A man reads", "Two dogs run in  the park, don't they?", "naïve\n🙂"]
SQUARE = {"height": 16, "width": 16}
CLIP_IMAGES = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "crop_size": SQUARE}


def pictures(count, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, 255, (20 + 7 * i, 31, 3), "uint8") for i in range(count)]


def generated(reference, inputs, tokenizer, count):
    """What transformers writes for each of a list of inputs, one at a time."""
    import torch

    results = []
    for one in inputs:
        length = 0 if reference.config.is_encoder_decoder else one["input_ids"].shape[1]
        with quiet(), torch.no_grad():
            ids = reference.generate(**one, max_new_tokens=count, do_sample=False)[0, length:]
        results.append(tokenizer.decode(ids, skip_special_tokens=True))
    return results


def make_gpt2(directory):
    size = len(write_byte_pairs(directory))
    sizes = {"vocab_size": size, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 40}
    return make("GPT2LMHeadModel", {**sizes, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}, directory, 1)


def test_going_on_with_a_text(tmp_path):
    from transformers import AutoTokenizer

    reference = make_gpt2(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    pipeline = kt.pipelines.load_pretrained(tmp_path, max_new_tokens=7, jit_compile=False)
    wanted = generated(reference, [tokenizer(text, return_tensors="pt") for text in TEXTS], tokenizer, 7)
    assert pipeline.predict(TEXTS, batch_size=2) == wanted and all(wanted)
    assert pipeline.predict([]) == []
    with pytest.raises(ValueError, match="`raw_inputs` must be a list of raw inputs; received 'one text'"):
        pipeline.predict("one text")
    with pytest.raises(ValueError, match="A raw input must be a text, a string; received 3"):
        pipeline.predict(["a", 3])
    with pytest.raises(ValueError, match="A text must have a token; number 1 of the batch has none"):
        pipeline.predict(["a", ""])


def test_one_text_to_another(tmp_path):
    from transformers import AutoTokenizer

    vocabulary = write_marian(tmp_path)
    write_json(tmp_path, "tokenizer_config.json", {"source_lang": "en", "target_lang": "de"})
    sizes = {"vocab_size": len(vocabulary), "d_model": 32, "max_position_embeddings": 40}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    pad = vocabulary["<pad>"]
    special = {"eos_token_id": 0, "forced_eos_token_id": 0, "pad_token_id": pad, "decoder_start_token_id": pad}
    reference = make("MarianMTModel", {**sizes, **special}, tmp_path)
    reference = type(reference).from_pretrained(tmp_path)  # Positions are computed, without the noise on them.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, "", ">>deu<< the train"]
    pipeline = kt.pipelines.load_pretrained(tmp_path, max_new_tokens=9, jit_compile=False)
    wanted = generated(reference, [tokenizer(text, return_tensors="pt") for text in texts], tokenizer, 9)
    assert pipeline.predict(texts) == wanted and all(wanted)


BERT_LABELS = {"id2label": {"0": "bad", "1": "so so", "2": "good"}, "label2id": {"bad": 0, "so so": 1, "good": 2}}


def balanced(reference, classifiers, inputs):
    """Moves the bias of classifiers so that labels differ from input to input, and gives these."""
    import torch

    with torch.no_grad():
        logits = torch.cat([reference(**one).logits for one in inputs])
        for classifier in classifiers:
            classifier.bias -= logits.mean(0)
        wanted = [reference.config.id2label[i] for i in (logits - logits.mean(0)).argmax(-1).tolist()]
    assert len(set(wanted)) > 1
    return wanted


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert"])
def test_labels_of_texts(kind, tmp_path):
    from transformers import AutoTokenizer

    if kind == "Roberta":
        size = len(write_byte_pairs(tmp_path, ("<s>", "<pad>", "</s>", "<unk>", "<mask>")))
        fields = {**SIZES, "pad_token_id": 1, "type_vocab_size": 1}
    else:
        size = len(write_word_pieces(tmp_path))
        fields = SIZES if kind == "Bert" else {"dim": 32, "n_heads": 4, "n_layers": 1, "hidden_dim": 48}
    fields = {**fields, "vocab_size": size, "max_position_embeddings": 70, **BERT_LABELS}
    reference = make(f"{kind}ForSequenceClassification", fields, tmp_path, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*SENTENCES, "", ("A man", "reads a book"), ("dogs", "x"), "a</s>b [SEP] c"]
    inputs = [tokenizer(*(x if isinstance(x, tuple) else [x]), return_tensors="pt") for x in texts]
    wanted = balanced(reference, [getattr(reference.classifier, "out_proj", reference.classifier)], inputs)
    reference.save_pretrained(tmp_path)
    pipeline = kt.pipelines.load_pretrained(tmp_path)
    assert pipeline.predict(texts, batch_size=6) == wanted
    with pytest.raises(ValueError, match=r"A raw input must be a text, a string; received \('a', 'b', 'c'\)"):
        pipeline.predict([("a", "b", "c")])
    assert kt.pipelines.load_pretrained(tmp_path, labels="abc").predict(["A man"])[0] in "abc"
    with pytest.raises(ValueError, match="options of `Generator` are for models that generate; received .'sampler'"):
        kt.pipelines.load_pretrained(tmp_path, sampler="greedy")


@pytest.mark.parametrize("architecture", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher"])
def test_labels_of_images(architecture, tmp_path):
    from transformers import AutoImageProcessor

    reference = make(architecture, {**SIZES, "image_size": 16, "patch_size": 8, **BERT_LABELS}, tmp_path)
    kind = architecture.partition("For")[0]
    values = {"image_processor_type": f"{kind}ImageProcessor", "size": SQUARE, "crop_size": 16}
    write_json(tmp_path, "preprocessor_config.json", values)
    images = pictures(7)
    made = AutoImageProcessor.from_pretrained(tmp_path)(images, return_tensors="pt")
    heads = [x for name, x in reference.named_children() if "classifier" in name]
    wanted = balanced(reference, heads, [made])
    reference.save_pretrained(tmp_path)
    Image.fromarray(images[0]).save(tmp_path / "image.png")
    pipeline = kt.pipelines.load_pretrained(tmp_path)
    found = pipeline.predict([tmp_path / "image.png", Image.fromarray(images[1]), *images[2:]], batch_size=4)
    assert found == wanted
    with pytest.raises(ValueError, match="missing.png must be an image that Pillow can read"):
        pipeline.predict([str(tmp_path / "missing.png")])
    write_json(tmp_path, "preprocessor_config.json", {**values, "size": 24, "crop_size": 24})
    with pytest.raises(ValueError, match=r"must make images of \(16, 16, 3\).*it made them of \(24, 24, 3\)"):
        kt.pipelines.load_pretrained(tmp_path).predict(images)


def test_the_text_that_fits_an_image(tmp_path):
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer

    vocabulary = write_clip(tmp_path)
    text = {**SIZES, "vocab_size": len(vocabulary), "max_position_embeddings": 12, "projection_dim": 20}
    text["eos_token_id"] = vocabulary["<|endoftext|>"]
    vision = {**SIZES, "image_size": 16, "patch_size": 8, "projection_dim": 20}
    reference = make("CLIPModel", {"text_config": text, "vision_config": vision, "projection_dim": 20}, tmp_path)
    write_json(tmp_path, "preprocessor_config.json", CLIP_IMAGES)
    labels, images = ["a cat", "Two dogs!", "the train"], pictures(9)
    tokens = AutoTokenizer.from_pretrained(tmp_path)(labels, padding=True, return_tensors="pt")
    made = AutoImageProcessor.from_pretrained(tmp_path)(images, return_tensors="pt")
    with torch.no_grad():
        # So that what is alike in all images does not decide.
        reference.vision_model.post_layernorm.bias -= reference.vision_model(**made).pooler_output.mean(0)
        reference.save_pretrained(tmp_path)
        best = reference(**tokens, **made).logits_per_image.argmax(-1).tolist()
    found = kt.pipelines.load_pretrained(tmp_path, labels=labels).predict(images)
    assert found == [labels[i] for i in best] and len(set(found)) > 1
    with pytest.raises(ValueError, match="`labels` must be the texts of which one is to fit an image"):
        kt.pipelines.load_pretrained(tmp_path)


VISION = {**SIZES, "hidden_size": 24, "image_size": 16, "patch_size": 8}


def make_llava(directory, strategy="default"):
    from transformers import LlamaTokenizer

    write_llama(directory, user_defined_symbols=["<image>"])
    LlamaTokenizer.from_pretrained(directory, add_bos_token=True).save_pretrained(directory)
    write_json(directory, "preprocessor_config.json", CLIP_IMAGES)
    text = {**SIZES, "model_type": "llama", "vocab_size": 500, "num_key_value_heads": 2, "max_position_embeddings": 64}
    configuration = {"text_config": text, "vision_config": {"model_type": "clip_vision_model", **VISION}}
    count = 4 if strategy == "default" else 5
    fields = {"image_token_index": 3, "vision_feature_select_strategy": strategy, "image_seq_length": count}
    return make("LlavaForConditionalGeneration", {**configuration, **fields}, directory)


def make_paligemma(directory):
    pieces = write_gemma(directory)
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "bos_token": "<bos>"}
    write_json(directory, "tokenizer_config.json", settings)
    values = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 16, "width": 16},
        "image_seq_length": 4,
    }
    write_json(directory, "preprocessor_config.json", values)
    text = {**SIZES, "model_type": "gemma", "vocab_size": 500, "num_key_value_heads": 1, "head_dim": 8}
    configuration = {"text_config": text, "vision_config": {"model_type": "siglip_vision_model", **VISION}}
    fields = {"image_token_index": pieces.piece_to_id("<image>"), "projection_dim": 32}
    return make("PaliGemmaForConditionalGeneration", {**configuration, **fields}, directory)


QUESTIONS = ["USER: <image>\nWhat does the man read? ASSISTANT:", "<image>", "Look at  <image>, please."]


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_an_image_and_a_text_to_text(strategy, tmp_path):
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaProcessor

    reference = make_llava(tmp_path, strategy)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    processor = LlavaProcessor(AutoImageProcessor.from_pretrained(tmp_path), tokenizer, patch_size=8,
                               vision_feature_select_strategy=strategy, num_additional_image_tokens=1)  # fmt: skip
    inputs = [processor(x, text, return_tensors="pt") for x, text in zip(pictures(3), QUESTIONS, strict=True)]
    pipeline = kt.pipelines.load_pretrained(tmp_path, max_new_tokens=6, jit_compile=False)
    pairs = list(zip(pictures(3), QUESTIONS, strict=True))
    with pytest.raises(ValueError, match="must have a token of the id 99999, which stands for an image"):
        kt.pipelines.ImageTextReader(pipeline.read.read_images, pipeline.read.tokenizer, 99999, 4)
    assert pipeline.read(pairs)["token_ids"] == [one["input_ids"][0].tolist() for one in inputs]
    wanted = generated(reference, inputs, tokenizer, 6)
    assert pipeline.predict(pairs) == wanted and all(wanted)
    for bad, message in (((pictures(1)[0], "no image"), "must hold <image> once"), ("image.png", "must be a pair")):
        with pytest.raises(ValueError, match=message):
            pipeline.read([bad])


@pytest.mark.filterwarnings("ignore")
def test_an_image_and_a_prompt_that_sees_itself_in_both_directions(tmp_path):
    from transformers import AutoImageProcessor, AutoTokenizer, PaliGemmaProcessor

    reference = make_paligemma(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    images = AutoImageProcessor.from_pretrained(tmp_path)
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, tokenizer)
    texts = ["caption en", "", "<image>  what is  it?"]
    inputs = [processor(x, text, return_tensors="pt") for x, text in zip(pictures(3), texts, strict=True)]
    for one in inputs:
        one.pop("labels")
    pipeline = kt.pipelines.load_pretrained(tmp_path, max_new_tokens=6, jit_compile=False)
    pairs = list(zip(pictures(3), texts, strict=True))
    assert pipeline.read(pairs)["token_ids"] == [one["input_ids"][0].tolist() for one in inputs]
    wanted = generated(reference, inputs, tokenizer, 6)
    assert pipeline.predict(pairs) == wanted and all(wanted)


INFILLING = ["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"]
HOLES = [
    "A man <FILL_ME> a book",
    "A man<FILL_ME>reads",
    "A man<FILL_ME>",
    "<FILL_ME>\n  x",
    "no hole",
    "  A<FILL_ME> ",
]


def test_what_stands_in_the_middle_of_a_text(tmp_path):
    from transformers import AutoTokenizer

    write_llama(tmp_path, user_defined_symbols=INFILLING)
    write_json(tmp_path, "tokenizer_config.json", {"tokenizer_class": "CodeLlamaTokenizer", "add_bos_token": True})
    fields = {**SIZES, "vocab_size": 500, "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 1e6}
    reference = make("LlamaForCausalLM", {**fields, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    inputs = [tokenizer(text, return_tensors="pt") for text in HOLES]
    pipeline = kt.pipelines.load_pretrained(tmp_path, max_new_tokens=6, jit_compile=False)
    assert pipeline.read(HOLES)["token_ids"] == [one["input_ids"][0].tolist() for one in inputs]
    assert pipeline.answer.generator.end_id == [2, tokenizer.eot_id]
    assert pipeline.predict(HOLES) == generated(reference, inputs, tokenizer, 6)
    with pytest.raises(ValueError, match="must hold <FILL_ME> once"):
        pipeline.predict(["<FILL_ME> a <FILL_ME>"])
    # What transformers saves asks for the same.
    tokenizer.save_pretrained(tmp_path / "new")
    again = kt.pipelines.TextReader(kt.pipelines.read_tokenizer(tmp_path / "new"), "token_ids")
    assert again(HOLES) == pipeline.read(HOLES)


def test_what_a_pipeline_cannot_do_without(tmp_path):
    make_gpt2(tmp_path)
    with pytest.raises(ValueError, match="`max_new_tokens` must be a positive integer; received 0"):
        kt.pipelines.load_pretrained(tmp_path, max_new_tokens=0, jit_compile=False)
    with pytest.raises(ValueError, match="`language` and `task` are for models of speech; received 'en' and None"):
        kt.pipelines.load_pretrained(tmp_path, language="en")
    with pytest.raises(ValueError, match="`labels` are for models that classify; this one generates"):
        kt.pipelines.load_pretrained(tmp_path, labels=["a"])
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="`directory` must hold a tokenizer: tokenizer.json, or"):
        kt.pipelines.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "architecture, fields, message",
    [
        ("BertModel", {}, "must generate or classify; its model has the outputs .'hidden_states', 'pooled'"),
        ("BertForMaskedLM", {}, "must have exactly one integer input that reaches a causal"),
        ("BertForSequenceClassification", {"num_labels": 1}, "`problem_type` .* received None with 1 labels"),
        (
            "BertForSequenceClassification",
            {"problem_type": "multi_label_classification"},
            "`problem_type` .* received 'multi_label_classification' with 2 labels",
        ),
    ],
)
def test_models_that_give_no_text(architecture, fields, message, tmp_path):
    size = len(write_word_pieces(tmp_path))
    make(architecture, {**SIZES, "vocab_size": size, **fields}, tmp_path)
    with pytest.raises(ValueError, match=message):
        kt.pipelines.load_pretrained(tmp_path)
