"""Every kind of picture file has one result, and the tensors are those of LLaVA and CLIP."""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from dora_core.media.images import CLIP_MEAN, CLIP_STD, MAX_PIXELS, ImageError, ImageTransform, open_image

MEDIA = sorted((Path(__file__).parents[3].parent / "shared" / "data" / "media").glob("*.jpg"))


def picture(width=40, height=24, channels=3):
    return np.random.default_rng(channels).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(width, height):
    """A picture that JPEG keeps well: gradients, different in every corner and channel."""
    down, across = np.mgrid[0:height, 0:width] / max(width, height)
    return (np.stack([across, down, 1 - across * down], axis=-1) * 255).astype(np.uint8)


def encode(image, format, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(data, **options):
    image = open_image(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_claiming(width, height):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)
def test_pixels_come_back_from_each_format_and_from_a_file_as_from_bytes(tmp_path, format, options):
    array = picture()
    data = encode(array, format, **options)
    (tmp_path / "file.jpg").write_bytes(data)  # the name says nothing
    for source in (data, tmp_path / "file.jpg", str(tmp_path / "file.jpg")):
        assert np.array_equal(pixels(source), array)


def test_a_jpeg_and_the_first_picture_of_an_mpo_come_back_nearly():
    array = smooth(40, 24)
    jpeg = encode(array, "JPEG", quality=95)
    mpo = encode(array, "MPO", quality=95, save_all=True, append_images=[Image.new("RGB", (40, 24))])
    assert Image.open(io.BytesIO(mpo)).n_frames == 2
    for data in (jpeg, mpo):
        assert np.abs(pixels(data).astype(int) - array).max() <= 12


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied_once(format, orientation):
    upright = smooth(40, 24)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, 3),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(format, {})
    data = encode(np.ascontiguousarray(stored), format, exif=exif, **options)
    image = open_image(data)
    assert image.size == (40, 24)
    assert np.abs(np.asarray(image).astype(int) - upright).max() <= (12 if format == "JPEG" else 0)
    assert image.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01"]
)
def test_an_exif_block_that_cannot_be_read_leaves_the_picture_as_it_is(exif):
    assert pixels(encode(smooth(40, 24), "JPEG", exif=exif)).shape == (24, 40, 3)


def test_cmyk_is_converted_as_pillow_does():
    cmyk = Image.fromarray(smooth(40, 24)).convert("CMYK")
    for data in (encode(cmyk, "JPEG", quality=95), encode(cmyk, "TIFF")):
        assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        assert np.abs(pixels(data).astype(int) - smooth(40, 24)).max() <= 12


def test_grey_and_two_colours_become_rgb():
    grey = picture(channels=1)[..., 0]
    assert np.array_equal(pixels(encode(grey, "PNG")), np.stack([grey] * 3, axis=-1))
    two = Image.fromarray(grey).convert("1")
    expected = np.stack([np.asarray(two) * np.uint8(255)] * 3, axis=-1)
    assert np.array_equal(pixels(encode(two, "PNG")), expected)


def on_white(array, alpha):
    return np.rint(255 + (array.astype(float) - 255) * (alpha[..., None] / 255))


def test_transparency_is_composited_on_white():
    array, alpha = picture(), picture(channels=1)[..., 0]
    alpha[:4], alpha[4:8] = 0, 255
    for format in ("PNG", "TIFF"):
        result = pixels(encode(np.dstack([array, alpha]), format))
        assert np.abs(result - on_white(array, alpha)).max() <= 1
        assert (result[:4] == 255).all() and np.array_equal(result[4:8], array[4:8])
    grey = array[..., :1]
    result = pixels(encode(Image.fromarray(np.dstack([grey, alpha[..., None]]), "LA"), "PNG"))
    assert np.abs(result - on_white(np.repeat(grey, 3, axis=-1), alpha)).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_becomes_white(format):
    indices = np.arange(96, dtype=np.uint8).reshape(8, 12) % 4
    image = Image.fromarray(indices, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]])
    assert np.array_equal(pixels(encode(image, format)), colours[indices])
    colours[2] = 255
    assert np.array_equal(pixels(encode(image, format, transparency=2)), colours[indices])


def test_a_palette_with_an_alpha_value_for_each_entry_is_composited_on_white():
    indices = np.arange(96, dtype=np.uint8).reshape(8, 12) % 3
    image = Image.fromarray(indices, "P")
    image.putpalette([255, 0, 0, 0, 0, 0, 0, 0, 255])
    result = pixels(encode(image, "PNG", transparency=bytes([255, 128, 0])))
    assert np.array_equal(result, np.array([[255, 0, 0], [127, 127, 127], [255, 255, 255]])[indices])


def test_a_transparent_colour_of_rgb_and_grey_becomes_white():
    rgb = np.full((6, 6, 3), (10, 20, 30), np.uint8)
    rgb[0] = (1, 2, 3)
    result = pixels(encode(rgb, "PNG", transparency=(10, 20, 30)))
    assert (result[1:] == 255).all() and (result[0] == (1, 2, 3)).all()
    grey = pixels(encode(rgb[..., 0], "PNG", transparency=10))
    assert (grey[1:] == 255).all() and (grey[0] == 1).all()


def grey16(big_endian=False):
    values = np.linspace(0, 65535, 6 * 50).round().astype(np.uint16).reshape(6, 50)
    if big_endian:
        return values, Image.frombytes("I;16B", (50, 6), values.astype(">u2").tobytes())
    return values, Image.fromarray(values)


@pytest.mark.parametrize(
    ("format", "big_endian", "options", "mode"),
    [
        ("PNG", False, {}, "I;16"),
        ("TIFF", False, {}, "I;16"),
        ("TIFF", True, {}, "I;16B"),
        ("TIFF", False, {"compression": "tiff_lzw"}, "I;16"),
    ],
)
def test_sixteen_bits_are_scaled_not_clipped(format, big_endian, options, mode):
    values, image = grey16(big_endian)
    data = encode(image, format, **options)
    assert Image.open(io.BytesIO(data)).mode == mode
    expected = np.rint(values / 257).astype(np.uint8)
    assert expected[0, 0] == 0 and expected[-1, -1] == 255
    assert np.array_equal(pixels(data), np.stack([expected] * 3, axis=-1))


def test_signed_sixteen_bits_are_scaled_unless_negative():
    values, _ = grey16()
    for array, negative in ((values // 2, False), (values, True)):
        data = encode(array, "TIFF", tiffinfo={339: 2})  # SampleFormat: signed
        assert Image.open(io.BytesIO(data)).mode == "I"
        if negative:
            with pytest.raises(ImageError, match="whose scale is unknown"):
                open_image(data)
        else:
            assert np.array_equal(pixels(data)[..., 0], np.rint(array / 257))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_of_an_unknown_scale_are_refused(dtype):
    with pytest.raises(ImageError, match="scale is unknown"):
        open_image(encode(np.ones((4, 4), dtype), "TIFF"))


@pytest.mark.parametrize(("format", "options"), [("GIF", {"disposal": 2}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_of_an_animation_the_first_frame_is_taken(format, options):
    frames = [Image.new("RGB", (12, 8), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (pixels(data) == (200, 0, 0)).all()


SOUND = {
    "JPEG": encode(smooth(64, 48), "JPEG"),
    "PNG": encode(picture(), "PNG"),
    "WEBP": encode(picture(), "WEBP"),
    "GIF": encode(picture(channels=1)[..., 0], "GIF"),
    "BMP": encode(picture(), "BMP"),
    "TIFF": encode(picture(), "TIFF"),
}


@pytest.mark.parametrize("format", SOUND)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_file_that_was_cut_off_is_an_error_that_names_it(tmp_path, format, share):
    data = SOUND[format][: int(len(SOUND[format]) * share)]
    (tmp_path / "cut.img").write_bytes(data)
    for source, name in ((data, f"an image of {len(data)} bytes"), (tmp_path / "cut.img", f"{tmp_path}/cut.img")):
        with pytest.raises(ImageError) as error:
            open_image(source)
        assert str(error.value).startswith(f"{name}: it ")
        assert str(error.value).endswith("Replace the file or remove its row.")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(SOUND)), st.data())
def test_a_damaged_file_gives_a_picture_or_an_image_error(format, data):
    content = bytearray(SOUND[format])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(300, len(content)) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImageError):
            assert open_image(bytes(content), max_pixels=100_000).mode == "RGB"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html></html>", "it is of no known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is of no known format"),
        (b"%PDF-1.4\n", "it is of no known format"),
        (b"P6 2 2 255\n" + bytes(12), "it is of no known format"),
    ],
)
def test_what_is_no_picture_of_a_known_format_is_an_error(data, reason):
    with pytest.raises(ImageError, match=f"^shard/7: {reason}. A picture is a complete file of the formats JPEG, PNG"):
        open_image(data, name="shard/7")


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    for path in (tmp_path / "absent.jpg", tmp_path, "nul\0byte"):
        with pytest.raises(ImageError, match="there is no such file"):
            open_image(path)


def bombs():
    gif = bytearray(encode(Image.new("P", (8, 8)), "GIF", save_all=True, append_images=[Image.new("P", (8, 8), 1)]))
    webp = (
        b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8L" + struct.pack("<I", 10) + b"\x2f" + b"\xff\xff\xff\x0f" + bytes(5)
    )
    small = encode(Image.new("RGB", (8, 8)), "BMP")
    return {
        "png": png_claiming(100_000, 100_000),
        "png of 120 megapixels": png_claiming(12_000, 10_000),
        "gif": bytes(gif[:6] + struct.pack("<HH", 12_000, 10_000) + gif[10:]),
        "gif frame": bytes(gif).replace(struct.pack("<HHHH", 0, 0, 8, 8), struct.pack("<HHHH", 0, 0, 60_000, 60_000)),
        "webp": webp,
        "bmp": small[:18] + struct.pack("<ii", 50_000, 50_000) + small[26:],
        "jpeg": SOUND["JPEG"].replace(struct.pack(">HH", 48, 64), struct.pack(">HH", 65_500, 65_500)),
    }


@pytest.mark.parametrize("action", ["error", "always", "ignore"])
@pytest.mark.parametrize("name", bombs())
def test_a_decompression_bomb_is_refused_before_decoding_whatever_the_warning_filters(monkeypatch, name, action):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        with pytest.raises(ImageError, match=r"it is said to have .* pixels, more than 89,478,485"):
            open_image(bombs()[name])
    assert not caught
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_limit_is_the_callers_not_pillows(monkeypatch):
    with pytest.raises(ImageError, match="40 x 24 pixels, more than 959"):
        open_image(SOUND["PNG"], max_pixels=959)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow itself would refuse from 200 on
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for format in SOUND:
            assert open_image(SOUND[format]).mode == "RGB"
    assert Image.MAX_IMAGE_PIXELS == 100


def test_pillows_limit_is_back_after_many_threads():
    limit = Image.MAX_IMAGE_PIXELS
    threads = [threading.Thread(target=lambda: [open_image(SOUND["PNG"]) for _ in range(20)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Image.MAX_IMAGE_PIXELS == limit == MAX_PIXELS


def test_a_strip_is_refused_from_two_hundred_to_one_on():
    assert pixels(encode(picture(400, 2), "PNG")).shape == (2, 400, 3)
    for width, height in ((401, 2), (1, 201)):
        with pytest.raises(ImageError, match="one side more than 200 times the other"):
            open_image(encode(picture(width, height), "PNG"))


def expand2square(image):
    """LLaVA's padding, by its definition: the picture in the middle of a square of the mean colour."""
    side = max(image.size)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(value * 255) for value in CLIP_MEAN]
    top, left = (side - image.height) // 2, (side - image.width) // 2
    square[top : top + image.height, left : left + image.width] = np.asarray(image)
    return Image.fromarray(square)


def processed(image, processor):
    values = processor(image, do_normalize=False, do_rescale=False, return_tensors="pt")["pixel_values"][0]
    return values.to(torch.int64)


def clip(size):
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


SHAPES = [
    (56, 56),
    (30, 30),
    (97, 97),
    (120, 41),
    (41, 120),
    (57, 56),
    (33, 34),
    (300, 2),
    (3, 199),
    (1, 1),
    (640, 480),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_transforms_are_those_of_transformers(shape):
    image = Image.fromarray(picture(*shape))
    result = ImageTransform(56, aspect="square")(image)
    assert result.dtype == torch.uint8 and result.shape == (3, 56, 56) and result.is_contiguous()
    assert torch.equal(result.to(torch.int64), processed(image, clip(56)))
    padded = ImageTransform(56)(image)
    assert torch.equal(padded.to(torch.int64), processed(expand2square(image), clip(56)))
    llava = LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_pad=True)
    assert torch.equal(padded.to(torch.int64), processed(image, llava))


@pytest.mark.parametrize("path", MEDIA or [None], ids=lambda path: path.name if path else "none")
def test_transforms_of_photographs_are_those_of_transformers(path):
    if path is None:
        pytest.skip("there is no folder of shared photographs here")
    image = open_image(path)
    assert torch.equal(ImageTransform(336, aspect="square")(image).to(torch.int64), processed(image, clip(336)))
    padded = ImageTransform(336)(image).to(torch.int64)
    assert torch.equal(padded, processed(expand2square(image), clip(336)))


@pytest.mark.parametrize("shape", SHAPES)
def test_stretching_resizes_both_sides_as_transformers_does_without_a_crop(shape):
    image = Image.fromarray(picture(*shape))
    result = ImageTransform(56, aspect="stretch")(image)
    assert result.dtype == torch.uint8 and result.shape == (3, 56, 56) and result.is_contiguous()
    whole = CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False)
    assert torch.equal(result.to(torch.int64), processed(image, whole))


def test_a_box_is_the_mean_over_the_area_of_a_pixel():
    array = picture(60, 40)
    result = ImageTransform(10, aspect="stretch", resample="box")(Image.fromarray(array))
    means = array.reshape(10, 4, 10, 6, 3).astype(float).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(result.numpy() - means).max() <= 1  # Pillow rounds after each of two passes


def test_bilinear_differs_from_bicubic():
    image = Image.fromarray(picture(30, 30))
    one, other = (ImageTransform(56, resample=name)(image) for name in ("bicubic", "bilinear"))
    assert not torch.equal(one, other)


def test_normalizing_gives_what_transformers_gives():
    image = Image.fromarray(picture(70, 50))
    transform = ImageTransform(56, aspect="square")
    expected = clip(56)(image, return_tensors="pt")["pixel_values"]
    batch = transform(image)[None]
    values = transform.normalize(batch, torch.float32, "cpu")
    assert values.dtype == torch.float32 and torch.allclose(values, expected, atol=1e-6)
    assert batch.dtype == torch.uint8 and torch.equal(batch[0], transform(image))
    half = transform.normalize(batch, torch.bfloat16, "cpu")
    assert torch.equal(half, values.to(torch.bfloat16))
    assert transform.normalize(batch[:0], torch.float32, "cpu").shape == (0, 3, 56, 56)
    with pytest.raises(ValueError, match=r"pixels are torch\.float32; they must be uint8"):
        transform.normalize(values, torch.float32, "cpu")


def test_the_mean_colour_becomes_nearly_zero():
    transform = ImageTransform(8)
    border = transform(Image.new("RGB", (8, 1)))[:, :1]
    assert transform.normalize(border[None], torch.float64, "cpu").abs().max() < 1 / 255 / min(CLIP_STD)


def test_a_canvas_beyond_the_limit_is_refused_before_it_is_made():
    image = Image.new("RGB", (20, 200))
    for aspect, allowed in (("pad", 40_000), ("square", 31_360)):
        ImageTransform(56, aspect=aspect, max_pixels=allowed)(image)
        with pytest.raises(ImageError, match=r"a picture needs a canvas of .* pixels; at most .* are allowed\. Scale"):
            ImageTransform(56, aspect=aspect, max_pixels=allowed - 1)(image)
    with pytest.raises(ImageError, match="canvas of 20000 x 20000 pixels"):
        ImageTransform(56)(Image.new("RGB", (20_000, 100)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"size": 0}, "size is 0; it must be 1 or more"),
        ({"mean": (0.5, 0.5)}, "mean is .* three numbers"),
        ({"mean": (122.0, 116.0, 104.0)}, r"three numbers in \[0, 1\]"),
        ({"std": (0.0, 1.0, 1.0)}, "std is .* above 0"),
        ({"aspect": "crop"}, "aspect is 'crop'; it must be pad, square or stretch. Change"),
        ({"resample": "nearest"}, "resample is 'nearest'; it must be bicubic, bilinear or box"),
    ],
)
def test_a_transform_that_makes_no_sense_is_an_error(options, reason):
    with pytest.raises(ValueError, match=reason):
        ImageTransform(**{"size": 56, **options})
