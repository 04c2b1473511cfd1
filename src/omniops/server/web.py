"""The WSGI application: the routes of the official demo server, and ours."""

from __future__ import annotations

from flask import Flask, Response

from omniops.server.settings import Settings


def create_app(settings: Settings) -> Flask:
    """The application that ``settings`` describe."""
    app = Flask("omniops.server", static_folder=None, template_folder=None)
    app.extensions["omniops"] = settings

    @app.get("/healthy")
    def healthy() -> Response:
        return Response("OK")

    return app
