"""``omniops segment``: SAM 2 on a picture or through a video, from clicks and boxes or of everything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omniops.cli.common import CommandError, DeviceOption, choose_device, load_sam2, require_sam2
from omniops.cli.errors import say
from omniops.cli.outputs import OverwriteOption, lines_of, require_ending, require_new
from omniops.cli.segment_parts import (
    ImageSizeOption,
    Precision,
    PrecisionOption,
    RandomWeightsOption,
    Work,
    configuration,
    is_picture,
    load_model,
    parse,
    require_image_size,
)

if TYPE_CHECKING:
    from transformers import Sam2VideoModel

_GRID, _GRID_OF_RANDOM_WEIGHTS = 32, 4
_IMAGE_SIZE_OF_RANDOM_WEIGHTS = 256


def segment(
    source: Annotated[
        Path, typer.Argument(metavar="IMAGE|VIDEO", help="A picture, a video, or a folder of a video's frames.")
    ],
    points: Annotated[
        list[str] | None,
        typer.Option(
            "--point",
            metavar="X,Y[,LABEL][@FRAME][#OBJECT]",
            help="A place in pixels from the top left; LABEL 1, of the object, or 0, not of it. May be repeated.",
            show_default=False,
        ),
    ] = None,
    boxes: Annotated[
        list[str] | None,
        typer.Option(
            "--box",
            metavar="X0,Y0,X1,Y1[@FRAME][#OBJECT]",
            help="Around an object, from the top left corner to the bottom right one. May be repeated.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Instead of prompts: every mask that a grid of points finds.")
    ] = False,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="M",
            help="tiny, small, base-plus or large, which are fetched once; Meta's .pt or its URL, a folder, a hub id.",
        ),
    ] = "tiny",
    random_weights: RandomWeightsOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = Precision.AUTO,
    image_size: ImageSizeOption = None,
    grid: Annotated[
        int | None,
        typer.Option(
            "--grid",
            metavar="N",
            min=1,
            help="The points along a side of the grid of --everything: half as many take a quarter of the time.",
            show_default=f"{_GRID}; with random weights {_GRID_OF_RANDOM_WEIGHTS}",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="What to write: a .png of a picture, a .mp4 of a video.",
            show_default="omniops-mask.png, omniops-video.mp4",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Cut objects out of a picture, or follow them through a video, with SAM 2.

    Of a picture, FILE.png gets the mask: white inside, or with several objects the number of the object at each pixel.
    Beside it FILE-overlay.jpg shows it on the picture, and FILE.json has each object's mask as COCO's run lengths, with
    its area and score. Of the three masks that one click may mean the one with the best score is taken.

    Of a video, FILE.mp4 shows the masks on it, without sound, and FILE.json has them by frame and object, with the
    frame's time in seconds. Prompts are of the frame after the @; without one of frame 0, the first. Objects are
    followed from the earliest of these frames back to the beginning, then on to the end. A video that breaks off,
    Ctrl-C or SIGTERM keeps the masks until there. Until the end they are in FILE.jsonl, a line of JSON for each, which
    stays there where the process is killed.

    What is there already is not replaced without --overwrite, and what is read never is.

    What follows a # tells objects apart, from 1 on. Places are those of a picture as it is shown: turned as its camera
    was.

    Example: omniops segment truck.jpg --point 500,375

    Example: omniops segment truck.jpg --box 425,600,700,875 --point 575,750,0 --point 1200,500#2 --out two.png

    Example: omniops segment juggle.mp4 --point 620,250@0 --point 640,300,0@30 --out followed.mp4
    """
    written = parse(points or [], boxes or [])
    if everything and written:
        raise CommandError("--everything takes no --point and no --box")
    if not everything and not written:
        raise CommandError("nothing to look for: give --point X,Y or --box X0,Y0,X1,Y1, or --everything")
    require_image_size(image_size)
    if not source.exists():
        raise CommandError(f"no such file: {source}")
    require_sam2()
    is_video = source.is_dir() or not is_picture(source)
    if everything and is_video:
        raise CommandError(f"--everything is for pictures, and {source} is none that Pillow can read")
    out = out or Path("omniops-video.mp4" if is_video else "omniops-mask.png")
    kind = "" if source.is_dir() or not is_video else ", which is no picture that Pillow can read,"
    require_ending("--out", out, ".mp4" if is_video else ".png", f"what is made of {source}{kind}")
    results, overlay = out.with_suffix(".json"), out.with_name(f"{out.stem}-overlay.jpg")
    require_new([out, results, lines_of(results) if is_video else overlay], overwrite, [source])
    if random_weights and everything:
        grid = grid or _GRID_OF_RANDOM_WEIGHTS
        image_size = image_size or _IMAGE_SIZE_OF_RANDOM_WEIGHTS
    say("loading PyTorch")
    chosen = choose_device(device)

    def load() -> Sam2VideoModel:
        means_nothing = ", with random weights: its masks mean nothing" if random_weights else ""
        say(f"loading SAM 2, {model}{means_nothing}")
        load_sam2()
        if random_weights:
            configuration(model)
        return load_model(model, random_weights, chosen, precision, image_size)

    work = Work(source, written, load, out, overwrite, random_weights)
    if is_video:
        from omniops.cli.segment_video import follow

        follow(work)
    else:
        from omniops.cli.segment_picture import cut_out

        cut_out(work, overlay, (grid or _GRID) if everything else None)
