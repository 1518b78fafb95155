"""Kills an example again and again, and compares what it ends with to a run that was left alone.

    python benchmarks/kill_and_resume.py --kills 20
    python benchmarks/kill_and_resume.py --example image_classification --kills 3 --epochs 8 --folder images

Every third time the process is killed while a backup is being written, otherwise at a random moment of the fit. The run
can itself be stopped and started again with the same --folder.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ARGUMENTS = {
    "translation": ["--pairs", "3000", "--vocabulary-size", "150"],
    "text_classification": [],
    "image_classification": [],
    "language_model": ["--steps", "300"],
}
ENVIRONMENT = {**os.environ, "TF_DETERMINISTIC_OPS": "1", "KERAS_BACKEND": "tensorflow", "PYTHONUNBUFFERED": "1"}


def start(arguments, output, log):
    script = Path(__file__).parents[1] / "examples" / f"{arguments.example}.py"
    options = [*ARGUMENTS[arguments.example], "--epochs", str(arguments.epochs), "--output", str(output)]
    command = [sys.executable, str(script), *options]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)


def until(process, condition):
    """Waits for it, and returns whether the process lives to see it."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.0005)
    return False


def kill(arguments, output, log_path, random, in_writing):
    """Starts the run and kills it in its fit. Returns whether the backup was being written then."""
    partial = output / "backup" / "partial"
    before = when(partial)  # What an earlier kill has left there.
    with log_path.open("w") as log:
        process = start(arguments, output, log)
        alive = until(process, lambda: "Epoch " in log_path.read_text())
        time.sleep(random.uniform(0, arguments.longest))
        if in_writing and alive:
            until(process, lambda: when(partial) not in (None, before))
            time.sleep(random.uniform(0, 0.02))
        if process.poll() is not None:
            raise SystemExit(
                f"The run ended before it was killed, with status {process.returncode}; take more epochs: {log_path}"
            )
        process.send_signal(signal.SIGKILL)
        process.wait()
    return when(partial) not in (None, before)


def when(path):
    """When a folder was made, or None if it is not there."""
    try:
        return path.stat().st_ino, path.stat().st_ctime
    except FileNotFoundError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", choices=ARGUMENTS, default="translation")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest", type=float, default=30.0, help="seconds from the first epoch's begin to a kill")
    parser.add_argument("--epochs", type=int, default=60, help="enough that the run does not end before the last kill")
    parser.add_argument("--folder", type=Path, default=Path("kill_and_resume"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, whole, parts = arguments.folder, arguments.folder / "whole", arguments.folder / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    if not (whole / "metrics.json").exists():
        with (folder / "whole.log").open("w") as log:
            assert start(arguments, whole, log).wait() == 0, folder / "whole.log"
    for number in range(len(list(folder.glob("kill-*.log"))), arguments.kills):
        random = np.random.default_rng((arguments.seed, number))
        log = folder / f"kill-{number:02d}.log"
        halved = kill(arguments, parts, log, random, in_writing=number % 3 == 2)
        backups = [path.name for path in (parts / "backup").glob("epoch-*")]
        print(f"kill {number + 1}{' in a backup' if halved else ''}; whole: {' '.join(backups) or 'none'}", flush=True)
    with (folder / "last.log").open("w") as log:
        assert start(arguments, parts, log).wait() == 0, folder / "last.log"

    import keras

    import keras_transformer as kt  # noqa: F401

    models = [keras.saving.load_model(output / "model.keras") for output in (whole, parts)]
    values = [[keras.ops.convert_to_numpy(v) for v in (*m.weights, *m.optimizer.variables)] for m in models]
    for one, other in zip(*values, strict=True):
        np.testing.assert_array_equal(one, other)
    print(f"{len(values[0])} variables of the model and its optimizer are equal bit for bit.")


if __name__ == "__main__":
    main()
