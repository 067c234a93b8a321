"""What a run changes in its process, and how it is restored for the program that called `ft.fine_tune`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ft.device import restore_malloc_trim


@contextmanager
def process_state_restored(*, release_memory: bool) -> Iterator[None]:
    """A context after which the settings and random generators of PyTorch are what they were, also after an error.

    Within it, the default device and dtype are those of a new process.

    Signal handlers, the number of threads, files and locks are restored by the contexts of the run itself.

    Args:
        release_memory: whether the run leaves the allocator as it is; otherwise its settings are reset to what glibc
            itself adjusts them to.
    """
    precision = torch.get_float32_matmul_precision()
    generator, seed = torch.get_rng_state(), torch.initial_seed()
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    has_cuda, was_initialized = torch.cuda.is_available(), torch.cuda.is_initialized()
    cuda = torch.cuda.get_rng_state_all() if was_initialized else []
    device = torch.cuda.current_device() if was_initialized else 0
    has_cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
    default_dtype, default_device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    if default_device.type != "cpu":
        torch.set_default_device(None)
    try:
        yield
    finally:
        torch.set_default_dtype(default_dtype)
        if default_device.type != "cpu":
            torch.set_default_device(default_device)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.enable_cudnn_sdp(has_cudnn_attention)
        if has_cuda:
            # Without an initial state, the generators have the seed of the last `torch.manual_seed`, like the CPU's.
            torch.cuda.set_rng_state_all(cuda) if was_initialized else torch.cuda.manual_seed_all(seed)
            if torch.cuda.is_initialized():
                torch.cuda.set_device(device)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        torch.set_rng_state(generator)
        if not release_memory:
            restore_malloc_trim()


@contextmanager
def download_bars(*, hidden: bool) -> Iterator[None]:
    """A context in which huggingface_hub shows no download bars if `hidden`; then its settings are what they were.

    Its functions that show and hide bars forget the settings of single groups of bars, so these are restored here. The
    variable HF_HUB_DISABLE_PROGRESS_BARS takes precedence over them.
    """
    if not hidden:
        yield
        return
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from huggingface_hub.utils.tqdm import disable_progress_bars, progress_bar_states

    before = dict(progress_bar_states)
    if HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    try:
        yield
    finally:
        progress_bar_states.clear()
        progress_bar_states.update(before)
