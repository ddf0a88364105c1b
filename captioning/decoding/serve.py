"""A local page: drop a photograph, see its caption."""

import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from captioning.data import images
from captioning.scoring import report
from config import UserError

HOST = "127.0.0.1"
# The largest upload; twice a photograph of a good camera.
MAX_BYTES = 32 * 2**20


def application(
    caption: Callable[[list[np.ndarray]], list[Any]], title: str, size: int
) -> Any:
    """Builds the page.

    Args:
        caption: captions photographs, uint8 (size, size, 3) each: a
            `captioner.Captioned` for each.
        title: the heading.
        size: side of the images that `caption` takes, in pixels.

    Returns:
        A Flask application.

    Raises:
        UserError: if Flask is not installed.
    """
    try:
        import flask
    except ImportError:
        raise UserError(
            "--serve needs Flask: pip install -r requirements-serve.txt"
        ) from None
    page = report.template("decoding/serve.html.jinja").render(title=title)
    one_at_a_time = threading.Lock()
    app = flask.Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BYTES
    # No other site can make its own name lead to this page.
    app.config["TRUSTED_HOSTS"] = [HOST, "localhost"]

    @app.get("/")
    def show() -> str:
        return page

    @app.post("/caption")
    def answer() -> Any:
        upload = flask.request.files.get("photo")
        data = upload.read() if upload else b""
        try:
            pixels, _ = images.decode_image(data, size)
        except images.UnusableImage as error:
            return {"error": f"This photograph cannot be used: {error}."}, 400
        with one_at_a_time:
            (found,) = caption([pixels])
        return {
            "caption": found.caption,
            "words": found.words,
            "n_best": [each._asdict() for each in found.n_best],
            "pictures": report.lit_photographs(data, found.attention),
        }

    @app.errorhandler(413)
    def too_large(_: Any) -> Any:
        most = f"{MAX_BYTES / 2**20:.0f} MB"
        return {"error": f"This file is larger than {most}."}, 413

    return app


def serve(app: Any, port: int) -> None:
    """Serves a page to this machine alone, until interrupted.

    Raises:
        UserError: if the port is taken or out of range.
    """
    from werkzeug.serving import make_server

    try:
        with socket.create_server((HOST, port)):
            pass
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot serve on port {port} ({error}): choose another with "
            "--serve PORT"
        ) from None
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not each request
    server = make_server(HOST, port, app, threaded=True)
    print(f"Open http://{HOST}:{server.port} (Ctrl-C to stop)", flush=True)
    server.serve_forever()
