import os

import torch

if not torch.cuda.is_available():  # before DeepSpeed is imported, which looks for other hardware and warns
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
