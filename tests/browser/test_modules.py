"""What the page computes by itself: run-length encoding, the stream's parts, MP4, history."""

import io
import json
from pathlib import Path
from tempfile import NamedTemporaryFile

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from omniops.drawing import colour_of
from omniops.sam2 import rle
from omniops.server import stream


@pytest.fixture(scope="module")
def blank(browser, stand_in):
    """The page, for its modules."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{stand_in.url}page/favicon.svg")
    page.goto(stand_in.url)
    yield page
    context.close()


def masks():
    rng = np.random.default_rng(0)
    yield np.zeros((7, 5), bool)
    yield np.ones((7, 5), bool)
    yield np.eye(6, 9, dtype=bool)
    for height, width, share in ((1, 1, 0.5), (1, 40, 0.3), (40, 1, 0.7), (33, 57, 0.5), (64, 48, 0.02)):
        yield rng.random((height, width)) < share
    blob = np.zeros((720, 1280), bool)
    blob[100:640, 3:1277] = True
    blob[300:310, 400:900] = False
    yield blob


@pytest.mark.parametrize("mask", list(masks()), ids=lambda mask: "x".join(map(str, mask.shape)))
def test_rle_is_cocos(blank, mask):
    expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = expected["counts"].decode()
    height, width = mask.shape
    found = blank.evaluate(
        """async ([size, counts]) => {
            const rle = await import("/page/rle.js");
            const { mask, box, area } = rle.decode({ size, counts });
            const pixels = [[0, 0], [size[1] - 1, size[0] - 1], [size[1] >> 1, size[0] >> 1]];
            const covers = pixels.map(([x, y]) => rle.covers({ size, counts }, x, y));
            const ones = new TextDecoder("latin1").decode(mask.map((value) => 48 + value));
            return { ones, box, area, areaOf: rle.areaOf(counts), covers };
        }""",
        [[height, width], text],
    )
    assert found["ones"] == "".join(map(str, mask.astype(int).ravel()))
    assert found["area"] == found["areaOf"] == int(coco.area(expected))
    x, y, w, h = map(int, coco.toBbox(expected))
    assert found["box"] == ([x, y, x + w, y + h] if mask.any() else [0, 0, 0, 0])
    assert found["covers"] == [bool(mask[0, 0]), bool(mask[-1, -1]), bool(mask[height >> 1, width >> 1])]


@pytest.mark.parametrize("counts", ["0", "z", "~~", "U1000"])
def test_rle_that_does_not_fit_is_refused(blank, counts):
    refused = blank.evaluate(
        """async (counts) => {
            const { decode } = await import("/page/rle.js");
            try { decode({ size: [3, 4], counts }); return null; } catch (error) { return error.message; }
        }""",
        counts,
    )
    assert refused


def test_colours_are_those_of_downloads(blank):
    found = blank.evaluate(
        """async () => {
            const { channelsOf, colorOf } = await import("/page/colors.js");
            return Array.from({ length: 300 }, (_, id) => channelsOf(colorOf(id)));
        }"""
    )
    assert found == [list(colour_of(number)) for number in range(300)]


def test_what_lies_in_another_mask_is_on_top_whatever_came_last(blank):
    large, small = np.ones((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    small[5:15, 5:15] = 1
    layers = [
        {"counts": rle.encode(mask)["counts"], "color": colour, "fill": 1, "edge": 1}
        for mask, colour in ((small, "#ff0000"), (large, "#0000ff"))
    ]
    for order in (layers, layers[::-1]):
        found = blank.evaluate(
            """async (layers) => {
                const { Overlay } = await import("/page/overlay.js");
                const context = new Overlay().paint([20, 20], layers).getContext("2d");
                return [[10, 10], [2, 2]].map(([x, y]) => [...context.getImageData(x, y, 1, 1).data]);
            }""",
            order,
        )
        assert found == [[255, 0, 0, 255], [0, 0, 255, 255]]


FRAMES = [
    (0, [(0, {"size": [2, 3], "counts": "06"}), (7, {"size": [2, 3], "counts": "ü\r\n--frame\r\n"})]),
    (1, []),
    (2, [(0, {"size": [2, 3], "counts": "6"})]),
]

PARSE = """async ([bytes, cuts]) => {
    const { BodyPartParser } = await import("/page/stream.js");
    const parser = new BodyPartParser("multipart/x-savi-stream; boundary=frame");
    const complete = [];
    let from = 0;
    try {
        for (const to of [...cuts, bytes.length]) {
            complete.push(...parser.push(new Uint8Array(bytes.slice(from, to))));
            from = to;
        }
        parser.end();
    } catch (error) { return { count: complete.length, error: error.message }; }
    return { frames: complete.map(({ body }) => JSON.parse(new TextDecoder().decode(body))), error: null };
}"""


def test_stream_is_parsed_wherever_it_is_cut(blank):
    data = b"".join(stream.body_part(frame, found) for frame, found in FRAMES)
    expected = [json.loads(stream.body_part(*case).partition(b"\r\n\r\n")[2]) for case in FRAMES]
    rng = np.random.default_rng(1)
    cuts = [[], list(range(1, len(data)))] + [sorted(rng.integers(1, len(data), 5).tolist()) for _ in range(20)]
    for positions in cuts:
        assert blank.evaluate(PARSE, [list(data), positions]) == {"frames": expected, "error": None}


@pytest.mark.parametrize("lost", [1, 30, 150])
def test_stream_that_ends_inside_a_part_is_an_error(blank, lost):
    data = b"".join(stream.body_part(frame, found) for frame, found in FRAMES)
    answer = blank.evaluate(PARSE, [list(data[:-lost]), []])
    assert answer["error"] == "the stream ended in the middle of a frame"


def write_movie(fps, count, *, frames_between=12, b_frames=2, offset=0, rate=None, layout="moov last", size=(96, 64)):
    """An H.264 MP4 of `count` frames, as bytes."""
    file = NamedTemporaryFile(suffix=".mp4")  # noqa: SIM115  # what is moved within it has to have a name
    options = {"movflags": "+faststart"} if layout == "moov first" else {}
    with av.open(file.name, "w", options=options) as container:
        video = container.add_stream("libx264", rate=fps, options={"bf": str(b_frames), "g": str(frames_between)})
        video.width, video.height = size
        video.pix_fmt = "yuv420p"
        for t in range(count):
            pixels = np.full((size[1], size[0], 3), 20 + (t * 37) % 200, np.uint8)
            pixels[: size[1] // 2, : 2 + 5 * (t % 16)] = 235
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = offset + (t if rate is None else rate[t])
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    with file:
        return Path(file.name).read_bytes()


MOVIES = {
    "b-frames": {"fps": 24, "count": 40},
    "no-b-frames": {"fps": 30, "count": 7, "b_frames": 0},
    "moov-first": {"fps": 25, "count": 12, "layout": "moov first"},
    "one-frame": {"fps": 24, "count": 1},
    "variable-rate": {"fps": 24, "count": 10, "rate": [0, 1, 2, 5, 6, 9, 10, 11, 15, 16]},
    "starts-late": {"fps": 24, "count": 10, "offset": 5},
    "key-frames-only": {"fps": 24, "count": 10, "frames_between": 1, "b_frames": 0},
}

READ = """async (bytes) => {
    const { readMovie } = await import("/page/mp4.js");
    const movie = readMovie(new Uint8Array(bytes).buffer);
    return { ...movie, description: [...movie.description] };
}"""


@pytest.mark.parametrize("name", MOVIES)
def test_mp4_is_read_as_ffmpeg_reads_it(blank, name):
    data = write_movie(**MOVIES[name])
    movie = blank.evaluate(READ, list(data))
    with av.open(io.BytesIO(data)) as container:
        video = container.streams.video[0]
        packets = [packet for packet in container.demux(video) if packet.size]
        assert bytes(movie["description"]) == video.codec_context.extradata
        assert (movie["width"], movie["height"]) == (video.width, video.height)
        times = sorted(float(packet.pts * packet.time_base) for packet in packets)
    assert [(s["offset"], s["size"], s["key"]) for s in movie["samples"]] == [
        (packet.pos, packet.size, packet.is_keyframe) for packet in packets
    ]
    shown = [times.index(float(packet.pts * packet.time_base)) for packet in packets]
    assert [sample["index"] for sample in movie["samples"]] == shown
    assert [frame["time"] for frame in movie["frames"]] == pytest.approx([time - times[0] for time in times], abs=2e-4)
    assert movie["codec"].startswith("avc1.64")


@pytest.mark.parametrize("end", [0, 8, 100, 0.5, 0.9, -1])
def test_mp4_that_is_cut_off_is_refused(blank, end):
    data = write_movie(24, 12, layout="moov first")
    data = data[: int(end * len(data)) if isinstance(end, float) else end]
    refused = blank.evaluate(
        """async (bytes) => {
            const { UnsupportedMovie, readMovie } = await import("/page/mp4.js");
            try { readMovie(new Uint8Array(bytes).buffer); return false; }
            catch (error) { return error instanceof UnsupportedMovie; }
        }""",
        list(data),
    )
    assert refused


DECODE = """async ([bytes, order, kind]) => {
    const { DecodedFrames, SeekedFrames, timesOf } = await import("/page/frames.js");
    const { readMovie } = await import("/page/mp4.js");
    const buffer = new Uint8Array(bytes).buffer;
    const url = URL.createObjectURL(new Blob([buffer], { type: "video/mp4" }));
    const times = timesOf(readMovie(buffer));
    const frames = kind === "webcodecs" ? await DecodedFrames.open(buffer) : await SeekedFrames.open(url, times);
    const canvas = new OffscreenCanvas(96, 64);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const found = [];
    for (const index of order) {
        context.drawImage(await frames.frame(index), 0, 0);
        found.push([context.getImageData(90, 60, 1, 1).data[0], context.getImageData(8, 10, 1, 1).data[0]]);
    }
    frames.close();
    return found;
}"""


@pytest.mark.parametrize("kind", ["webcodecs", "video"])
@pytest.mark.parametrize("name", ["b-frames", "no-b-frames", "variable-rate", "starts-late"])
def test_frames_are_those_of_ffmpeg_in_any_order(blank, name, kind):
    data = write_movie(**MOVIES[name])
    with av.open(io.BytesIO(data)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    count = len(pictures)
    order = [
        0,
        count - 1,
        1,
        count // 2,
        count // 2 + 1,
        count // 2 - 1,
        count - 2,
        *range(count),
        *range(count - 1, 0, -3),
    ]
    found = blank.evaluate(DECODE, [list(data), order, kind])
    expected = [[int(pictures[index][60, 90, 0]), int(pictures[index][10, 8, 0])] for index in order]
    assert np.abs(np.array(found) - expected).max() <= 6


def test_the_cache_of_frames_is_bounded(blank):
    found = blank.evaluate(
        """async () => {
            const { FrameCache } = await import("/page/frames.js");
            const closed = [];
            const cache = new FrameCache(5);
            for (let index = 0; index < 9; index += 1) {
                cache.put(index, { close: () => closed.push(index) });
                cache.get(0);
            }
            return { closed, size: cache.size, capacity: cache.capacity };
        }"""
    )
    assert found == {"closed": [1, 2, 3, 4], "size": 5, "capacity": 5}


def test_of_frames_that_are_asked_for_at_once_the_newest_is_shown(blank):
    data = write_movie(24, 40)
    answers = blank.evaluate(
        """async (bytes) => {
            const { DecodedFrames } = await import("/page/frames.js");
            const frames = await DecodedFrames.open(new Uint8Array(bytes).buffer);
            const answers = await Promise.all([30, 5, 20, 39].map((index) => frames.frame(index)));
            return answers.map(Boolean);
        }""",
        list(data),
    )
    assert answers[-1] is True
    assert answers[1:3] == [False, False]


def test_a_frame_that_comes_late_does_not_take_the_place_of_a_newer_one(blank):
    shown = blank.evaluate(
        """async () => {
            const { Player } = await import("/page/player.js");
            let finish;
            const late = new Promise((resolve) => (finish = resolve));
            const frames = { count: 9, frame: (index) => (index === 2 ? late : Promise.resolve({})), close() {} };
            const player = new Player();
            const shown = [];
            player.addEventListener("frame", ({ detail }) => shown.push(detail.index));
            player.open(frames, 24);
            const first = player.seek(2);
            await player.seek(0);
            finish({});
            await first;
            return [...shown, player.index];
        }"""
    )
    assert shown == [0, 0]


def test_history_goes_back_and_forth_and_forgets_what_was_refused(blank):
    found = blank.evaluate(
        """async () => {
            const { History } = await import("/page/history.js");
            const [a, b, c, d] = ["a", "b", "c", "d"].map((name) => ({ name }));
            const history = new History(a);
            const seen = [];
            const see = () => seen.push(`${history.present.name} ${history.canUndo} ${history.canRedo}`);
            history.push(b); history.push(c); see();
            history.undo(); see();
            history.undo(); history.undo(); see();
            history.redo(); see();
            history.push(d); history.redo(); see();
            history.refuse(b); see();
            return seen;
        }"""
    )
    assert found == ["c true false", "b true true", "a false true", "b true true", "d true false", "b true false"]


def test_prompts_reach_the_server_one_after_another_and_are_taken_back(blank):
    """Whatever is wanted, the calls that follow from it lead there."""
    found = blank.evaluate(
        """async () => {
            const { EMPTY, after, nextCall, withName, withSteps, without } = await import("/page/prompts.js");
            const point = (x, label = 1) => ({ kind: "point", x, y: 0.5, label });
            const lead = (known, wanted) => {
                const calls = [];
                for (let call = nextCall(known, wanted); call; call = nextCall(known, wanted)) {
                    calls.push([call.kind, call.id, call.frame, call.steps?.length]);
                    known = after(known, call);
                }
                return calls;
            };
            const one = withSteps(EMPTY, 0, 3, [point(0.1), point(0.2, 0)]);
            const two = withSteps(withName(one, 0, "cat"), 1, 0, [point(0.4)]);
            const fewer = withSteps(two, 0, 3, [point(0.2, 0)]);
            const changes = [[EMPTY, one], [one, two], [two, fewer], [two, without(two, 0)], [two, EMPTY], [two, two]];
            return changes.map(([known, wanted]) => lead(known, wanted));
        }"""
    )
    none = None
    assert found == [
        [["send", 0, 3, 1], ["send", 0, 3, 2]],
        [["rename", 0, none, none], ["send", 1, 0, 1]],
        [["clear", 0, 3, none], ["send", 0, 3, 1]],
        [["remove", 0, none, none]],
        [["empty", none, none, none]],
        [],
    ]


def test_a_picture_of_a_session_that_is_resumed_keeps_its_prompts(blank):
    state = {
        "frames": [{"frameIndex": 2, "rleMaskList": [{"objectId": 5, "rleMask": {"size": [2, 2], "counts": "13"}}]}],
        "objects": [
            {
                "objectId": 5,
                "name": None,
                "prompts": [
                    {"frameIndex": 2, "points": [[0.1, 0.2]], "labels": [0], "box": [0, 0, 1, 1], "hasMask": True}
                ],
            }
        ],
    }
    prompts = blank.evaluate("async (state) => (await import('/page/prompts.js')).fromServer(state)", state)
    steps = prompts["objects"][0]["frames"]["2"]
    assert prompts["objects"][0]["name"] == "Object 6"
    assert [step["kind"] for step in steps] == ["mask", "box", "point"]
    assert steps[2] == {"kind": "point", "x": 0.1, "y": 0.2, "label": 0}


def test_the_scene_is_what_the_stand_in_says(clip):
    """The masks that other tests look for lie where the clip has the balloons."""
    from browser import scene

    with av.open(str(clip)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(pictures) == scene.FRAMES
    difference = np.abs(pictures[50].astype(int) - np.asarray(Image.fromarray(scene.picture(50))))
    assert np.median(difference) <= 3
    assert all(mask.sum() > 5000 for mask in scene.masks(0))
