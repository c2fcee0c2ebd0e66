"""How a training script ends: a user's mistake in one message, a failure without waiting for other ranks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import torch

from dora_core.config import exit_with_message


def run_script(main: Callable[[], None]) -> None:
    """Run a training script: a user's mistake ends in one message and exit status 2, on however many ranks."""
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("DORA_TRACEBACK"):
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # rank 0 mostly says the same first, and the launcher then ends this process
        exit_with_message(error)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _leave_group(sys.exc_info()[0])


def _leave_group(error: type[BaseException] | None) -> None:
    # After a failure the other ranks may be waiting in a collective; destroying the group would wait for them.
    if error is None or error is SystemExit:
        torch.distributed.destroy_process_group()
