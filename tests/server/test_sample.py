"""The clip that is served where no folder is given."""

import av
import numpy as np

from omniops.server import sample


def test_the_clip_is_three_seconds_that_every_browser_plays(tmp_path):
    path = tmp_path / sample.NAME
    sample.write_sample(path)
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert container.duration == 3_000_000  # microseconds
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == sample.SECONDS * sample.FPS == 72
    assert list(tmp_path.iterdir()) == [path]
    for index in (0, 40, 71):
        difference = np.abs(frames[index].astype(int) - sample.frame(index))
        assert np.percentile(difference, 99) < 24
        assert difference.mean() < 3


def test_the_discs_stay_inside_and_move():
    y, x = (axis.ravel() for axis in np.indices((sample.HEIGHT, sample.WIDTH)))
    border = (x < 1) | (x > sample.WIDTH - 2) | (y < 1) | (y > sample.HEIGHT - 2)
    before = None
    for index in range(0, 72, 6):
        pixels = sample.frame(index).reshape(-1, 3).astype(int)
        assert np.ptp(pixels[border], axis=1).max() < 40  # the background is grey
        red = (pixels[:, 0] > 150) & (pixels[:, 1] < 110)
        centre = np.array([x[red].mean(), y[red].mean()])
        assert before is None or np.hypot(*(centre - before)) > 20
        before = centre
