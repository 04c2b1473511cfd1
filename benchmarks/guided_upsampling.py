"""What a picture's edges are worth to a mask: bilinear upsampling beside ``omniops.sam2.upsampling.guided``.

Shapes whose masks are known exactly are laid over a photograph: discs, stars, blobs and spokes, of one colour; of the
photograph's own texture; of what was there, but a twentieth of white brighter or darker; and of what was there itself,
so that only the photograph's own edges can be followed, wrongly. Low-resolution logits are made of the exact mask as
SAM 2's network might give them: the picture squeezed to a square, the mask's share of each of 256 x 256 pixels taken
and blurred, its logit, and smooth noise. Every way brings them to the picture's size; all are judged near the true
boundary alone, where they differ.

Real logits err by an unknown amount, and the more they err the more there is to gain: so it is --noise that decides.

python benchmarks/guided_upsampling.py photo.jpg --json guided_upsampling.json --plot guided_upsampling.png
"""

from __future__ import annotations

import datetime
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from omniops import device as devices
from omniops.cli import errors
from omniops.cli.common import (
    DeviceOption,
    choose_device,
    output,
    progress,
    require_pictures,
)
from omniops.cli.outputs import OverwriteOption, require_new, require_picture, write_json, writing
from omniops.cli.pictures import read_picture
from omniops.environment import machine, versions
from omniops.sam2.upsampling import guided

LOW = 256
"""The side of the low-resolution map."""
BLURRED, GRAIN = 1.0, 1.5
"""How far the mask is blurred and the noise is smooth, in low-resolution pixels."""
CLIP = 1e-3
"""The least share of a pixel, of the mask and of what is not: its logits go from -6.9 to 6.9."""
BANDS = (2, 4, 8)
"""How far from the true boundary the intersection over union is taken, in pixels of the picture."""
TOLERANCES = (1, 2)
"""How near a boundary must be to count as found."""
MARGIN = 40
OUTLINES = ("disc", "star", "blob", "spokes")
FILLINGS = ("colour", "texture", "low contrast", "unseen")
BILINEAR, BLUR, GUIDED = "bilinear", "blur", "guided"
"""Blur is guided upsampling that takes all colours for one: what guided gains over it the picture gives."""

Upsample = Callable[..., Tensor]


class Scene(NamedTuple):
    """A shape laid over the photograph."""

    outline: str
    filling: str
    picture: Tensor
    """(1, 3, H, W) from 0 to 1."""
    mask: Tensor
    """(H, W), bool."""
    logits: Tensor
    """(1, 1, 256, 256)"""
    box: tuple[slice, slice]
    """Where the shape is, and all that counts."""


def main(
    photo: Annotated[
        Path | None, typer.Argument(metavar="PHOTO", help="Any picture; a portrait of Grace Hopper without it.")
    ] = None,
    device: DeviceOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw them there: .png, .svg.")] = None,
    scenes: Annotated[int, typer.Option("--scenes", metavar="N", min=1, help="Of each outline and filling.")] = 6,
    noise: Annotated[
        float, typer.Option("--noise", min=0, help="Of the logits: their error's standard deviation.")
    ] = 0.5,
    sweep: Annotated[bool, typer.Option("--sweep", help="Other settings too: where the defaults are from.")] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare, print a table, write the figures."""
    chosen = choose_device(device)
    require_picture("--plot", plot)
    require_new([json_file, plot], overwrite, [] if photo is None else [photo])
    require_pictures()
    if photo is None:
        from matplotlib.cbook import get_sample_data

        photo = Path(get_sample_data("grace_hopper.jpg", asfileobj=False))
    pixels = np.asarray(read_picture(photo), dtype=np.float32) / np.float32(255)
    height, width = pixels.shape[:2]
    found = _compare(pixels, _contenders(sweep), scenes, noise, chosen)

    console = output()
    console.print(f"{photo.name}, {width} x {height}, noise of {noise}, {devices.title(chosen)}")
    console.print(_table(found.scores, list(found.seconds), found.seconds))
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    if json_file is not None:
        report = {
            "date": date,
            "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
            "device": devices.title(chosen),
            "hardware": {**machine(), "threads": torch.get_num_threads()},
            "versions": versions(),
            "photo": {"name": photo.name, "size": [height, width]},
            "method": _method(scenes, noise),
            "median_seconds": {name: statistics.median(times) for name, times in found.seconds.items()},
            "results": found.scores,
        }
        write_json(json_file, report, overwrite, indent=1)
    if plot is not None:
        with writing(plot, overwrite) as path:
            title = f"{photo.name}, {width} x {height}, noise of {noise}, {date[:10]}"
            _draw(found.scores, found.stars, title, path)


@dataclass
class Comparison:
    """Of upsampling methods on scenes."""

    scores: list[dict[str, Any]]
    """Of each method on each scene."""
    seconds: dict[str, list[float]]
    """Of each method's calls."""
    stars: dict[str, tuple[Scene, dict[str, Tensor]]]
    """For each filling the first star, and the mask by each method."""


def _contenders(sweep: bool) -> dict[str, Upsample]:
    contenders: dict[str, Upsample] = {
        BILINEAR: _bilinear,
        BLUR: partial(guided, sigma_colour=torch.inf),
        GUIDED: guided,
    }
    if sweep:
        for k, space, colour in product((3, 5, 7), (0.6, 0.8, 1.0), (0.05, 0.1, 0.15, 0.2)):
            settings = partial(guided, kernel_size=k, sigma_space=space, sigma_colour=colour)
            contenders[f"{k}, {space}, {colour}"] = settings
    return contenders


def _compare(
    pixels: NDArray[np.float32], contenders: dict[str, Upsample], scenes: int, noise: float, device: torch.device
) -> Comparison:
    size = pixels.shape[:2]
    comparison = Comparison([], {name: [] for name in contenders}, {})
    with progress() as bar:
        task = bar.add_task("", total=scenes * len(OUTLINES) * len(FILLINGS))
        for scene in _scenes(pixels, scenes, noise):
            bar.update(task, description=f"{scene.outline}, {scene.filling}")
            masks = {}
            for name, upsample in contenders.items():
                logits, picture = scene.logits.to(device), scene.picture.to(device)
                devices.synchronize(device)
                before = perf_counter()
                upsampled = upsample(logits, picture, size)
                devices.synchronize(device)
                comparison.seconds[name].append(perf_counter() - before)
                masks[name] = upsampled[0, 0].cpu() > 0
                scores = _scores(masks[name][scene.box], scene.mask[scene.box])
                row = {"outline": scene.outline, "filling": scene.filling, "upsampling": name, **scores}
                comparison.scores.append(row)
            if scene.outline == "star":
                comparison.stars.setdefault(scene.filling, (scene, masks))
            bar.advance(task)
    return comparison


def _method(scenes: int, noise: float) -> dict[str, str]:
    return {
        "logits": f"256 x 256: shares blurred by {BLURRED}, clipped to {CLIP}; noise of {noise}, blurred by {GRAIN}",
        "iou": f"within {BANDS} pixels of the true boundary",
        "f": f"of boundaries found within {TOLERANCES} pixels",
        "scenes": f"{scenes} of each outline and filling, from the same seeds",
    }


def _bilinear(logits: Tensor, picture: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def _scenes(photo: NDArray[np.float32], count: int, noise: float) -> Iterator[Scene]:
    height, width = photo.shape[:2]
    for seed, outline, filling in product(range(count), OUTLINES, FILLINGS):
        numbers = np.random.default_rng([seed, OUTLINES.index(outline)])  # the same places for every filling
        size = numbers.uniform(0.12, 0.25) * min(height, width)
        x, y = numbers.uniform(size * 1.1, width - size * 1.1), numbers.uniform(size * 1.1, height - size * 1.1)
        share = _share(outline, x, y, size, height, width, numbers)
        inside = _filling(filling, photo, share, numbers)
        picture = photo + share[..., None] * (inside - photo)
        box = tuple(
            slice(max(0, int(middle - size * 1.1) - MARGIN), int(middle + size * 1.1) + MARGIN) for middle in (y, x)
        )
        yield Scene(
            outline,
            filling,
            torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None].contiguous(),
            torch.from_numpy(share > 0.5),
            _logits(torch.from_numpy(share), noise, seed),
            (box[0], box[1]),
        )


def _share(
    outline: str, x: float, y: float, size: float, height: int, width: int, numbers: np.random.Generator
) -> NDArray[np.float32]:
    """(H, W): how much of each pixel is the shape's, counted at 4 x 4 points of it."""
    top, bottom = max(0, int(y - size * 1.1)), min(height, int(y + size * 1.1) + 1)
    left, right = max(0, int(x - size * 1.1)), min(width, int(x + size * 1.1) + 1)
    down, across = np.mgrid[top : bottom : 1 / 4, left : right : 1 / 4] + 1 / 8
    down, across = down - y, across - x
    angle = np.arctan2(down, across) + numbers.uniform(0, 2 * np.pi)
    radius = np.hypot(down, across)
    if outline == "disc":
        inside = radius < size
    elif outline == "star":
        tip = np.abs((angle * 5 / np.pi) % 2 - 1)  # 1 at the five points, 0 between them
        inside = radius < size * (0.4 + 0.6 * tip**2)
    elif outline == "blob":
        waves = sum(numbers.uniform(0.03, 0.12) * np.sin(n * angle + numbers.uniform(0, 7)) for n in range(2, 7))
        inside = radius < size * (0.7 + waves)
    else:  # spokes, about a hundredth of the picture wide
        turn = (angle % (np.pi / 3)) - np.pi / 6
        inside = (radius < size) & ((np.abs(radius * np.sin(turn)) < size * 0.04) | (radius < size * 0.25))
    share = np.zeros((height, width), dtype=np.float32)
    share[top:bottom, left:right] = inside.reshape(bottom - top, 4, right - left, 4).mean((1, 3))
    return share


def _filling(
    filling: str, photo: NDArray[np.float32], share: NDArray[np.float32], numbers: np.random.Generator
) -> NDArray[np.float32]:
    """What the shape shows: one colour, or (H, W, 3)."""
    covered = photo[share > 0].mean(0)
    if filling == "colour":
        colour: NDArray[np.float32] = (covered + numbers.uniform(0.3, 0.6, 3)) % 1
        return colour
    if filling == "texture":
        return photo[::-1, ::-1]
    if filling == "low contrast":
        changed: NDArray[np.float32] = photo + np.float32(0.05 if covered.mean() < 0.5 else -0.05)
        return changed
    return photo


def _logits(share: Tensor, noise: float, seed: int) -> Tensor:
    """(1, 1, 256, 256)"""
    small = F.interpolate(share[None, None], (LOW, LOW), mode="area")
    small = _blurred(small, BLURRED).clamp(CLIP, 1 - CLIP)
    grain = _blurred(torch.randn(small.shape, generator=torch.Generator().manual_seed(seed)), GRAIN)
    return small.logit() + noise * grain / grain.std()


def _blurred(image: Tensor, sigma: float) -> Tensor:
    reach = int(4 * sigma)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(image, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])


def _scores(found: Tensor, true: Tensor) -> dict[str, float]:
    """Of bool (H, W)."""
    edges = {name: _boundary(mask) for name, mask in (("found", found), ("true", true))}
    scores = {}
    for band in BANDS:
        near = _near(edges["true"], band)
        scores[f"iou_{band}"] = ((found & true & near).sum() / ((found | true) & near).sum()).item()
    for tolerance in TOLERANCES:
        precision = (edges["found"] & _near(edges["true"], tolerance)).sum() / edges["found"].sum().clamp(min=1)
        recall = (edges["true"] & _near(edges["found"], tolerance)).sum() / edges["true"].sum()
        scores[f"f_{tolerance}"] = (2 * precision * recall / (precision + recall).clamp(min=1e-9)).item()
    return scores


def _boundary(mask: Tensor) -> Tensor:
    """The mask's pixels that share a side with one that is not the mask's."""
    outside = F.pad(~mask, (1, 1, 1, 1))
    return mask & (outside[1:-1, 2:] | outside[1:-1, :-2] | outside[2:, 1:-1] | outside[:-2, 1:-1])


def _near(pixels: Tensor, reach: int) -> Tensor:
    """All that is no farther from one of the pixels."""
    line = torch.arange(-reach, reach + 1)
    disc = (line[:, None] ** 2 + line**2 <= reach**2).float()
    return F.conv2d(pixels[None, None].float(), disc[None, None], padding=reach)[0, 0] > 0.5


def _mean(results: list[dict[str, Any]], score: str, **columns: str) -> float:
    return statistics.fmean(row[score] for row in results if all(row[key] == value for key, value in columns.items()))


def _score_names() -> dict[str, str]:
    names = {f"iou_{band}": f"IoU within {band} px" for band in BANDS}
    return names | {f"f_{tolerance}": f"F at {tolerance} px" for tolerance in TOLERANCES}


def _table(results: list[dict[str, Any]], contenders: list[str], seconds: dict[str, list[float]]) -> Table:
    """In percent, the best in bold."""
    table = Table("what", "", *_score_names().values(), "ms", box=SIMPLE_HEAD)
    groups: list[tuple[str, dict[str, str]]] = [(filling, {"filling": filling}) for filling in FILLINGS]
    groups += [(outline, {"outline": outline}) for outline in OUTLINES]
    for title, columns in [*groups, ("all", {})]:
        for name in contenders if title == "all" else (BILINEAR, BLUR, GUIDED):
            means = {score: _mean(results, score, upsampling=name, **columns) for score in _score_names()}
            best = {
                score: max(_mean(results, score, upsampling=contender, **columns) for contender in contenders)
                for score in means
            }
            cells = [f"[bold]{mean:.1%}[/]" if mean == best[score] else f"{mean:.1%}" for score, mean in means.items()]
            time = f"{statistics.median(seconds[name]) * 1e3:.0f}" if title == "all" else ""
            table.add_row(title if name == BILINEAR else "", name, *cells, time)
        table.add_section()
    return table


def _draw(
    results: list[dict[str, Any]], shown: dict[str, tuple[Scene, dict[str, Tensor]]], title: str, path: Path
) -> None:
    """For each filling: the scores, and a detail of a star with the boundary of each."""
    from matplotlib.figure import Figure

    colours = {"true": "white", BILINEAR: "#e07b28", BLUR: "#9a9a9a", GUIDED: "#1f9fd8"}
    figure = Figure(figsize=(15, 4.2 * len(FILLINGS)), dpi=100, layout="constrained")
    panels = figure.subplots(len(FILLINGS), 3, squeeze=False)
    names = _score_names()
    for axes, filling in zip(panels, FILLINGS, strict=True):
        for shift, name in ((-0.28, BILINEAR), (0, BLUR), (0.28, GUIDED)):
            means = [100 * _mean(results, score, upsampling=name, filling=filling) for score in names]
            bars = axes[0].bar(np.arange(len(names)) + shift, means, 0.27, color=colours[name], label=name)
            axes[0].bar_label(bars, fmt="%.0f", fontsize=8)
        axes[0].set_xticks(
            range(len(names)), [label.replace(" within", "\nwithin") for label in names.values()], fontsize=8
        )
        axes[0].set_ylim(0, 115)
        axes[0].set_ylabel("%")
        axes[0].set_title(filling)
        axes[0].legend(loc="upper right", ncols=3, fontsize=8)
        scene, found = shown[filling]
        row, column = np.argwhere(_boundary(scene.mask).numpy())[0].tolist()
        reach = max(scene.mask.shape) // 24
        crop = tuple(slice(max(0, middle - reach), middle + reach) for middle in (row, column))
        picture = scene.picture[0].permute(1, 2, 0).clamp(0, 1)[crop].numpy()
        for axis, name in zip(axes[1:], (BILINEAR, GUIDED), strict=True):
            axis.imshow(picture, interpolation="nearest")
            for mask, key in ((scene.mask, "true"), (found[name], name)):
                axis.contour(mask[crop].float().numpy(), [0.5], colors=colours[key], linewidths=1.4)
            axis.set_title(f"{name}; white: the truth")
            axis.set_axis_off()
    figure.suptitle(f"Masks from 256 x 256 logits: {title}")
    figure.savefig(path)


if __name__ == "__main__":
    with errors.signals_as_errors():
        sys.exit(errors.run(lambda: typer.run(main)))
