"""The page that a trace writes: what is in the file, and what a browser makes of it."""

import base64
import hashlib
import json
import os
import re
import shutil

import numpy as np
import pytest

import keras_transformer as kt

SOURCE = ["the", "the", "</script><b>", "שלום", "🎉", "\u2028"]
TARGET = ["<s>", "die", "katze"]
# Without one, playwright's own is taken, if `playwright install chromium` has brought it.
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def translation(**options):
    model = kt.models.transformer(20, 20, dim=8, depth=2, num_heads=2, hidden_dim=16)
    inputs = {"source_ids": np.arange(3, 9)[None], "target_ids": np.array([[1, 2, 3]])}
    return kt.inspection.trace(model, inputs, {"source_ids": SOURCE, "target_ids": TARGET}, **options)


def read(path):
    text = path.read_text("utf-8")
    (held,) = re.findall(r'<script type="application/json" id="trace">(.*?)</script>', text, re.DOTALL)
    return text, json.loads(held)


def numbers(data, i):
    held = data["arrays"][i]
    return np.frombuffer(
        base64.b64decode(held["text"]), {"f4": "<f4", "f2": "<f2", "i4": "<i4", "u1": "u1"}[held["kind"]]
    )


def test_the_file_holds_the_trace(tmp_path):
    trace = translation()
    trace.to_html(tmp_path / "page.html", title="A <title>")
    text, data = read(tmp_path / "page.html")
    assert [tab["name"] for tab in data["tabs"]] == ["Encoder", "Decoder", "Cross-attention"]
    assert [len(tab["layers"]) for tab in data["tabs"]] == [2, 2, 2]
    assert data["tokens"] == {"source_ids": SOURCE, "target_ids": TARGET} and data["title"] == "A <title>"
    assert [step["path"] for step in data["steps"]] == list(trace)
    for step in data["steps"]:
        if step["array"] is not None:
            expected = trace[step["path"]]
            np.testing.assert_array_equal(numbers(data, step["array"]), expected.reshape(-1)[-expected[0].size :])
    assert "<title>A &lt;title&gt;</title>" in text and len(data["notes"]) == 1
    shares = np.exp(list(trace.values())[-1][0, 1].astype("float64"))
    name, share = data["answers"]["rows"][1][0]
    assert share == pytest.approx(shares[int(name)] / shares.sum(), abs=1e-6) and int(name) == shares.argmax()


def test_the_file_asks_nothing_of_anywhere(tmp_path):
    translation().to_html(tmp_path / "page.html")
    text, _ = read(tmp_path / "page.html")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    for tag in ("script", "style"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?:|src=|href=|@import|url\(", text)


def test_what_has_no_room_is_listed(tmp_path):
    model = kt.models.causal_lm(50, dim=64, depth=4, num_heads=4, hidden_dim=256)
    trace = kt.inspection.trace(model, np.arange(40)[None])
    trace.to_html(tmp_path / "page.html", layers=["decoder_block_3"], max_bytes=300_000)
    assert (tmp_path / "page.html").stat().st_size <= 300_000
    _, data = read(tmp_path / "page.html")
    assert len(data["tabs"][0]["layers"]) == 4  # Attention goes first,
    held = {step["path"] for step in data["steps"] if step["array"] is not None}
    assert {path for path in trace if path.startswith("decoder_block_3/self_attention/")} - {
        "decoder_block_3/self_attention/mask"
    } <= held  # then the layer that was asked for.
    left = [step["path"] for step in data["steps"] if step["left"]]
    notes = " ".join(data["notes"])
    assert left and "Left out" in notes and "half precision" in notes and left[0] in notes
    with pytest.raises(ValueError, match="max_bytes=20000"):
        trace.to_html(tmp_path / "none.html", max_bytes=20_000)
    assert not (tmp_path / "none.html").exists()
    with pytest.raises(ValueError, match="whole trace"):
        trace.layer("decoder_block_0").to_html(tmp_path / "none.html")


def test_patches_lie_over_their_image(tmp_path):
    model = kt.models.vision_transformer((8, 12, 3), 4, patch_size=4, dim=8, depth=1, num_heads=2, hidden_dim=16)
    image = np.random.default_rng(0).uniform(size=(1, 8, 12, 3)).astype("float32")
    kt.inspection.trace(model, image).to_html(tmp_path / "page.html")
    _, data = read(tmp_path / "page.html")
    assert {data["image"][name] for name in ("down", "across", "front")} == {2, 3, 1}
    pixels = numbers(data, data["image"]["pixels"]).reshape(8, 12, 3)
    np.testing.assert_allclose(pixels / 255, (image[0] - image.min()) / np.ptp(image), atol=0.003)


def test_one_trace_for_each_generated_token():
    model = kt.models.transformer(20, 20, dim=8, depth=1, num_heads=2, hidden_dim=16)
    inputs = {"source_ids": np.array([[3, 4, 5]]), "target_ids": np.array([[1]])}
    traces = kt.inspection.trace(model, inputs, {"target_ids": ["<s>"]}, generate=3)
    generated = kt.generation.Generator(model, 1, 2).generate({"source_ids": inputs["source_ids"]}, 3)[0].tolist()
    chosen = [int(trace.steps[-1].array[0, -1].argmax()) for trace in traces]
    until = chosen.index(2) + 1 if 2 in chosen else 3  # The generator ends there.
    assert chosen[:until] == generated[:until]
    assert traces[2].tokens["target_ids"] == ["<s>", str(chosen[0]), str(chosen[1])]
    named = kt.inspection.trace(model, inputs, {"target_ids": ["<s>"]}, 2, vocabulary=[f"<{i}>" for i in range(20)])[1]
    assert named.tokens["target_ids"] == ["<s>", f"<{chosen[0]}>"]
    assert str(named).splitlines()[-1].split()[0] == f"<{chosen[1]}>:"
    assert (
        named.answer(3) == "<3>" and kt.inspection.trace(model, inputs, vocabulary="abc".__getitem__).answer(1) == "b"
    )
    classifier = kt.models.vision_transformer((8, 8, 3), 4, patch_size=4, dim=8, depth=1, num_heads=2, hidden_dim=16)
    with pytest.raises(ValueError, match="an input `target_ids` or `token_ids`"):
        kt.inspection.trace(classifier, np.zeros((1, 8, 8, 3)), generate=1)


@pytest.mark.filterwarnings("ignore:Glyph")  # The fonts that come with matplotlib lack it.
def test_notebooks_show_the_page_and_figures_the_maps():
    trace = translation()
    assert trace._repr_html_().startswith("<iframe") and "</script>" not in trace._repr_html_()
    assert trace.layer("decoder_block_0/feed_forward")._repr_html_().startswith("<pre>")
    figure = trace.plot_attention("decoder_block_0/cross_attention")
    assert figure._repr_png_().startswith(b"\x89PNG")  # Notebooks show it, with pyplot imported or not.
    first, second = figure.axes[:2]
    np.testing.assert_array_equal(first.images[0].get_array(), trace["decoder_block_0/cross_attention/weights"][0, 0])
    assert [label.get_text() for label in second.get_xticklabels()][:3] == SOURCE[:3]
    with pytest.raises(KeyError, match="decoder_block_0/cross_attention/weights"):
        trace.plot_attention("decoder_block_0/cross")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="the `browser` extra is not installed")
    with sync_api.sync_playwright() as playwright:
        if not os.path.exists(CHROMIUM or playwright.chromium.executable_path):
            pytest.skip("there is no Chromium on this machine")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    seen = {"requests": [], "errors": []}
    view = browser.new_page(viewport={"width": 1280, "height": 900})
    view.on("request", lambda request: seen["requests"].append(request.url))
    view.on("console", lambda message: seen["errors"].append(message.text) if message.type == "error" else None)
    view.on("pageerror", lambda error: seen["errors"].append(str(error)))

    def open_page(trace):
        trace.to_html(tmp_path / "page.html")
        view.goto((tmp_path / "page.html").as_uri())
        view.wait_for_selector("#walk details")
        return view

    yield open_page
    view.close()
    assert not seen["errors"]
    assert {url.split("#")[0] for url in seen["requests"]} == {(tmp_path / "page.html").as_uri()}


def pixels(view):
    return view.evaluate("[...document.querySelectorAll('#grid canvas')].map((x) => x.toDataURL())")


@pytest.mark.browser
def test_a_click_on_a_token_changes_every_head(opened):
    view = opened(translation())
    before = pixels(view)
    assert len(before) == 4
    view.click("#tokens button:nth-child(2)")
    assert all(old != new for old, new in zip(before, pixels(view), strict=True))
    assert "token=1" in view.url and "tab=Encoder" in view.url
    assert view.evaluate("[...document.querySelectorAll('#tokens button')].map((x) => x.textContent)") == SOURCE


@pytest.mark.browser
def test_keys_choose_and_the_address_keeps_the_choice(opened):
    view = opened(translation())
    view.click("#tabs button:nth-child(3)")
    for key in ("ArrowLeft", "ArrowDown", "Shift+ArrowDown"):
        view.keyboard.press(key)
    assert view.url.endswith("#tab=Cross-attention&token=1&layer=1&head=1")
    assert view.text_content("#title") == "decoder_block_1/cross_attention, head 1"
    view.reload()
    assert view.text_content("#title") == "decoder_block_1/cross_attention, head 1"
    assert view.evaluate("document.querySelector('#tokens button[aria-pressed=true]').textContent") == "die"


@pytest.mark.browser
def test_steps_open_on_their_formula_with_numbers_in_it(opened):
    trace = translation()
    view = opened(trace)
    view.click("#tabs button:nth-child(2)")
    view.click('details[data-path="decoder_block_0/self_attention/scaled_scores"] summary')
    told = view.text_content('details[data-path="decoder_block_0/self_attention/scaled_scores"] .example')
    score, scale, result = (float(x.replace("−", "-")) for x in re.findall(r"−?[\d.]+", told))
    assert scale == 0.5 and result == pytest.approx(score * scale, abs=1e-4)
    assert result == pytest.approx(trace["decoder_block_0/self_attention/scaled_scores"][0, 0, 2, 0], abs=1e-4)


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_six_layers_of_eight_heads_fit(opened, width):
    model = kt.models.causal_lm(100, dim=64, depth=6, num_heads=8, hidden_dim=128)
    view = opened(kt.inspection.trace(model, np.arange(64)[None]))
    view.set_viewport_size({"width": width, "height": 900})
    assert view.evaluate("document.documentElement.scrollWidth") <= width
