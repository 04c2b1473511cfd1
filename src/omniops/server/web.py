"""The WSGI application: the routes of the official demo server, and ours."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from flask import Flask, Request, Response, current_app, g, request, send_file
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import HTTPException

from omniops.sam2.picture_files import KINDS
from omniops.server import connection, graphql, stream
from omniops.server.downloads import Downloads
from omniops.server.errors import UNKNOWN_ERROR, Busy, NotFound, ServerError
from omniops.server.metrics import CONTENT_TYPE as METRICS_TYPE
from omniops.server.predictors import Predictor, make_predictors
from omniops.server.schema import Context, make_schema
from omniops.server.security import COOKIE, Guard, page_headers
from omniops.server.sessions import Sessions
from omniops.server.settings import Settings
from omniops.server.uploads import Incoming, Uploads, temporary_file
from omniops.server.videos import Video, Videos

_MAX_JSON_BYTES = 8_000_000  # a mask, and every click on an object
_MAX_FIELD_BYTES = 200_000  # of a form, besides its file
_MAX_FORM_PARTS = 8
_STREAM_PATIENCE = 2.0  # seconds that a propagation waits for the end of one that was cancelled

_WORDS = {
    400: "The request cannot be read",
    404: "There is nothing at this address",
    405: "This address does not take this method",
    408: "The request did not come in time",
    411: "The request has to tell its length",
    413: "The request is larger than the server takes",
    414: "The address is too long",
    415: "The request has to be JSON, with Content-Type: application/json",
    416: "The file has no such range",
}
_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}

_logger = logging.getLogger(__name__)


class Server:
    """What the routes share."""

    def __init__(self, settings: Settings, predictors: Sequence[Predictor]) -> None:
        self.settings = settings
        self.guard = Guard(settings)
        self.schema = make_schema(settings.debug)
        self.videos = Videos(settings)
        self.sessions = Sessions(settings, predictors)
        self.uploads = Uploads(settings, self.videos, self.sessions.names)
        self.downloads = Downloads(settings, self.videos.jobs)
        self.stream_slots = stream.StreamSlots(settings.max_streams)
        # One less, so that of the official command's 8 threads one is left to answer clicks.
        self.receiving = threading.BoundedSemaphore(max(1, settings.max_streams - 1))
        self.page_headers = page_headers(settings)

    def receive(self, file: Any, **options: Any) -> Video:
        """Store the file of this request; waits for it to be checked and converted. As ``Uploads.receive``."""
        if not isinstance(file, FileStorage) or not file.filename:
            raise ServerError("file has to be a file of a multipart/form-data request")
        environ = request.environ
        stream = cast(BinaryIO, file.stream)
        return self.uploads.receive(stream, key=_upload_key(), gone=lambda: connection.is_gone(environ), **options)


class _UploadRequest(Request):
    """A request whose files go to the disk as they come, whatever their size."""

    max_form_parts = _MAX_FORM_PARTS
    max_form_memory_size = _MAX_FIELD_BYTES

    def _get_file_stream(self, total_content_length: int | None, *args: Any, **kwargs: Any) -> Any:
        server = _server()
        if g.setdefault("incoming", None) is not None:
            raise ServerError("A request may have one file")
        progress = server.videos.jobs.announce(_upload_key(), "receiving")
        progress.total = total_content_length
        g.incoming = temporary_file(server.settings, progress)
        return g.incoming


def _upload_key() -> str | None:
    """What the client calls this upload or download, to ask for its progress by."""
    return request.headers.get("Upload") or request.args.get("upload")


def create_app(settings: Settings, predictors: Sequence[Predictor] | None = None) -> Flask:
    """The application that ``settings`` describe.

    Args:
        predictors: one for each device; by default processes of their own, none of which starts before it is used.
    """
    app = Flask("omniops.server", static_folder=None, template_folder=None)
    app.request_class = _UploadRequest
    app.url_map.merge_slashes = False  # an address that is not quite one is none, rather than a redirect
    app.extensions["omniops"] = Server(settings, make_predictors(settings) if predictors is None else predictors)
    app.before_request(_check)
    app.after_request(_add_headers)
    app.teardown_request(_let_go)
    app.register_error_handler(ServerError, _refusal)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unknown_error)
    _add_routes(app)
    return app


def _add_routes(app: Flask) -> None:
    routes: list[tuple[str, tuple[str, ...], Callable[..., Response]]] = [
        ("/healthy", ("GET",), _healthy),
        ("/graphql", ("GET", "POST"), _graphql),
        ("/propagate_in_video", ("POST",), _propagate),
        ("/<any(gallery, posters, uploads):folder>/<path:name>", ("GET",), _media),
        ("/", ("GET",), _page),
        ("/page/<path:name>", ("GET",), _page),
        ("/favicon.ico", ("GET",), _favicon),
        ("/metrics", ("GET",), _metrics),
        ("/login", ("POST",), _login),
        ("/sessions/<session_id>/leave", ("POST",), _leave),
        ("/downloads/<session_id>", ("GET",), _download),
        ("/progress/<key>", ("GET",), _progress),
    ]
    for rule, methods, view in routes:
        app.add_url_rule(rule, view.__name__.strip("_"), view, methods=methods, provide_automatic_options=False)


def _server() -> Server:
    server: Server = current_app.extensions["omniops"]
    return server


def _check() -> Response | None:
    """What comes before every route."""
    server = _server()
    if request.environ.get("wsgi.multiprocess"):
        # Sessions live in this process alone: with several, a request would come to one that does not know it.
        raise Busy("The server runs in several processes and cannot: start gunicorn with --workers 1")
    if not request.environ.get("wsgi.multithread"):
        raise Busy("The server runs in one thread and cannot: start gunicorn with --worker-class gthread --threads 8")
    connection.limit_stalls(request.environ, server.settings.send_timeout)
    server.guard.check(request)
    if request.method == "OPTIONS":
        return Response(content_type="text/html; charset=utf-8")
    is_form = request.mimetype == "multipart/form-data"
    if is_form and request.method == "POST":
        if not server.receiving.acquire(blocking=False):
            raise Busy("The server receives as many uploads as it can: try again in a minute")
        g.is_receiving = True
    request.max_content_length = _MAX_JSON_BYTES + (server.settings.max_upload_bytes if is_form else 0)
    return None


def _let_go(_error: BaseException | None) -> None:
    """What comes after every route, also where it failed."""
    incoming: Incoming | None = g.pop("incoming", None)
    if incoming is not None:
        incoming.close()
    if g.pop("is_receiving", False):
        _server().receiving.release()


def _add_headers(response: Response) -> Response:
    server = _server()
    server.guard.add_cors(request, response)
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    # The official front end, of another origin, shows videos and posters; nobody else's page may have anything.
    is_media = request.endpoint == "media"
    response.headers["Cross-Origin-Resource-Policy"] = "cross-origin" if is_media else "same-origin"
    if request.endpoint == "page":
        response.headers.update(server.page_headers)
    elif "Content-Security-Policy" not in response.headers:
        # An uploaded or sent file that a browser is made to open as a page does nothing there.
        response.headers["Content-Security-Policy"] = "default-src 'none'; frame-ancestors 'none'; sandbox"
    return response


def _error(message: str, status: int) -> Response:
    """An error in the form of the route that was asked."""
    if request.path == "/graphql":
        body: dict[str, Any] = {"data": None, "errors": [{"message": message}]}
    else:
        body = {"error": {"message": message}}
    response = Response(json.dumps(body), status, content_type="application/json")
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if status == 503:
        response.headers["Retry-After"] = "10"
    return response


def _refusal(error: ServerError) -> Response:
    if error.status == 413:
        connection.drain(request.environ, _server().settings.max_upload_bytes)
    return _error(error.message, error.status)


def _http_error(error: HTTPException) -> Response:
    status = error.code or 500
    if status == 413:
        connection.drain(request.environ, _server().settings.max_upload_bytes)
    response = _error(_WORDS.get(status, UNKNOWN_ERROR if status >= 500 else _WORDS[400]), status)
    for name, value in error.get_headers():
        if name in ("Allow", "Content-Range"):
            response.headers[name] = value
    return response


def _unknown_error(error: Exception) -> Response:
    _logger.error("A request failed: %s %s", request.method, request.path, exc_info=error)
    return _error(UNKNOWN_ERROR, 500)


def _healthy() -> Response:
    return Response("OK", content_type="text/html; charset=utf-8")


def _graphql() -> Response:
    server = _server()
    base_url = server.settings.api_url or request.host_url.rstrip("/")
    context = Context(server.settings, server.sessions, server.videos, base_url, server.receive)
    return graphql.serve(server.schema, request, context, server.settings.debug)


def _json_object() -> dict[str, Any]:
    """The request's JSON: 415 for another type, 400 for what is no JSON; without fields where it is no object."""
    try:
        body = request.get_json()
    except RecursionError:
        raise ServerError(_WORDS[400]) from None
    return body if isinstance(body, dict) else {}


def _propagate() -> Response:
    fields = _json_object()
    session_id = fields.get("session_id")
    if not isinstance(session_id, str):
        raise ServerError("The request has to name its session_id, a string")
    start = fields.get("start_frame_index", 0)
    if not isinstance(start, int) or isinstance(start, bool):
        raise ServerError("start_frame_index has to be a whole number")
    server = _server()
    session = server.sessions.get(session_id)
    if session.tracking:
        session.cancel()  # what it does until now makes room for what it is asked for
    slots, environ = server.stream_slots, request.environ
    if not slots.take(_STREAM_PATIENCE):
        raise Busy(f"{server.settings.max_streams} videos are tracked right now, which is all that the server does")
    try:
        body = stream.MultipartStream(session.propagate(start), slots.give_back, lambda: connection.break_off(environ))
    except BaseException:
        slots.give_back()
        raise
    slots.watch(body)
    return Response(body, content_type=stream.CONTENT_TYPE, direct_passthrough=True)


def _media(folder: str, name: str) -> Response:
    videos, path = _server().videos, f"{folder}/{name}"
    file = videos.poster(path) if folder == "posters" else videos.find(path)
    suffix = file.suffix.lower()
    kind = "video/mp4" if suffix == ".mp4" else "image/jpeg" if KINDS.get(suffix) == "JPEG" else "image/png"
    shown_name = PurePosixPath(name).with_suffix(suffix).name  # what a file was converted to has its name
    try:
        return send_file(file, kind, conditional=True, download_name=shown_name)
    except OSError:
        raise NotFound("There is no such file") from None


def _page(name: str = "index.html") -> Response:
    folder = files("omniops.server") / "page"
    known = {file.name: file for file in folder.iterdir() if file.is_file()}
    suffix = name[name.rfind(".") :]
    if name not in known or suffix not in _TYPES:
        raise NotFound(_WORDS[404])
    response = Response(known[name].read_bytes(), content_type=f"{_TYPES[suffix]}; charset=utf-8")
    response.cache_control.no_cache = True  # asked for anew after an update, by its ETag
    response.add_etag()
    response.make_conditional(request)
    return response


def _favicon() -> Response:
    return _page("favicon.svg")


def _metrics() -> Response:
    return Response(_server().sessions.metrics_text(), content_type=METRICS_TYPE)


def _login() -> Response:
    token = _json_object().get("token")
    guard = _server().guard
    if not isinstance(token, str) or not guard.knows(token):
        raise ServerError("This is not the server's token", 401)
    response = Response("{}", content_type="application/json")
    is_secure = request.is_secure or _server().settings.api_url.startswith("https:")
    response.set_cookie(COOKIE, guard.cookie_value(), httponly=True, samesite="Strict", secure=is_secure)
    return response


def _leave(session_id: str) -> Response:
    _server().sessions.leave(session_id)
    return Response(status=204)


def _progress(key: str) -> Response:
    progress = _server().videos.jobs.progress(key)
    if progress is None:
        raise NotFound("Nothing of this name is being done")
    response = Response(json.dumps(progress.as_json()), content_type="application/json")
    response.cache_control.no_store = True
    return response


def _download(session_id: str) -> Response:
    server, environ = _server(), request.environ
    made = server.downloads.make(
        server.sessions.get(session_id),
        request.args.get("format", ""),
        request.args.get("as"),
        key=_upload_key(),
        gone=lambda: connection.is_gone(environ),
    )
    response = send_file(made.file, made.type, as_attachment=True, download_name=made.name)
    response.content_length = made.size
    response.cache_control.no_store = True
    return response
