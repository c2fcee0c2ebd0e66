"""Frozen encoders from pixels to features; this is the pipeline's only importer of open_clip.

What every encoder is called with and gives is in ``frozen.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dora_core.config import ConfigError, require
from dora_core.media.images import ImageTransform
from dora_core.registry import unknown_name
from pipelines.video.feature_files import GRID
from pipelines.video.frozen import DTYPES, FrozenEncoder, Kind, Precision

OPEN_CLIP, PIXELS = "open_clip:", "pixels:"
_WITH_OWN_WEIGHTS = ("hf-hub:", "local-dir:")
_ASPECTS = {"shortest": "square", "squash": "stretch"}  # open_clip's resize_mode to ImageTransform's aspect
_log = logging.getLogger(__name__)


class _FrameTower(nn.Module):
    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, values: Tensor) -> Tensor:
        done = self.visual(values)
        return (done[0] if isinstance(done, tuple) else done)[:, None]  # a tuple is the embedding and tokens


class _GridTower(nn.Module):
    """The last feature map of open_clip's ResNet, before its attention pool, max-pooled to 6 x 6."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, values: Tensor) -> Tensor:
        done = self.visual.forward_intermediates(values, indices=1, intermediates_only=True)
        return F.adaptive_max_pool2d(done["image_intermediates"][-1], GRID).flatten(2).transpose(1, 2)


class _PixelTower(nn.Module):
    """The colours themselves, row by row: of the whole picture, or of each of 6 x 6 patches."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.num = GRID if kind == "grid" else 1

    def forward(self, values: Tensor) -> Tensor:
        patches = values.unflatten(3, (self.num, -1)).unflatten(2, (self.num, -1))  # N, 3, row, y, column, x
        return patches.permute(0, 2, 4, 3, 5, 1).reshape(len(values), self.num**2, -1)


def load_encoder(
    name: str,
    kind: Kind | None = None,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
    batch: int | None = None,
) -> FrozenEncoder:
    """Return the encoder ``open_clip:<model>[:<pretrained tag or weights file>]`` or ``pixels:<side>``.

    "frame" is one vector a frame: open_clip's image embedding as ``encode_image`` gives it, of the middle of the
    frame as CLIP sees it; "grid" is 36 vectors of a picture stretched to a square: a ResNet's last feature map (VL-T5,
    VL-Adapter). Without ``kind`` a ResNet gives a grid and all else a frame. ``pixels`` are the mean colours of side x
    side parts of the stretched picture, in [0, 1].

    Without tag or file, weights are random and always the same. A file of OpenAI's weights needs the model whose name
    ends in ``-quickgelu``; with the tag, the model gets that activation here. ``batch`` is ``FrozenEncoder``'s.

    Raises ``ConfigError`` for an unknown name and for weights that cannot be loaded.
    """
    require(precision in DTYPES, "precision", precision, " or ".join(DTYPES))
    require(kind in ("frame", "grid", None), "kind", kind, "frame or grid")
    if name.startswith(PIXELS):
        tower, preprocessing, kind, identity = _pixels(name, kind)
    elif name.startswith(OPEN_CLIP):
        tower, preprocessing, kind, identity = _open_clip(name, kind)
    else:
        raise ConfigError(
            f"The encoder is {name!r}; it must be {OPEN_CLIP}<model>[:<pretrained tag or weights file>] or "
            f"{PIXELS}<side>. Change the name."
        )
    return FrozenEncoder(
        name,
        tower,
        preprocessing,
        kind=kind,
        precision=precision,
        device=device,
        identity=identity,
        batch=batch,
    )


def _pixels(name: str, kind: Kind | None) -> tuple[nn.Module, ImageTransform, Kind, dict[str, Any]]:
    text = name.removeprefix(PIXELS)
    side = int(text) if text.isdecimal() else 0
    if not side or (kind == "grid" and side % GRID):
        raise ConfigError(
            f"The encoder is {name!r}; the side must be a positive integer, of a grid a multiple of {GRID}. Change the "
            f"name, to {PIXELS}24 for example."
        )
    # black is zero: a thing on a black ground is then the same direction in whatever colour, which is quickly learned
    preprocessing = ImageTransform(side, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), aspect="stretch", resample="box")
    return _PixelTower(kind or "frame"), preprocessing, kind or "frame", {"model": "pixels", "pretrained": None}


def _open_clip(name: str, kind: Kind | None) -> tuple[nn.Module, ImageTransform, Kind, dict[str, Any]]:
    import open_clip
    from open_clip.modified_resnet import ModifiedResNet

    model_name, tag = _model_and_tag(name.removeprefix(OPEN_CLIP))
    model = _create(name, model_name, tag)
    visual = model.visual
    kind = kind or ("grid" if isinstance(visual, ModifiedResNet) else "frame")
    if kind == "grid" and not isinstance(visual, ModifiedResNet):
        raise ConfigError(
            f"{name} is a {type(visual).__name__}, and grids are of ResNets such as RN101. Choose one or kind: frame."
        )
    own = open_clip.get_model_preprocess_cfg(model)
    sides = set(own["size"]) if isinstance(own["size"], list | tuple) else {own["size"]}
    mode = own.get("resize_mode", "shortest")
    if len(sides) > 1 or mode not in _ASPECTS:
        raise ConfigError(
            f"{name} sees pictures of {own['size']} by {mode!r}; they must be squares, by {' or '.join(_ASPECTS)}. "
            "Choose another model."
        )
    preprocessing = ImageTransform(
        sides.pop(),
        tuple(own["mean"]),
        tuple(own["std"]),
        aspect="stretch" if kind == "grid" else _ASPECTS[mode],
        resample=own["interpolation"],
    )
    if model_name.startswith("local-dir:"):
        model_name = f"local-dir:{Path(model_name).name}"  # the same model wherever it lies
    identity = {"model": model_name, "pretrained": Path(tag).name or None, "weights_sha256": _sha256(visual)}
    return (_GridTower if kind == "grid" else _FrameTower)(visual), preprocessing, kind, identity


def _model_and_tag(text: str) -> tuple[str, str]:
    if text.startswith(_WITH_OWN_WEIGHTS):
        return text, ""
    model_name, _, tag = text.partition(":")
    return model_name, tag


def _create(name: str, model_name: str, tag: str) -> nn.Module:
    import open_clip

    has_own = model_name.startswith(_WITH_OWN_WEIGHTS)
    if not has_own and model_name not in open_clip.list_models():
        raise unknown_name("open_clip model", model_name, sorted(open_clip.list_models()))
    # OpenAI's weights need another activation than the models of their name have, of which open_clip only warns
    quick = bool(open_clip.get_pretrained_cfg(model_name, tag).get("quick_gelu")) if tag else False
    try:
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.default_generator.manual_seed(0)  # torch.manual_seed would change the GPU's state too
            model = open_clip.create_model(
                model_name,
                pretrained=tag or None,
                force_quick_gelu=quick,
                require_pretrained=bool(tag) or has_own,
            )
    except Exception as error:  # open_clip raises RuntimeError, OSError and what the hub client raises
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)) or "none"
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"The encoder {name!r} cannot be loaded: {first}. Its weights must be a file, or a tag that this machine "
            f"can reach or has cached; tags of {model_name} are {tags}. Change the name or provide the weights."
        ) from error
    if not tag and not has_own:
        _log.warning("%s has no weights named: they are random, and features mean nothing", name)
    return model


def _sha256(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(module.state_dict().items()):
        digest.update(f"{name} {values.dtype} {list(values.shape)} ".encode())
        digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip from warning of random weights, of which we do, and from logging what we raise."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
