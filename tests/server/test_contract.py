"""The official demo server's contract, as its front end uses it, byte by byte."""

import base64
import json
import re

import pytest
from server.client import ORIGIN, ApiError, Parser, cut, frames

from omniops.sam2 import rle


def test_videos_are_as_the_front_end_asks_for_them(api):
    video = api.default_video()
    assert api.videos() == [video]
    assert base64.b64decode(video["id"]) == b"Video:gallery/clip.mp4"
    poster = video["posterPath"]
    assert re.fullmatch(r"posters/[0-9a-f]+\.jpg", poster)
    assert video == {
        "id": video["id"],
        "path": "gallery/clip.mp4",
        "posterPath": poster,
        "url": "http://localhost/gallery/clip.mp4",
        "posterUrl": f"http://localhost/{poster}",
        "height": 24,
        "width": 32,
    }


def test_click_refine_track_cancel_clear_close(api):
    session = api.start_session("gallery/clip.mp4")
    first = api.add_points(session, 2, 0, [[0.5, 0.5]])
    assert first["frameIndex"] == 2
    (mask,) = first["rleMaskList"]
    assert mask["objectId"] == 0
    assert mask["rleMask"]["size"] == [24, 32]
    second = api.add_points(session, 2, 1, [[0.1, 0.1], [0.2, 0.2]], [1, 0])
    assert [mask["objectId"] for mask in second["rleMaskList"]] == [0, 1]
    tracked = list(api.propagate(session, start=2))
    assert [frame["frame_index"] for frame in tracked] == [*range(2, 10), 2, 1, 0]
    for frame in tracked:
        assert [result["object_id"] for result in frame["results"]] == [0, 1]
        assert all(result["mask"]["size"] == [24, 32] for result in frame["results"])
    assert api.cancel(session) is True
    cleared = api.clear_frame(session, 2, 1)
    assert [mask["objectId"] for mask in cleared["rleMaskList"]] == [0, 1]
    remaining = api.remove_object(session, 1)
    assert all([mask["objectId"] for mask in frame["rleMaskList"]] == [0] for frame in remaining)
    assert api.remove_object(session, 0) == api.remove_object(session, 7) == []
    assert api.clear_video(session) is True
    assert api.close_session(session) is True
    assert api.close_session(session) is False


def test_every_part_is_one_chunk_of_these_very_bytes(api):
    session = api.start_session("gallery/clip.mp4")
    api.add_points(session, 0, 0, [[0.5, 0.5]])
    response = api.post_propagate(session)
    assert response.headers["Content-Type"] == "multipart/x-savi-stream; boundary=frame"
    assert "Content-Length" not in response.headers
    chunks = list(response.response)
    assert len(chunks) == 10
    for frame, chunk in enumerate(chunks):
        body = chunk.split(b"\r\n\r\n", 1)[1]
        counts = json.loads(body)["results"][0]["mask"]["counts"]
        assert body.decode() == (
            f'{{"frame_index": {frame}, "results": [{{"object_id": 0, "mask": {{"size": [24, 32], '
            f'"counts": {json.dumps(counts)}}}}}]}}'
        )
        assert chunk == (
            b"--frame\r\n"
            b"Content-Type: application/json; charset=utf-8\r\n"
            b"Frame-Current: -1\r\n"
            b"Frame-Total: -1\r\n"
            b"Mask-Type: RLE[]\r\n"
            b"Content-Length: " + str(len(body)).encode() + b"\r\n"
            b"\r\n" + body
        )


def test_masks_are_canonical_rle(api):
    session = api.start_session("gallery/clip.mp4")
    mask = api.add_points(session, 1, 0, [[0.5, 0.5]])["rleMaskList"][0]["rleMask"]
    decoded = rle.decode(mask)
    assert decoded.any()
    assert rle.encode(decoded)["counts"] == mask["counts"]


def test_an_unknown_session_is_refused_in_the_official_words(api):
    with pytest.raises(ApiError) as raised:
        api.add_points("no such session", 0, 0, [[0.5, 0.5]])
    (error,) = raised.value.errors
    assert set(error) == {"message", "locations", "path"}
    assert error["message"] == "Cannot find session ID; it might have expired"
    assert error["path"] == ["addPoints"]
    assert set(error["locations"][0]) == {"line", "column"}


@pytest.mark.parametrize(
    ("query", "variables"),
    [
        ("mutation M($input: StartSessionInput!) { startSession(input: $input) { sessionId } }", {}),
        ("mutation M($input: StartSessionInput!) { startSession(input: $input) { sessionId } }", {"input": {}}),
        ("{ ping }", {}),
        ("{ videos { edges { node { nothing } } } }", {}),
    ],
)
def test_wrong_queries_are_errors_with_status_200(api, query, variables):
    with pytest.raises(ApiError) as raised:
        api.ask(query, variables)
    assert all({"message", "locations"} <= set(error) for error in raised.value.errors)


def test_answers_are_compact_json_of_data_alone(api):
    response = api.post("{ __typename }")
    assert response.data == b'{"data":{"__typename":"Query"}}'
    assert response.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("path", ["/graphql", "/propagate_in_video"])
def test_a_preflight_is_answered(client, path):
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    response = client.options(path, headers=asked)
    assert (response.status_code, response.data) == (200, b"")
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert response.headers["Access-Control-Allow-Credentials"] == "true"
    assert response.headers["Access-Control-Allow-Headers"] == "content-type"
    assert response.headers["Access-Control-Allow-Methods"] == "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"
    assert "Origin" in response.headers["Vary"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/healthy", 200),
        ("GET", "/gallery/clip.mp4", 200),
        ("GET", "/gallery/other.mp4", 404),
        ("GET", "/nowhere", 404),
        ("DELETE", "/graphql", 405),
        ("POST", "/propagate_in_video", 415),
        ("POST", "/graphql", 400),
    ],
)
def test_every_answer_has_the_headers_that_let_its_page_read_it(client, method, path, status):
    response = client.open(path, method=method, headers={"Origin": ORIGIN})
    assert response.status_code == status
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert response.headers["Access-Control-Allow-Credentials"] == "true"
    assert "Origin" in response.headers["Vary"]


def test_healthy(client):
    response = client.get("/healthy")
    assert (response.status_code, response.data) == (200, b"OK")
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"


def test_a_video_is_sent_as_the_front_end_needs_it(client, clip):
    response = client.get("/gallery/clip.mp4")
    assert response.data == clip.read_bytes()
    assert response.headers["Content-Length"] == str(clip.stat().st_size)
    assert response.headers["Content-Type"] == "video/mp4"
    assert response.headers["Accept-Ranges"] == "bytes"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["Content-Disposition"].startswith("inline")
    assert {"ETag", "Last-Modified"} <= set(response.headers.keys())
    ranged = client.get("/gallery/clip.mp4", headers={"Range": "bytes=10-19"})
    assert (ranged.status_code, ranged.data) == (206, clip.read_bytes()[10:20])
    assert ranged.headers["Content-Range"] == f"bytes 10-19/{clip.stat().st_size}"
    for name, value in (
        ("If-None-Match", response.headers["ETag"]),
        ("If-Modified-Since", response.headers["Last-Modified"]),
    ):
        known = client.get("/gallery/clip.mp4", headers={name: value})
        assert (known.status_code, known.data) == (304, b"")


def test_a_poster_is_a_jpeg(api, client):
    response = client.get("/" + api.default_video()["posterPath"])
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "image/jpeg"
    assert response.data.startswith(b"\xff\xd8\xff")


def test_clicks_with_a_whole_number_for_a_fraction_are_taken(api):
    session = api.start_session("gallery/clip.mp4")
    assert api.add_points(session, 0, 0, [[0, 1]])["rleMaskList"]


@pytest.mark.parametrize("seed", range(5))
def test_the_parser_of_these_tests_takes_any_cut(api, seed):
    session = api.start_session("gallery/clip.mp4")
    api.add_points(session, 0, 0, [[0.5, 0.5]])
    response = api.post_propagate(session)
    chunks = list(response.response)
    kind = response.headers["Content-Type"]
    assert list(frames(kind, cut(chunks, seed))) == list(frames(kind, chunks))
    parser = Parser(kind)
    parser.push(b"".join(chunks)[:-1])
    with pytest.raises(EOFError):
        parser.end()
