"""Runs a server for the tests of the page, until it is ended: ``python -m browser.server FOLDER [--stand-in] ...``.

Prints its port on a line of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from omniops.server.predictors import Predictor
from omniops.server.serving import listen, serve
from omniops.server.settings import Settings
from omniops.server.web import create_app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stand-in", action="store_true", help="an Inference that knows the clip, and no model")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that the stand-in takes for a frame")
    parser.add_argument("--token")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds after which an idle session ends")
    parser.add_argument("--upload-bytes", type=int, default=20_000_000)
    options = parser.parse_args()
    settings = Settings(
        data=options.folder,
        device="cpu",
        random_weights=True,
        image_size=128,
        token=options.token,
        session_timeout=options.timeout,
        max_upload_bytes=options.upload_bytes,
        max_upload_video_duration=2.0,
    )

    def make_app():
        if not options.stand_in:
            return create_app(settings)
        from browser.stand_in import StandIn

        return create_app(settings, [Predictor(lambda: StandIn(options.delay), "stand-in")])

    bound = listen("127.0.0.1", 0)
    print(bound.getsockname()[1], flush=True)
    serve(make_app, bound)


if __name__ == "__main__":
    main()
