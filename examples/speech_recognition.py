"""Speech recognition, end to end: from recordings and their transcripts to a SavedModel that writes down what is said.

    python examples/speech_recognition.py --data fsdd.tar
    python examples/speech_recognition.py --data an4_mfcc.tar --output an4
    python examples/speech_recognition.py --data recordings --epochs 50

There is no speech to begin with in any package, so --data must be given: a folder with transcripts.tsv, whose lines
have the name of a sound file, a tab and what is said in it; the Free Spoken Digit Dataset, as it is downloaded from
https://github.com/Jakobovski/free-spoken-digit-dataset; or AN4 as MFCC features in the layout of
http://www.speech.cs.cmu.edu/databases/an4. All of them may be packed as .tar.
"""

import argparse
import json
import re
import shutil
import time
import warnings
from collections import namedtuple
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

import keras_transformer as kt

FIELDS = "dim depth num_heads hidden_dim dropout mels tokens vocabulary speeds frames rate epochs last width held_out"
Recipe = namedtuple("Recipe", FIELDS)
SPEEDS, MORE_SPEEDS = (0.9, 1.0, 1.1), (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)
# Where few words are said again and again, each is a token; where others may be said, pieces of words are.
RECIPES = {
    "fsdd": Recipe(96, (3, 1), 4, 384, 0.1, 40, "words", 100, MORE_SPEEDS, 4000, 2e-3, 16, 5, 16, "test"),
    "an4": Recipe(144, (5, 2), 4, 576, 0.2, 80, "words", 100, SPEEDS, 4000, 1.5e-3, 40, 5, 16, "speakers"),
    "open": Recipe(144, (5, 2), 4, 576, 0.1, 80, "pieces", 60, SPEEDS, 4000, 1.5e-3, 30, 5, 16, "speakers"),
}
HELD_OUT = {
    "test": "recordings 0 to 4 of each digit and speaker, the test part of the Free Spoken Digit Dataset",
    "tuning": "recordings 5 to 9, with the test part left aside",
    "speakers": "a tenth of the speakers",
    "recordings": "a tenth of the recordings",
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="a folder or .tar of recordings with their transcripts, as above")
    add("--recipe", choices=RECIPES, help="default: 'fsdd' for spoken digits, 'an4' for cepstra, else 'open'")
    told = "; ".join(f"{name}: {what}" for name, what in HELD_OUT.items())
    add("--held-out", choices=HELD_OUT, help=f"what to validate on, by --recipe. {told}")
    add("--vocabulary-size", type=int, help="default: by --recipe")
    add("--epochs", type=int, help="default: by --recipe")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("speech_recognition_output"), help="new, empty, or of a run to resume")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("--data must be given: a folder or .tar of recordings. --help tells where to find some")
    if arguments.epochs is not None and arguments.epochs < 1:
        parser.error(f"--epochs must be at least 1; received {arguments.epochs}")
    output = arguments.output
    if output.exists() and not (output / "backup").is_dir() and (not output.is_dir() or any(output.iterdir())):
        parser.error(f"--output must be a new or an empty directory, or hold a run that was interrupted; got {output}")
    return parser, arguments


def build_model(recipe, vocabulary_size, num_features, is_wave, steps):
    # Neighbouring bands of a spectrum tell nearly the same; what one cepstral coefficient tells no other does.
    hidden = kt.layers.SpecAugment(feature_masks=2 if is_wave else 0)
    options = {"position": kt.layers.RotaryEmbedding(), "dropout": recipe.dropout, "augmentation": hidden}
    model = kt.models.speech_recognizer(vocabulary_size, num_features, *recipe[:4], **options)
    warmup = max(1, steps // 10)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup), warmup_target=recipe.rate, warmup_steps=warmup
    )
    model.compile(
        keras.optimizers.Adam(rate, beta_2=0.98, global_clipnorm=5.0),
        {"logits": kt.training.SmoothedCrossEntropy(0.1), "ctc_logits": kt.training.CTCLoss()},
        loss_weights={"logits": 0.5, "ctc_logits": 0.5},
        metrics={"logits": [kt.training.TokenAccuracy()]},
    )
    return model


def draw_curves(history, path):
    figure = Figure(figsize=(12, 4), layout="constrained")
    names = ("logits_loss", "ctc_logits_loss", "logits_token_accuracy", "ctc_wer")
    for axes, name in zip(figure.subplots(1, 4), names, strict=True):
        for key, label in ((name, "training"), (f"val_{name}", "held out")):
            if key in history:
                axes.plot(range(1, len(history[key]) + 1), history[key], label=label)
        axes.set(xlabel="epoch", title=name)
        axes.legend()
    figure.savefig(path)


def draw_sound(pipeline, recording, answer, path):
    """The features of a recording, and below them where the decoder looks for each token that it writes."""
    inputs = pipeline.source([recording.sound])
    frames = pipeline.source.rows([recording.sound])[0]
    ids = [1, *kt.pipelines.token_ids(pipeline.target, [answer])[0]]
    with kt.scopes.RecordingScope(["weights"]) as scope:
        pipeline.generator.model({**inputs, "target_ids": np.array([ids], "int32")})
    weights = [value for name, value in scope.records.items() if name.endswith("cross_attention/weights")][-1]
    attention = keras.ops.convert_to_numpy(weights)[0].mean(axis=0)[:, : -(-len(frames) // 4)]
    figure = Figure(figsize=(10, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    top.imshow(frames.T, aspect="auto", origin="lower", interpolation="nearest")
    top.set(title=f"said: {recording.text}\nheard: {answer}", ylabel="feature", xlabel="frame")
    bottom.imshow(attention, aspect="auto", interpolation="nearest", cmap="Blues")
    names = [pipeline.target.id_to_token(i) for i in ids[1:]] + ["<end>"]
    bottom.set_yticks(range(len(names)), names)
    bottom.set(xlabel="encoded frame", title="where the decoder looks")
    figure.savefig(path)


def main():
    parser, arguments = parse_arguments()
    kt.training.keep_memory()
    output = arguments.output
    keras.utils.set_random_seed(arguments.seed)
    try:
        with warnings.catch_warnings(record=True) as unread:
            warnings.simplefilter("always", UserWarning)
            recordings, sampling_rate = kt.pipelines.read_recordings(arguments.data)
        digits = all(re.search(r"\d_[^_/]+_\d+\.wav$", recording.name) for recording in recordings)
        recipe = RECIPES[arguments.recipe or ("fsdd" if digits else "an4" if sampling_rate is None else "open")]
        changes = {"epochs": arguments.epochs, "held_out": arguments.held_out, "vocabulary": arguments.vocabulary_size}
        recipe = recipe._replace(**{name: value for name, value in changes.items() if value is not None})
        train, held_out = kt.pipelines.split_recordings(recordings, recipe.held_out, seed=arguments.seed)
        words = recipe.tokens == "words"  # They are told in lower case.
        texts, truth = ([x.text.lower() if words else x.text for x in part] for part in (train, held_out))
        tokenizer = (kt.pipelines.train_words if words else kt.pipelines.train_sentence_piece)(texts, recipe.vocabulary)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    is_wave, sounds = sampling_rate is not None, [recording.sound for recording in held_out]
    reader = kt.pipelines.WaveReader(sampling_rate, recipe.mels) if is_wave else kt.pipelines.CepstrumReader()
    copies = [kt.pipelines.change_speed(x.sound, speed) for speed in recipe.speeds for x in train]
    frames, rows = reader.rows(copies), kt.pipelines.token_ids(tokenizer, texts) * len(recipe.speeds)
    short = sum(len(ids) > -(-len(x) // 4) for ids, x in zip(rows, frames, strict=True))
    seen = vars(arguments) | {"output": None, "texts": texts + truth, "frames": np.concatenate(frames)}
    resume = kt.training.Resume(output / "backup", 100, seen, delete_checkpoint=False)
    options = {"seed": arguments.seed, "first_epoch": resume.epoch}
    batches = kt.pipelines.speech_batches(frames, rows, recipe.frames, **options)
    validation = kt.pipelines.speech_batches(
        reader.rows(sounds), kt.pipelines.token_ids(tokenizer, truth), recipe.frames, shuffle=False
    )
    size, steps = tokenizer.vocabulary_size(), recipe.epochs * int(batches.cardinality())
    model = build_model(recipe, size, frames[0].shape[1], is_wave, steps)
    generator = kt.generation.AttentionRescoring(model, 1, 2, width=recipe.width)
    longest = max(map(len, rows))
    pipeline = kt.pipelines.Pipeline(generator, reader, tokenizer, max_new_tokens=longest + longest // 4 + 2)
    for warning in unread:
        print(warning.message)
    print(f"{len(train)} recordings to train on, {len(held_out)} held out ({HELD_OUT[recipe.held_out]});")
    print(f"a vocabulary of {size}, {model.count_params()} parameters.")
    if short:
        print(f"{short} of {len(rows)} are too short for their transcripts: CTC leaves them out.")

    def finish_epoch(epoch, logs):
        logs["val_ctc_wer"] = kt.pipelines.error_rate(truth, kt.pipelines.ctc_texts(model, reader, tokenizer, sounds))

    resume.directory.mkdir(parents=True, exist_ok=True)
    callbacks = [
        keras.callbacks.LambdaCallback(on_epoch_end=finish_epoch),
        kt.training.AverageWeights(output / "epochs", last=recipe.last),
        keras.callbacks.TensorBoard(output / "logs", write_graph=False),
        resume,
    ]
    started = time.time()
    fit = {"validation_data": validation, "epochs": recipe.epochs, "callbacks": callbacks, "shuffle": False}
    model.fit(batches, **fit)
    seconds, history = time.time() - started, resume.history
    answers, by_ctc = pipeline.predict(sounds), kt.pipelines.ctc_texts(model, reader, tokenizer, sounds)
    draw_curves(history, output / "curves.png")
    for i in range(min(3, len(held_out))):
        draw_sound(pipeline, held_out[i], answers[i], output / f"sound_{i + 1}.png")
    model.save(output / "model.keras")
    pipeline.save(output / "pipeline")
    if keras.backend.backend() == "tensorflow":
        pipeline.export(output / "saved_model")
        recognize = tf.saved_model.load(output / "saved_model").signatures["serving_default"]
        print(f"{output / 'saved_model'} hears:")
        batch = tf.ragged.stack(sounds[:5]).to_tensor()  # Filled up with zeros.
        heard = recognize(**{reader.signature[0].name: batch})["text"].numpy()
        for recording, text in zip(held_out, heard, strict=False):
            print(f"  {text.decode()} (said: {recording.text})  {recording.name}")
    metrics = {
        "word_accuracy": 1 - kt.pipelines.error_rate(truth, answers),
        "wer": kt.pipelines.error_rate(truth, answers),
        "cer": kt.pipelines.error_rate(truth, answers, letters=True),
        "sentence_accuracy": sum(a == b for a, b in zip(answers, truth, strict=True)) / len(truth),
        "ctc_wer": kt.pipelines.error_rate(truth, by_ctc),
        "ctc_cer": kt.pipelines.error_rate(truth, by_ctc, letters=True),
        "parameters": model.count_params(),
        "train_seconds": seconds,
        "val_ctc_wer": history["val_ctc_wer"],
        "val_token_accuracy": history["val_logits_token_accuracy"],
        "recipe": {**recipe._asdict(), "data": str(arguments.data), "seed": arguments.seed},
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    for name in ("epochs", "backup"):
        shutil.rmtree(output / name)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
