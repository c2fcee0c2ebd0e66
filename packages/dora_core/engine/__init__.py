"""DeepSpeed and the process group: the only place that imports them, but for gathered ZeRO-3 parameters."""

import os

import torch

if not torch.cuda.is_available():  # before DeepSpeed is imported, which looks for other hardware and warns
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
