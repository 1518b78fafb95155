"""A server of translations over HTTP, with a page to try it: from the SavedModel of a pipeline, by TensorFlow alone.

    python examples/serve.py --model translation_output/saved_model
    curl http://127.0.0.1:8000/translate --json '{"text": "twenty-one"}'

The page is at http://127.0.0.1:8000/. Requests that come together are translated together. A text that is too long, or
no text, gets the status that says so (400, 408, 413, 422), and a flood of them 503, while the others are served.
"""

import argparse
import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import tensorflow as tf
import tensorflow_text  # noqa: F401 (its import registers the tokenizers' operations)
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse

PAGE = Path(__file__).with_name("serve.html")
FORMAT = 1  # Of a SavedModel's signatures, as `Pipeline.export` notes it.


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=Path("translation_output/saved_model"), help="what `Pipeline.export` wrote")
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, for this machine alone)")
    add("--port", type=int, default=8000, help="default: 8000; 0 for any that is free")
    add("--batch-size", type=int, default=32, help="texts that are translated at once (default: 32)")
    add("--wait", type=float, default=5.0, help="milliseconds that a text waits for others (default: 5)")
    add("--queue", type=int, default=256, help="texts that may wait; more are turned away (default: 256)")
    add("--max-bytes", type=int, default=4000, help="of a request (default: 4000)")
    add("--timeout", type=float, default=10.0, help="seconds that a request may take to arrive (default: 10)")
    arguments = parser.parse_args()
    if min(arguments.batch_size, arguments.queue, arguments.max_bytes) < 1 or min(arguments.wait, arguments.port) < 0:
        parser.error("--batch-size, --queue and --max-bytes must be at least 1, --wait and --port 0 or more")
    return parser, arguments


def load_signatures(directory):
    """The functions of a SavedModel that takes texts: `serving_default`, and `attention` if it has it."""
    if not (directory / "saved_model.pb").is_file():
        raise ValueError(f"--model must be the directory of a SavedModel; there is none at {directory}")
    notes = directory / "assets.extra" / "keras_transformer.json"
    written = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {"format": FORMAT}
    if written.get("format") != FORMAT:
        raise ValueError(
            f"--model must have signatures of format {FORMAT}, which this server knows; {directory} has format "
            f"{written.get('format')}, written by {written.get('versions', 'an unknown version')}"
        )
    signatures = dict(tf.saved_model.load(directory).signatures)
    found = {name: sorted(f.structured_input_signature[1]) for name, f in signatures.items()}
    if found.get("serving_default") != ["text"] or "text" not in signatures["serving_default"].structured_outputs:
        raise ValueError(
            "--model must be what `Pipeline.export` writes, with a signature `serving_default` from `text` to `text`; "
            f"{directory} has the signatures {found or 'none'}"
        )
    return signatures


class Batcher:
    """Gathers requests and answers them together, a batch at a time, in a thread of its own.

    Args:
        answer: function from a list of texts to a list of as many answers.
        size: int. Texts of a batch at most.
        wait: float. Seconds that the first text of a batch waits for others.
        room: int. How many texts may wait.
    """

    def __init__(self, answer, size, wait, room):
        self.answer, self.size, self.wait = answer, size, wait
        self.waiting = asyncio.Queue(room)
        self.thread = ThreadPoolExecutor(1)

    async def ask(self, text):
        answer = asyncio.get_running_loop().create_future()
        try:
            self.waiting.put_nowait((text, answer))
        except asyncio.QueueFull:
            busy = "too many texts are waiting; try again later"
            raise HTTPException(503, busy, headers={"Retry-After": "1"}) from None
        return await answer

    async def run(self):
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.waiting.get()]
            if self.waiting.qsize() + 1 < self.size:
                await asyncio.sleep(self.wait)
            while len(batch) < self.size and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            try:
                answers = await loop.run_in_executor(self.thread, self.answer, [text for text, _ in batch])
            except Exception as error:  # Whoever asked is told, and the next batch is served.
                answers = [error] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.done():  # Who asked has gone away.
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(HTTPException(500, f"the model failed: {type(answer).__name__}"))
                else:
                    future.set_result(answer)


def translator(signatures, size):
    """The function of a list of texts that the `Batcher` calls: one text alone, or a batch of one size."""

    def translate(texts):
        filled = texts if len(texts) == 1 else [*texts, *[texts[0]] * (size - len(texts))]
        found = signatures["serving_default"](text=tf.constant(filled))["text"].numpy()
        return [{"text": text.decode(errors="replace")} for text in found[: len(texts)]]

    return translate


def explain(signatures, text):
    found = {name: value.numpy() for name, value in signatures["attention"](text=tf.constant([text])).items()}
    tokens = {name: [x.decode(errors="replace") for x in found[name][0]] for name in ("source_tokens", "target_tokens")}
    attention = found["attention"][0].round(4).tolist()  # [layers, heads, T, S]
    return {"text": found["text"][0].decode(errors="replace"), **tokens, "attention": attention}


async def read_text(request, arguments):
    """The text of a request `{"text": ...}`, or the error that says what is wrong with it."""

    async def read():
        body, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= arguments.max_bytes:
                body.append(chunk)
        # What is too long is read to its end and dropped: a client that is still sending would not see the answer.
        if size > arguments.max_bytes:
            raise HTTPException(413, f"a request must have at most {arguments.max_bytes} bytes; it has {size}")
        return b"".join(body)

    try:
        body = await asyncio.wait_for(read(), arguments.timeout)
        text = json.loads(body.decode("utf-8"))["text"]
    except TimeoutError:
        raise HTTPException(408, f"a request must arrive within {arguments.timeout:g} seconds") from None
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"a request must be UTF-8; byte {error.start} is not") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise HTTPException(400, f"a request must be JSON: {error}") from None
    except (KeyError, TypeError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise HTTPException(422, 'a request must be {"text": "..."} with a text that is not empty')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # Half of a pair, as JSON can write it.
        raise HTTPException(400, "a text must be Unicode; it has a surrogate by itself") from None
    return text


def make_server(signatures, arguments):
    batcher = None

    @asynccontextmanager
    async def lifespan(_):
        nonlocal batcher
        batcher = Batcher(
            translator(signatures, arguments.batch_size), arguments.batch_size, arguments.wait / 1000, arguments.queue
        )
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    server = FastAPI(title="keras_transformer", lifespan=lifespan)

    @server.get("/", include_in_schema=False)
    def page():
        return FileResponse(PAGE, media_type="text/html")

    @server.get("/health")
    def health():
        return {"status": "ready", "waiting": batcher.waiting.qsize(), "attention": "attention" in signatures}

    @server.post("/translate")
    async def translate(request: Request):
        return await batcher.ask(await read_text(request, arguments))

    @server.post("/attention")
    async def attention(request: Request):
        if "attention" not in signatures:
            raise HTTPException(404, "this SavedModel has no signature `attention`")
        text = await read_text(request, arguments)
        return await asyncio.get_running_loop().run_in_executor(batcher.thread, explain, signatures, text)

    return server


def main():
    parser, arguments = parse_arguments()
    try:
        signatures = load_signatures(arguments.model)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("The model gets ready: it compiles for one text and for a batch.", flush=True)
    warm = translator(signatures, arguments.batch_size)
    for count in (1, min(2, arguments.batch_size)):
        warm(["one"] * count)
    server = make_server(signatures, arguments)
    uvicorn.run(server, host=arguments.host, port=arguments.port, log_level="info", timeout_keep_alive=30)


if __name__ == "__main__":
    main()
