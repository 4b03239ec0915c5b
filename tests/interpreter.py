"""All checks of the CUDA network, one word for each that held, with interpreter and simulator in place of a device.

Run by test_triton.py: TRITON_INTERPRET=1 and NUMBA_ENABLE_CUDASIM=1 must be set before the imports.
"""

from __future__ import annotations

import engine_checks
import network_checks
import triton_checks

if __name__ == "__main__":
    for module, given in ((triton_checks, ["cpu"]), (network_checks, ["cpu"]), (engine_checks, [])):
        for check in module.CHECKS:
            check(*given)
            print(check.__name__.removeprefix("check_"), flush=True)
