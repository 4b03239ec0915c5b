"""The C library's allocator, told to keep what is freed: a job asks for the same large maps again and again.

As it comes, it gives every map of more than 32 MiB back to the system, and gets it again, cleared, page by page: up to
a fifth of a network's time on the CPU, and more in virtual machines that hand free pages to their host.

    python -m tilepipe.allocator        prints the setting, for workers that are started elsewhere
"""

from __future__ import annotations

import os
import sys

VARIABLE = "GLIBC_TUNABLES"

KEEPING = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "mmap_max": 0,
        "trim_threshold": 1 << 40,
        # Arenas of threads hold no large maps.
        "arena_max": 1,
        # Scraps beside aligned maps have to join these again when they are freed, or the next map does not fit.
        "tcache_count": 0,
        "mxfast": 0,
    }.items()
)
"""VARIABLE for processes that run networks on the CPU; read when a process starts."""

COMMANDS = frozenset({"segment", "predict", "batch", "bench", "demo", "train"})
"""Those that run networks."""

_DEVICES = ("/dev/nvidiactl", "/dev/kfd")


def keeps_freed_memory() -> bool:
    """Whether this process's allocator was told so when it started."""
    return KEEPING in os.environ.get(VARIABLE, "")


def worker_environment() -> dict[str, str]:
    """What to set for processes that are started to run networks; nothing where it would not serve.

    That is where the C library is another one, where there is a GPU, whose maps are not in the host's memory, and
    where the user has chosen settings.
    """
    if not _with_glibc() or any(map(os.path.exists, _DEVICES)) or VARIABLE in os.environ:
        return {}
    return {VARIABLE: KEEPING}


def start_keeping() -> None:
    """Starts this process's command again with such an allocator, where it runs networks; returns where not."""
    settings = worker_environment()
    if settings and COMMANDS.intersection(sys.argv[1:2]) and os.access(sys.executable or "", os.X_OK):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **settings})


def _with_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False


if __name__ == "__main__":
    print(KEEPING)
