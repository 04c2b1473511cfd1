"""A stand-in for the official demo's server, for ``benchmarks/server.py`` alone: none of its code, but its design.

One lock around the model, held for the whole of a propagation, also while a part is sent; frames kept as float32 by the
official package's ``init_state``; gunicorn with two threads. The operations are those that the benchmark asks for, in
the form in which it asks.

CLIPS=... IMAGE_SIZE=1024 DEVICE=cpu gunicorn --worker-class gthread --threads 2 'one_lock_server:app()'
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flask import Flask, Response, request
from pycocotools.mask import encode  # type: ignore[import-untyped]
from sam2.build_sam import build_sam2_video_predictor  # type: ignore[import-untyped]


def app() -> Flask:
    """The application; CLIPS holds a folder of a video's frames, as JPEG files, for each name that is asked for."""
    device = torch.device(os.environ["DEVICE"])
    torch.manual_seed(0)
    predictor = build_sam2_video_predictor(
        "configs/sam2.1/sam2.1_hiera_t.yaml",
        None,
        device=device.type,
        hydra_overrides_extra=[f"++model.image_size={os.environ['IMAGE_SIZE']}"],
    )
    lock = threading.Lock()
    states: dict[str, Any] = {}

    def precision() -> Any:
        return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()

    server = Flask("one_lock_server")

    @server.get("/healthy")
    def healthy() -> str:
        return "OK"

    @server.post("/graphql")
    def graphql() -> Response:
        arguments = request.get_json()["variables"]["input"]
        with lock, torch.inference_mode(), precision():
            if "path" in arguments:
                session = str(uuid.uuid4())
                states[session] = predictor.init_state(str(Path(os.environ["CLIPS"]) / Path(arguments["path"]).stem))
                return _answer({"startSession": {"sessionId": session}})
            state = states[arguments["sessionId"]]
            size = [state["video_width"], state["video_height"]]
            frame, ids, logits = predictor.add_new_points_or_box(
                state,
                arguments["frameIndex"],
                arguments["objectId"],
                points=np.array(arguments["points"], np.float32) * size,
                labels=np.array(arguments["labels"], np.int32),
                clear_old_points=arguments["clearOldPoints"],
            )
            masks = [{"objectId": object_id, "rleMask": mask} for object_id, mask in _masks(ids, logits)]
        return _answer({"addPoints": {"frameIndex": frame, "rleMaskList": masks}})

    @server.post("/propagate_in_video")
    def propagate() -> Response:
        state = states[request.get_json()["session_id"]]

        def stream() -> Iterator[bytes]:
            with lock, torch.inference_mode(), precision():
                for frame, ids, logits in predictor.propagate_in_video(state):
                    results = [{"object_id": object_id, "mask": mask} for object_id, mask in _masks(ids, logits)]
                    body = json.dumps({"frame_index": frame, "results": results}).encode()
                    head = f"--frame\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                    yield head.encode() + body

        return Response(stream(), content_type="multipart/x-savi-stream; boundary=frame")

    return server


def _answer(data: dict[str, Any]) -> Response:
    return Response(json.dumps({"data": data}), content_type="application/json")


def _masks(ids: list[int], logits: torch.Tensor) -> Iterator[tuple[int, dict[str, Any]]]:
    """As COCO's run lengths."""
    for object_id, mask in zip(ids, (logits[:, 0] > 0).cpu().numpy(), strict=True):
        coded = encode(np.asfortranarray(mask.astype(np.uint8)))
        yield object_id, {"size": list(coded["size"]), "counts": coded["counts"].decode()}
