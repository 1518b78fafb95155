"""What quantizing costs in quality: `examples/translation.py` or `examples/language_model.py`, in each mode.

    python examples/translation.py
    python benchmarks/quantization.py --run translation_output

    python examples/language_model.py --data shakespeare.txt --recipe shakespeare-cpu --output shakespeare
    python benchmarks/quantization.py --run shakespeare --data shakespeare.txt --recipe shakespeare-cpu

Of a translator, the logits and BLEU of 1,000 held-out number names; of a language model, the loss of the tenth of the
text that was held out, and the logits of its beginning. GPTQ is calibrated with what the model was trained on. The
modes with `projections` leave the embedding as it is, which is also the output projection of these models; the one with
`weights` rounds no activations.
"""

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
import sacrebleu

import keras_transformer as kt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import language_model

MODES = ["float32", "int8", "int8 weights", "int4", "int8 projections", "int4 projections", "gptq"]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("translation_output"), help="what the example has written")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    add = parser.add_argument_group("of a language model, as it was trained").add_argument
    add("--data", type=Path, help="default: Python's standard library")
    add("--suffix", default=".txt")
    add("--recipe", choices=language_model.RECIPES, default="code")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def translator(arguments):
    """The file of the model, inputs to calibrate with and to compare logits for, and a function to its quality."""
    trained = json.loads((arguments.run / "arguments.json").read_text())
    if trained["data"] != ["numbers"]:
        sys.exit("--run must be a run of the example on number names")
    pairs = kt.pipelines.number_pairs(trained["pairs"] + 1000, trained["target_language"], seed=trained["seed"])
    train, validation = kt.pipelines.hold_out(pairs, 1000, seed=trained["seed"])
    sources, references = map(list, zip(*validation, strict=True))
    pipeline = kt.pipelines.load(arguments.run / "pipeline")
    generator, tokenizers = pipeline.generator, (pipeline.source, pipeline.target)

    def inputs_of(pairs):
        ids = [kt.pipelines.token_ids(pipeline.source, side) for side in zip(*pairs, strict=True)]
        inputs = next(iter(kt.pipelines.token_batches(*ids, 2048, shuffle=False)))[0]
        return {name: x.numpy() for name, x in inputs.items()}

    def quality(model):
        reloaded = type(generator).from_config(model, generator.get_config())
        found = kt.pipelines.Pipeline(reloaded, *tokenizers, pipeline.max_new_tokens).predict(sources)
        return {
            "bleu": round(sacrebleu.corpus_bleu(found, [references], force=True).score, 2),
            "exact_match": float(np.mean([a == b for a, b in zip(found, references, strict=True)])),
        }

    return arguments.run / "pipeline" / "model.keras", inputs_of(train[:200]), inputs_of(validation[:100]), quality


def language(arguments):
    """Likewise."""
    recipe = language_model.RECIPES[arguments.recipe]
    texts, held_out = language_model.read_data(arguments)
    tokenizer = kt.pipelines.train_byte_pairs(texts, recipe.vocabulary)
    train, validation = (
        kt.pipelines.token_windows(
            kt.pipelines.token_stream(tokenizer, part), recipe.length, recipe.batch, shuffle=False
        )
        for part in (texts, held_out)
    )

    def inputs_of(windows):
        return np.concatenate([ids.numpy() for ids, _ in windows.take(8)])

    def quality(model):
        model.compile(loss=kt.training.SmoothedCrossEntropy(0.0))
        return {"loss": model.evaluate(validation, verbose=0)}

    return arguments.run / "model.keras", inputs_of(train), inputs_of(validation), quality


def quantize(model, mode, rows):
    name, _, part = mode.partition(" ")
    if mode == "gptq":
        model.quantize("gptq", config=kt.training.gptq_config(model, rows))
    elif part == "projections":
        model.quantize(name, filters=lambda layer: isinstance(layer, keras.layers.Dense))
    elif part == "weights":
        model.quantize(config=keras.quantizers.Int8QuantizationConfig(activation_quantizer=None))
    elif mode != "float32":
        model.quantize(name)


def logits_of(model, inputs):
    return keras.ops.convert_to_numpy(model(inputs)).astype("float64")


def main():
    arguments = parse_arguments()
    side = translator if (arguments.run / "pipeline").is_dir() else language
    path, rows, probe, quality = side(arguments)
    real = probe["target_ids"] != 0 if side is translator else slice(None)
    wanted = None
    for mode in arguments.modes:
        model = keras.saving.load_model(path, compile=False)
        wanted = logits_of(model, probe)[real] if wanted is None else wanted
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns of layers that have no kernel.
            quantize(model, mode, rows)
        found = logits_of(model, probe)[real]
        with tempfile.TemporaryDirectory() as directory:
            model.save(Path(directory, "model.keras"))
            size = Path(directory, "model.keras").stat().st_size
            reloaded = keras.saving.load_model(Path(directory, "model.keras"), compile=False)
        result = {
            "mode": mode,
            "cosine": round(float(np.sum(found * wanted) / np.linalg.norm(found) / np.linalg.norm(wanted)), 5),
            **quality(reloaded),
            "megabytes": round(size / 1e6, 2),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
