"""How numbers and dtypes are written for people to read."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import torch


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def digits(number: float) -> str:
    """Three significant digits, or all before the point: 0.00789, 0.100, 12.3, 1234."""
    return f"{number:#.3g}" if number < 99.95 else f"{number:.0f}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
