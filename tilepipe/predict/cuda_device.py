"""A CUDA device as the engine uses it: uploads, kernels, downloads. The one place where torch and numba meet."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from threading import BoundedSemaphore
from typing import Any

import numpy as np
import torch
from numba.core import config

from tilepipe.errors import RunError, UsageError
from tilepipe.predict.scores import Array
from tilepipe.projection import RESIDENT

# numba's own CUDA part cannot compile our kernels, only simulate them; the `gpu` extra brings its successor of the
# same name, and the compiler that it calls.
if find_spec("numba_cuda") is None and not config.ENABLE_CUDASIM:
    raise UsageError("device cuda needs the gpu extra; install tilepipe[gpu]")
from numba import cuda

# A small last tile is no reason to tell users of grids.
warnings.filterwarnings("ignore", message=".*Grid size")


class CudaDevice:
    """One CUDA device, with a stream for computing and one for copies in each direction.

    Work is queued in the order of calls; nothing waits but `Download.wait`. Buffers that are uploaded or fetched are
    page-locked, and come from torch's cache of such memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._uploads = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._computing = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._downloads = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graph_memory: Any = None
        self.room = BoundedSemaphore(RESIDENT)
        """Whoever has tensors of a block on the device holds it."""
        check_kernels(self)

    def stage(self, values: Array) -> torch.Tensor:
        """A page-locked copy of `values`, from which `upload` does not have to wait."""
        plain = torch.from_numpy(values)
        return torch.empty(plain.shape, dtype=plain.dtype, pin_memory=True).copy_(plain)

    def upload(self, staged: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies on the device; computing that is queued from now on sees them whole."""
        with torch.cuda.stream(self._uploads):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in staged]
        self._computing.wait_stream(self._uploads)
        for copy in copies:
            copy.record_stream(self._computing)
        return copies

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A context whose work, torch's and numba's, goes to the computing stream."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._computing), torch.inference_mode():
            yield

    def run(self, kernel: Any, grid: tuple[int, int], threads: tuple[int, int], arguments: Sequence[Any]) -> None:
        """Queue a numba kernel on the current stream; tensors among the arguments are passed as they lie."""
        with cuda.gpus[self.device.index]:
            stream = cuda.external_stream(torch.cuda.current_stream(self.device).cuda_stream)
            given = [cuda.as_cuda_array(a, sync=False) if isinstance(a, torch.Tensor) else a for a in arguments]
            kernel[grid, threads, stream](*given)

    def download(self, tensors: Sequence[torch.Tensor]) -> Download:
        """Queue copies of `tensors` to the host, after all computing that is queued and beside what comes next."""
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        self._downloads.wait_stream(self._computing)
        with torch.cuda.stream(self._downloads):
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._downloads)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(self._downloads)
        return Download(copies, done)

    def capture(self, work: Callable[[], None]) -> Any:
        """What `work` queues on the computing stream, as a graph to `replay`; nothing of it runs now.

        All graphs take their memory from one pool: at most one of them may be running.
        """
        if self._graph_memory is None:
            self._graph_memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Kernels that this work is the first to need are loaded meanwhile, and other threads ask for memory: stricter
        # modes take both for faults. What a graph cannot hold, such as waiting for the device, is one in any mode.
        mode = "relaxed"
        try:
            with torch.cuda.graph(graph, self._graph_memory, self._computing, capture_error_mode=mode):
                work()
        except Exception:
            # A capture that fails may leave the allocator waiting for its end, and giving nothing back meanwhile.
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(self.device.index, self._graph_memory)
            raise
        return graph

    def free(self) -> None:
        """Wait for all that is queued, and give cached memory back to the device."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def limit(self, size: int) -> None:
        """Lets torch's allocator take at most `size` bytes of the device; `peak_bytes` counts from now on."""
        # Networks of earlier jobs may hang in cycles, and their memory in the allocator's cache.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), self.device)

    def peak_bytes(self) -> int:
        """The most memory that was reserved at once, since it was limited."""
        return int(torch.cuda.max_memory_reserved(self.device))


@cuda.jit(cache=True)
def _one(out: Any) -> None:
    out[0] = 1


def check_kernels(device: CudaDevice) -> None:
    """Nothing; raises RunError where numba cannot build or run a kernel on a device."""
    try:
        with device.computing():
            tried = torch.zeros(1, device=device.device)
            device.run(_one, (1, 1), (1, 1), (tried,))
            assert float(tried) == 1
    except Exception as error:  # a missing compiler, library, driver: whatever the machine lacks
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunError(
            f"numba cannot build kernels for {device.device}: {said}; install tilepipe[gpu], or tilepipe[gpu-cuda12] "
            "where torch is built for CUDA 12"
        ) from error


class Download:
    """Arrays on their way to the host."""

    def __init__(self, tensors: list[torch.Tensor], done: Any) -> None:
        self._tensors, self._done = tensors, done

    def wait(self) -> list[Array]:
        """The arrays, once they are here; in memory of their own."""
        self._done.synchronize()
        return [np.array(tensor.numpy()) for tensor in self._tensors]
