"""The pixels that an encoder sees of a picture or video; extraction and online training both take them from here.

Legend of shapes: T frames, H and W pixels. This module knows no encoder, so the processes that prepare batches import
it alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dora_core.media.images import ImageTransform, open_image
from pipelines.video.decode import indices_every, open_video
from pipelines.video.visual import VIDEO_SUFFIXES

_NUM_DECODED = 32


def is_video(path: str | Path) -> bool:
    """Whether a file is taken for a video: by its suffix."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def frames_of(
    path: str | Path, preprocessing: ImageTransform, seconds: float = 1.5, max_frames: int | None = None
) -> Tensor:
    """Return what ``preprocessing`` makes of a file: uint8 ``[T, 3, size, size]``, T being 1 for a picture.

    Of a video one frame is taken for every ``seconds`` of it, by time of presentation; of more than ``max_frames``,
    that many at equal distances. Raises ``VideoError`` or ``ImageError`` for a file that cannot be read.
    """
    if not is_video(path):
        return preprocessing(open_image(path))[None]
    with open_video(path) as video:
        indices = indices_every(video.info, seconds, max_frames)
        # a few at a time: whole frames take up to a hundred times the memory of what is kept of them
        parts = (video.frames(indices[start : start + _NUM_DECODED]) for start in range(0, len(indices), _NUM_DECODED))
        return torch.stack([prepare(frame, preprocessing) for part in parts for frame in part])


def prepare(picture: Image.Image | np.ndarray, preprocessing: ImageTransform) -> Tensor:
    """Return uint8 ``[3, size, size]`` of a picture in mode RGB or of uint8 ``[H, W, 3]``."""
    return preprocessing(picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture)))
