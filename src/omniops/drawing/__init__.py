"""What commands and servers show: videos as they are written."""

from omniops.drawing.video_writer import VideoWriter

__all__ = ["VideoWriter"]
