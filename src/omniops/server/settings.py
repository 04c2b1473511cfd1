"""The server's settings, and how environment variables set them: the official server's, and ours, OMNIOPS_*."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

MODEL_SIZES = ("tiny", "small", "base_plus", "large")
# The official front end's own address, as it is started by its documentation.
FRONT_END_ORIGINS = ("http://localhost:7262", "http://127.0.0.1:7262")

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class Settings:
    """The settings of a server. Sizes are in bytes and times in seconds.

    Args:
        data: the folder of gallery, posters and uploads; nothing outside it and ``gallery`` is opened.
        gallery: the folder of the videos that are offered; ``gallery`` in ``data`` if None.
        default_video: the API's path (``gallery/NAME.mp4``) of the video that is shown first.
        api_url: the address that browsers reach the server by, which precedes the path in every URL that it gives; if
            empty, the one that the request came to.
        model: a checkpoint or a size, as ``omniops.sam2.load`` takes it.
        device: one device or several, separated by commas; a predictor runs on each.
        token: the token that clients have to send; None where none is needed.
        insecure: whether other machines are served without a token.
        origins, hosts: pages (``https://name:port``) and Host headers (``name`` or ``name:port``) that are served
            besides the server's own.
        predictor_timeout: a predictor that takes longer to open a video, for a click or for a frame has hung and is
            started anew.
        max_upload_pixels: of a picture, or of a frame of a video.
        max_upload_video_duration: an uploaded video is cut to this length.
        upload_age: uploads that nobody used for so long are removed.
        max_uploads_bytes: of all uploads together; the oldest are removed first.
    """

    data: Path = Path("/data")
    gallery: Path = field(default=None)  # type: ignore[assignment]  # set below from data
    default_video: str = ""
    api_url: str = ""

    model: str = "tiny"
    device: str = "auto"
    random_weights: bool = False
    image_size: int | None = None

    token: str | None = None
    insecure: bool = False
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    debug: bool = False

    max_sessions: int = 32
    max_session_bytes: int = 8_000_000_000
    session_timeout: float = 1800.0
    max_streams: int = 4
    send_timeout: float = 60.0
    predictor_timeout: float = 300.0

    max_upload_bytes: int = 500_000_000
    max_upload_pixels: int = 2**26
    max_upload_video_duration: float = 10.0
    upload_age: float = 86400.0
    max_uploads_bytes: int = 10_000_000_000

    ffmpeg_num_threads: int = 1
    video_encode_codec: str = "libx264"
    video_encode_crf: int = 23
    video_encode_fps: float = 24.0
    video_encode_max_width: int = 1280
    video_encode_max_height: int = 720
    video_encode_seek_time: float = 0.0
    video_encode_verbose: bool = False

    def __post_init__(self) -> None:
        # Frozen: what is derived when it is made is set past the guard.
        object.__setattr__(self, "data", Path(self.data))
        object.__setattr__(self, "gallery", Path(self.gallery) if self.gallery is not None else self.data / "gallery")
        object.__setattr__(self, "api_url", self.api_url.rstrip("/"))
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None and not (value >= 0 if name in _MAY_BE_ZERO else value > 0):
                wanted = "not be negative" if name in _MAY_BE_ZERO else "be positive"
                raise ValueError(f"{name} must {wanted}, got {value}")
        if not self.devices:
            raise ValueError(f"device must name at least one device, got {self.device!r}")
        if self.token is not None and not self.token:
            raise ValueError("token must not be empty")
        for name, addresses in (("api_url", (self.api_url,) if self.api_url else ()), ("origins", self.origins)):
            for address in addresses:
                if not address.startswith(("http://", "https://")):
                    raise ValueError(f"{name} must begin with http:// or https://, got {address!r}")

    @property
    def devices(self) -> tuple[str, ...]:
        """The names in ``device``, one for each predictor."""
        return tuple(name.strip() for name in self.device.split(",") if name.strip())

    @property
    def uploads(self) -> Path:
        """The folder of uploaded videos and pictures."""
        return self.data / "uploads"

    @property
    def posters(self) -> Path:
        """The folder of the videos' posters."""
        return self.data / "posters"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """The settings that ``environment``, or this process's, gives; an unset or empty variable is the default's.

        Raises:
            ValueError: that names the variable, if its value is not of its kind.
        """
        environment = os.environ if environment is None else environment
        values: dict[str, Any] = {}
        for variable, (name, read) in _VARIABLES.items():
            text = environment.get(variable, "").strip()
            if text:
                try:
                    values[name] = read(text)
                except ValueError as error:
                    raise ValueError(f"{variable}: {error}") from None
        if environment.get("SAM2_DEMO_FORCE_CPU_DEVICE", "").strip().lower() in _TRUE:
            values["device"] = "cpu"
        if "model" not in values:
            size = environment.get("MODEL_SIZE", "")
            size = size if size in MODEL_SIZES else "base_plus"
            values["model"] = size if values.get("random_weights") else _official_checkpoint(environment, size)
        try:
            return cls(**values)
        except ValueError as error:
            variables = {name: variable for variable, (name, _) in _VARIABLES.items()}
            name, _, rest = str(error).partition(" ")
            raise ValueError(f"{variables.get(name, name)} {rest}") from None


def _official_checkpoint(environment: Mapping[str, str], size: str) -> str:
    """The checkpoint of a size, where the official server looks for it."""
    return str(Path(environment.get("APP_ROOT") or "/opt/sam2") / "checkpoints" / f"sam2.1_hiera_{size}.pt")


def _integer(text: str) -> int:
    value = _number(text)  # 500e6 is a whole number, too
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return value


def _flag(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError(f"{text!r} is neither 1 nor 0")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


_READERS: dict[str, Callable[[str], Any]] = {
    "int": _integer,
    "int | None": _integer,
    "float": _number,
    "bool": _flag,
    "tuple[str, ...]": _names,
    "Path": Path,
    "str": str,
    "str | None": str,
}
_OFFICIAL = {
    "data": "DATA_PATH",
    "default_video": "DEFAULT_VIDEO_PATH",
    "api_url": "API_URL",
    "max_upload_video_duration": "MAX_UPLOAD_VIDEO_DURATION",
    "ffmpeg_num_threads": "FFMPEG_NUM_THREADS",
    **{item.name: item.name.upper() for item in fields(Settings) if item.name.startswith("video_encode_")},
}
# Each variable with its field and how its text is read.
_VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    _OFFICIAL.get(item.name, f"OMNIOPS_{item.name.upper()}"): (item.name, _READERS[str(item.type)])
    for item in fields(Settings)
}
_NUMBERS = tuple(item.name for item in fields(Settings) if item.type in ("int", "int | None", "float"))
_MAY_BE_ZERO = ("video_encode_seek_time", "video_encode_crf")
