"""``omniops segment``: SAM 2 on pictures, through videos and on live video, from clicks and boxes or of everything."""

from __future__ import annotations

from collections.abc import Mapping

from omniops.cli.common import CommandError, DeviceOption, choose_device
from omniops.cli.errors import say
from omniops.cli.outputs import OverwriteOption
from omniops.cli.segment.files import DEFAULT_FOLDER, Job, choose_targets, chosen_save, require_outputs, without_done
from omniops.cli.segment.model import ModelChoice
from omniops.cli.segment.options import (
    GRID,
    GRID_OF_RANDOM_WEIGHTS,
    IMAGE_SIZE_OF_RANDOM_WEIGHTS,
    BoxesOption,
    CameraOption,
    CropsOption,
    EverythingOption,
    FramesOption,
    GridOption,
    ImageSizeOption,
    LabelsOption,
    MinAreaOption,
    ModelOption,
    OutOption,
    PicturesOption,
    PointsOption,
    Precision,
    PrecisionOption,
    PredIouThreshOption,
    RandomWeightsOption,
    ResumeOption,
    SaveOption,
    ShowOption,
    SourcesArgument,
    StabilityScoreThreshOption,
    Upsampling,
    UpsamplingOption,
    WhenFullOption,
    require_image_size,
)
from omniops.cli.segment.prompts import parse_prompts
from omniops.cli.segment.request import Request, parse_labels
from omniops.cli.segment.sources import Kind, find_sources
from omniops.cli.sources import FilesFromOption


def segment(
    sources: SourcesArgument = None,
    points: PointsOption = None,
    boxes: BoxesOption = None,
    everything: EverythingOption = False,
    files_from: FilesFromOption = None,
    pictures: PicturesOption = False,
    camera: CameraOption = None,
    show: ShowOption = False,
    when_full: WhenFullOption = None,
    frames: FramesOption = None,
    model: ModelOption = "tiny",
    random_weights: RandomWeightsOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = Precision.AUTO,
    image_size: ImageSizeOption = None,
    upsampling: UpsamplingOption = Upsampling.BILINEAR,
    grid: GridOption = None,
    pred_iou_thresh: PredIouThreshOption = None,
    stability_score_thresh: StabilityScoreThreshOption = None,
    crops: CropsOption = 0,
    min_area: MinAreaOption = 0,
    save: SaveOption = None,
    labels: LabelsOption = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Cut objects out of pictures, or follow them through videos and live video, with SAM 2.

    Of a picture, FILE.png gets the mask: white inside, or with several objects the number of the object at each pixel.
    Beside it FILE-overlay.jpg shows it on the picture, and FILE.json has each object's mask as COCO's run lengths, with
    its area and score. Of the three masks that one click may mean the one with the best score is taken.

    Of a video, FILE.mp4 shows the masks on it, with its sound, and FILE.json has them by frame and object, with the
    frame's time in seconds. Prompts are of the frame after the @; without one of frame 0, the first. Objects are
    followed from the earliest of these frames back to the beginning, then on to the end. A video that breaks off,
    Ctrl-C or SIGTERM keeps the masks until there. Until the end they are in FILE.jsonl, a line of JSON for each frame,
    which stays there where the process is killed.

    Several pictures and videos, or a pattern or a list, go to a folder, each under its own name; the prompts are those
    of each. One that fails does not keep the others from being done: it is named at the end, with status 1. The files
    of a folder are the frames of a video, unless with --everything or --pictures.

    A live video is shown in a window, where clicks show objects and correct their masks; with --out it is written,
    and FILE.jsonl has the masks of each frame, until it ends or Ctrl-C. Frames that come too fast are dropped.

    What is there already is not replaced without --overwrite, and what is read never is. While a video is followed,
    FILE.state.safetensors has what is needed to go on: an interrupted command does so with --resume.

    What follows a # tells objects apart, from 1 on. Places are those of a picture as it is shown: turned as its camera
    was.

    Example: omniops segment truck.jpg --point 500,375

    Example: omniops segment truck.jpg --box 425,600,700,875 --point 575,750,0 --point 1200,500#2 --out two.png

    Example: omniops segment juggle.mp4 --point 620,250@0 --point 640,300,0@30 --out followed.mp4

    Example: omniops segment photos/*.jpg --everything --save yolo --out labels

    Example: omniops segment --camera 0
    """
    prompts = parse_prompts(points or [], boxes or [])
    if everything and prompts:
        raise CommandError("--everything takes no --point and no --box")
    found = find_sources(sources or [], files_from, camera, everything=everything, pictures=pictures)
    is_live = found.all[0].kind is Kind.LIVE
    shows = is_live and (show or (out is None and save is None))
    if not everything and not prompts and not shows:
        raise CommandError("nothing to look for: give --point X,Y or --box X0,Y0,X1,Y1, or --everything")
    require_image_size(image_size)
    _require_live(is_live, {"--show": show, "--when-full": when_full, "--frames": frames})
    classes = parse_labels(labels or [])
    folder = (out or DEFAULT_FOLDER) if found.are_many else None
    targets = choose_targets(found, out)
    jobs = [
        Job(source, target, chosen_save(source, save, out)) for source, target in zip(found.all, targets, strict=True)
    ]
    if resume and not is_live:
        jobs = without_done(jobs, are_many=found.are_many)
        if len(jobs) < len(targets):
            say(f"{len(targets) - len(jobs)} of {len(targets)} are done already")
        if not jobs:
            return
    overwrite = overwrite or (resume and not is_live)
    require_outputs(jobs, found.all, folder, overwrite)
    if random_weights and everything:
        grid = grid or GRID_OF_RANDOM_WEIGHTS
        image_size = image_size or IMAGE_SIZE_OF_RANDOM_WEIGHTS
    say("loading PyTorch")
    choice = ModelChoice(model, random_weights, choose_device(device), precision, image_size)
    requests = [
        Request(source, prompts, choice, target, overwrite, what, classes, upsampling, resume)
        for source, target, what in jobs
    ]
    if is_live:
        from omniops.cli.segment.live import segment_live

        segment_live(requests[0], when_full, frames, shows=shows)
        return
    from omniops.cli.segment.picture import Everything, segment_picture

    every_mask = None
    if everything:
        every_mask = Everything(grid or GRID, pred_iou_thresh, stability_score_thresh, crops, min_area)
    if folder is not None:
        from omniops.cli.segment.many import segment_many

        segment_many(requests, every_mask, folder, found.all)
    elif requests[0].source.kind is Kind.VIDEO:
        from omniops.cli.segment.video import segment_video

        segment_video(requests[0])
    else:
        segment_picture(requests[0], every_mask)


def _require_live(is_live: bool, options: Mapping[str, object]) -> None:
    for option, value in options.items():
        if value and not is_live:
            raise CommandError(f"{option} is for live video: a camera, a URL, a device or a video from stdin")
