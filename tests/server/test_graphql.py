import json
import logging
import time

import pytest
from PIL import Image
from server.client import Api, ApiError

from omniops.server.errors import Busy

START = "mutation M($input: StartSessionInput!) { startSession(input: $input) { sessionId } }"
INTROSPECTION = "{ __schema { types { name } } }"


def message(api, query, variables=None):
    with pytest.raises(ApiError) as raised:
        api.ask(query, variables)
    assert len(raised.value.errors) == 1
    return str(raised.value)


def test_boxes_masks_and_previews(api):
    session = api.start_session("gallery/clip.mp4", guided=True)
    frame = {"sessionId": session, "frameIndex": 3}
    fields = "{ frameIndex rleMaskList { objectId rleMask { size counts order } } }"
    box = api.change("addBox", fields, **frame, objectId=4, box=[0.1, 0.1, 0.6, 0.6], points=[[0.5, 0.5]], labels=[1])
    assert box["frameIndex"] == 3
    (found,) = box["rleMaskList"]
    assert found["objectId"] == 4
    assert found["rleMask"]["order"] == "F"
    mask = {"size": found["rleMask"]["size"], "counts": found["rleMask"]["counts"]}
    answer = api.change("addMask", fields, **frame, objectId=9, mask=mask)
    assert [item["objectId"] for item in answer["rleMaskList"]] == [4, 9]
    before = api.ask("query Q($id: String!) { session(sessionId: $id) { objects { objectId } } }", {"id": session})
    assert api.change("preview", "{ size counts }", **frame, points=[[0.2, 0.2]], labels=[1])["size"] == [24, 32]
    assert api.change("preview", "{ size counts }", **frame, box=[0, 0, 1, 1])["size"] == [24, 32]
    after = api.ask("query Q($id: String!) { session(sessionId: $id) { objects { objectId } } }", {"id": session})
    assert before == after


def test_everything(api):
    session = api.start_session("gallery/clip.mp4")
    fields = "{ rleMask { size counts } score area box }"
    (found,) = api.change("findEverything", fields, sessionId=session, frameIndex=0)
    assert found["rleMask"]["size"] == [24, 32]
    assert (found["score"], found["area"], found["box"]) == (0.9, 24 * 32, [0, 0, 31, 23])


def test_a_session_is_there_again_after_a_reload(api):
    session = api.start_session("gallery/clip.mp4", guided=True)
    api.add_points(session, 1, 7, [[0.25, 0.5], [0.5, 0.5]], [1, 0])
    api.change("addBox", "{ frameIndex }", sessionId=session, frameIndex=2, objectId=3, box=[0, 0, 0.5, 0.5])
    assert api.change("renameObject", "{ success }", sessionId=session, objectId=7, name="Ball")["success"]
    tracked = {frame["frame_index"]: frame["results"] for frame in api.propagate(session)}
    state = api.ask(
        """query Q($id: String!) { session(sessionId: $id) {
          sessionId path numFrames width height fps isPicture guided tracking
          objects { objectId name prompts { frameIndex points labels box hasMask } }
          frames { frameIndex rleMaskList { objectId rleMask { size counts } } } } }""",
        {"id": session},
    )["session"]
    frames = state.pop("frames")
    assert state == {
        "sessionId": session,
        "path": "gallery/clip.mp4",
        "numFrames": 10,
        "width": 32,
        "height": 24,
        "fps": 24.0,
        "isPicture": False,
        "guided": True,
        "tracking": False,
        "objects": [
            {
                "objectId": 7,
                "name": "Ball",
                "prompts": [
                    {
                        "frameIndex": 1,
                        "points": [[0.25, 0.5], [0.5, 0.5]],
                        "labels": [1, 0],
                        "box": None,
                        "hasMask": False,
                    }
                ],
            },
            {
                "objectId": 3,
                "name": "",
                "prompts": [{"frameIndex": 2, "points": [], "labels": [], "box": [0, 0, 0.5, 0.5], "hasMask": False}],
            },
        ],
    }
    assert {
        frame["frameIndex"]: [{"object_id": item["objectId"], "mask": item["rleMask"]} for item in frame["rleMaskList"]]
        for frame in frames
    } == tracked


def test_what_the_server_runs_on(api, client):
    query = """{ server { device dtype model imageSize randomWeights ready failure canHover
                          maxUploadBytes maxUploadSeconds } }"""
    before = api.ask(query)["server"]
    assert (before["ready"], before["device"]) == (False, "auto")
    api.start_session("gallery/clip.mp4")
    assert api.ask(query)["server"] == {
        "device": "Fake device",
        "dtype": "float32",
        "model": "tiny",
        "imageSize": 64,
        "randomWeights": True,
        "ready": True,
        "failure": None,
        "canHover": True,
        "maxUploadBytes": 500e6,
        "maxUploadSeconds": 10,
    }


def test_videos_have_frames_and_pages(api, data, clip):
    for number in range(3):
        (data / "gallery" / f"other{number}.mp4").write_bytes(clip.read_bytes())
    (first, *_, last) = api.videos()
    assert len(api.videos()) == 4
    assert api.videos("(first: 1)") == [first]
    assert api.videos("(last: 1)") == [last]
    fields = api.ask("{ defaultVideo { numFrames fps isPicture } }")["defaultVideo"]
    assert fields == {"numFrames": 10, "fps": 24, "isPicture": False}


def test_pictures_of_the_gallery_are_listed_apart(api, data, client):
    Image.new("RGB", (40, 30)).save(data / "gallery" / "photo.png")
    (picture,) = api.ask("{ pictures { path width height url posterUrl numFrames fps isPicture } }")["pictures"]
    url, poster = picture.pop("url"), picture.pop("posterUrl")
    assert picture == {
        "path": "gallery/photo.png",
        "width": 40,
        "height": 30,
        "numFrames": 1,
        "fps": None,
        "isPicture": True,
    }
    assert client.get(url).content_type == "image/png"
    assert client.get(poster).content_type == "image/jpeg"
    assert [video["path"] for video in api.videos()] == ["gallery/clip.mp4"]
    assert api.start_session("gallery/photo.png")


def test_names_in_urls_are_quoted(api, data, client):
    (data / "gallery" / "clip.mp4").rename(data / "gallery" / "50% of #1?.mp4")
    video = api.default_video()
    assert video["path"] == "gallery/50% of #1?.mp4"
    assert video["url"] == "http://localhost/gallery/50%25%20of%20%231%3F.mp4"
    assert client.get(video["url"]).status_code == 200


def test_urls_begin_with_the_address_that_was_given(make_app):
    api = Api(make_app(api_url="https://demo.example/sam/").test_client())
    assert api.default_video()["url"] == "https://demo.example/sam/gallery/clip.mp4"


def test_an_empty_gallery_is_named(api, data):
    (data / "gallery" / "clip.mp4").unlink()
    assert "no video in the gallery" in message(api, "{ defaultVideo { path } }")
    assert api.videos() == []


def test_the_form_of_an_error_carries_its_status_unless_it_is_an_official_one(api):
    for path, extensions in (("gallery/none.mp4", {"status": 404}), ("gallery/../clip.mp4", {"status": 404})):
        with pytest.raises(ApiError) as raised:
            api.start_session(path)
        assert raised.value.errors[0]["extensions"] == extensions
        assert raised.value.errors[0]["path"] == ["startSession"]


def test_an_unexpected_error_is_logged_and_not_shown(api, inference, caplog):
    session = api.start_session("gallery/clip.mp4")
    inference.errors["add"] = RuntimeError("/secret/path of version 1.2.3")
    with caplog.at_level(logging.ERROR), pytest.raises(ApiError) as raised:
        api.add_points(session, 0, 0, [[0.5, 0.5]])
    assert [error["message"] for error in raised.value.errors] == ["An unknown error occurred."]
    assert "/secret/path" in caplog.text
    assert "Traceback" in caplog.text


def test_a_busy_server_says_so(api, inference, monkeypatch):
    def start(*args, **kwargs):
        raise Busy("Too many")

    monkeypatch.setattr("omniops.server.sessions.Sessions.start", start)
    with pytest.raises(ApiError) as raised:
        api.start_session("gallery/clip.mp4")
    assert raised.value.errors[0]["extensions"] == {"status": 503}


def test_introspection_and_guesses_are_for_debugging(api, make_app):
    assert "introspection has been disabled" in message(api, "{ __schema { __typename } }")
    assert "Did you mean" not in message(api, "{ serve }")
    debug = Api(make_app(debug=True).test_client())
    assert debug.ask(INTROSPECTION)["__schema"]["types"]
    assert "Did you mean" in message(debug, "{ serve }")


def test_graphiql_is_for_debugging(client, make_app):
    html = {"Accept": "text/html"}
    assert client.get("/graphql", headers=html).status_code == 404
    response = make_app(debug=True).test_client().get("/graphql", headers=html)
    assert response.status_code == 200
    assert "GraphiQL" in response.text
    assert "sandbox" not in response.headers["Content-Security-Policy"]


@pytest.mark.parametrize("debug", [False, True])
def test_queries_by_get_are_refused_in_the_official_words(make_app, debug):
    client = make_app(debug=debug).test_client()
    response = client.get("/graphql?query={videos{edges{node{path}}}}", headers={"Accept": "text/html"})
    assert (response.status_code, response.text) == (400, "queries are not allowed when using GET")
    assert response.content_type.startswith("text/plain")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("{ videos { " * 400 + "}}" * 400, "nested too deeply: more than 12 levels"),
        ("query Q($a: " + "[" * 100_000, "nested too deeply: more than 12 levels"),
        ("{ server { ready } }" + " x" * 2000, "too long: it has more than 1000 tokens"),
        (
            "{ " + " ".join(f"a{i}: defaultVideo {{ path }}" for i in range(17)) + " }",
            "The query has more than 16 aliases",
        ),
        ("{ ...A } fragment A on Query { ...B } fragment B on Query { ...A }", "Cannot spread fragment"),
    ],
)
def test_queries_have_limits(api, query, words):
    begin = time.monotonic()
    with pytest.raises(ApiError) as raised:
        api.ask(query)
    assert any(words in error["message"] for error in raised.value.errors)
    assert time.monotonic() - begin < 2


def test_a_chain_of_fragments_takes_no_time(api):
    chain = "".join(f"fragment F{i} on Query {{ ...F{i + 1} ...F{i + 1} }} " for i in range(80))
    begin = time.monotonic()
    assert api.ask("{ ...F0 } " + chain + "fragment F80 on Query { __typename }")["__typename"] == "Query"
    assert time.monotonic() - begin < 2


def test_braces_in_a_text_are_no_nesting(api):
    words = message(api, 'mutation { startSession(input: {path: "' + "{([" * 20 + '"}) { sessionId } }')
    assert "nested" not in words


def test_a_document_that_is_sent_often_is_parsed_once(api, monkeypatch):
    api.ask("query Once { __typename }")
    monkeypatch.setattr("graphql.language.parser.Parser.parse_document", lambda self: pytest.fail("parsed again"))
    assert api.ask("query Once { __typename }") == {"__typename": "Query"}


def test_bodies_have_a_limit(client):
    response = client.post("/graphql", data=b" " * 8_000_001, content_type="application/json")
    assert response.status_code == 413
    assert json.loads(response.data) == {
        "data": None,
        "errors": [{"message": "The request is larger than the server takes"}],
    }
