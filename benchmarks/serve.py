"""How long many clients at once wait for `examples/serve.py`, which must run already.

    python examples/serve.py --model translation_output/saved_model
    python benchmarks/serve.py

Each client sends its next text when its last one is answered. The texts are the English names of numbers.
"""

import argparse
import concurrent.futures
import http.client
import json
import time

import numpy as np
from side_by_side import tell

import keras_transformer as kt


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    for name, default in (("port", 8000), ("requests", 1000), ("clients", 32)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--output", help="file to write the result to, as JSON")
    arguments = parser.parse_args()
    texts = [text for text, _ in kt.pipelines.number_pairs(arguments.requests, "fr", seed=1)]

    def ask(text):
        connection = http.client.HTTPConnection(arguments.host, arguments.port, timeout=120)
        started = time.perf_counter()
        connection.request("POST", "/translate", json.dumps({"text": text}))
        response = connection.getresponse()
        response.read()
        connection.close()
        return response.status, time.perf_counter() - started

    with concurrent.futures.ThreadPoolExecutor(arguments.clients) as clients:
        list(clients.map(ask, texts[:100]))  # Which compiles for the lengths that come.
        started = time.perf_counter()
        answers = list(clients.map(ask, texts))
        seconds = time.perf_counter() - started
    milliseconds = 1000 * np.array([taken for _, taken in answers])
    result = {
        "requests": arguments.requests,
        "clients": arguments.clients,
        "answered": sum(status == 200 for status, _ in answers),
        "requests_per_second": round(arguments.requests / seconds, 1),
        **{f"p{p}_milliseconds": round(float(np.percentile(milliseconds, p)), 1) for p in (50, 99)},
    }
    tell(result, arguments.output)


if __name__ == "__main__":
    main()
