"""What commands and servers show: masks over pictures, and videos as they are written."""

from omniops.drawing.masks import colour_of, paint
from omniops.drawing.video_writer import VideoWriter

__all__ = ["VideoWriter", "colour_of", "paint"]
