"""Memory that is freed stays with the process once `keep_memory` was called."""

import json
import subprocess
import sys

import pytest

import keras_transformer as kt
from keras_transformer.training import allocation

# Takes and frees blocks of 80 MB, here or in another thread, and counts how many pages the system had to bring.
FAULTS = """
import json, resource, sys, threading
from keras_transformer.training import keep_memory
told = keep_memory() if sys.argv[1] == "keep" else None
counts = []

def take():
    for _ in range(4):
        block = bytearray(80 * 2**20)
        del block
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

if sys.argv[2] == "thread":
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
else:
    take()
print(json.dumps([told, counts[-1] - counts[0]]))
"""


def faults(*words):
    command = [sys.executable, "-c", FAULTS, *words]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("place", ["main", "thread"])
def test_blocks_are_used_again(place):
    told, kept = faults("keep", place)
    if not told:
        pytest.skip("the C library is not glibc")
    _, given_back = faults("leave", place)
    assert given_back > 3 * 80 * 2**20 / 4096 / 2  # Half of the pages at least, however large they are here.
    assert kept < given_back / 20


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocation.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: pytest.fail("was told"))
    assert kt.training.keep_memory() is False
