"""What commands and servers show: masks, boxes and prompts on pictures, and videos as they are written."""

from omniops.drawing.boxes import draw_detections
from omniops.drawing.masks import colour_of, mask_image, paint
from omniops.drawing.prompts import draw_prompts
from omniops.drawing.video_writer import VideoWriter

__all__ = ["VideoWriter", "colour_of", "draw_detections", "draw_prompts", "mask_image", "paint"]
