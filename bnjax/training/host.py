"""The machine that JAX runs on: the memory of its processor, and its paths."""

import ctypes
import os
import platform

# These are the numbers of mallopt's parameters in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory(pad: int = 2**28) -> bool:
    """Makes the C library keep the memory of freed arrays for the next ones, in place of giving it back to the system.

    XLA's CPU backend allocates each result anew. glibc asks the system for what is large, and the system clears it page
    by page as it is first touched, which takes longer than a batch norm of it. Once this has been called, all threads
    share one heap that never shrinks, and after some calls every result lies in memory that was used before. The
    process stays as large as it once was. Nothing changes for arrays on accelerators.

    Call it before JAX's first computation, or set BNJAX_KEEP_MEMORY=1 for the command line. For other programs the
    environment variables MALLOC_ARENA_MAX=1, MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_=1000000000000 and
    MALLOC_TOP_PAD_=268435456 do the same from a process's start.

    Args:
      pad: bytes by which the heap grows at least.

    Returns:
      Whether the C library is glibc and took the settings; elsewhere nothing changes.

    Raises:
      ValueError: for a negative pad, or one of 2 GiB or more.

    References:
      mallopt(3).
    """
    if not 0 <= pad < 2**31:
        raise ValueError(f"pad must lie in [0, 2**31) bytes, got {pad!r}.")
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, pad))
    taken = [mallopt(name, value) == 1 for name, value in settings]
    return all(taken)


def check_checkpoint_path(path: str | os.PathLike) -> None:
    """Raises ValueError for a path with characters under which Orbax loses what it saves, without a word."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise ValueError("Orbax loses checkpoints in a path that is not UTF-8.") from None
    unfit = "[]" if os.sep == "\\" else "[]\\"
    if found := sorted(set(unfit) & set(os.path.abspath(path))):
        raise ValueError(
            f"{os.fspath(path)} can't hold checkpoints: Orbax loses those in a path with {' or '.join(found)}."
        )
