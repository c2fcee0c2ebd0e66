from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on the CPU, slowly


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny models are fastest, and sums are in one order, on one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def signals_of_a_terminal() -> Iterator[None]:
    """Ctrl-C and a hangup do what they do in a terminal, here and in child processes: nohup and jobs ignore them."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def attention_masks(monkeypatch) -> list[torch.Tensor | None]:
    """The masks that attention was called with, in a list that grows with each call."""
    seen, attention = [], F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, *args, **kwargs):
        seen.append(attn_mask)
        return attention(query, key, value, attn_mask, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen
