"""Magnitude and direction change of weights between two states of a model (arXiv 2402.09353, eq. 3 and 4)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dora_core.analysis.weights import Weights, WeightsError, find_key

MAX_ELEMENTS = 1 << 19
"""Of a block of rows, which takes eight bytes for each of them a few times over."""
NO_LINEAR = re.compile(r"embed|lm_head|shared\.weight|wte\.|wpe\.")


@dataclass(frozen=True)
class Change:
    """What happened to one weight matrix [out, in]."""

    name: str
    layer: int | None
    """The first number in the name."""
    role: str
    """The last word of the module's name, such as ``q_proj``."""
    num_rows: int
    num_columns: int
    delta_m: float
    """Eq. 3: the mean over rows of |m_t - m_0|, where m is a row's norm; in the unit of the weights' norms."""
    delta_d: float
    """Eq. 4: the mean over rows of 1 - cos(row_t, row_0), 0 to 2."""
    mean_magnitude: float
    """Of m_0."""


def decompose(before: Weights, after: Weights, pattern: str | None = None) -> Iterator[Change]:
    """Yield the change of each matrix, one after the other; ``pattern`` is searched in names.

    Without it these are the matrices that an adapter of either side changes, or, of two plain models, those of linear
    layers. The paper's columns are rows here, as W is [out, in]. All is computed in fp64. A row of zeros has direction
    change 0 if it stays one, else 1. Raises ``WeightsError`` if a matrix is missing or has another shape.
    """
    names = after.matrices()
    if pattern is not None:
        names = [name for name in names if re.search(pattern, name)]
    elif trained := after.trained() | {find_key(name, names, after.base.folder) for name in before.trained()}:
        names = [name for name in names if name in trained]
    else:
        names = [name for name in names if not NO_LINEAR.search(name)]
    if not names:
        raise WeightsError(f"{after.base.folder}: no matrix matches {pattern!r}. Give a pattern of its weights' names.")
    others = before.matrices()
    for name in names:
        yield change(before, find_key(name, others, before.base.folder), after, name)


@torch.no_grad()
def change(before: Weights, name_before: str, after: Weights, name: str) -> Change:
    """Return the change of one matrix, read in blocks of rows."""
    num_rows, num_columns = shape = after.shape(name)
    if before.shape(name_before) != shape:
        raise WeightsError(
            f"{name} is {list(shape)} and was {list(before.shape(name_before))}. Compare states of one model."
        )
    sums = torch.zeros(3, dtype=torch.float64)
    step = max(1, MAX_ELEMENTS // num_columns)
    for start in range(0, num_rows, step):
        old, new = (w.rows(n, start, start + step) for w, n in ((before, name_before), (after, name)))
        old_norm, new_norm = (torch.linalg.vector_norm(rows, dim=1) for rows in (old, new))
        for rows, norm in ((old, old_norm), (new, new_norm)):
            rows /= norm.clamp(min=torch.finfo(norm.dtype).tiny)[:, None]
        # 1 - cos of unit vectors is half their squared distance, which keeps its digits where they nearly agree
        direction = (new - old).square().sum(1) / 2
        direction[(old_norm == 0) != (new_norm == 0)] = 1.0
        sums += torch.stack([(new_norm - old_norm).abs().sum(), direction.sum(), old_norm.sum()])
    delta_m, delta_d, mean_magnitude = (sums / num_rows).tolist()
    words = name.removesuffix(".weight").split(".")
    layer = next((int(word) for word in words if word.isdecimal()), None)
    return Change(name, layer, words[-1], num_rows, num_columns, delta_m, delta_d, mean_magnitude)
