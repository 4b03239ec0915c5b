"""Which of the ways to make a network faster on a CUDA device are in force."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any


@dataclass(frozen=True, slots=True)
class CudaSteps:
    """Steps beyond folding and channels-last; those that a job takes are stored with it.

    They are decided by rule, never by timing, so that every worker computes the same bytes.
    """

    pooling: bool = True
    """Pooling and unpooling by our kernels, with switches of a byte, in place of torch's with 64-bit indices."""
    fused: bool = True
    """A convolution's bias and ReLU in one pass, that of pooling or unpooling where one follows."""
    upload: bool = True
    """A tile's input in one pass from the pixels as stored."""
    graph_pixels: int = 2048 * 2048
    """The largest tile whose pass is captured as a CUDA graph; larger ones hide their launches. 0 captures none."""
    bands: int = 0
    """Input channels that the first convolution gets at least, those beyond the bands being 0; 0 leaves it."""
    classifier: bool = False
    """SegNet's last convolution, best class and confidence in one pass, where labels are wanted exactly."""

    @classmethod
    def on(cls, device: str) -> CudaSteps:
        """What is in force on "cpu" or "cuda": where Triton is missing, nothing that needs it."""
        if device != "cuda":
            return NONE
        return cls() if triton_version() else cls(pooling=False, fused=False, upload=False)

    @property
    def replace(self) -> bool:
        """Whether some module of the network is replaced."""
        return self.pooling or self.fused or self.bands > 0 or self.classifier

    def to_json(self) -> dict[str, Any]:
        """The steps as JSON values."""
        return asdict(self)


NONE = CudaSteps(False, False, False, 0)
"""The network as torch runs it."""


def triton_version() -> str | None:
    """The version of Triton here; None without."""
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
