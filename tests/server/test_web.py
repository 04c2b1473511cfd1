import base64
import hashlib
import io
import os
import re
import shutil
import socket
import threading
import tracemalloc
from importlib.resources import files

import pytest
from PIL import Image
from server.client import ORIGIN, Api, ApiError
from server.conftest import Client

import omniops.server
from omniops.sam2 import rle
from omniops.server import connection
from omniops.server.predictors import Predictor
from omniops.server.settings import Settings


def test_a_small_model_in_this_process_does_all_of_it(data):
    from omniops.sam2 import load
    from omniops.server.inference import Inference

    def make():
        return Inference(load("tiny", "cpu", "float32", image_size=64, random_weights=True))

    app = omniops.server.create_app(Settings(data=data), predictors=[Predictor(make)])
    app.test_client_class = Client
    api = Api(app.test_client())
    session = api.start_session(api.default_video()["path"])
    clicked = api.add_points(session, 0, 0, [[0.5, 0.5]])
    assert clicked["rleMaskList"][0]["rleMask"]["size"] == [24, 32]
    tracked = [frame["frame_index"] for frame in api.propagate(session, 8)]
    assert tracked == [8, 9, *range(8, -1, -1)]
    chunks = iter(api.post_propagate(session).response)
    next(chunks)
    assert api.cancel(session) is True
    assert list(chunks) == []
    second = api.add_points(session, 3, 5, [[0.2, 0.2], [0.9, 0.9]], [1, 0])
    assert [mask["objectId"] for mask in second["rleMaskList"]] == [0, 5]
    cleared = api.clear_frame(session, 3, 5)["rleMaskList"]
    assert [mask["objectId"] for mask in cleared] == [0, 5]
    assert not rle.decode(cleared[1]["rleMask"]).any()
    with pytest.raises(ApiError, match="no frame 99"):
        api.add_points(session, 99, 6, [[0.5, 0.5]])
    tracked = list(api.propagate(session))  # neither the object without points nor the click that failed poisons it
    assert all([result["object_id"] for result in frame["results"]] == [0, 5] for frame in tracked)
    assert [[mask["objectId"] for mask in frame["rleMaskList"]] for frame in api.remove_object(session, 0)] == [[5]]
    assert api.remove_object(session, 5) == api.remove_object(session, 7) == []
    assert api.clear_video(session) is True
    assert api.post_propagate(session).status_code == 400
    assert api.close_session(session) is True
    for kind in ("jpeg", "png"):
        Image.new("RGB", (40, 30)).save(data / "gallery" / f"photo.{kind}")
        session = api.start_session(f"gallery/photo.{kind}")
        query = "query Q($id: String!) { session(sessionId: $id) { isPicture numFrames fps width height } }"
        assert api.ask(query, {"id": session})["session"] == {
            "isPicture": True,
            "numFrames": 1,
            "fps": None,
            "width": 40,
            "height": 30,
        }
        assert api.add_points(session, 0, 0, [[0.5, 0.5]])["rleMaskList"][0]["rleMask"]["size"] == [30, 40]
    app.extensions["omniops"].sessions.shutdown()


def test_the_environment_makes_the_application(data, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(data))
    monkeypatch.setenv("DEFAULT_VIDEO_PATH", "gallery/second.mp4")
    shutil.copy(data / "gallery" / "clip.mp4", data / "gallery" / "second.mp4")
    app = omniops.server.app()
    app.test_client_class = Client
    assert Api(app.test_client()).default_video()["path"] == "gallery/second.mp4"


def test_making_the_application_starts_nothing(make_app, inference):
    before = threading.active_count()
    client = make_app().test_client()
    assert client.get("/").status_code == 200
    assert client.get("/healthy").status_code == 200
    assert inference.calls == []
    assert threading.active_count() == before


def test_without_flask_it_says_what_to_install(monkeypatch):
    def missing(name, *args, **kwargs):
        if name == "flask" or name.startswith("flask."):
            raise ModuleNotFoundError("No module named 'flask'", name="flask")
        return original(name, *args, **kwargs)

    original = __import__
    monkeypatch.delitem(omniops.server.__dict__, "web")
    monkeypatch.delitem(__import__("sys").modules, "omniops.server.web")
    monkeypatch.setattr("builtins.__import__", missing)
    with pytest.raises(ImportError, match=r"^omniops.server needs flask: pip install 'omniops\[server\]'$"):
        omniops.server.create_app(Settings())


def test_the_page_and_all_of_its_files(client):
    response = client.get("/")
    assert response.content_type == "text/html; charset=utf-8"
    assert response.text.lower().startswith("<!doctype html>")
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
    for file in (files("omniops.server") / "page").iterdir():
        response = client.get(f"/page/{file.name}")
        assert response.data == file.read_bytes()
        assert response.content_type == f"{types[file.suffix]}; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-cache"
        assert "Content-Security-Policy" in response.headers
        known = client.get(f"/page/{file.name}", headers={"If-None-Match": response.headers["ETag"]})
        assert (known.status_code, known.data) == (304, b"")
    assert client.get("/favicon.ico").content_type == "image/svg+xml; charset=utf-8"


def test_metrics(api, client):
    api.start_session("gallery/clip.mp4")
    response = client.get("/metrics")
    assert response.content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert "\nomniops_sessions 1\n" in response.text


def test_leaving_ends_a_session_unless_it_is_used_again(app, api, client):
    left, kept = (api.start_session("gallery/clip.mp4") for _ in range(2))
    for session in (left, kept):
        # As navigator.sendBeacon sends it.
        response = client.post(f"/sessions/{session}/leave", headers={"Origin": "http://localhost"})
        assert (response.status_code, response.data) == (204, b"")
    api.add_points(kept, 0, 0, [[0.5, 0.5]])
    sessions = app.extensions["omniops"].sessions
    now = sessions.clock()
    sessions.clock = lambda: now + 61
    sessions.sweep()
    assert len(sessions) == 1
    assert client.post("/sessions/unknown/leave").status_code == 204
    assert api.cancel(kept) is True


def test_progress_is_reported_by_its_key(app, client):
    jobs = app.extensions["omniops"].videos.jobs
    jobs.announce("a-key", "Converting").update(3, 10)
    response = client.get("/progress/a-key")
    assert response.json == {"done": 3, "total": 10, "what": "Converting"}
    assert response.headers["Cache-Control"] == "no-store"


def test_a_client_that_is_gone_is_noticed():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        environ = {"gunicorn.socket": ours}
        assert not connection.is_gone(environ)
        theirs.send(b"the next request")
        assert not connection.is_gone(environ)
        assert ours.recv(100) == b"the next request"
        theirs.close()
        assert connection.is_gone(environ)
    assert connection.is_gone(environ)
    assert not connection.is_gone({})


def test_a_client_that_stalls_is_dropped(make_app):
    client = make_app(send_timeout=0.1).test_client()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client.get("/healthy", environ_overrides={"gunicorn.socket": ours})
        with pytest.raises(TimeoutError):
            ours.sendall(b"x" * 10_000_000)


def test_what_is_too_large_is_read_to_its_end_but_no_further_than_an_upload_may_be(make_app):
    app = make_app(max_upload_bytes=20_000_000)
    for size, read in ((9_000_000, 9_000_000), (50_000_000, 20_000_000)):
        body = io.BytesIO(b"x" * size)
        headers = {"content_length": size, "content_type": "application/json"}
        assert app.test_client().post("/graphql", input_stream=body, **headers).status_code == 413
        assert body.tell() == read


@pytest.mark.parametrize("placeholder", ["official", None])
def test_an_uploaded_video_is_one_like_those_of_the_gallery(api, client, clip, placeholder):
    video = api.upload("a clip.mp4", clip.read_bytes(), placeholder=placeholder)
    name = re.fullmatch(r"uploads/([0-9a-f]{64})\.mp4", video["path"])[1]
    assert video == {
        "id": base64.b64encode(f"Video:{video['path']}".encode()).decode(),
        "path": video["path"],
        "posterPath": None,
        "url": f"http://localhost/uploads/{name}.mp4",
        "posterUrl": f"http://localhost/posters/{name}.jpg",
        "height": 24,
        "width": 32,
    }
    video_response = client.get(video["url"])
    assert video_response.content_type == "video/mp4"
    assert hashlib.sha256(video_response.data).hexdigest() == name
    poster = client.get(video["posterUrl"])
    assert poster.content_type == "image/jpeg"
    assert Image.open(io.BytesIO(poster.data)).size == (32, 24)
    assert api.upload("another name.mov", clip.read_bytes(), "video/quicktime") == video
    session = api.start_session(video["path"])
    assert api.add_points(session, 0, 0, [[0.5, 0.5]])


def test_an_uploaded_picture(api, client):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "PNG")
    picture = api.upload("photo.png", file.getvalue(), "image/png", "uploadPicture")
    assert (picture["width"], picture["height"], picture["posterPath"]) == (40, 30, None)
    assert client.get(picture["posterUrl"]).content_type == "image/jpeg"
    assert client.get(picture["url"]).content_type in ("image/png", "image/jpeg")
    assert api.start_session(picture["path"])


def test_an_upload_goes_to_the_disk_as_it_comes(make_app, data, monkeypatch):
    app = make_app()
    sizes = []

    class Body(io.BytesIO):
        def readinto(self, buffer):
            sizes.extend(path.stat().st_size for path in (data / "uploads").glob(".incoming-*"))
            return super().readinto(buffer)

    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
    body = head + b"x" * 3_000_000 + b"\r\n--x--\r\n"
    headers = {"content_length": len(body), "content_type": "multipart/form-data; boundary=x"}
    tracemalloc.start()
    app.test_client().post("/graphql?upload=key", input_stream=Body(body), **headers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(sizes) > 2_000_000
    assert peak < 1_500_000
    assert list((data / "uploads").iterdir()) == []
    assert app.test_client().get("/progress/key").json["what"] == "receiving"


def test_the_progress_of_an_upload_has_its_key(api, client, clip):
    for options in ({"query_string": {"upload": "one"}}, {"headers": {"Upload": "two"}}):
        assert api.upload("clip.mp4", clip.read_bytes(), **options)
    for key in ("one", "two"):
        progress = client.get(f"/progress/{key}").json
        assert progress["done"] == 10


def test_only_so_many_uploads_come_at_once(make_app, clip):
    app = make_app(max_streams=2)
    api = Api(app.test_client())
    receiving = app.extensions["omniops"].receiving
    assert receiving.acquire(blocking=False)
    response = api.post_upload("clip.mp4", clip.read_bytes())
    assert response.status_code == 503
    words = "The server receives as many uploads as it can: try again in a minute"
    assert response.json["errors"] == [{"message": words}]
    receiving.release()
    for _ in range(3):  # neither success nor failure keeps a slot
        assert api.upload("clip.mp4", clip.read_bytes())
        with pytest.raises(ApiError):
            api.upload("clip.mp4", b"no video")


def test_a_client_that_leaves_ends_its_upload(api, clip, data, monkeypatch):
    def transcode(*args, progress, **more):
        while True:
            progress.check()

    monkeypatch.setattr("omniops.server.uploads.transcode", transcode)
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(ApiError, match=r"It was cancelled\."):
        api.upload("clip.mp4", clip.read_bytes(), environ_overrides={"gunicorn.socket": ours})
    assert list((data / "uploads").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind", "sent_name", "sent_kind"),
    [
        ("photo.jpeg", "JPEG", "photo.jpeg", "image/jpeg"),
        ("photo.jfif", "JPEG", "photo.jfif", "image/jpeg"),
        ("photo.png", "PNG", "photo.png", "image/png"),
        ("photo.bmp", "BMP", "photo.png", "image/png"),
        ("photo.tif", "TIFF", "photo.png", "image/png"),
    ],
)
def test_pictures_are_sent_as_what_they_are(client, data, name, kind, sent_name, sent_kind):
    Image.new("RGB", (40, 30)).save(data / "gallery" / name, kind)
    response = client.get(f"/gallery/{name}")
    assert response.content_type == sent_kind
    assert response.headers["Content-Disposition"] == f"inline; filename={sent_name}"
    signature = b"\x89PNG" if sent_kind == "image/png" else b"\xff\xd8"
    assert response.data.startswith(signature)


def test_the_poster_of_an_upload_goes_with_it(app, api, client, clip, data):
    video = api.upload("clip.mp4", clip.read_bytes())
    assert client.get(video["posterUrl"]).status_code == 200
    (upload,) = (data / "uploads").iterdir()
    session = api.start_session(video["path"])
    os.utime(upload, (0, 0))
    app.extensions["omniops"].uploads.sweep(keep="")
    assert upload.exists()  # for the session is open
    api.close_session(session)
    app.extensions["omniops"].uploads.sweep(keep="")
    assert not list((data / "uploads").iterdir())
    assert not list((data / "posters").iterdir())
    assert client.get(video["posterUrl"]).status_code == 404


@pytest.fixture
def tracked(api):
    """A session with a named object that was tracked."""
    session = api.start_session("gallery/clip.mp4")
    api.add_points(session, 0, 3, [[0.5, 0.5]])
    api.change("renameObject", "{ success }", sessionId=session, objectId=3, name="Ball")
    assert len(list(api.propagate(session))) == 10
    return session


@pytest.mark.parametrize(
    ("query", "kind", "name", "signature"),
    [
        ("format=coco", "application/json", "clip-coco.json", rb"\["),
        ("format=png", "application/zip", "clip-png.zip", b"PK"),
        ("format=overlay", "video/mp4", "clip-overlay.mp4", b"....ftyp"),
        ("format=overlay&as=webm", "video/webm", "clip-overlay.webm", b"\x1aE\xdf\xa3"),
        ("format=cutout&as=webm", "video/webm", "clip-cutout.webm", b"\x1aE\xdf\xa3"),
    ],
)
def test_what_was_found_is_downloaded(client, tracked, data, query, kind, name, signature):
    response = client.get(f"/downloads/{tracked}?{query}&upload=key", headers={"Origin": ORIGIN})
    assert response.status_code == 200
    assert response.content_type == kind
    assert response.headers["Content-Disposition"] == f"attachment; filename={name}"
    assert response.headers["Access-Control-Expose-Headers"] == "Content-Disposition"
    assert int(response.headers["Content-Length"]) == len(response.data)
    assert re.match(signature, response.data)
    response.close()
    assert not list((data / "downloads").iterdir())
    assert client.get("/progress/key").json["done"] == 10


def test_downloaded_masks_are_those_of_the_session(client, api, tracked):
    records = client.get(f"/downloads/{tracked}?format=coco").json
    assert [record["frame"] for record in records] == list(range(10))
    assert {(record["id"], record["name"]) for record in records} == {(3, "Ball")}
    query = "query Q($id: String!) { session(sessionId: $id) { frames { rleMaskList { rleMask { counts } } } } }"
    frames = api.ask(query, {"id": tracked})["session"]["frames"]
    counts = [frame["rleMaskList"][0]["rleMask"]["counts"] for frame in frames]
    assert [record["segmentation"]["counts"] for record in records] == counts


def test_a_download_that_nobody_reads_to_its_end_is_removed(client, tracked, data):
    response = client.get(f"/downloads/{tracked}?format=png", buffered=False)
    next(iter(response.response))
    response.close()
    assert not list((data / "downloads").iterdir())
