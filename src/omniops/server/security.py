"""Who is served: names, pages and tokens; and the headers that tell browsers so."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from urllib.parse import urlsplit

from flask import Request, Response

from omniops.server.errors import Forbidden, ServerError
from omniops.server.settings import FRONT_END_ORIGINS, Settings

COOKIE = "omniops"
METHODS = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"

# Served to who has no token yet: what shows the page that asks for it, and what watches the server.
_OPEN_PATHS = re.compile(r"/|/favicon\.ico|/page/.*|/login|/healthy")
_HEADER_NAMES = re.compile(r"[A-Za-z0-9_\-]+(?:, ?[A-Za-z0-9_\-]+)*")
_PROXY_HEADERS = ("X-Forwarded-For", "X-Real-Ip", "Forwarded")
_PREFLIGHT_SECONDS = 600


class Guard:
    """Lets a request in or refuses it.

    - The Host header has to be an address, this machine's, the API_URL's or one of ``settings.hosts``: a page whose
      name was made to point at this machine (DNS rebinding) has another.
    - The Origin, if a browser sends one, has to be the server's own, the official front end's, the API_URL's or one of
      ``settings.origins`` for anything that changes something, and for its page to be allowed to read the answer.
    - Where a token is set, everybody needs it. A proxy on this machine makes everybody look as if on this machine.
    - Without one, only this machine is served, unless ``settings.insecure``.
    """

    def __init__(self, settings: Settings) -> None:
        api = urlsplit(settings.api_url)
        self._token = None if settings.token is None else settings.token.encode()
        self._insecure = settings.insecure
        self._hosts = {host.lower() for host in settings.hosts}
        self._origins = {origin.rstrip("/").lower() for origin in settings.origins} | set(FRONT_END_ORIGINS)
        if api.netloc:
            self._hosts.add((api.hostname or "").lower())
            self._origins.add(f"{api.scheme}://{api.netloc}".lower())

    def check(self, request: Request) -> None:
        """Returns for a request that may be answered.

        Raises:
            ServerError: 401 or 403, that says what is missing.
        """
        host = request.environ.get("HTTP_HOST", "").lower()
        name = _host_name(host)
        if not (_is_address(name) or name == "localhost" or name in self._hosts or host in self._hosts):
            raise Forbidden("The server does not know itself by this name; whoever runs it can add it to its hosts")
        if request.path != "/login" or request.method != "POST":
            self._check_token(request, name)
        if request.method not in ("GET", "HEAD", "OPTIONS") and self._is_foreign(request):
            raise Forbidden("Pages of this origin may not use the server; whoever runs it can add it to its origins")

    def _check_token(self, request: Request, host_name: str) -> None:
        if self._insecure or request.method == "OPTIONS" or _OPEN_PATHS.fullmatch(request.path):
            return
        if self._token is not None:
            if not self._has_token(request):
                raise ServerError("The server asks for its token", 401)
        elif not (_is_loopback(host_name) and _is_loopback(request.remote_addr or "") and not _is_proxied(request)):
            raise Forbidden("The server serves its own machine only; whoever runs it can set a token for others")

    def _has_token(self, request: Request) -> bool:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.knows(token.strip()):
            return True
        cookie = request.cookies.get(COOKIE, "")
        return hmac.compare_digest(cookie.encode(), self.cookie_value().encode())

    def knows(self, token: str) -> bool:
        """Whether ``token`` is the server's, compared in constant time."""
        # Digests have one length, so that not even the token's is given away.
        return hmac.compare_digest(
            hashlib.sha256(token.encode(errors="replace")).digest(), hashlib.sha256(self._token or b"").digest()
        ) and (self._token is not None)

    def cookie_value(self) -> str:
        """What the cookie holds instead of the token."""
        return hmac.new(self._token or b"", b"omniops cookie", hashlib.sha256).hexdigest()

    def _is_foreign(self, request: Request) -> bool:
        if "Origin" in request.headers:
            return self.allowed_origin(request) is None
        return request.headers.get("Sec-Fetch-Site") == "cross-site"

    def allowed_origin(self, request: Request) -> str | None:
        """The request's origin, if its pages may read answers; None where there is none, too."""
        origin = request.headers.get("Origin", "")
        url = urlsplit(origin.lower())
        is_own = url.scheme in ("http", "https") and url.netloc == request.environ.get("HTTP_HOST", "").lower()
        return origin if origin and (is_own or origin.lower() in self._origins) else None

    def add_cors(self, request: Request, response: Response) -> None:
        """The headers that let the page of an allowed origin read ``response``."""
        response.vary.add("Origin")
        origin = self.allowed_origin(request)
        if origin is None:
            return
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Allow-Credentials"] = "true"
        if request.method == "OPTIONS":
            asked = request.headers.get("Access-Control-Request-Headers", "")
            if _HEADER_NAMES.fullmatch(asked):
                response.headers["Access-Control-Allow-Headers"] = asked
            response.headers["Access-Control-Allow-Methods"] = METHODS
            response.headers["Access-Control-Max-Age"] = str(_PREFLIGHT_SECONDS)
        else:
            response.headers["Access-Control-Expose-Headers"] = "Content-Disposition"


def page_headers(settings: Settings) -> dict[str, str]:
    """The headers of the page: it loads from the server alone and is in nobody's frame."""
    api = urlsplit(settings.api_url)
    own = f"'self' {api.scheme}://{api.netloc}" if api.netloc else "'self'"
    policy = {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": f"{own} blob: data:",
        "media-src": f"{own} blob:",
        "connect-src": f"{own} blob:",
        "worker-src": "'self'",
        "manifest-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {sources}" for name, sources in policy.items()),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
        "X-Frame-Options": "DENY",
    }


def _host_name(host: str) -> str:
    """The name or address in a Host header, without port and brackets."""
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9_.\-]+)(?::\d*)?", host)
    return match[1].strip("[]").rstrip(".") if match else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1, of a socket for both families
    return (mapped or address).is_loopback


def _is_proxied(request: Request) -> bool:
    """Whether a proxy says that it asks for another machine."""
    clients = [text.strip() for name in _PROXY_HEADERS for text in request.headers.get(name, "").split(",")]
    return any(client and not _is_loopback(client) for client in clients)
