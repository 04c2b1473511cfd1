"""What is wrong with a request or a file is named, with the right status, and nothing of the server is given away."""

import io
import json

import pytest
from PIL import Image
from server.client import ORIGIN, Api, ApiError

START = "mutation M($input: StartSessionInput!) { startSession(input: $input) { sessionId } }"
NO_VIDEO = "There is no such video. It may have been removed."
NO_JSON = "Unable to parse request body as JSON"
NO_SESSION = "Cannot find session ID; it might have expired"
TOO_LARGE = "The request is larger than the server takes"
NOTHING = "There is nothing at this address"
JSON = "application/json"


def refused(response, status, message):
    """See that the answer is this error, in JSON that the official front end's page can read, and nothing else."""
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert (response.status_code, response.content_type) == (status, JSON), response.text
    body = response.json
    if "errors" in body:
        assert body["data"] is None
        assert [error["message"] for error in body["errors"]] == [message]
    else:
        assert body == {"error": {"message": message}}


def from_page(client, path, method="GET", **more):
    headers = {"Origin": ORIGIN, **more.pop("headers", {})}
    return client.open(path, method=method, headers=headers, **more)


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/nowhere", 404, NOTHING),
        ("GET", "/page/none.js", 404, NOTHING),
        ("GET", "/page/../web.py", 404, NOTHING),
        ("GET", "/page/%2e%2e/web.py", 404, NOTHING),
        ("GET", "/page/", 404, NOTHING),
        ("GET", "/gallery/", 404, NOTHING),
        ("GET", "/gallery/none.mp4", 404, NO_VIDEO),
        ("GET", "/gallery/../gallery/clip.mp4", 404, NO_VIDEO),
        ("GET", "/gallery/%2e%2e/%2e%2e/outside.mp4", 404, NO_VIDEO),
        ("GET", "/gallery/..%2f..%2foutside.mp4", 404, NO_VIDEO),
        ("GET", "/gallery//etc/passwd", 404, NOTHING),
        ("GET", "/gallery/clip.mp4%00.jpg", 404, NO_VIDEO),
        ("GET", "/gallery/link.mp4", 404, NO_VIDEO),
        ("GET", "/gallery/folder/clip.mp4", 404, NO_VIDEO),
        ("GET", "/uploads/none.mp4", 404, NO_VIDEO),
        ("GET", "/uploads/" + "0" * 64 + ".mp4", 404, NO_VIDEO),
        ("GET", "/uploads/../gallery/clip.mp4", 404, NO_VIDEO),
        ("GET", "/posters/none.jpg", 404, "There is no such poster."),
        ("GET", "/posters/" + "0" * 32 + ".jpg", 404, "There is no such poster."),
        ("GET", "/progress/none", 404, "Nothing of this name is being done"),
        ("GET", "/downloads/none?format=coco", 404, NO_SESSION),
        ("GET", "/propagate_in_video", 405, "This address does not take this method"),
        ("PUT", "/graphql", 405, "This address does not take this method"),
        ("POST", "/gallery/clip.mp4", 405, "This address does not take this method"),
        ("DELETE", "/", 405, "This address does not take this method"),
    ],
)
def test_addresses(client, data, method, path, status, message):
    (data.parent / "outside.mp4").write_bytes((data / "gallery" / "clip.mp4").read_bytes())
    (data / "gallery" / "link.mp4").symlink_to(data.parent / "outside.mp4")
    (data / "gallery" / "folder").symlink_to(data.parent)
    (data / "clip.mp4").write_bytes((data / "gallery" / "clip.mp4").read_bytes())
    response = from_page(client, path, method)
    refused(response, status, message)
    if status == 405:
        assert response.headers["Allow"]


def test_a_range_beyond_the_end(client):
    response = from_page(client, "/gallery/clip.mp4", headers={"Range": "bytes=9999999-"})
    refused(response, 416, "The file has no such range")
    assert response.headers["Content-Range"].startswith("bytes */")


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"", JSON, NO_JSON),
        (b"{", JSON, NO_JSON),
        (b"\xff\xfe", JSON, NO_JSON),
        (b"[" * 100_000, JSON, NO_JSON),
        (b'"text"', JSON, NO_JSON),
        (b"null", JSON, NO_JSON),
        (b"[]", JSON, "Batching is not enabled"),
        (b'[{"query": "{ __typename }"}]', JSON, "Batching is not enabled"),
        (b"{}", JSON, "No GraphQL query found in the request"),
        (b'{"query": ""}', JSON, "No GraphQL query found in the request"),
        (b'{"query": 1}', JSON, "No GraphQL query found in the request"),
        (
            b'{"query": "{ __typename }", "variables": [1]}',
            JSON,
            "The GraphQL operation's `variables` must be an object or null, if provided.",
        ),
        (
            b'{"query": "{ __typename }", "operationName": 1}',
            JSON,
            "The GraphQL operation's `operationName` must be a string or null, if provided.",
        ),
        (b'{"query": "query A { __typename }", "operationName": "B"}', JSON, 'Unknown operation named "B".'),
        (b'{"query": "subscription { a }"}', JSON, "subscriptions are not allowed when using POST"),
        (b'{"query": "fragment A on Query { __typename }"}', JSON, "Can't get GraphQL operation type"),
        (b'{"query": "{ __typename }"}', "text/plain", "Unsupported content type"),
        (b"query=1", "application/x-www-form-urlencoded", "Unsupported content type"),
        (b"query=1", "", "Unsupported content type"),
    ],
)
def test_bodies_that_are_no_graphql(client, body, kind, message):
    response = from_page(client, "/graphql", "POST", data=body, content_type=kind)
    assert (response.status_code, response.text) == (400, message)
    assert response.content_type.startswith("text/plain")
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("{", "Syntax Error: Expected Name, found <EOF>."),
        ("\u00a7", "Syntax Error: Unexpected character: U+00A7."),
        ("{ ping }", "Cannot query field 'ping' on type 'Query'."),
        ("mutation { closeSession { success } }", "of type 'CloseSessionInput!' is required, but it was not provided."),
    ],
)
def test_queries(client, query, message):
    response = from_page(client, "/graphql", "POST", json={"query": query})
    assert (response.status_code, response.content_type) == (200, JSON)
    assert response.json["data"] is None
    assert message in response.json["errors"][0]["message"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../outside.mp4", NO_VIDEO),
        ("gallery/../../outside.mp4", NO_VIDEO),
        ("/etc/passwd", NO_VIDEO),
        ("gallery/link.mp4", NO_VIDEO),
        ("gallery", NO_VIDEO),
        ("gallery/", NO_VIDEO),
        ("", NO_VIDEO),
        ("gallery/\0.mp4", NO_VIDEO),
        ("gallery/" + "x" * 5000, NO_VIDEO),
        ("file:///etc/passwd", NO_VIDEO),
        ("http://localhost/gallery/clip.mp4", NO_VIDEO),
        ("gallery\\clip.mp4", NO_VIDEO),
        ("gallery/CLIP.MP4", NO_VIDEO),
        ("uploads/../gallery/clip.mp4", NO_VIDEO),
        ("posters/clip.jpg", NO_VIDEO),
    ],
)
def test_paths_of_sessions(api, data, path, message):
    (data.parent / "outside.mp4").write_bytes((data / "gallery" / "clip.mp4").read_bytes())
    (data / "gallery" / "link.mp4").symlink_to(data.parent / "outside.mp4")
    response = api.post(START, {"input": {"path": path}})
    refused(response, 200, message)


@pytest.mark.parametrize("path", [None, 3, ["gallery/clip.mp4"], {"a": 1}])
def test_paths_of_another_type(api, path):
    with pytest.raises(ApiError, match=r"\$input.* at .*path.*String"):
        api.ask(START, {"input": {"path": path}})


OBJECT = {"frameIndex": 0, "objectId": 0}
POINTS = {**OBJECT, "points": [[0.5, 0.5]], "labels": [1], "clearOldPoints": True}


@pytest.mark.parametrize(
    ("mutation", "inputs", "message"),
    [
        ("addPoints", {**POINTS, "frameIndex": -1}, "There is no frame -1: the video has frames 0 to 9."),
        ("addPoints", {**POINTS, "frameIndex": 10}, "There is no frame 10: the video has frames 0 to 9."),
        (
            "addPoints",
            {**POINTS, "labels": [7]},
            "A label must be 1 for a point of the object or 0 for one that is not, got 7.",
        ),
        ("addPoints", {**POINTS, "labels": []}, "There must be as many labels as points, got 0 and 1."),
        ("addPoints", {**POINTS, "points": [], "labels": []}, "There is no prompt: give a point or a box."),
        ("clearPointsInFrame", {**OBJECT, "frameIndex": 99}, "There is no frame 99: the video has frames 0 to 9."),
        ("findEverything", {"frameIndex": 99}, "There is no frame 99: the video has frames 0 to 9."),
        ("renameObject", {"objectId": 0, "name": "x" * 201}, "A name has at most 200 characters, got 201."),
        (
            "addMask",
            {**OBJECT, "mask": {"size": [1, 1], "counts": "1"}},
            "The mask must be of the size of the video, [24, 32] (height, width).",
        ),
    ],
)
def test_prompts(api, mutation, inputs, message):
    session = api.start_session("gallery/clip.mp4")
    fields = {"renameObject": "{ success }", "findEverything": "{ area }"}.get(mutation, "{ frameIndex }")
    with pytest.raises(ApiError) as raised:
        api.change(mutation, fields, sessionId=session, **inputs)
    assert [error["message"] for error in raised.value.errors] == [message]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({**POINTS, "frameIndex": 1.5}, "Int cannot represent non-integer value: 1.5"),
        ({**POINTS, "frameIndex": 2**40}, "Int cannot represent non 32-bit signed integer value"),
        ({**POINTS, "frameIndex": True}, "Int cannot represent non-integer value: "),
        ({**POINTS, "points": [["a", 0]]}, "Float cannot represent non numeric value"),
        ({**POINTS, "points": [[float("nan"), 0]]}, "Float cannot represent non numeric value"),
        ({**POINTS, "points": [[float("inf"), 0]]}, "Float cannot represent non numeric value"),
        ({**POINTS, "surprise": 1}, "'surprise'"),
        (
            {k: v for k, v in POINTS.items() if k != "labels"},
            "'labels'",
        ),
    ],
)
def test_prompts_of_another_type(api, inputs, words):
    session = api.start_session("gallery/clip.mp4")
    with pytest.raises(ApiError) as raised:
        api.change("addPoints", "{ frameIndex }", sessionId=session, **inputs)
    assert words in str(raised.value)


def of_the_session(mutation):
    inputs = {
        "addPoints": POINTS,
        "addBox": {**OBJECT, "box": [0, 0, 1, 1]},
        "addMask": {**OBJECT, "mask": {"size": [24, 32], "counts": "P;"}},
        "clearPointsInFrame": OBJECT,
        "removeObject": {"objectId": 0},
        "renameObject": {"objectId": 0, "name": "a"},
        "clearPointsInVideo": {},
        "cancelPropagateInVideo": {},
        "preview": {"frameIndex": 0, "points": [[0, 0]], "labels": [1]},
        "findEverything": {"frameIndex": 0},
    }
    return inputs[mutation], "{ __typename }"


@pytest.mark.parametrize(
    "mutation",
    [
        *("addPoints", "addBox", "addMask", "clearPointsInFrame", "removeObject", "renameObject"),
        *("clearPointsInVideo", "cancelPropagateInVideo", "preview", "findEverything"),
    ],
)
def test_sessions_that_never_were_and_that_were_closed(api, mutation):
    inputs, fields = of_the_session(mutation)
    with pytest.raises(ApiError, match=f"^{NO_SESSION}$"):
        api.change(mutation, fields, sessionId="00000000-0000-0000-0000-000000000000", **inputs)
    session = api.start_session("gallery/clip.mp4")
    api.close_session(session)
    with pytest.raises(ApiError, match=r"^Cannot find session ID; it was closed$"):
        api.change(mutation, fields, sessionId=session, **inputs)


@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        (b"", JSON, 400, "The request cannot be read"),
        (b"{", JSON, 400, "The request cannot be read"),
        (b"[" * 10_000, JSON, 400, "The request cannot be read"),
        (b"[]", JSON, 400, "The request has to name its session_id, a string"),
        (b"{}", JSON, 400, "The request has to name its session_id, a string"),
        (b'{"session_id": 7}', JSON, 400, "The request has to name its session_id, a string"),
        (b'{"session_id": "none"}', JSON, 404, NO_SESSION),
        (b'{"session_id": "none", "start_frame_index": "0"}', JSON, 400, "start_frame_index has to be a whole number"),
        (b'{"session_id": "none", "start_frame_index": 1.5}', JSON, 400, "start_frame_index has to be a whole number"),
        (b'{"session_id": "none", "start_frame_index": true}', JSON, 400, "start_frame_index has to be a whole number"),
        (b"{}", "text/plain", 415, "The request has to be JSON, with Content-Type: application/json"),
        (
            b"a=1",
            "application/x-www-form-urlencoded",
            415,
            "The request has to be JSON, with Content-Type: application/json",
        ),
        (b" " * 8_000_001, JSON, 413, TOO_LARGE),
    ],
)
def test_propagations(client, body, kind, status, message):
    refused(from_page(client, "/propagate_in_video", "POST", data=body, content_type=kind), status, message)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (0, "There is nothing to track: show an object first, by points, a box or a mask."),
        (10, "There is no frame 10: the video has frames 0 to 9."),
        (-1, "There is no frame -1: the video has frames 0 to 9."),
    ],
)
def test_propagations_of_a_session(api, start, message):
    session = api.start_session("gallery/clip.mp4")
    if start:
        api.add_points(session, 0, 0, [[0.5, 0.5]])
    refused(api.post_propagate(session, start), 400, message)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'{"token": 1}', b'{"token": ["secret"]}', rb'{"token": "\ud800"}']
)
def test_logins(make_app, body):
    client = make_app(token="secret").test_client()
    response = from_page(client, "/login", "POST", data=body, content_type=JSON)
    assert response.status_code in (400, 401)
    refused(
        response,
        response.status_code,
        {400: "The request cannot be read"}.get(response.status_code, "This is not the server's token"),
    )


NOT_VALID = "not valid video file"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.mp4", b"", NOT_VALID),
        ("text.mp4", b"hello " * 1000, NOT_VALID),
        ("playlist.m3u8", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", NOT_VALID),
        ("concat.mp4", b"ffconcat version 1.0\nfile /etc/passwd\n", NOT_VALID),
        ("page.html", b"<!doctype html><script>alert(1)</script>", NOT_VALID),
        ("../../../evil.mp4", b"\0" * 1000, NOT_VALID),
    ],
)
def test_uploads_that_are_no_video(api, data, name, content, message):
    refused(api.post_upload(name, content), 200, message)
    assert list((data / "uploads").iterdir()) == []


def test_an_upload_that_ends_early(api, data, clip):
    content = clip.read_bytes()
    for length in (20, len(content) // 2):
        with pytest.raises(ApiError, match="video"):
            api.upload("cut.mp4", content[:length])
    assert list((data / "uploads").iterdir()) == []


def test_a_picture_is_no_video_and_the_other_way_round(api, clip):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    with pytest.raises(ApiError, match="video"):
        api.upload("a.mp4", file.getvalue())
    for content in (clip.read_bytes(), b"", b"<svg/>", file.getvalue()[:40]):
        with pytest.raises(ApiError) as raised:
            api.upload("a.png", content, "image/png", "uploadPicture")
        assert "/" not in str(raised.value)


def test_uploads_that_are_too_large(make_app, data, clip):
    api = Api(make_app(max_upload_bytes=1000).test_client())
    refused(api.post_upload("clip.mp4", clip.read_bytes()), 413, "It has more than the 0.001 megabytes that are taken.")
    refused(api.post_upload("clip.mp4", b"x" * 8_100_000), 413, TOO_LARGE)
    assert list((data / "uploads").iterdir()) == []


def test_pictures_of_too_many_pixels(make_app):
    api = Api(make_app(max_upload_pixels=1000).test_client())
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "PNG")
    with pytest.raises(ApiError, match="pixels"):
        api.upload("a.png", file.getvalue(), "image/png", "uploadPicture")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("startTimeSec: -1", "startTimeSec must be a number of seconds from 0 on."),
        ("durationTimeSec: 0", "durationTimeSec must be a number of seconds above 0."),
        ("durationTimeSec: -3", "durationTimeSec must be a number of seconds above 0."),
        ("startTimeSec: 1000", "transcode produced empty video; check seek time or your input video"),
    ],
)
def test_times_of_uploads(api, clip, argument, message):
    query = f"mutation M($file: Upload!) {{ uploadVideo(file: $file, {argument}) {{ path }} }}"
    form = {
        "operations": json.dumps({"query": query, "variables": {"file": None}}),
        "map": '{"file": ["variables.file"]}',
        "file": (io.BytesIO(clip.read_bytes()), "clip.mp4"),
    }
    refused(from_page(api.client, "/graphql", "POST", data=form), 200, message)


UPLOAD = json.dumps({"query": "mutation M($file: Upload!) { uploadVideo(file: $file) { path } }", "variables": {}})


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"operations": UPLOAD, "map": '{"file": ["variables.file"]}'}, "File(s) missing in form data"),
        ({"operations": "{", "map": "{}"}, NO_JSON),
        ({"operations": UPLOAD, "map": "["}, NO_JSON),
        ({"operations": UPLOAD, "map": "[]"}, "The form's map must be an object of lists"),
        ({"operations": UPLOAD, "map": '{"file": "variables.file"}'}, "The form's map must be an object of lists"),
        ({"map": "{}"}, "No GraphQL query found in the request"),
        ({}, "No GraphQL query found in the request"),
    ],
)
def test_forms(client, form, message):
    response = from_page(client, "/graphql", "POST", data=form, content_type="multipart/form-data")
    assert (response.status_code, response.text) == (400, message)


@pytest.mark.parametrize("path", ["query", "variables", "variables.a.b", "operationName", "", "variables.file.0"])
def test_files_belong_among_the_variables(client, path):
    form = {"operations": UPLOAD, "map": json.dumps({"file": [path]}), "file": (io.BytesIO(b"x"), "a.mp4")}
    response = from_page(client, "/graphql", "POST", data=form)
    assert (response.status_code, response.text) == (
        400,
        "The form's map names a place that is not among the variables",
    )


def test_a_file_has_to_be_one(api, data):
    query = "mutation M($file: Upload!) { uploadVideo(file: $file) { path } }"
    for value in ("text", {"path": "a.mp4"}, 3, ["a"]):
        response = api.post(query, {"file": value})
        refused(response, 200, "file has to be a file of a multipart/form-data request")
    two = {
        "operations": UPLOAD,
        "map": '{"a": ["variables.file"], "b": ["variables.other"]}',
        "a": (io.BytesIO(b"x"), "a.mp4"),
        "b": (io.BytesIO(b"x"), "b.mp4"),
    }
    refused(from_page(api.client, "/graphql", "POST", data=two), 400, "A request may have one file")
    assert list((data / "uploads").iterdir()) == []


def test_a_form_of_very_many_or_very_large_fields(client):
    for form in ({str(number): "x" for number in range(100)}, {"operations": "x" * 1_000_000}):
        response = from_page(client, "/graphql", "POST", data=form, content_type="multipart/form-data")
        refused(response, 413, TOO_LARGE)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "format must be coco, png, overlay or cutout."),
        ("?format=tiff", "format must be coco, png, overlay or cutout."),
        ("?format=overlay&as=gif", "as must be mp4, webm or png."),
        ("?format=overlay&as=../x", "as must be mp4, webm or png."),
        ("?format=overlay&as=png", "A video is written as mp4 or webm; format=png gives its masks as pictures."),
    ],
)
def test_downloads(api, client, query, message):
    session = api.start_session("gallery/clip.mp4")
    refused(
        from_page(client, f"/downloads/{session}?format=coco"), 409, "Nothing was found yet. Click on an object first."
    )
    refused(from_page(client, f"/downloads/{session}{query}"), 400, message)


def test_an_object_that_was_clicked_away_poisons_nothing(api):
    session = api.start_session("gallery/clip.mp4")
    api.add_points(session, 0, 0, [[0.5, 0.5]])
    api.add_points(session, 0, 1, [[0.1, 0.1]])
    api.clear_frame(session, 0, 0)
    with pytest.raises(ApiError):
        api.add_points(session, 99, 2, [[0.5, 0.5]])
    frames = list(api.propagate(session))
    assert len(frames) == 10
    assert all([mask["object_id"] for mask in frame["results"]] == [0, 1] for frame in frames)


def test_answers_have_nothing_of_the_disk(api, client, data):
    responses = [
        api.post(START, {"input": {"path": "../" * 8 + "etc/passwd"}}),
        api.post(START, {"input": {"path": str(data)}}),
        client.get("/gallery/none.mp4"),
        client.get("/uploads/none.mp4"),
    ]
    for response in responses:
        assert str(data) not in response.text.replace(json.dumps(str(data)), "")
        for word in ("Traceback", "site-packages", "Python", "Werkzeug", "gunicorn"):
            assert word not in response.text
            assert word not in str(response.headers)
