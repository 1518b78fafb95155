"""Memory that is freed stays with the process once `keep_memory` was called."""

import json
import subprocess
import sys

import pytest

import keras_transformer as kt
from keras_transformer.training import allocation

# Takes and frees blocks of 80 MB, and counts how many pages the system had to bring.
FAULTS = """
import json, resource, sys
from keras_transformer.training import keep_memory
told = keep_memory() if sys.argv[1] == "keep" else None
counts = []
for _ in range(4):
    block = bytearray(80 * 2**20)
    del block
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(json.dumps([told, counts[-1] - counts[0]]))
"""


def faults(way):
    found = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True, timeout=300)
    return json.loads(found.stdout.splitlines()[-1])


def test_blocks_are_used_again():
    told, kept = faults("keep")
    if not told:
        pytest.skip("the C library is not glibc")
    _, given_back = faults("leave")
    assert given_back > 3 * 80 * 2**20 / 4096 / 2  # Half of the pages at least, however large they are here.
    assert kept < given_back / 20


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocation.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: pytest.fail("was told"))
    assert kt.training.keep_memory() is False
