"""The types of the GraphQL schema: the official demo server's, and what ours has beyond them."""

from __future__ import annotations

from pathlib import PurePosixPath
from urllib.parse import quote

import strawberry
from strawberry import relay


@strawberry.type(name="Video")
class VideoNode(relay.Node):
    """A video, or a picture, that sessions can be started on."""

    code: relay.NodeID[str]
    path: str
    poster_path: str | None
    width: int
    height: int
    num_frames: int | None
    fps: float | None
    is_picture: bool
    base_url: strawberry.Private[str]

    @strawberry.field
    def url(self) -> str:
        """Where the file is."""
        return f"{self.base_url}/{quote(self.path)}"

    @strawberry.field
    def poster_url(self) -> str:
        """A picture to show it by. An upload has one, too, although by the contract it has no path."""
        return f"{self.base_url}/{quote(self.poster_path or _poster_of_upload(self.path))}"


@strawberry.type
class RLEMask:
    """COCO's run-length encoding."""

    size: list[int]
    counts: str
    order: str


@strawberry.type
class RLEMaskForObject:
    """An object's mask."""

    object_id: int
    rle_mask: RLEMask


@strawberry.type
class RLEMaskListOnFrame:
    """The masks of all objects of a session on a frame."""

    frame_index: int
    rle_mask_list: list[RLEMaskForObject]


@strawberry.type
class StartSession:
    """The session that was started."""

    session_id: str


@strawberry.type
class CloseSession:
    """Whether there was a session."""

    success: bool


@strawberry.type
class ClearPointsInVideo:
    """Whether all objects are gone."""

    success: bool


@strawberry.type
class CancelPropagateInVideo:
    """Whether the session propagates nothing any more."""

    success: bool


@strawberry.type
class RenameObject:
    """Whether the object has its name."""

    success: bool


@strawberry.type
class FoundMask:
    """One of what everything mode found; the box in pixels."""

    rle_mask: RLEMask
    score: float
    area: int
    box: list[float]


@strawberry.type
class Prompts:
    """What an object was prompted with on a frame, in fractions of its width and height."""

    frame_index: int
    points: list[list[float]]
    labels: list[int]
    box: list[float] | None
    has_mask: bool


@strawberry.type
class ObjectState:
    """An object of a session."""

    object_id: int
    name: str | None
    prompts: list[Prompts]


@strawberry.type
class SessionState:
    """All that a page needs to go on with a session after a reload."""

    session_id: str
    path: str
    num_frames: int
    width: int
    height: int
    fps: float | None
    is_picture: bool
    guided: bool
    tracking: bool
    objects: list[ObjectState]
    frames: list[RLEMaskListOnFrame]


@strawberry.type
class Server:
    """What the server runs on. ``failure`` says why the model could not be loaded."""

    device: str
    dtype: str
    model: str
    image_size: int
    random_weights: bool
    ready: bool
    failure: str | None
    can_hover: bool
    max_upload_bytes: float
    max_upload_seconds: float


@strawberry.input
class StartSessionInput:
    """``path`` as Video has it; ``guided``: the masks follow the edges of the picture."""

    path: str
    guided: bool = False


@strawberry.input
class CloseSessionInput:
    """The session."""

    session_id: str


@strawberry.input
class AddPointsInput:
    """Points in [0, 1] of width and height; labels are 1 on the object and 0 beside it."""

    session_id: str
    frame_index: int
    clear_old_points: bool
    object_id: int
    labels: list[int]
    points: list[list[float]]


@strawberry.input
class AddBoxInput:
    """The box as x0, y0, x1, y1 in [0, 1] of width and height."""

    session_id: str
    frame_index: int
    object_id: int
    box: list[float]
    points: list[list[float]] = strawberry.field(default_factory=list)
    labels: list[int] = strawberry.field(default_factory=list)
    clear_old_points: bool = True


@strawberry.input
class RLEMaskInput:
    """COCO's run-length encoding, of the size of the video."""

    size: list[int]
    counts: str


@strawberry.input
class AddMaskInput:
    """The mask of an object on a frame."""

    session_id: str
    frame_index: int
    object_id: int
    mask: RLEMaskInput


@strawberry.input
class PreviewInput:
    """Points and a box as AddBoxInput has them."""

    session_id: str
    frame_index: int
    points: list[list[float]] = strawberry.field(default_factory=list)
    labels: list[int] = strawberry.field(default_factory=list)
    box: list[float] | None = None


@strawberry.input
class FindEverythingInput:
    """The grid of points that is tried has ``pointsPerSide`` on each side."""

    session_id: str
    frame_index: int
    points_per_side: int = 16


@strawberry.input
class RenameObjectInput:
    """An empty name takes the name away."""

    session_id: str
    object_id: int
    name: str


@strawberry.input
class RemoveObjectInput:
    """The object."""

    session_id: str
    object_id: int


@strawberry.input
class ClearPointsInFrameInput:
    """The object and the frame."""

    session_id: str
    frame_index: int
    object_id: int


@strawberry.input
class ClearPointsInVideoInput:
    """The session."""

    session_id: str


@strawberry.input
class CancelPropagateInVideoInput:
    """The session."""

    session_id: str


def _poster_of_upload(path: str) -> str:
    return f"posters/{PurePosixPath(path).stem}.jpg"
