"""What the tests of the sessions in the predictor's process share."""

import numpy as np
from clips import HEIGHT, WIDTH

from omniops.sam2 import rle

FRAMES = 6
EMPTY = {"size": [HEIGHT, WIDTH], "counts": rle.compress_counts(np.array([HEIGHT * WIDTH]))}
POINT = [0.25, 0.5]


def tracked(inference, session="a", start=0):
    count = inference.begin(session, start)
    found = list(iter(lambda: inference.next(session), None))
    assert len(found) == count
    return found


def everything(inference, session, frame, side):
    number = inference.begin_everything(session, frame, side)
    while (found := inference.next_everything(session, number)) is None:
        pass
    return found
