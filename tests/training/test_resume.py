"""A training that stops anywhere, while a backup is written too, goes on and ends with the weights of a whole one."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from keras_transformer.training import Resume

BACKEND = keras.backend.backend()


class Killed(BaseException):
    """Stands for the end of the process: nothing cleans up after it."""


class Batches(keras.utils.PyDataset):
    """Six batches of an order that is the epoch's own."""

    def __init__(self, epoch=0):
        super().__init__()
        self.epoch = epoch
        self.x = np.random.default_rng(0).normal(size=(12, 3)).astype("float32")

    def on_epoch_end(self):
        self.epoch += 1

    def __len__(self):
        return 6

    def __getitem__(self, index):
        order = np.random.default_rng(self.epoch).permutation(12)[2 * index : 2 * index + 2]
        return self.x[order], self.x[order].sum(axis=1, keepdims=True)


def build(units=4, rate=1e-2, accumulated=None, steps=1):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(units, name="hidden"), keras.layers.Dropout(0.5), keras.layers.Dense(1, name="out")]
    model = keras.Sequential([keras.Input((3,)), *layers])
    optimizer = keras.optimizers.Adam(rate, gradient_accumulation_steps=accumulated)
    model.compile(optimizer, "mse", metrics=["mae"], steps_per_execution=steps)
    return model


def fit(folder, *others, save_freq=2, epochs=3, model=None, **options):
    """Trains as a new process would, from a backup in `folder` if there is one."""
    model = model or build()
    resume = Resume(folder, save_freq, **options)
    data = Batches(resume.epoch)
    history = model.fit(data, epochs=epochs, callbacks=[*others, resume], shuffle=False, verbose=0)
    return model, history.history


def state(model):
    return [keras.ops.convert_to_numpy(v) for v in (*model.variables, *model.optimizer.variables)]


def stop_at(step):
    steps = iter(range(100))

    def after(batch, logs):
        if next(steps) == step:
            raise Killed

    return keras.callbacks.LambdaCallback(on_train_batch_end=after)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    model, history = fit(tmp_path_factory.mktemp("whole"))
    return state(model), history


def check_equal(model, whole):
    for value, expected in zip(state(model), whole[0], strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("steps", [[3], [5, 0, 4], [17]])
def test_stopped_between_steps(tmp_path, whole, steps):
    for step in steps:
        with pytest.raises(Killed):
            fit(tmp_path, stop_at(step))
    model, history = fit(tmp_path)
    check_equal(model, whole)
    for name, values in history.items():  # The interrupted epoch's as well: its metrics go on, too.
        np.testing.assert_allclose(values, whole[1][name][-len(values) :], rtol=1e-6)
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize("point", ["values", "state", "rename", "renamed", "deleting"])
def test_stopped_while_a_backup_is_written(tmp_path, whole, monkeypatch, point):
    calls, count = iter(range(100)), 30 if point == "values" else 2  # Of some twenty values, the second backup's.

    def killed(function, after=False):
        def call(target, *arguments, **options):
            if next(calls) < count:
                return function(target, *arguments, **options)
            if after:
                function(target, *arguments, **options)
            elif point == "values":
                target.write(b"half")
            elif pathlib.Path(target).suffix:
                pathlib.Path(target).write_bytes(b"half")
            raise Killed

        return call

    owner, name = {
        "values": (np.lib.format, "write_array"),
        "state": (pathlib.Path, "write_text"),
        "rename": (pathlib.Path, "rename"),
        "renamed": (pathlib.Path, "rename"),
        "deleting": (None, None),
    }[point]
    with monkeypatch.context() as patch:
        if point == "deleting":
            import shutil

            def remove_half(path, **options):
                if pathlib.Path(path).name != "partial" and next(calls) >= count:
                    (path / "state.json").unlink()
                    raise Killed
                return rmtree(path, **options)

            rmtree = shutil.rmtree
            patch.setattr(shutil, "rmtree", remove_half)
        else:
            patch.setattr(owner, name, killed(getattr(owner, name), after=point == "renamed"))
        with pytest.raises(Killed):
            fit(tmp_path)
    assert list(tmp_path.glob("*"))
    model, _ = fit(tmp_path)
    check_equal(model, whole)


def test_stopped_between_gradients_that_are_summed_up(tmp_path):
    def train(folder, *others):
        return fit(folder, *others, save_freq=1, model=build(accumulated=4))[0]

    expected = train(tmp_path / "whole")
    for step in (3, 7):  # Backups after 3 and 9 batches, of which the next step needs one gradient or more.
        with pytest.raises(Killed):
            train(tmp_path / "parts", stop_at(step))
    check_equal(train(tmp_path / "parts"), [state(expected)])


def test_stopped_between_executions_of_several_steps(tmp_path):
    def train(folder, *others, steps=4):
        return fit(folder, *others, save_freq=4, model=build(steps=steps))[0]

    if BACKEND == "torch":
        with pytest.raises(ValueError, match="`steps_per_execution` must be 1 with the PyTorch backend"):
            train(tmp_path / "whole")
        return
    expected = train(tmp_path / "whole")  # Of the six batches, the second execution has two.
    for step in (1, 2):
        with pytest.raises(Killed):
            train(tmp_path / "parts", stop_at(step))
    with pytest.raises(ValueError, match="steps: steps_per_execution is 4 in the backup and 3 here"):
        train(tmp_path / "parts", steps=3)
    check_equal(train(tmp_path / "parts"), [state(expected)])


def test_an_epoch_that_has_become_shorter_is_refused(tmp_path):
    def train(batches, *others):
        def rows():
            yield from ((np.ones((2, 3), "float32"), np.ones((2, 1), "float32")) for _ in range(batches))

        resume, options = Resume(tmp_path, save_freq=1), {"epochs": 1, "verbose": 0, "shuffle": False}
        build().fit(rows(), callbacks=[*others, resume], **options)  # Nobody knows how many there are.

    with pytest.raises(Killed):
        train(5, stop_at(4))
    with pytest.raises(ValueError, match="after 4 batches of epoch 0; here the epoch ended 2 batches before"):
        train(2)
    train(5)
    assert not tmp_path.exists()


SCRIPT = """
import sys, time
import keras
from test_resume import build, fit
after = lambda batch, logs: (print(batch, flush=True), time.sleep(0.02))
fit(sys.argv[1], keras.callbacks.LambdaCallback(on_train_batch_end=after), save_freq=1, epochs=10)
"""


def test_a_killed_process(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "backup")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        for _ in range(20):
            assert process.stdout.readline(), "it ended by itself"
        time.sleep(np.random.default_rng().uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
    assert Resume(tmp_path / "backup").epoch >= 3
    model, _ = fit(tmp_path / "backup", save_freq=1, epochs=10)
    expected, _ = fit(tmp_path / "whole", epochs=10)
    check_equal(model, [state(expected)])


def test_other_backends_need_no_torch(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        fit(tmp_path / "backup", stop_at(3), epochs=1)
    if BACKEND != "torch":
        monkeypatch.setitem(sys.modules, "torch", None)  # As if it were not installed.
    fit(tmp_path / "backup", epochs=1)


def test_early_stopping_waits_as_long_as_it_would_have(tmp_path):
    def early():
        return keras.callbacks.EarlyStopping("mae", mode="max", patience=2)  # It falls.

    expected = len(fit(tmp_path / "whole", early(), epochs=20)[1]["loss"])
    assert expected < 20
    with pytest.raises(Killed):
        fit(tmp_path / "parts", early(), stop_at(6 * (expected - 1) + 1), epochs=20)
    again = early()
    assert len(fit(tmp_path / "parts", again, epochs=20, replay=[again])[1]["loss"]) == 1
    assert again.stopped_epoch == expected - 1


def test_a_training_that_had_ended_is_not_trained_on(tmp_path):
    model, _ = fit(tmp_path, delete_checkpoint=False)
    again, history = fit(tmp_path, delete_checkpoint=False)
    assert not history
    check_equal(again, [state(model)])
    further, history = fit(tmp_path, epochs=4)
    assert len(history["loss"]) == 1


def test_another_training_is_refused(tmp_path):
    data = {"pairs": ["a", "b"], "ids": np.arange(3), "language": "fr"}
    with pytest.raises(Killed):
        fit(tmp_path, stop_at(3), data=data)
    for model, options, message in (
        (
            build(5),
            {},
            r"weights: 0 sequential/hidden/kernel is float32 \(3, 4\) in the backup and float32 \(3, 5\) here",
        ),
        (build(rate=0.1), {}, "optimizer: learning_rate is 0.0.* in the backup and 0.1.* here"),
        (build(), {"pairs": ["a", "c"]}, "data: pairs is 2 items with the digest .* in the backup and 2 items"),
        (build(), {"ids": np.arange(4)}, r"data: ids is int64 \(3,\) .* and int64 \(4,\)"),
        (build(), {"language": "de"}, "data: language is fr in the backup and de here"),
        (build(), {"seed": 1}, "data: seed is missing in the backup and 1 here"),
    ):
        before = model.get_weights()
        with pytest.raises(
            ValueError, match=rf"`directory` must be empty or hold a backup of this training(.|\n)*{message}"
        ):
            fit(tmp_path, model=model, data={**data, **options})
        for value, expected in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(value, expected)
    fit(tmp_path, data=data)


@pytest.mark.parametrize("save_freq", [0, True, "batch", 1.5])
def test_bad_save_freq(tmp_path, save_freq):
    with pytest.raises(ValueError, match="`save_freq` must be 'epoch' or a positive integer"):
        Resume(tmp_path, save_freq)
