"""Times of SAM 2's steps, made up, for the tests of its benchmark."""

from omniops.benchmarking.sam2 import OFFICIAL, OURS, PREDICT, SET_IMAGE, TOTAL, Time


def times_of(milliseconds):
    """Of every step, by device and contender; the total is the sum."""
    times = []
    for (device, contender), (first, second) in milliseconds.items():
        for step, median in ((SET_IMAGE, first), (PREDICT, second), (TOTAL, first + second)):
            times.append(Time(device, "float32", contender, step, median))
    return times


SOURCE = {
    ("cpu", OURS): (711, 31),
    ("cpu", OFFICIAL): (1422, 62),
    ("mps", OURS): (349, 21),
    ("mps", OFFICIAL): (349, 31),
}
