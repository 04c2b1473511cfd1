"""The GraphQL schema: the official demo server's, and what ours has beyond it.

Names, types and nullability of the official part are its own, so that its front end's documents hold as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import strawberry
from graphql import GraphQLError
from strawberry import relay
from strawberry.extensions import DisableIntrospection, ParserCache, ValidationCache
from strawberry.file_uploads import Upload
from strawberry.schema.config import StrawberryConfig
from strawberry.types import Info

from omniops.server import videos as catalogue
from omniops.server.masks import RLE, Masks
from omniops.server.schema_types import (
    AddBoxInput,
    AddMaskInput,
    AddPointsInput,
    CancelPropagateInVideo,
    CancelPropagateInVideoInput,
    ClearPointsInFrameInput,
    ClearPointsInVideo,
    ClearPointsInVideoInput,
    CloseSession,
    CloseSessionInput,
    FindEverythingInput,
    FoundMask,
    ObjectState,
    PreviewInput,
    Prompts,
    RemoveObjectInput,
    RenameObject,
    RenameObjectInput,
    RLEMask,
    RLEMaskForObject,
    RLEMaskListOnFrame,
    Server,
    SessionState,
    StartSession,
    StartSessionInput,
    VideoNode,
)
from omniops.server.session import Session
from omniops.server.sessions import Sessions
from omniops.server.settings import Settings

_HOVER_IMAGE_SIZE = 512
_CACHED_DOCUMENTS = 64


@dataclass
class Context:
    """What resolvers work with in one request.

    Args:
        base_url: what precedes the path in the URLs that are given.
        receive: stores an uploaded file and waits for it, as ``Uploads.receive``.
    """

    settings: Settings
    sessions: Sessions
    videos: catalogue.Videos
    base_url: str
    receive: Callable[..., catalogue.Video]


RequestInfo = Info[Context, None]


def _rle_mask(rle: RLE) -> RLEMask:
    return RLEMask(size=list(rle["size"]), counts=rle["counts"], order="F")


def _on_frame(frame_index: int, masks: Masks) -> RLEMaskListOnFrame:
    found = [RLEMaskForObject(object_id=object_id, rle_mask=_rle_mask(rle)) for object_id, rle in masks]
    return RLEMaskListOnFrame(frame_index=frame_index, rle_mask_list=found)


def _video_node(video: catalogue.Video, context: Context) -> VideoNode:
    return VideoNode(
        code=video.path,
        path=video.path,
        poster_path=video.poster_path,
        width=video.width,
        height=video.height,
        num_frames=video.frames,
        fps=video.fps,
        is_picture=video.is_picture,
        base_url=context.base_url,
    )


def _session(info: RequestInfo, session_id: str) -> Session:
    return info.context.sessions.get(session_id)


@strawberry.type
class Query:
    """What is there."""

    @strawberry.field
    def default_video(self, info: RequestInfo) -> VideoNode:
        """The video that is shown first."""
        return _video_node(info.context.videos.default(), info.context)

    @relay.connection(relay.ListConnection[VideoNode])  # type: ignore[untyped-decorator]
    def videos(self, info: RequestInfo) -> list[VideoNode]:
        """The gallery, in natural order."""
        return [_video_node(video, info.context) for video in info.context.videos.videos()]

    @strawberry.field
    def pictures(self, info: RequestInfo) -> list[VideoNode]:
        """The pictures of the gallery, which the official front end has no place for."""
        return [_video_node(picture, info.context) for picture in info.context.videos.pictures()]

    @strawberry.field
    def server(self, info: RequestInfo) -> Server:
        """What the server runs on."""
        settings, predictor = info.context.settings, info.context.sessions.predictors[0]
        described = predictor.description or {}
        return Server(
            device=described.get("device", settings.devices[0]),
            dtype=described.get("dtype", ""),
            model=described.get("model", ""),
            image_size=described.get("image_size", 0),
            random_weights=described.get("random_weights", settings.random_weights),
            ready=predictor.is_ready,
            failure=predictor.failure.message if predictor.failure is not None else None,
            can_hover=_can_hover(described),
            max_upload_bytes=float(settings.max_upload_bytes),
            max_upload_seconds=float(settings.max_upload_video_duration),
        )

    @strawberry.field
    def session(self, info: RequestInfo, session_id: str) -> SessionState:
        """All of a session, for a page that was loaded again."""
        session = _session(info, session_id)
        state = session.snapshot()
        objects = [
            ObjectState(
                object_id=item["object_id"],
                name=item["name"],
                prompts=[Prompts(**prompts) for prompts in item["prompts"]],
            )
            for item in state.pop("objects")
        ]
        frames = [_on_frame(frame_index, masks) for frame_index, masks in state.pop("frames")]
        return SessionState(**state, guided=session.guided, objects=objects, frames=frames)


def _can_hover(described: dict[str, Any]) -> bool:
    """Whether masks come fast enough to follow the pointer: on a GPU, or from a small picture on a CPU."""
    return bool(described.get("device_type", "cpu") != "cpu") or 0 < described.get("image_size", 0) <= _HOVER_IMAGE_SIZE


@strawberry.type
class Mutation:
    """What can be done."""

    @strawberry.mutation
    def upload_video(
        self,
        info: RequestInfo,
        file: Upload,
        start_time_sec: float | None = None,
        duration_time_sec: float | None = None,
    ) -> VideoNode:
        """Store a video, cut to the seconds from ``startTimeSec`` on."""
        video = info.context.receive(file, start=start_time_sec, duration=duration_time_sec)
        return _video_node(video, info.context)

    @strawberry.mutation
    def upload_picture(self, info: RequestInfo, file: Upload) -> VideoNode:
        """Store a picture."""
        return _video_node(info.context.receive(file, picture=True), info.context)

    @strawberry.mutation
    def start_session(self, info: RequestInfo, input: StartSessionInput) -> StartSession:
        """Open a video or a picture."""
        context = info.context
        session = context.sessions.start(context.videos.find(input.path), input.path, guided=input.guided)
        return StartSession(session_id=session.id)

    @strawberry.mutation
    def close_session(self, info: RequestInfo, input: CloseSessionInput) -> CloseSession:
        """Give a session back."""
        return CloseSession(success=info.context.sessions.close(input.session_id))

    @strawberry.mutation
    def add_points(self, info: RequestInfo, input: AddPointsInput) -> RLEMaskListOnFrame:
        """Prompt an object with points on a frame; the masks of all objects there."""
        masks = _session(info, input.session_id).add_points(
            input.frame_index, input.object_id, input.points, input.labels, input.clear_old_points
        )
        return _on_frame(input.frame_index, masks)

    @strawberry.mutation
    def add_box(self, info: RequestInfo, input: AddBoxInput) -> RLEMaskListOnFrame:
        """Prompt an object with a box around it, and points within it."""
        masks = _session(info, input.session_id).add_box(
            input.frame_index, input.object_id, input.box, input.points, input.labels, input.clear_old_points
        )
        return _on_frame(input.frame_index, masks)

    @strawberry.mutation
    def add_mask(self, info: RequestInfo, input: AddMaskInput) -> RLEMaskListOnFrame:
        """Prompt an object with its mask."""
        rle = {"size": input.mask.size, "counts": input.mask.counts}
        masks = _session(info, input.session_id).add_mask(input.frame_index, input.object_id, rle)
        return _on_frame(input.frame_index, masks)

    @strawberry.mutation
    def preview(self, info: RequestInfo, input: PreviewInput) -> RLEMask:
        """The mask that a prompt would give; the session stays as it is."""
        session = _session(info, input.session_id)
        return _rle_mask(session.preview(input.frame_index, input.points, input.labels, input.box))

    @strawberry.mutation
    def find_everything(self, info: RequestInfo, input: FindEverythingInput) -> list[FoundMask]:
        """The masks of all that is found on a frame; the session stays as it is."""
        found = _session(info, input.session_id).everything(input.frame_index, input.points_per_side)
        return [
            FoundMask(rle_mask=_rle_mask(mask["mask"]), score=mask["predicted_iou"], area=mask["area"], box=mask["box"])
            for mask in found
        ]

    @strawberry.mutation
    def rename_object(self, info: RequestInfo, input: RenameObjectInput) -> RenameObject:
        """Call an object by a name of the person's."""
        _session(info, input.session_id).rename(input.object_id, input.name)
        return RenameObject(success=True)

    @strawberry.mutation
    def remove_object(self, info: RequestInfo, input: RemoveObjectInput) -> list[RLEMaskListOnFrame]:
        """Forget an object; the masks of the others on the frames that it was prompted on."""
        changed = _session(info, input.session_id).remove(input.object_id)
        return [_on_frame(frame_index, masks) for frame_index, masks in changed]

    @strawberry.mutation
    def clear_points_in_frame(self, info: RequestInfo, input: ClearPointsInFrameInput) -> RLEMaskListOnFrame:
        """Take back what an object was prompted with on a frame."""
        masks = _session(info, input.session_id).clear_frame(input.frame_index, input.object_id)
        return _on_frame(input.frame_index, masks)

    @strawberry.mutation
    def clear_points_in_video(self, info: RequestInfo, input: ClearPointsInVideoInput) -> ClearPointsInVideo:
        """Forget all objects."""
        _session(info, input.session_id).clear_video()
        return ClearPointsInVideo(success=True)

    @strawberry.mutation
    def cancel_propagate_in_video(
        self, info: RequestInfo, input: CancelPropagateInVideoInput
    ) -> CancelPropagateInVideo:
        """End the propagation of a session."""
        _session(info, input.session_id).cancel()
        return CancelPropagateInVideo(success=True)


class Schema(strawberry.Schema):
    """Logs nothing: the route that answers with the errors logs those that nobody foresaw."""

    def process_errors(self, errors: list[GraphQLError], execution_context: Any = None) -> None:
        """Leave them to the route."""


def make_schema(debug: bool = False) -> Schema:
    """The schema. Introspection, and guesses at what a wrong name could have meant, are for ``debug``."""
    extensions: list[Any] = [
        lambda: ParserCache(maxsize=_CACHED_DOCUMENTS),
        lambda: ValidationCache(maxsize=_CACHED_DOCUMENTS),
    ]
    if not debug:
        extensions.append(DisableIntrospection)
    config = StrawberryConfig(disable_field_suggestions=not debug, relay_max_results=100)
    return Schema(query=Query, mutation=Mutation, config=config, extensions=extensions)
