"""The server of translations as a user runs it: many clients at once, bad requests, and the page in a browser."""

import concurrent.futures
import http.client
import importlib.util
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import keras_transformer as kt

SCRIPT = Path(__file__).parents[2] / "examples" / "serve.py"
PAIRS = kt.pipelines.number_pairs(200, "fr")
TEXTS = [text for text, _ in PAIRS]


@pytest.fixture(scope="module")
def pipeline():
    """Untrained, but its answers depend on what it reads."""
    keras.utils.set_random_seed(2)
    tokenizer = kt.pipelines.train_sentence_piece([text for pair in PAIRS for text in pair], 150)
    size = tokenizer.vocabulary_size()
    model = kt.models.transformer(size, size, dim=32, depth=2, num_heads=2, hidden_dim=32, norm_position="pre")
    for variable in model.trainable_variables:
        variable.assign(3 * keras.ops.convert_to_tensor(variable))
    generator = kt.generation.Generator(model, start_id=1, end_id=2, jit_compile=True)
    return kt.pipelines.Pipeline(generator, tokenizer, tokenizer, max_new_tokens=8)


@pytest.fixture(scope="module")
def port(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    pipeline.export(folder / "saved_model")
    options = ["--model", "saved_model", "--port", "0", "--timeout", "3", "--queue", "64", "--batch-size", "16"]
    for name in ("keras_transformer", "keras_hub", "keras_nlp"):  # TensorFlow Text loads Keras by itself.
        (folder / f"{name}.py").write_text("raise ImportError('a server needs TensorFlow alone')\n")
    environment = {**os.environ, "PYTHONPATH": str(folder), "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *options], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
            break
    else:
        pytest.fail("".join(lines))
    # What it says from here on must not fill the pipe.
    reader = concurrent.futures.ThreadPoolExecutor(1)
    reader.submit(process.stderr.read)
    yield int(found[1])
    process.terminate()
    process.wait()
    reader.shutdown()


def post(port, body, path="/translate"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def ask(port, text):
    return post(port, json.dumps({"text": text}))


def test_a_thousand_requests_of_32_clients_get_the_answers_of_the_pipeline(port, pipeline):
    texts = [TEXTS[i % len(TEXTS)] for i in range(1000)]
    expected = dict(zip(TEXTS, pipeline.predict(TEXTS), strict=True))
    assert len(set(expected.values())) > 20
    with concurrent.futures.ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(lambda text: ask(port, text), texts))
    assert [status for status, _ in answers] == [200] * 1000
    assert [answer["text"] for _, answer in answers] == [expected[text] for text in texts]


BAD = {
    "no JSON": (b"{text: 1", 400, "must be JSON"),
    "JSON in the depth": (b"[" * 3000, 400, "must be JSON"),
    "no UTF-8": (b'{"text": "\xff"}', 400, "must be UTF-8; byte 10 is not"),
    "half a pair": (b'{"text": "\\ud800"}', 400, "surrogate"),
    "a megabyte": (json.dumps({"text": "a" * 10**6}).encode(), 413, "at most 4000 bytes; it has 1000012"),
    "empty": (b'{"text": "  "}', 422, "a text that is not empty"),
    "no text": (b'{"sentence": "one"}', 422, "a text that is not empty"),
    "a number": (b'{"text": 1}', 422, "a text that is not empty"),
    "a list": (b'["one"]', 422, "a text that is not empty"),
    "nothing": (b"", 400, "must be JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_told_why(port, name):
    body, status, detail = BAD[name]
    for path in ("/translate", "/attention"):
        found = post(port, body, path)
        assert found[0] == status and detail in found[1]["detail"]


def test_a_slow_client_is_given_up_while_others_are_served(port, pipeline):
    expected = pipeline.predict(["two"])[0]
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        slow.sendall(b"POST /translate HTTP/1.1\r\nHost: here\r\nContent-Length: 20\r\n\r\n{")
        assert ask(port, "two") == (200, {"text": expected})
        assert not select.select([slow], [], [], 0)[0]  # Nobody has waited for it.
        assert b" 408 " in slow.recv(4096)


def test_a_flood_is_turned_away_and_the_server_lives(port):
    with concurrent.futures.ThreadPoolExecutor(200) as clients:
        found = list(clients.map(lambda i: ask(port, TEXTS[i % 200])[0], range(600)))
    assert set(found) == {200, 503} and found.count(200) > 64
    assert ask(port, "two")[0] == 200


def test_attention_is_that_of_the_model(port, pipeline):
    status, found = post(port, json.dumps({"text": "forty-two"}), "/attention")
    ids = [*map(int, pipeline.source.tokenize("forty-two")), 2]
    assert status == 200 and found["text"] == pipeline.predict(["forty-two"])[0]
    assert found["source_tokens"] == [pipeline.source.id_to_token(i) for i in ids]
    heads = found["attention"]
    assert (len(heads), len(heads[0])) == (2, 2) and len(heads[0][0]) == len(found["target_tokens"])
    assert all(abs(sum(row) - 1) < 1e-3 for layer in heads for head in layer for row in head)


def test_what_is_no_pipeline_is_refused(tmp_path, monkeypatch, capsys):
    import tensorflow as tf

    specification = importlib.util.spec_from_file_location("serve", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    module = tf.Module()
    module.double = tf.function(lambda x: {"y": 2 * x}, input_signature=[tf.TensorSpec([None], name="x")])
    tf.saved_model.save(module, tmp_path / "other", signatures={"serving_default": module.double})
    monkeypatch.chdir(tmp_path)
    assert script.FORMAT == kt.pipelines.saving.SIGNATURES_FORMAT
    (tmp_path / "later" / "assets.extra").mkdir(parents=True)
    (tmp_path / "later" / "saved_model.pb").touch()
    notes = {"format": 2, "versions": {"keras_transformer": "9.0"}}
    (tmp_path / "later" / "assets.extra" / "keras_transformer.json").write_text(json.dumps(notes))
    cases = {
        "nowhere": "there is none at nowhere",
        "other": "{'serving_default': ['x']}",
        "later": "format 1, which this server knows; later has format 2, written by {'keras_transformer': '9.0'}",
    }
    for directory, message in cases.items():
        monkeypatch.setattr(sys, "argv", ["serve.py", "--model", directory])
        with pytest.raises(SystemExit) as error:
            script.main()
        assert error.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


@pytest.mark.browser
def test_the_page_shows_translation_and_attention(port, pipeline):
    playwright = pytest.importorskip("playwright.sync_api", reason="the `browser` extra is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        page.fill("#text", "forty-two")
        page.press("#text", "Control+Enter")
        page.wait_for_selector("table")
        assert page.inner_text("#answer") == pipeline.predict(["forty-two"])[0].strip()
        rows = page.locator("tbody tr")
        count = rows.count()
        page.select_option("#head", "1")
        assert rows.count() == count > 0 and rows.first.locator("td").count() > 1
        page.fill("#text", " ")
        page.click("button")
        page.wait_for_selector("#answer.error")
        assert "a text that is not empty" in page.inner_text("#answer") and not page.is_visible("table")
        assert errors == []
        browser.close()
