"""A client of the API: the operations as the official front end sends them, and a parser of its stream.

api = Api(app.test_client())
session = api.start_session("gallery/clip.mp4")
for frame in api.propagate(session): ...
"""

from __future__ import annotations

import io
import json
import random

ORIGIN = "http://localhost:7262"

MASKS = "frameIndex rleMaskList { objectId rleMask { counts size } }"
VIDEO = "id path posterPath url posterUrl height width"


class ApiError(Exception):
    """The errors of a GraphQL answer; ``errors`` as they came."""

    def __init__(self, errors):
        super().__init__(errors[0]["message"])
        self.errors = errors


class Api:
    """The operations; ``client`` is Flask's. Each method returns what its operation answers."""

    def __init__(self, client, origin=ORIGIN):
        self.client = client
        self.headers = {"Origin": origin} if origin else {}

    def post(self, query, variables=None, **more):
        body = {"query": query, "variables": variables or {}}
        return self.client.post("/graphql", json=body, headers=self.headers, **more)

    def ask(self, query, variables=None):
        """The data of an answer, whose form is checked. Raises ApiError."""
        return data_of(self.post(query, variables))

    def change(self, mutation, fields, /, **inputs):
        kind = mutation[0].upper() + mutation[1:] + "Input"
        operation = f"mutation Page($input: {kind}!) {{ {mutation}(input: $input) {fields} }}"
        return self.ask(operation, {"input": inputs})[mutation]

    def default_video(self):
        return self.ask(f"query DemoPageQuery {{ defaultVideo {{ {VIDEO} }} }}")["defaultVideo"]

    def videos(self, arguments=""):
        found = self.ask(f"query DemoVideoGalleryQuery {{ videos{arguments} {{ edges {{ node {{ {VIDEO} }} }} }} }}")
        return [edge["node"] for edge in found["videos"]["edges"]]

    def start_session(self, path, **more):
        return self.change("startSession", "{ sessionId }", path=path, **more)["sessionId"]

    def close_session(self, session):
        return self.change("closeSession", "{ success }", sessionId=session)["success"]

    def add_points(self, session, frame, object_id, points, labels=None, clear=True):
        return self.change(
            "addPoints",
            f"{{ {MASKS} }}",
            sessionId=session,
            frameIndex=frame,
            objectId=object_id,
            labels=[1] * len(points) if labels is None else labels,
            points=points,
            clearOldPoints=clear,
        )

    def remove_object(self, session, object_id):
        return self.change("removeObject", f"{{ {MASKS} }}", sessionId=session, objectId=object_id)

    def clear_frame(self, session, frame, object_id):
        return self.change(
            "clearPointsInFrame", f"{{ {MASKS} }}", sessionId=session, frameIndex=frame, objectId=object_id
        )

    def clear_video(self, session):
        return self.change("clearPointsInVideo", "{ success }", sessionId=session)["success"]

    def cancel(self, session):
        return self.change("cancelPropagateInVideo", "{ success }", sessionId=session)["success"]

    def upload(self, name, data, kind="video/mp4", mutation="uploadVideo", placeholder="official", **more):
        """The answer's data; ``data``: bytes or a file. More: the query string, headers."""
        response = self.post_upload(name, data, kind, mutation, placeholder, **more)
        return data_of(response)[mutation]

    def post_upload(self, name, data, kind="video/mp4", mutation="uploadVideo", placeholder="official", **more):
        query = f"mutation useUploadVideoMutation($file: Upload!) {{ {mutation}(file: $file) {{ {VIDEO} }} }}"
        held = {"path": name} if placeholder == "official" else placeholder
        form = {
            "operations": json.dumps({"query": query, "variables": {"file": held}}),
            "map": json.dumps({"file": ["variables.file"]}),
            "file": (io.BytesIO(data) if isinstance(data, bytes) else data, name, kind),
        }
        headers = {**self.headers, **more.pop("headers", {})}
        return self.client.post("/graphql", data=form, headers=headers, **more)

    def post_propagate(self, session, start=0):
        body = {"session_id": session, "start_frame_index": start}
        return self.client.post("/propagate_in_video", json=body, headers=self.headers, buffered=False)

    def propagate(self, session, start=0):
        """The JSON of each body part, as it comes; cut at random on the way."""
        response = self.post_propagate(session, start)
        assert response.status_code == 200, response.text
        return frames(response.headers["Content-Type"], cut(response.response))


def data_of(response):
    """The data of an answer in the official form. Raises ApiError for the errors in it."""
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "application/json"
    body = json.loads(response.data)
    if "errors" in body:
        assert body["data"] is None
        raise ApiError(body["errors"])
    assert set(body) == {"data"}
    return body["data"]


class Parser:
    """The body parts of a multipart/x-savi-stream, cut anywhere, as strictly as the official front end reads it."""

    def __init__(self, content_type):
        assert content_type.startswith("multipart/x-savi-stream;")
        self.boundary = b"--" + content_type.split("; boundary=")[1].encode()
        self.buffer = b""

    def push(self, data):
        """(headers, body) of each body part that is complete now."""
        self.buffer += data
        found = []
        while (complete := self._next()) is not None:
            found.append(complete)
        return found

    def _next(self):
        rest = self.buffer.lstrip(b"\r\n")
        head, blank, body = rest.partition(b"\r\n\r\n")
        if not blank:
            return None
        first, *lines = head.split(b"\r\n")
        assert first == self.boundary, first
        headers = {}
        for line in lines:
            name, separator, value = line.decode().partition(": ")
            assert separator, line
            headers[name] = value
        length = int(headers["Content-Length"])
        if len(body) < length:
            return None
        self.buffer = body[length:]
        return headers, body[:length]

    def end(self):
        """Raises EOFError where the stream ends inside of a part."""
        if self.buffer:
            raise EOFError("the stream ended inside of a part")


def cut(chunks, seed=0):
    """The same bytes with other borders between them."""
    rng = random.Random(seed)
    for chunk in chunks:
        while chunk:
            length = rng.choice((1, 2, 3, 7, 50, 1000))
            yield chunk[:length]
            chunk = chunk[length:]


def frames(content_type, chunks):
    """The JSON of each body part."""
    parser = Parser(content_type)
    for chunk in chunks:
        for headers, body in parser.push(chunk):
            if headers["Content-Type"].startswith("application/json"):
                yield json.loads(body)
    parser.end()
