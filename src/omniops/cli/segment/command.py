"""``omniops segment``: SAM 2 on a picture or through a video, from clicks and boxes or of everything."""

from __future__ import annotations

from pathlib import Path

from omniops.cli.common import CommandError, DeviceOption, choose_device, require_sam2
from omniops.cli.errors import say
from omniops.cli.outputs import OverwriteOption, lines_of, require_ending, require_new
from omniops.cli.pictures import is_picture
from omniops.cli.segment.model import ModelChoice
from omniops.cli.segment.options import (
    GRID,
    GRID_OF_RANDOM_WEIGHTS,
    IMAGE_SIZE_OF_RANDOM_WEIGHTS,
    BoxesOption,
    EverythingOption,
    GridOption,
    ImageSizeOption,
    ModelOption,
    OutOption,
    PointsOption,
    Precision,
    PrecisionOption,
    RandomWeightsOption,
    SourceArgument,
    require_image_size,
)
from omniops.cli.segment.prompts import WrittenPrompt, parse_prompts
from omniops.cli.segment.request import Request, overlay_of


def segment(
    source: SourceArgument,
    points: PointsOption = None,
    boxes: BoxesOption = None,
    everything: EverythingOption = False,
    model: ModelOption = "tiny",
    random_weights: RandomWeightsOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = Precision.AUTO,
    image_size: ImageSizeOption = None,
    grid: GridOption = None,
    out: OutOption = None,
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
    prompts = parse_prompts(points or [], boxes or [])
    _require_something_to_find(prompts, everything)
    require_image_size(image_size)
    is_video = _is_video(source, everything)
    out = out or Path("omniops-video.mp4" if is_video else "omniops-mask.png")
    _require_outputs(source, is_video, out, overwrite)
    if random_weights and everything:
        grid = grid or GRID_OF_RANDOM_WEIGHTS
        image_size = image_size or IMAGE_SIZE_OF_RANDOM_WEIGHTS
    say("loading PyTorch")
    choice = ModelChoice(model, random_weights, choose_device(device), precision, image_size)
    request = Request(source, prompts, choice, out, overwrite)
    if is_video:
        from omniops.cli.segment.video import segment_video

        segment_video(request)
    else:
        from omniops.cli.segment.picture import segment_picture

        segment_picture(request, (grid or GRID) if everything else None)


def _require_something_to_find(prompts: list[WrittenPrompt], everything: bool) -> None:
    if everything and prompts:
        raise CommandError("--everything takes no --point and no --box")
    if not everything and not prompts:
        raise CommandError("nothing to look for: give --point X,Y or --box X0,Y0,X1,Y1, or --everything")


def _is_video(source: Path, everything: bool) -> bool:
    if not source.exists():
        raise CommandError(f"no such file: {source}")
    require_sam2()
    is_video = source.is_dir() or not is_picture(source)
    if everything and is_video:
        raise CommandError(f"--everything is for pictures, and {source} is none that Pillow can read")
    return is_video


def _require_outputs(source: Path, is_video: bool, out: Path, overwrite: bool) -> None:
    kind = "" if source.is_dir() or not is_video else ", which is no picture that Pillow can read,"
    require_ending("--out", out, ".mp4" if is_video else ".png", f"what is made of {source}{kind}")
    results = out.with_suffix(".json")
    require_new([out, results, lines_of(results) if is_video else overlay_of(out)], overwrite, [source])
