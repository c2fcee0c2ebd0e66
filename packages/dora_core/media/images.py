"""Image files to uint8 tensors: every kind of file has one defined result or is an ``ImageError``.

Legend of shapes: N images, H and W pixels.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import ExifTags, Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of red, green and blue, in [0, 1], that CLIP's pictures are normalized with."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of red, green and blue, in [0, 1], that CLIP's pictures are normalized with."""
MAX_PIXELS = 89_478_485
"""Largest picture by default: 256 MiB as RGB."""
MAX_ASPECT = 200
"""Long side over short side, at most."""

# None of these runs a program, as EPS does; to Pillow an MPO is a JPEG.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_WHITE = (255, 255, 255)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}


class ImageError(ValueError):
    """A picture cannot be used; the message gives its name and the reason."""


def open_image(source: str | Path | bytes, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """Return the picture of a file or of its bytes, upright, in mode RGB.

    Of an animation it is the first frame. Transparent parts are composited on white, 16 bits are scaled to 8 (65535 to
    255), CMYK and grey become RGB. The EXIF orientation is applied; one that cannot be read counts as upright.
    ``name`` stands for the bytes in messages.

    Raises ``ImageError`` for a file that is missing, empty, damaged, cut off or not JPEG, PNG, WebP, GIF, BMP, TIFF or
    MPO, for numbers of an unknown scale (floats, integers of 32 bits), for a side 200 times the other, and, before
    anything is decoded, for more than ``max_pixels`` pixels.
    """
    name = name or (f"an image of {len(source)} bytes" if isinstance(source, bytes) else str(source))
    try:
        with _opened(source, name) as file, _without_pil_limit(), Image.open(file, formats=_FORMATS) as image:
            _check_size(image.size, max_pixels, name)
            image.load()
            picture = _rgb(image, name)
            orientation = _orientation(image)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise _unusable(name, "it is of no known format") from None
    except Exception as error:  # for damaged files PIL raises anything from SyntaxError to struct.error
        raise _unusable(name, f"it cannot be decoded ({type(error).__name__}: {error})") from error
    if orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[orientation])
    picture.info = {}  # else the orientation could be applied a second time
    return picture


@dataclass(frozen=True)
class ImageTransform:
    """From a picture in mode RGB to the square of ``size`` pixels that a vision tower sees.

    ``aspect`` "pad" centres the picture on a square of the mean colour and resizes that, as LLaVA does; "square"
    resizes the short side to ``size`` and cuts out the centre, as CLIP does; "stretch" resizes both sides to ``size``.
    ``resample`` "box" is the mean over the area of each new pixel. ``mean`` and ``std`` are of red, green and blue in
    [0, 1]. A canvas of more than ``max_pixels`` pixels is an ``ImageError``.
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    aspect: Literal["pad", "square", "stretch"] = "pad"
    resample: Literal["bicubic", "bilinear", "box"] = "bicubic"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("size", self.size > 0, "1 or more"),
            ("mean", len(self.mean) == 3 and all(0 <= value <= 1 for value in self.mean), "three numbers in [0, 1]"),
            ("std", len(self.std) == 3 and all(value > 0 for value in self.std), "three numbers above 0"),
            ("aspect", self.aspect in ("pad", "square", "stretch"), "pad, square or stretch"),
            ("resample", self.resample in _RESAMPLE, "bicubic, bilinear or box"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {allowed}. Change the transform.")

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return uint8 ``[3, size, size]``."""
        shapes = {"pad": self._padded, "square": self._cropped, "stretch": self._stretched}
        picture = shapes[self.aspect](image)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()

    def normalize(self, pixels: torch.Tensor, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """Return ``(pixels / 255 - mean) / std`` of uint8 ``[N, 3, H, W]``, moved first and computed in fp32."""
        if pixels.dtype != torch.uint8:
            raise ValueError(
                f"pixels are {pixels.dtype}; they must be uint8 in [0, 255]. Give what the transform gives."
            )
        values = pixels.to(device, non_blocking=True).to(torch.float32)
        mean, std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (self.mean, self.std))
        return values.div_(255).sub_(mean).div_(std).to(dtype)

    def _padded(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        if image.size != (side, side):
            canvas = self._canvas_size(side, side)
            picture = Image.new("RGB", canvas, tuple(int(255 * value) for value in self.mean))
            picture.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = picture
        return self._stretched(image)

    def _stretched(self, image: Image.Image) -> Image.Image:
        return image.resize((self.size, self.size), _RESAMPLE[self.resample])

    def _cropped(self, image: Image.Image) -> Image.Image:
        long = int(self.size * max(image.size) / min(image.size))
        width, height = (self.size, long) if image.width <= image.height else (long, self.size)
        picture = image.resize(self._canvas_size(width, height), _RESAMPLE[self.resample])
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return picture.crop((left, top, left + self.size, top + self.size))

    def _canvas_size(self, width: int, height: int) -> tuple[int, int]:
        if width * height > self.max_pixels:
            raise ImageError(
                f"a picture needs a canvas of {width} x {height} pixels; at most {self.max_pixels:,} are allowed. "
                "Scale the picture down or remove its row."
            )
        return width, height


@contextlib.contextmanager
def _opened(source: str | Path | bytes, name: str) -> Iterator[BinaryIO]:
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise _unusable(name, "there is no such file")
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        if not file.read(1):
            raise _unusable(name, "it is empty")
        yield file


_lift_lock = threading.Lock()
_num_lifts = 0
_lifted_limit: int | None = None


@contextlib.contextmanager
def _without_pil_limit() -> Iterator[None]:
    """Leave the judgement on sizes to ``max_pixels``: PIL's own warns or raises by the process's warning filters.

    The limit belongs to the whole process; it returns when no thread decodes any more.
    """
    global _num_lifts, _lifted_limit
    with _lift_lock:
        if _num_lifts == 0:
            _lifted_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _num_lifts += 1
    try:
        yield
    finally:
        with _lift_lock:
            _num_lifts -= 1
            if _num_lifts == 0:
                Image.MAX_IMAGE_PIXELS = _lifted_limit


def _check_size(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width * height > max_pixels:
        raise _unusable(name, f"it is said to have {width} x {height} pixels, more than {max_pixels:,}")
    if max(size) > MAX_ASPECT * min(size):
        raise _unusable(name, f"it has {width} x {height} pixels, one side more than {MAX_ASPECT} times the other")


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise _unusable(name, "its pixels are floats, whose scale is unknown")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(image, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, _WHITE)
        canvas.paste(image, mask=image)
        return canvas
    return image.convert("RGB")


def _from_16_bits(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    bits = max(np.atleast_1d(image.tag_v2[ExifTags.Base.BitsPerSample])) if image.mode == "I" else 16
    if bits > 16 or values.min() < 0:
        raise _unusable(name, "its pixels are integers of 32 bits or negative ones, whose scale is unknown")
    scaled = (values.astype(np.uint32) * 255 + 32767) // 65535  # to the nearest of 256 levels
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block, for which PIL raises as much, says nothing about the pixels
        return 1


def _unusable(name: str, reason: str) -> ImageError:
    return ImageError(
        f"{name}: {reason}. A picture is a complete file of the formats {', '.join(_FORMATS)}. "
        "Replace the file or remove its row."
    )
