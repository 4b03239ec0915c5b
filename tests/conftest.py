"""What all tests share: one torch thread a process, since several run side by side, and hypothesis's settings."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("tilepipe", deadline=None, derandomize=True)
settings.load_profile("tilepipe")
