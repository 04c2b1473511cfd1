import re
from dataclasses import fields
from pathlib import Path

import pytest

from omniops.server.settings import Settings

OFFICIAL = {
    "DATA_PATH": ("/srv/data", "data", Path("/srv/data")),
    "API_URL": ("https://example.org/", "api_url", "https://example.org"),
    "DEFAULT_VIDEO_PATH": ("gallery/05.mp4", "default_video", "gallery/05.mp4"),
    "MAX_UPLOAD_VIDEO_DURATION": ("30", "max_upload_video_duration", 30.0),
    "FFMPEG_NUM_THREADS": ("2", "ffmpeg_num_threads", 2),
    "VIDEO_ENCODE_CODEC": ("libx265", "video_encode_codec", "libx265"),
    "VIDEO_ENCODE_CRF": ("0", "video_encode_crf", 0),
    "VIDEO_ENCODE_FPS": ("29.97", "video_encode_fps", 29.97),
    "VIDEO_ENCODE_MAX_WIDTH": ("640", "video_encode_max_width", 640),
    "VIDEO_ENCODE_MAX_HEIGHT": ("360", "video_encode_max_height", 360),
    "VIDEO_ENCODE_SEEK_TIME": ("0", "video_encode_seek_time", 0.0),
    "VIDEO_ENCODE_VERBOSE": ("1", "video_encode_verbose", True),
    "SAM2_DEMO_FORCE_CPU_DEVICE": ("1", "device", "cpu"),
}
OURS = {
    "OMNIOPS_DEVICE": ("cuda:0, cuda:1", "device", "cuda:0, cuda:1"),
    "OMNIOPS_MODEL": ("small", "model", "small"),
    "OMNIOPS_RANDOM_WEIGHTS": ("yes", "random_weights", True),
    "OMNIOPS_IMAGE_SIZE": ("512", "image_size", 512),
    "OMNIOPS_TOKEN": ("secret", "token", "secret"),
    "OMNIOPS_INSECURE": ("true", "insecure", True),
    "OMNIOPS_ORIGINS": ("https://a.org, https://b.org", "origins", ("https://a.org", "https://b.org")),
    "OMNIOPS_HOSTS": ("a.org,", "hosts", ("a.org",)),
    "OMNIOPS_DEBUG": ("0", "debug", False),
    "OMNIOPS_GALLERY": ("/srv/clips", "gallery", Path("/srv/clips")),
    "OMNIOPS_MAX_SESSIONS": ("3", "max_sessions", 3),
    "OMNIOPS_MAX_SESSION_BYTES": ("1e9", "max_session_bytes", 10**9),
    "OMNIOPS_SESSION_TIMEOUT": ("60", "session_timeout", 60.0),
    "OMNIOPS_MAX_STREAMS": ("2", "max_streams", 2),
    "OMNIOPS_SEND_TIMEOUT": ("5", "send_timeout", 5.0),
    "OMNIOPS_PREDICTOR_TIMEOUT": ("90", "predictor_timeout", 90.0),
    "OMNIOPS_MAX_UPLOAD_BYTES": ("500e6", "max_upload_bytes", 500_000_000),
    "OMNIOPS_MAX_UPLOAD_PIXELS": ("1000", "max_upload_pixels", 1000),
    "OMNIOPS_UPLOAD_AGE": ("3600", "upload_age", 3600.0),
    "OMNIOPS_MAX_UPLOADS_BYTES": ("1e10", "max_uploads_bytes", 10**10),
}


@pytest.mark.parametrize("variable", [*OFFICIAL, *OURS])
def test_a_variable_sets_its_field(variable):
    text, name, value = {**OFFICIAL, **OURS}[variable]
    read = getattr(Settings.from_environment({variable: text}), name)
    assert read == value
    assert type(read) is type(value)


def test_every_field_has_a_variable():
    assert {field.name for field in fields(Settings)} == {name for _, name, _ in [*OFFICIAL.values(), *OURS.values()]}


def test_variables_that_are_empty_are_not_set():
    assert Settings.from_environment(dict.fromkeys([*OFFICIAL, *OURS], " ")) == Settings.from_environment({})


def test_without_variables_the_documented_defaults_hold():
    settings = Settings.from_environment({})
    assert settings.data == Path("/data")
    assert settings.gallery == Path("/data/gallery")
    assert settings.uploads == Path("/data/uploads")
    assert settings.posters == Path("/data/posters")
    assert settings.devices == ("auto",)
    assert settings.token is None
    assert not settings.insecure
    assert not settings.debug
    assert settings.max_upload_video_duration == 10
    assert settings.video_encode_fps == 24


@pytest.mark.parametrize("size", ["tiny", "small", "base_plus", "large"])
def test_the_checkpoint_is_where_the_official_server_has_it(size):
    settings = Settings.from_environment({"APP_ROOT": "/opt/demo", "MODEL_SIZE": size})
    assert settings.model == str(Path(f"/opt/demo/checkpoints/sam2.1_hiera_{size}.pt"))
    assert Settings.from_environment({"MODEL_SIZE": size, "OMNIOPS_RANDOM_WEIGHTS": "1"}).model == size


def test_any_other_size_is_base_plus_as_in_the_official_server():
    for environment in ({}, {"MODEL_SIZE": "huge"}):
        assert Settings.from_environment(environment).model.endswith("checkpoints/sam2.1_hiera_base_plus.pt")


def test_the_process_environment_is_read_by_default(monkeypatch):
    monkeypatch.setenv("OMNIOPS_MAX_SESSIONS", "7")
    assert Settings.from_environment().max_sessions == 7


def test_devices_are_separated_by_commas():
    assert Settings(device="cuda:0, cuda:1").devices == ("cuda:0", "cuda:1")


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("OMNIOPS_MAX_SESSIONS", "many", "OMNIOPS_MAX_SESSIONS: 'many' is not a number"),
        ("OMNIOPS_MAX_SESSIONS", "1.5", "OMNIOPS_MAX_SESSIONS: '1.5' is not a whole number"),
        ("OMNIOPS_MAX_SESSIONS", "0", "OMNIOPS_MAX_SESSIONS must be positive, got 0"),
        ("OMNIOPS_SESSION_TIMEOUT", "nan", "OMNIOPS_SESSION_TIMEOUT: 'nan' is not a finite number"),
        ("OMNIOPS_SEND_TIMEOUT", "inf", "OMNIOPS_SEND_TIMEOUT: 'inf' is not a finite number"),
        ("OMNIOPS_DEBUG", "maybe", "OMNIOPS_DEBUG: 'maybe' is neither 1 nor 0"),
        ("OMNIOPS_DEVICE", ",", "OMNIOPS_DEVICE must name at least one device, got ','"),
        ("OMNIOPS_IMAGE_SIZE", "-32", "OMNIOPS_IMAGE_SIZE must be positive, got -32"),
        ("VIDEO_ENCODE_SEEK_TIME", "-1", "VIDEO_ENCODE_SEEK_TIME must not be negative, got -1.0"),
        ("VIDEO_ENCODE_CRF", "-1", "VIDEO_ENCODE_CRF must not be negative, got -1"),
        ("API_URL", "localhost:7263", "API_URL must begin with http:// or https://, got 'localhost:7263'"),
        ("OMNIOPS_ORIGINS", "example.org", "OMNIOPS_ORIGINS must begin with http:// or https://, got 'example.org'"),
    ],
)
def test_a_value_of_another_kind_is_named(variable, text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Settings.from_environment({variable: text})


def test_a_token_must_not_be_empty():
    with pytest.raises(ValueError, match="token must not be empty"):
        Settings(token="")
