"""Two processes, or two devices of one, train as one does, from a backup too; processes do not outlive each other."""

import concurrent.futures
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import keras_transformer as kt

BACKENDS = ["jax", "tensorflow", "torch"]


def start(script, backend, *arguments):
    environment = {**os.environ, "KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_hosts():
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    hosts = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return hosts


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    process = start("mirrored_run.py", "tensorflow", tmp_path_factory.mktemp("devices"))
    result, message = process.communicate()
    assert process.returncode == 0, message
    return json.loads(result)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By backend: what two processes found, how the first one ended when the second one was killed, and its words."""
    started = [
        start("process_run.py", backend, tmp_path_factory.mktemp(backend), *free_hosts()) for backend in BACKENDS
    ]
    with concurrent.futures.ThreadPoolExecutor() as readers:
        written = list(readers.map(subprocess.Popen.communicate, started))
    assert not any(process.returncode for process in started), written
    lines = [found.splitlines()[-1] for found, _ in written]  # Gloo writes to the same place.
    return {name: (*json.loads(line), words) for name, line, (_, words) in zip(BACKENDS, lines, written, strict=True)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_train_as_one(runs, backend):
    result, _, _, message = runs[backend]
    assert result, message
    found, expected = result["found"], result["expected"]
    assert len(expected["loss"]) == 5 and expected["loss"][-1] < expected["loss"][0] - 0.25
    for name in ("loss", "token_accuracy"):
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5, err_msg=name)
    assert result["apart"] < 1e-4 and result["steps"] == 10
    assert backend != "jax" or found["tokens"] == expected["tokens"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_resume_from_one_backup(runs, backend):
    result, _, _, message = runs[backend]
    assert result, message
    assert result["resumed_epochs"] == 1 and result["resumed_apart"] == 0 and result["losses_apart"] < 1e-6
    assert result["left"] == [], "What had ended is deleted by one of them, and the others know."
    message = "`directory` must be one that all processes see.* 0 found one after 1 epochs and 1 batches, process 1 "
    assert re.search(message, result["refusal"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_process_ends_the_other(runs, backend):
    _, status, seconds, message = runs[backend]
    assert status not in (None, 0), message
    assert seconds < 60


def test_two_devices_of_one_process_train_as_one(mirrored):
    assert len(mirrored["devices"]) == len(set(mirrored["devices"])) == 2
    assert len(mirrored["expected"]["loss"]) == 5
    for name in ("loss", "token_accuracy"):
        np.testing.assert_allclose(mirrored["found"][name], mirrored["expected"][name], rtol=0, atol=1e-5, err_msg=name)


def test_two_devices_of_one_process_resume(mirrored):
    assert mirrored["resumed_epochs"] == 1 and mirrored["resumed_apart"] == 0 and mirrored["losses_apart"] < 1e-6
    assert mirrored["equal_without_engine"]
    message = (
        "`gradient_accumulation_steps` of the optimizer must be None under `tf.distribute`.* received 2 with 2 copies"
    )
    assert re.search(message, mirrored["refusal_of_sums"])


def test_bad_input():
    with pytest.raises(ValueError, match="`rank` must be a place in `hosts`, 0 to 1; received rank=2"):
        kt.distribution.start(["a:1", "b:1"], rank=2)
    with pytest.raises(ValueError, match="`model_parallel` must .*received model_parallel=7"):
        kt.distribution.start(model_parallel=7)
    model = kt.models.causal_lm(8, dim=4, depth=1, num_heads=1)
    model.compile("sgd", "sparse_categorical_crossentropy")
    engine = kt.distribution.start()
    with pytest.raises(ValueError, match="must be compiled with a `keras.losses.Loss`; its loss is 'sparse"):
        engine.copy(model)
