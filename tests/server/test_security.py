import pytest
from server.client import ORIGIN, Api

from omniops.server import security

OTHER_MACHINE = {"REMOTE_ADDR": "192.168.1.20"}
MISS_TOKEN = "The server asks for its token"
MISS_HOST = "The server does not know itself by this name; whoever runs it can add it to its hosts"
MISS_MACHINE = "The server serves its own machine only; whoever runs it can set a token for others"
MISS_ORIGIN = "Pages of this origin may not use the server; whoever runs it can add it to its origins"


def error_of(response):
    return response.status_code, response.json["error"]["message"]


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:7263", "127.0.0.1:9", "[::1]", "[::1]:7263", "LOCALHOST", "localhost."]
)
def test_this_machine_by_its_names(client, host):
    assert client.get("/metrics", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:7263",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "a b",
        "[::1",
        "@localhost",
    ],
)
def test_a_name_that_was_made_to_point_here_is_refused(client, host):
    assert error_of(client.get("/metrics", headers={"Host": host})) == (403, MISS_HOST)
    assert error_of(client.get("/", headers={"Host": host})) == (403, MISS_HOST)


@pytest.mark.parametrize(
    "settings",
    [{"hosts": ("demo.example",)}, {"hosts": ("demo.example:8000",)}, {"api_url": "https://demo.example:8000"}],
)
def test_a_name_of_the_settings_is_known(make_app, settings):
    client = make_app(insecure=True, **settings).test_client()
    assert client.get("/metrics", headers={"Host": "demo.example:8000"}).status_code == 200
    assert client.get("/metrics", headers={"Host": "other.example:8000"}).status_code == 403


@pytest.mark.parametrize(
    ("environ", "headers"),
    [
        (OTHER_MACHINE, {}),
        ({"REMOTE_ADDR": "::ffff:10.0.0.1"}, {}),
        ({}, {"Host": "192.168.1.5:7263"}),
        ({}, {"X-Forwarded-For": "203.0.113.9"}),
        ({}, {"X-Forwarded-For": "127.0.0.1, 203.0.113.9"}),
        ({}, {"X-Real-IP": "203.0.113.9"}),
        ({}, {"Forwarded": "for=203.0.113.9"}),
    ],
)
def test_without_a_token_other_machines_are_refused(client, make_app, environ, headers):
    assert error_of(client.get("/metrics", headers=headers, environ_overrides=environ)) == (403, MISS_MACHINE)
    insecure = make_app(insecure=True).test_client()
    assert insecure.get("/metrics", headers=headers, environ_overrides=environ).status_code == 200


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.5", "::1", "::ffff:127.0.0.1"])
def test_this_machine_by_its_addresses(client, address):
    assert client.get("/metrics", environ_overrides={"REMOTE_ADDR": address}).status_code == 200


@pytest.mark.parametrize("environ", [{}, OTHER_MACHINE])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/metrics"),
        ("GET", "/gallery/clip.mp4"),
        ("POST", "/graphql"),
        ("POST", "/propagate_in_video"),
        ("GET", "/downloads/1"),
        ("GET", "/progress/1"),
        ("POST", "/sessions/1/leave"),
        ("GET", "/nowhere"),
    ],
)
def test_where_there_is_a_token_everybody_needs_it(make_app, environ, method, path):
    client = make_app(token="secret").test_client()
    response = client.open(path, method=method, environ_overrides=environ)
    assert response.status_code == 401
    assert MISS_TOKEN in response.text
    assert response.headers["WWW-Authenticate"] == "Bearer"
    for wrong in ("Bearer wrong", "Bearer", "Bearer secre", "Bearer secrets", "Basic secret", "secret"):
        headers = {"Authorization": wrong}
        assert client.open(path, method=method, headers=headers, environ_overrides=environ).status_code == 401
    right = client.open(path, method=method, headers={"Authorization": "bearer secret"}, environ_overrides=environ)
    assert right.status_code != 401


@pytest.mark.parametrize("path", ["/healthy", "/", "/page/favicon.svg"])
def test_the_page_that_asks_for_the_token_comes_without(make_app, path):
    client = make_app(token="secret").test_client()
    assert client.get(path, environ_overrides=OTHER_MACHINE).status_code == 200
    assert client.options("/graphql", headers={"Origin": ORIGIN}).status_code == 200


def test_logging_in_sets_a_cookie_that_no_script_and_no_other_site_has(make_app):
    client = make_app(token="sécret").test_client()
    assert error_of(client.post("/login", json={"token": "wrong"})) == (401, "This is not the server's token")
    assert client.get("/metrics").status_code == 401
    response = client.post("/login", json={"token": "sécret"})
    cookie = response.headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    assert "cret" not in cookie
    assert client.get("/metrics").status_code == 200
    client.set_cookie("omniops", "0" * 64)
    assert client.get("/metrics").status_code == 401


def test_the_cookie_is_for_https_alone_where_the_server_is(make_app):
    client = make_app(token="secret", api_url="https://demo.example").test_client()
    cookie = client.post("/login", json={"token": "secret"}).headers["Set-Cookie"]
    assert "Secure" in cookie.split("; ")


def test_another_servers_cookie_is_not_ours(make_app):
    one, other = (make_app(token=token).test_client() for token in ("one", "other"))
    one.post("/login", json={"token": "one"})
    other.set_cookie("omniops", one.get_cookie("omniops").value)
    assert other.get("/metrics").status_code == 401


def test_there_is_nothing_to_log_in_to_without_a_token(client):
    assert client.post("/login", json={"token": ""}).status_code == 401


def test_tokens_are_compared_in_constant_time(make_app, monkeypatch):
    guard = make_app(token="secret").extensions["omniops"].guard
    compared = []

    def compare(one, other):
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(security.hmac, "compare_digest", compare)
    assert guard.knows("secret")
    assert not guard.knows("s")
    assert compared == [(32, 32), (32, 32)]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://localhost:1234", "null", "http://localhost:72620", "file://"]
)
def test_a_foreign_page_changes_and_reads_nothing(client, origin):
    api = Api(client, origin)
    for response in (api.post("{ __typename }"), api.post_propagate("1"), api.post_upload("a.mp4", b"")):
        assert response.status_code == 403
        assert MISS_ORIGIN in response.text
        assert "Access-Control-Allow-Origin" not in response.headers
    assert client.post("/sessions/1/leave", headers=api.headers).status_code == 403
    assert client.post("/login", json={}, headers=api.headers).status_code == 403
    read = client.get("/gallery/clip.mp4", headers=api.headers)
    assert "Access-Control-Allow-Origin" not in read.headers
    assert "Origin" in read.headers["Vary"]


def test_a_foreign_page_that_hides_its_origin_is_refused(client):
    hidden = {"Sec-Fetch-Site": "cross-site"}
    assert client.post("/graphql", json={"query": "{ __typename }"}, headers=hidden).status_code == 403
    assert client.post("/graphql", json={"query": "{ __typename }"}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost:7262",
        "http://127.0.0.1:7262",
        "http://localhost",
        "https://mine.example",
        "https://api.example",
    ],
)
def test_allowed_origins_are_echoed(make_app, origin):
    client = make_app(origins=("https://mine.example/",), api_url="https://api.example/").test_client()
    response = Api(client, origin).post("{ __typename }")
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Origin"] == origin


def test_the_own_origin_is_the_host_that_was_asked(client):
    asked = {"Host": "127.0.0.1:5000", "Origin": "http://127.0.0.1:5000"}
    assert client.post("/graphql", json={"query": "{ __typename }"}, headers=asked).status_code == 200
    asked["Origin"] = "http://127.0.0.1:5001"
    assert client.post("/graphql", json={"query": "{ __typename }"}, headers=asked).status_code == 403


def test_a_preflight_echoes_names_of_headers_only(client):
    asked = {"Origin": ORIGIN, "Access-Control-Request-Headers": "content-type; evil"}
    assert "Access-Control-Allow-Headers" not in client.options("/graphql", headers=asked).headers


def test_the_page_loads_from_here_and_is_in_nobodys_frame(client):
    headers = client.get("/").headers
    policy = dict(directive.split(" ", 1) for directive in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert not any("unsafe" in sources for sources in policy.values())
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Opener-Policy"] == headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize(
    "path", ["/healthy", "/nowhere", "/gallery/clip.mp4", "/graphql", "/page/nothing.js", "/metrics"]
)
def test_everything_else_is_inert(client, path):
    headers = client.get(path).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    wanted = "cross-origin" if path.startswith("/gallery") else "same-origin"
    assert headers["Cross-Origin-Resource-Policy"] == wanted


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"wsgi.multiprocess": True},
            "The server runs in several processes and cannot: start gunicorn with --workers 1",
        ),
        (
            {"wsgi.multithread": False},
            "The server runs in one thread and cannot: start gunicorn with --worker-class gthread --threads 8",
        ),
    ],
)
@pytest.mark.parametrize("path", ["/healthy", "/"])
def test_a_server_that_was_started_wrongly_says_so(client, environ, message, path):
    assert error_of(client.get(path, environ_overrides=environ)) == (503, message)
