"""The local page, by Flask's test client and in a browser."""

import io
import json
import socket
import sys
import threading

import cv2
import numpy as np
import pytest
from werkzeug.serving import make_server

from captioning.decoding import captioner, serve
from config import UserError
from tests.browser import chromium, find, phone, press, wait

WORDS = ["a", "<b>dog</b>"]


def caption(photos):
    """Stands in for a model; a photograph's caption tells its size."""
    best = captioner.Hypothesis(WORDS, " ".join(WORDS), -0.5, -1.0, 0.9)
    size = str(photos[0].shape[0])
    other = captioner.Hypothesis([size], size, -0.6, -1.2, 0.1)
    attention = np.full((2, 9), 1 / 9, "float32")
    return [captioner.Captioned([best, other], attention, np.ones(2))]


@pytest.fixture
def client():
    return serve.application(caption, "<run>", 32).test_client()


def photo(height: int = 30, width: int = 60) -> bytes:
    pixels = np.full((height, width, 3), 200, np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def upload(client, data: bytes, **options):
    form = {"photo": (io.BytesIO(data), "x.png")}
    return client.post("/caption", data=form, **options)


def test_the_page_stands_alone_and_is_escaped(client):
    page = client.get("/").get_data(as_text=True)
    assert "&lt;run&gt;" in page and "<run>" not in page
    assert "http://" not in page and "https://" not in page
    # Captions become text nodes, never markup.
    assert "innerHTML" not in page


def test_a_photograph_gets_its_caption_and_a_picture_a_word(client):
    reply = upload(client, photo())
    found = json.loads(reply.data)
    assert reply.status_code == 200 and reply.is_json
    assert found["words"] == WORDS and found["caption"] == " ".join(WORDS)
    assert [each["words"] for each in found["n_best"]] == [WORDS, ["32"]]
    assert len(found["pictures"]) == 3
    assert all(e.startswith("data:image/jpeg;") for e in found["pictures"])


@pytest.mark.parametrize("data", [b"", b"no image", photo()[:60]])
def test_what_is_no_photograph_gets_a_message(client, data):
    reply = upload(client, data)
    assert reply.status_code == 400
    assert "cannot be used" in json.loads(reply.data)["error"]
    assert client.post("/caption").status_code == 400


def test_what_is_too_large_or_from_another_host_is_refused(client):
    reply = upload(client, bytes(serve.MAX_BYTES + 1))
    assert reply.status_code == 413
    assert "larger than 32 MB" in json.loads(reply.data)["error"]
    for host, code in (("evil.example", 400), ("localhost:8000", 200)):
        assert client.get("/", headers={"Host": host}).status_code == code


def test_a_missing_flask_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "flask", None)
    with pytest.raises(UserError, match=r"requirements-serve\.txt"):
        serve.application(caption, "run", 32)


def test_a_port_in_use_is_told_in_one_line():
    with socket.create_server((serve.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}.*--serve PORT"):
            serve.serve(None, port)
    with pytest.raises(UserError, match="port 70000"):
        serve.serve(None, 70000)


# --- in a browser ----------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium and the address of the page."""
    app = serve.application(caption, "Captions by <run>", 32)
    server = make_server(serve.HOST, 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with chromium(tmp_path_factory.mktemp("profile")) as driver:
            yield driver, f"http://{serve.HOST}:{server.port}"
    finally:
        server.shutdown()
        thread.join()


@pytest.fixture
def page(browser):
    """The page as after loading; afterwards, nothing may have gone wrong."""
    driver, address = browser
    driver.get(address)
    yield driver
    told = [each["message"] for each in driver.get_log("browser")]
    # Chromium itself notes an answer with an error code.
    assert not [each for each in told if "400 (BAD REQUEST)" not in each]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(photo(60, 90))
    return str(path)


def test_a_photograph_that_is_chosen_gets_caption_and_attention(page, picture):
    find(page, "#file")[0].send_keys(picture)
    wait(page, "!$('found').hidden && $('picture').naturalWidth === 448")
    words = [each.text for each in find(page, "#words button")]
    assert words == ["photograph", *WORDS]
    assert find(page, "#message")[0].get_attribute("textContent") == (
        f"Caption: \u2068{' '.join(WORDS)}\u2069"
    )
    assert [each.text for each in find(page, "#others li")] == ["32"]
    whole = find(page, "#picture")[0].get_attribute("src")
    find(page, "#words button")[1].click()
    lit = find(page, "#picture")[0].get_attribute("src")
    assert lit != whole
    press(page, "ARROW_RIGHT")
    wait(page, "document.activeElement.textContent === '<b>dog</b>'")
    alt = find(page, "#picture")[0].get_attribute("alt")
    assert "<b>dog</b>" in alt and "attention" in alt


def test_a_right_to_left_caption_runs_from_right_to_left(
    page, picture, monkeypatch
):
    monkeypatch.setattr(f"{__name__}.WORDS", ["رجل", "يمشي"])
    find(page, "#file")[0].send_keys(picture)
    # Until the photograph is loaded, the page moves away from the mouse.
    wait(page, "!$('found').hidden && $('picture').naturalWidth === 448")
    buttons = find(page, "#words button")
    assert buttons[1].rect["x"] > buttons[2].rect["x"]
    buttons[1].click()
    press(page, "ARROW_LEFT")
    wait(page, "document.activeElement.textContent === 'يمشي'")
    # The other caption is a number.
    wait(page, "getComputedStyle($('others')).direction === 'ltr'")


# Makes what a person drops; arguments: type, name and content of the file.
DROP = """
const data = new DataTransfer();
data.items.add(new File([arguments[2]], arguments[1], {type: arguments[0]}));
document.querySelector("main").dispatchEvent(
  new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
"""


def test_a_photograph_is_dropped_and_a_text_is_not_taken(page, picture):
    page.execute_script(DROP, "text/plain", "notes.txt", "no photograph")
    wait(page, "$('message').textContent.includes('cannot be used')")
    message = find(page, "#message")[0]
    assert message.is_displayed() and not find(page, "#found")[0].is_displayed()
    svg = "<svg xmlns='http://www.w3.org/2000/svg'/>"
    page.execute_script(DROP, "image/svg+xml", "drawing.svg", svg)
    wait(page, "!$('message').textContent.includes('Looking')")
    assert "not an image" in message.text
    find(page, "#file")[0].send_keys(picture)
    wait(page, "!$('found').hidden")
    with phone(page):
        wait(page, "document.documentElement.scrollWidth <= 390")
        wait(page, "$('picture').getBoundingClientRect().width > 300")
    page.execute_script(DROP, "text/plain", "notes.txt", "no photograph")
    wait(page, "$('found').hidden")
