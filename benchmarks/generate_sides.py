"""The sides of `generate.py`: each as a function that generates for a batch and returns the tokens that are new."""

import concurrent.futures
import importlib
import os
import time
from types import SimpleNamespace

import numpy as np
from generate import TOP_K, WIDTH


def required(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"This side needs {name}: `pip install keras-transformer-layers[bench]`.") from error


def write_checkpoints(directory, s):
    """A GPT-2 and a BART with random weights, large enough that the tokens of a row vary."""
    torch, transformers = required("torch"), required("transformers")
    torch.manual_seed(0)
    ends = {"bos_token_id": s["vocabulary"] - 1, "eos_token_id": s["vocabulary"] - 1}
    gpt2 = transformers.GPT2Config(
        vocab_size=s["vocabulary"], n_positions=256, n_embd=s["dim"], n_layer=s["depth"], n_head=s["heads"],
        initializer_range=0.1, **ends,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(directory / "gpt2")
    bart = transformers.BartConfig(
        vocab_size=s["vocabulary"], max_position_embeddings=256, d_model=s["dim"], encoder_layers=s["depth"],
        decoder_layers=s["depth"], encoder_attention_heads=s["heads"], decoder_attention_heads=s["heads"],
        encoder_ffn_dim=4 * s["dim"], decoder_ffn_dim=4 * s["dim"], init_std=0.1, pad_token_id=1,
        decoder_start_token_id=s["vocabulary"] - 1, forced_eos_token_id=None, **ends,
    )  # fmt: skip
    transformers.BartForConditionalGeneration(bart).save_pretrained(directory / "bart")


def ways_of(side, kind, batch, s, directory):
    if side == "memory":
        return {"": memory(directory)}
    seed = np.random.default_rng(0)
    prompt = seed.integers(3, s["vocabulary"] - 1, (batch, s["prompt"])).astype("int32")
    checkpoint = directory / ("bart" if kind == "translate" else "gpt2")
    generate = SIDES[side.split("-")[0]](side, kind, prompt, s, checkpoint)

    def block():
        started = time.perf_counter()
        tokens = np.asarray(generate())
        seconds = time.perf_counter() - started
        if tokens.shape != (batch, s["tokens"]):
            raise RuntimeError(f"{side} gave {tokens.shape}, not {s['tokens']} tokens a row")
        np.save(directory / f"{side} {kind} {batch}.npy", tokens)
        return seconds

    return {"": block}


def memory(directory):
    """Reads as many bytes as the weights of the GPT-2 have, on all cores: what each token cannot do without."""
    weights = np.ones((directory / "gpt2" / "model.safetensors").stat().st_size // 4, "float32")
    parts = np.array_split(weights, os.cpu_count())
    pool = concurrent.futures.ThreadPoolExecutor(len(parts))

    def block():
        started = time.perf_counter()
        for _ in range(10):
            list(pool.map(np.max, parts))
        return (time.perf_counter() - started) / 10

    return block


def ours(side, kind, prompt, s, checkpoint):
    import keras_transformer as kt

    samplers = {
        "greedy": kt.generation.Greedy(), "sampling": kt.generation.Sampling(top_k=TOP_K),
        "beam": kt.generation.BeamSearch(WIDTH), "translate": kt.generation.BeamSearch(WIDTH),
    }  # fmt: skip
    model = kt.pretrained.load(checkpoint)
    if side.endswith("int8"):
        model.quantize("int8")
    generator = kt.generation.Generator(model, start_id=s["vocabulary"] - 1, pad_id=1, sampler=samplers[kind])
    inputs = {"source_ids" if kind == "translate" else "token_ids": prompt}
    return lambda: generator.generate(inputs, s["tokens"])


def transformers(side, kind, prompt, s, checkpoint):
    torch, library = required("torch"), required("transformers")
    kinds = {"translate": "BartForConditionalGeneration"}
    model = getattr(library, kinds.get(kind, "GPT2LMHeadModel")).from_pretrained(checkpoint).eval()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    model.generation_config.forced_bos_token_id = None
    options = {"max_new_tokens": s["tokens"], "min_new_tokens": s["tokens"], "pad_token_id": 1}
    options |= {"do_sample": kind == "sampling", "num_beams": WIDTH if kind in ("beam", "translate") else 1}
    options |= {"top_k": TOP_K} if kind == "sampling" else {}
    prompt = torch.tensor(prompt, dtype=torch.int64)

    def generate():
        with torch.no_grad():
            return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, -s["tokens"] :]

    return generate


def keras_hub(side, kind, prompt, s, checkpoint):
    library = required("keras_hub")
    samplers = {
        "greedy": library.samplers.GreedySampler, "sampling": lambda: library.samplers.TopKSampler(TOP_K),
        "beam": lambda: library.samplers.BeamSampler(WIDTH),
    }  # fmt: skip
    backbone = library.models.GPT2Backbone.from_preset(str(checkpoint))
    model = library.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    model.compile(sampler=samplers[kind]())
    padding = ((0, 0), (0, s["tokens"]))
    inputs = {"token_ids": np.pad(prompt, padding), "padding_mask": np.pad(np.ones_like(prompt), padding)}
    return lambda: model.generate(inputs, stop_token_ids=None)["token_ids"][:, s["prompt"] :]


def ctranslate2(side, kind, prompt, s, checkpoint):
    library = required("ctranslate2")
    converted = checkpoint.with_name(f"{checkpoint.name} {side} {kind}")
    converter_of(library, s["vocabulary"])(str(checkpoint)).convert(str(converted), force=True)
    kinds = {"device": "cpu", "intra_threads": 2, "compute_type": "int8" if side.endswith("int8") else "float32"}
    rows = [[str(token) for token in row] for row in prompt]
    options = {"beam_size": WIDTH if kind in ("beam", "translate") else 1, "max_batch_size": 0}
    options |= {"sampling_topk": TOP_K} if kind == "sampling" else {}
    if kind == "translate":
        translator, length = library.Translator(str(converted), **kinds), s["tokens"]
        options |= {"max_decoding_length": length, "min_decoding_length": length}
        return lambda: np.array([x.hypotheses[0] for x in translator.translate_batch(rows, **options)], "int32")
    generator = library.Generator(str(converted), **kinds)
    options |= {"max_length": s["tokens"], "min_length": s["tokens"], "include_prompt_in_result": False}
    return lambda: np.array([x.sequences_ids[0] for x in generator.generate_batch(rows, **options)], "int32")


def converter_of(library, vocabulary):
    """CTranslate2's converter, for a checkpoint without a tokenizer: a token is called by its number."""

    class Converter(library.converters.TransformersConverter):
        def load_model(self, *arguments, **options):
            model = super().load_model(*arguments, **options)
            model.config.normalize_before = False  # What the converter asks of a BART, and its settings do not have.
            return model

        def load_tokenizer(self, *_, **__):
            end = str(vocabulary - 1)
            return SimpleNamespace(
                get_vocab=lambda: {str(i): i for i in range(vocabulary)}, convert_ids_to_tokens=str,
                bos_token=end, eos_token=end, unk_token="2", pad_token="1",
            )  # fmt: skip

    return Converter


SIDES = {"ours": ours, "transformers": transformers, "keras": keras_hub, "ctranslate2": ctranslate2}
