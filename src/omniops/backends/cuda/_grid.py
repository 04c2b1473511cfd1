"""Sizes of grids and tiles. Triton's own functions of these names take some microseconds a call from Python."""


def cdiv(number: int, divisor: int) -> int:
    """number / divisor, rounded up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is no less than ``number``, which is at least 1."""
    return 1 << (number - 1).bit_length()
