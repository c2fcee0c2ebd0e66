"""A frozen encoder from pixels to features, whatever its model.

Legend of shapes: N frames, T tokens of a frame (1, or 36 of a grid), D numbers of a token, S pixels of a side.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dora_core.media.images import ImageTransform
from pipelines.video import frames

Kind = Literal["frame", "grid"]
Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FrozenEncoder:
    """From uint8 pixels to features, without gradients; no module, so that no model it is given to saves its weights.

    ``name`` as it was given, ``kind``, ``dim`` (D), ``tokens`` (T), ``size`` (S), ``preprocessing``, which alone the
    processes that prepare pixels need, and ``identity``, plain values that differ where features would.

    A frame's feature has the same bits whatever frames are with it: on a CPU frames are computed one by one, elsewhere
    in chunks of exactly ``batch``, the last filled up with black ones, since a GPU chooses its kernels by the shape. On
    an H100 that held for ViT-B-32, ViT-L-14 and RN101 in each precision; in chunks of other lengths up to half of the
    numbers differed in their last bits. So they do on other devices and with other versions of the libraries.
    """

    def __init__(
        self,
        name: str,
        tower: nn.Module,
        preprocessing: ImageTransform,
        *,
        kind: Kind,
        precision: Precision,
        device: torch.device | str,
        identity: dict[str, Any],
        batch: int | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.preprocessing = preprocessing
        self.size = preprocessing.size
        self.identity = {**identity, "kind": kind, "precision": precision, "preprocessing": _facts(preprocessing)}
        self.device = torch.device(device)
        self.batch = batch or (1 if self.device.type == "cpu" else 64)
        self._dtype = DTYPES[precision]
        self._tower = tower.eval().requires_grad_(False).to(self.device, self._dtype)
        black = torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8)
        _, self.tokens, self.dim = self(black).shape

    @property
    def preprocessing_hash(self) -> str:
        """Hexadecimal SHA-256 of how a picture becomes pixels."""
        return hashlib.sha256(json.dumps(_facts(self.preprocessing), sort_keys=True).encode()).hexdigest()

    def prepare(self, picture: Image.Image | np.ndarray) -> Tensor:
        """Return uint8 ``[3, S, S]`` of a picture in mode RGB or of uint8 ``[H, W, 3]``."""
        return frames.prepare(picture, self.preprocessing)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Return float16 ``[N, T, D]``, on the encoder's device, of uint8 ``[N, 3, S, S]`` on any."""
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, self.size, self.size):
            raise ValueError(
                f"Pixels are {pixels.dtype} of the shape {list(pixels.shape)}; {self.name} needs torch.uint8 [N, 3, "
                f"{self.size}, {self.size}]. Make them with its preprocessing."
            )
        if not len(pixels):
            return torch.zeros(0, self.tokens, self.dim, dtype=torch.float16, device=self.device)
        with _same_arithmetic(self.device):
            return torch.cat([self._chunk(chunk) for chunk in pixels.split(self.batch)])

    def _chunk(self, pixels: Tensor) -> Tensor:
        num = len(pixels)
        if num < self.batch:
            pixels = torch.cat([pixels, pixels.new_zeros(self.batch - num, *pixels.shape[1:])])
        values = self.preprocessing.normalize(pixels, self._dtype, self.device)
        return self._tower(values)[:num].to(torch.float16)


def _facts(preprocessing: ImageTransform) -> dict[str, Any]:
    named = {name: getattr(preprocessing, name) for name in ("size", "mean", "std", "aspect", "resample")}
    return json.loads(json.dumps(named))  # as a manifest has them: lists, not tuples


@contextlib.contextmanager
def _same_arithmetic(device: torch.device) -> Iterator[None]:
    """Compute in the encoder's precision, with kernels that are not chosen by trial, whatever the caller has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(device.type, enabled=False))
            if device.type == "cuda":
                stack.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
            yield
    finally:
        torch.set_float32_matmul_precision(before)
