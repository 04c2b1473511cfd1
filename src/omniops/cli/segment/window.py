"""A window that shows a live video with its masks, and takes clicks."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from omniops.cli.common import CommandError

_HELP = "left click: of the object; right click: not of it; 1 to 9: the object; Backspace: remove it; q: end"
_LARGEST_NUMBER = 9


class Click(NamedTuple):
    """A point of an object, in pixels of the frame."""

    number: int
    x: float
    y: float
    label: int
    """1 where it is of the object, 0 where it is not."""


class Window:
    """Shows frames, and collects clicks since the last one.

    Args:
        title: of the window.
        width: of frames, in pixels.
        height: of frames.

    Raises:
        CommandError: where no window can be opened.
    """

    def __init__(self, title: str, width: int, height: int) -> None:
        try:
            import tkinter
        except ImportError as error:
            raise CommandError(f"a window needs tkinter ({error}): --out FILE.mp4 writes instead", status=1) from None
        try:
            self._root = tkinter.Tk()
        except tkinter.TclError as error:
            raise CommandError(f"no window can be opened here ({error}): --out FILE.mp4 writes", status=1) from None
        self.is_open = True
        self._title = title
        # Larger than the screen it could not be clicked everywhere.
        room = min(0.9 * self._root.winfo_screenwidth() / width, 0.85 * self._root.winfo_screenheight() / height)
        self._scale = min(1.0, room)
        self._size = max(1, round(width * self._scale)), max(1, round(height * self._scale))
        self._number = 1
        self._clicks: list[Click] = []
        self._removed: list[int] = []
        self._label = tkinter.Label(self._root, borderwidth=0)
        self._label.pack()
        tkinter.Label(self._root, text=_HELP).pack()
        self._label.bind("<Button-1>", lambda event: self._click(event, 1))
        for button in ("<Button-2>", "<Button-3>"):  # the right one is the second on macOS, the third elsewhere
            self._label.bind(button, lambda event: self._click(event, 0))
        self._root.bind("<Key>", self._press)
        self._root.protocol("WM_DELETE_WINDOW", self.close)
        self._show_title()

    def show(self, pixels: NDArray[np.uint8]) -> None:
        """Show a frame, (H, W, 3), and take what was clicked and pressed meanwhile."""
        from PIL import Image, ImageTk

        if not self.is_open:
            return
        picture = Image.fromarray(pixels)
        if picture.size != self._size:
            picture = picture.resize(self._size)
        self._shown = ImageTk.PhotoImage(picture, master=self._root)  # Tk shows it as long as it is referred to
        self._label.configure(image=self._shown)
        self._root.update()

    def take_clicks(self) -> list[Click]:
        """The clicks that were not taken yet."""
        clicks, self._clicks = self._clicks, []
        return clicks

    def take_removed(self) -> list[int]:
        """The objects that are to be removed."""
        removed, self._removed = self._removed, []
        return removed

    def close(self) -> None:
        """Close it, unless it is."""
        if self.is_open:
            self.is_open = False
            self._root.destroy()

    def _click(self, event: Any, label: int) -> None:
        self._clicks.append(Click(self._number, event.x / self._scale, event.y / self._scale, label))

    def _press(self, event: Any) -> None:
        if event.char.isdecimal() and 1 <= int(event.char) <= _LARGEST_NUMBER:
            self._number = int(event.char)
            self._show_title()
        elif event.keysym == "BackSpace":
            self._removed.append(self._number)
        elif event.char == "q" or event.keysym == "Escape":
            self.close()

    def _show_title(self) -> None:
        self._root.title(f"{self._title}: object {self._number}")
