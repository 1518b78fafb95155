"""Averaging, scoring, and interrupted trainings, each in a real `fit`."""

import functools
import os
import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_transformer.training import (
    AverageWeights,
    BleuScore,
    InverseSquareRoot,
    Perplexity,
    SmoothedCrossEntropy,
    TokenAccuracy,
)

VOCABULARY, LENGTH = 9, 4


def make_data():
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (24, LENGTH)).astype("int32")
    ids[::3, -2:] = 0
    return ids, np.where(ids == 0, 0, ids % (VOCABULARY - 1) + 1)


@functools.cache
def compiled_model():
    """A tiny tagger, compiled with the parts of this package; batch normalization adds weights without a gradient."""
    source = keras.Input((None,), dtype="int32", name="source_ids")
    x = keras.layers.Embedding(VOCABULARY, 8, mask_zero=True, name="embedding")(source)
    x = keras.layers.BatchNormalization(name="norm")(x)
    model = keras.Model(source, keras.layers.Dense(VOCABULARY, name="logits")(x))
    model.compile(
        optimizer=keras.optimizers.Adam(InverseSquareRoot(8, warmup_steps=10, scale=0.3), beta_2=0.98),
        loss=SmoothedCrossEntropy(),
        metrics=[TokenAccuracy(), Perplexity()],
    )
    model.optimizer.build(model.trainable_variables)
    state = [*model.variables, *model.optimizer.variables]
    return model, state, [ops.convert_to_numpy(variable).copy() for variable in state]


def make_model():
    """The model as it was made, optimizer included: setting it back saves each test the time to compile another."""
    model, state, initial = compiled_model()
    for variable, value in zip(state, initial, strict=True):
        variable.assign(value)
    model._initial_epoch = None  # BackupAndRestore leaves it behind
    return model


def fit(model, epochs, callbacks, **arguments):
    arguments = {"shuffle": False, "batch_size": 8, "verbose": 0, **arguments}
    return model.fit(*make_data(), epochs=epochs, callbacks=callbacks, **arguments).history


class Interruption(Exception):
    pass


class InterruptAt(keras.callbacks.Callback):
    """Raises at one of the callbacks' moments in one epoch, as a lost machine would."""

    def __init__(self, moment, epoch):
        super().__init__()
        self.moment, self.epoch = moment, epoch
        self.current = None

    def interrupt(self, moment):
        if (moment, self.current) == (self.moment, self.epoch):
            raise Interruption

    def on_epoch_begin(self, epoch, logs=None):
        self.current = epoch
        self.interrupt("on_epoch_begin")

    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            self.interrupt("on_train_batch_end")

    def on_epoch_end(self, epoch, logs=None):
        self.interrupt("on_epoch_end")

    def on_train_end(self, logs=None):
        self.interrupt("on_train_end")


class RecordWeights(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.weights = []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append([weight.copy() for weight in self.model.get_weights()])


def mean_of(recorded):
    return [np.mean(values, axis=0, dtype="float64") for values in zip(*recorded, strict=True)]


def assert_weights(model, expected, **tolerance):
    for actual, value in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(actual, value, **(tolerance or {"rtol": 1e-6, "atol": 1e-7}))


# AverageWeights


@pytest.mark.parametrize("epochs, last", [(5, 3), (2, 10), (3, 1)])
def test_average_is_the_mean_of_the_last_epochs(tmp_path, epochs, last):
    model, record = make_model(), RecordWeights()
    average = AverageWeights(tmp_path / "new" / "snapshots", last=last)
    fit(model, epochs, [record, average])
    kept = record.weights[-last:]
    assert_weights(model, mean_of(kept))
    assert list(average.snapshots()) == list(range(epochs - len(kept) + 1, epochs + 1))
    assert sorted(os.listdir(tmp_path / "new" / "snapshots")) == [
        f"epoch-{epoch:04d}.weights.h5" for epoch in average.snapshots()
    ]


def test_average_on_its_own(tmp_path):
    model, record = make_model(), RecordWeights()
    fit(model, 4, [record, AverageWeights(tmp_path, last=3)])
    iterations = int(model.optimizer.iterations)
    other = make_model()
    assert AverageWeights(tmp_path, last=2).average(other) == [3, 4]
    assert_weights(other, mean_of(record.weights[-2:]))
    # What cannot be averaged is the latest's.
    assert int(other.optimizer.iterations) == iterations == 12
    uncompiled = keras.Model(other.inputs, other.outputs)
    AverageWeights(tmp_path, last=3).average(uncompiled)
    assert_weights(uncompiled, mean_of(record.weights[-3:]))


@keras.saving.register_keras_serializable(package="keras_transformer_tests")
class Counted(keras.layers.Layer):
    """Has a float weight and an integer one, such as a count of steps or a quantized kernel."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(3, 2), name="kernel")
        self.steps = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="steps")

    def call(self, x):
        return ops.matmul(x, self.kernel)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_average_by_dtype(tmp_path, dtype):
    layer = Counted(dtype=dtype)
    model = keras.Sequential([keras.Input((3,)), layer])
    average = AverageWeights(tmp_path, last=3)
    average.set_model(model)
    # The sum of the three would overflow float16.
    for epoch, value in enumerate([40000.0, 50000.0, 60000.0]):
        layer.kernel.assign(np.full((3, 2), value, "float32"))
        layer.steps.assign(10 * epoch + 7)
        average.on_epoch_end(epoch)
    assert average.average() == [1, 2, 3]
    kernel = ops.convert_to_numpy(ops.cast(layer.kernel, "float32"))
    np.testing.assert_allclose(kernel, np.full((3, 2), 50000.0), rtol=1e-2 if dtype == "bfloat16" else 1e-3)
    assert keras.backend.standardize_dtype(layer.kernel.dtype) == dtype
    assert int(layer.steps) == 27


def test_snapshots_of_another_run_do_not_count(tmp_path):
    (tmp_path / "notes.txt").write_text("kept")
    fit(make_model(), 6, [AverageWeights(tmp_path, last=6)])
    model, record = make_model(), RecordWeights()
    average = AverageWeights(tmp_path, last=6)
    fit(model, 2, [average, record])
    assert list(average.snapshots()) == [1, 2]
    assert_weights(model, mean_of(record.weights))
    # Going on from epoch 2 keeps those two, and the same callback serves for several fits.
    fit(model, 4, [average, record], initial_epoch=2)
    assert list(average.snapshots()) == [1, 2, 3, 4]
    assert_weights(model, mean_of(record.weights))
    fit(model, 1, [average])
    assert list(average.snapshots()) == [1]
    assert (tmp_path / "notes.txt").read_text() == "kept"


def test_a_write_that_was_cut_off_leaves_whole_snapshots_only(tmp_path, monkeypatch):
    model = make_model()
    average = AverageWeights(tmp_path, last=2)
    save_weights = model.save_weights
    written = []

    def cut_off(path, **arguments):
        written.append(path)
        if len(written) == 3:
            with open(path, "wb") as file:
                file.write(b"half a fi")
            raise Interruption
        return save_weights(path, **arguments)

    monkeypatch.setattr(model, "save_weights", cut_off)
    with pytest.raises(Interruption):
        fit(model, 5, [average])
    assert list(average.snapshots()) == [1, 2]
    other = make_model()
    other.load_weights(average.snapshots()[2])
    monkeypatch.undo()
    fit(model, 3, [average], initial_epoch=2)
    assert sorted(os.listdir(tmp_path)) == ["epoch-0002.weights.h5", "epoch-0003.weights.h5"]


@pytest.mark.parametrize("spoil", ["cut", "other_model"])
def test_a_snapshot_that_does_not_fit_is_named_and_harms_nothing(tmp_path, spoil):
    model = make_model()
    average = AverageWeights(tmp_path)
    fit(model, 2, [average])
    path = average.snapshots()[2]
    if spoil == "cut":
        with open(path, "wb") as file:
            file.write(b"half a fi")
    else:
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save_weights(path)
    before = model.get_weights()
    with pytest.raises(ValueError, match="does not fit the model: .*epoch-0002.weights.h5"):
        average.average(model)
    assert_weights(model, before, rtol=0)


def test_after_restoring_the_best_weights_the_average_wins(tmp_path):
    model, record = make_model(), RecordWeights()
    stopping = keras.callbacks.EarlyStopping("loss", restore_best_weights=True)
    fit(model, 3, [record, stopping, AverageWeights(tmp_path, last=2)])
    assert_weights(model, mean_of(record.weights[-2:]))


def test_bad_average(tmp_path):
    for last in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match="`last` must be a positive integer"):
            AverageWeights(tmp_path, last=last)
    with pytest.raises(ValueError, match="`model` must be given"):
        AverageWeights(tmp_path).average()
    with pytest.raises(ValueError, match="`directory` must hold snapshots"):
        AverageWeights(tmp_path / "missing").average(make_model())


# Interrupted and resumed


EPOCHS = 5


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    model, directory = make_model(), tmp_path_factory.mktemp("uninterrupted")
    history = fit(model, EPOCHS, [AverageWeights(directory, last=3)])
    return history, model.get_weights()


@pytest.mark.parametrize(
    "moment, epoch, epochs_left, backup_first",
    [
        ("on_epoch_begin", 0, 5, False),
        ("on_epoch_begin", 3, 2, False),
        ("on_train_batch_end", 2, 3, False),
        ("on_epoch_end", 3, 1, False),
        ("on_train_end", 4, 0, False),
        ("on_train_batch_end", 2, 3, True),
        ("on_train_end", 4, 0, True),
    ],
)
def test_resumed_training_equals_the_uninterrupted_one(
    tmp_path, uninterrupted, moment, epoch, epochs_left, backup_first
):
    expected, expected_weights = uninterrupted
    average = AverageWeights(tmp_path / "average", last=3)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    callbacks = [backup, average] if backup_first else [average, backup]
    # At the start and in the middle of an epoch, and at the very end, nothing else may have been done yet; at an
    # epoch's end, both have.
    interrupt = InterruptAt(moment, epoch)
    with pytest.raises(Interruption):
        fit(make_model(), EPOCHS, [*callbacks, interrupt] if moment == "on_epoch_end" else [interrupt, *callbacks])
    resumed = make_model()
    history = fit(resumed, EPOCHS, callbacks)

    assert len(history.get("loss", [])) == epochs_left
    for name in history:
        np.testing.assert_allclose(history[name], expected[name][EPOCHS - epochs_left :], atol=1e-6, rtol=1e-6)
    assert_weights(resumed, expected_weights)
    assert int(resumed.optimizer.iterations) == EPOCHS * 3


def test_interruption_between_snapshot_and_backup(tmp_path):
    def callbacks(*between):
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        return [AverageWeights(tmp_path / "average", last=3), *between, backup]

    record = RecordWeights()
    fit(make_model(), 5, [record])
    with pytest.raises(Interruption):
        fit(make_model(), 5, callbacks(InterruptAt("on_epoch_end", 2)))
    resumed = make_model()
    history = fit(resumed, 5, callbacks())
    assert len(history["loss"]) == 3  # epoch 3 again, whose snapshot was already there
    assert_weights(resumed, mean_of(record.weights[-3:]))


def test_a_snapshot_is_a_place_to_resume_from(tmp_path):
    expected = fit(make_model(), 4, [])
    average = AverageWeights(tmp_path, last=2)
    with pytest.raises(Interruption):
        fit(make_model(), 4, [average, InterruptAt("on_train_batch_end", 3)])
    resumed = make_model()
    epoch, path = list(average.snapshots().items())[-1]
    resumed.optimizer.build(resumed.trainable_variables)
    resumed.load_weights(path)
    history = fit(resumed, 4, [], initial_epoch=epoch)
    for name in expected:
        np.testing.assert_allclose(history[name], expected[name][epoch:], atol=1e-6, rtol=1e-6)


def test_saved_and_reloaded_model_goes_on(tmp_path):
    expected = fit(make_model(), 4, [], validation_data=make_data())
    model = make_model()
    fit(model, 2, [], validation_data=make_data())
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(reloaded.loss, SmoothedCrossEntropy)
    assert isinstance(reloaded.optimizer._learning_rate, InverseSquareRoot)
    history = fit(reloaded, 4, [], initial_epoch=2, validation_data=make_data())
    assert {"loss", "token_accuracy", "perplexity", "val_perplexity"} <= set(history)
    for name in expected:
        np.testing.assert_allclose(history[name], expected[name][2:], atol=1e-6, rtol=1e-6)


# BleuScore

SOURCES = ["ein Hund rennt .", "zwei Katzen schlafen .", "Das Haus ist rot .", "Ein Mann liest ein Buch ."]
REFERENCES = ["a dog runs fast .", "two cats are asleep .", "The house is red .", "A man reads a book ."]


@pytest.fixture(scope="module")
def any_model():
    """A model for the tests that only need some `fit` around the callback."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def fit_any(model, epochs, callbacks, **arguments):
    data = np.ones((4, 2), "float32"), np.ones((4, 1), "float32")
    arguments = {"validation_data": data, "verbose": 0, **arguments}
    return model.fit(*data, epochs=epochs, callbacks=callbacks, **arguments).history


class Translator:
    """Knows one more reference each time it is asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, sources):
        assert sources == SOURCES
        self.calls += 1
        known = min(self.calls, len(REFERENCES))
        return REFERENCES[:known] + ["no idea at all"] * (len(REFERENCES) - known)


def bleu_of(translations, **options):
    import sacrebleu

    return sacrebleu.corpus_bleu(translations, [REFERENCES], **options).score


class RecordLogs(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.scores = []

    def on_epoch_end(self, epoch, logs=None):
        self.scores.append(logs["val_bleu"])


@pytest.mark.parametrize(
    "every, epochs, scored",  # which call to `translate` each epoch's score is from
    [(1, 4, [1, 2, 3, 4]), (2, 5, [1, 2, 2, 3, 4]), (3, 4, [1, 1, 2, 3]), (10, 3, [1, 1, 2]), (1, 1, [1])],
)
def test_bleu_is_in_the_logs_of_every_epoch(any_model, every, epochs, scored):
    translate, record = Translator(), RecordLogs()
    history = fit_any(any_model, epochs, [BleuScore(translate, SOURCES, REFERENCES, every=every), record])
    expected = [bleu_of((REFERENCES[:call] + ["no idea at all"] * 4)[:4]) for call in scored]
    np.testing.assert_allclose(history["val_bleu"], expected)
    assert record.scores == history["val_bleu"]
    assert translate.calls == scored[-1]
    assert {"val_loss", "loss"} <= set(history)


@pytest.mark.filterwarnings("error:Early stopping conditioned")
@pytest.mark.parametrize("every", [1, 3])
def test_early_stopping_and_checkpoints_follow_bleu(any_model, tmp_path, every):
    callbacks = [
        BleuScore(lambda sources: REFERENCES, SOURCES, REFERENCES, every=every),
        keras.callbacks.EarlyStopping("val_bleu", mode="max", patience=2),
        keras.callbacks.ModelCheckpoint(
            str(tmp_path / "{epoch}-{val_bleu:.0f}.keras"), "val_bleu", mode="max", save_best_only=True
        ),
    ]
    history = fit_any(any_model, 8, callbacks)
    # Perfect from the start, so it stops when the patience is over.
    np.testing.assert_allclose(history["val_bleu"], [100.0] * 3)
    assert os.listdir(tmp_path) == ["1-100.keras"]


def test_tensorboard_follows_bleu(any_model, tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    tensorboard = keras.callbacks.TensorBoard(str(tmp_path), write_graph=False)
    history = fit_any(any_model, 2, [BleuScore(Translator(), SOURCES, REFERENCES), tensorboard])
    written = []
    for path in tmp_path.rglob("events*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if "bleu" in value.tag:
                    written.append(make_ndarray(value.tensor).item())
    np.testing.assert_allclose(written, history["val_bleu"], rtol=1e-6)


def test_the_progress_bar_shows_bleu_and_samples_are_readable(any_model, capsys):
    fit_any(any_model, 2, [BleuScore(Translator(), SOURCES, REFERENCES, samples=2)], verbose=2)
    printed = capsys.readouterr().out
    assert "val_bleu: " in printed
    assert f"\nEpoch 1: BLEU {bleu_of(REFERENCES[:1] + ['no idea at all'] * 3):.2f}\n" in printed
    assert (
        "  source       ein Hund rennt .\n"
        "  translation  a dog runs fast .\n"
        "  reference    a dog runs fast .\n"
        "\n"
        "  source       Ein Mann liest ein Buch .\n"
        "  translation  no idea at all\n"
        "  reference    A man reads a book .\n"
    ) in printed
    assert "zwei Katzen" not in printed


@pytest.mark.parametrize(
    "options, translations",
    [
        (dict(), ["A dog runs fast.", "two cats are asleep.", "The house is red.", "a man reads a book."]),
        (
            dict(lowercase=True),
            ["A dog runs fast.", "two cats are asleep.", "The house is red.", "a man reads a book."],
        ),
        (dict(tokenize="none"), ["a dog runs fast.", "two cats are asleep .", "The house is blue .", "A man reads ."]),
        (dict(tokenize="char"), ["a dog runs.", "two cats sleep .", "The house is blue .", "A man reads ."]),
    ],
)
def test_options_of_bleu(any_model, options, translations):
    history = fit_any(any_model, 1, [BleuScore(lambda sources: translations, SOURCES, REFERENCES, **options)])
    np.testing.assert_allclose(history["val_bleu"], [bleu_of(translations, **options)])


def test_bleu_can_use_the_model_in_training_and_be_used_again():
    model = make_model()
    ids = make_data()[0][:4]

    def translate(sources):
        predicted = ops.convert_to_numpy(model(ids)).argmax(-1)
        return [" ".join(map(str, row)) for row in predicted]

    bleu = BleuScore(translate, SOURCES, [" ".join(map(str, row)) for row in make_data()[1][:4]])
    scores = fit(model, 12, [bleu])["val_bleu"]
    assert len(scores) == 12 and scores[-1] > scores[0]
    assert len(fit(model, 2, [bleu])["val_bleu"]) == 2


def test_without_sacrebleu(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match=r'pip install "keras-transformer-layers\[examples\]"'):
        BleuScore(Translator(), SOURCES, REFERENCES)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(translate="greedy"), "`translate` must be callable.*'greedy'"),
        (dict(sources="one string"), "`sources` must be a list of strings, not one string"),
        (dict(sources=[]), "`sources` must be a list of strings.*an empty list"),
        (dict(references=REFERENCES[:3]), "received 3 references and 4 sources"),
        (dict(references=[[line] for line in REFERENCES]), "`references` must be a list of strings.*type list"),
        (dict(every=0), "`every` must be a positive integer.*every=0"),
        (dict(samples=5), "`samples` must be an integer from 0 to the number of sources, 4.*samples=5"),
        (dict(tokenize="14a"), "`tokenize` must be one of 13a, .*'14a'"),
    ],
)
def test_bad_bleu_arguments(change, message):
    arguments = dict(translate=Translator(), sources=SOURCES, references=REFERENCES) | change
    with pytest.raises(ValueError, match=message):
        BleuScore(**arguments)


@pytest.mark.parametrize(
    "returned, message",
    [
        (REFERENCES[:2], "`translate` must return one string for each source; received 2 for 4"),
        ([b"bytes"] * 4, "must be a list of strings.*type bytes"),
        ("one string", "must be a list of strings, not one string"),
    ],
)
def test_translations_of_the_wrong_kind(any_model, returned, message):
    with pytest.raises(ValueError, match=message):
        fit_any(any_model, 1, [BleuScore(lambda sources: returned, SOURCES, REFERENCES)])
