"""Segment rasters of any size with a convolutional network: tiled, seamless, and provably the whole-image result.

>>> import tilepipe
>>> tilepipe.segment_raster("input.tif", "labels.zarr", "model.safetensors")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tilepipe.version import __version__

if TYPE_CHECKING:
    from tilepipe.arrays import segment
    from tilepipe.batch import BatchSummary, Scene, segment_batch
    from tilepipe.checkpoint import ClassInfo, Model, ModelCard, load_model, save_model
    from tilepipe.errors import TilepipeError
    from tilepipe.evaluation import EvaluationOptions, evaluate
    from tilepipe.job import Job, prepare
    from tilepipe.loading.reference import ModelReference
    from tilepipe.options import SegmentOptions
    from tilepipe.overviews import make_overviews
    from tilepipe.pipeline import Summary, predict_raster, segment_raster
    from tilepipe.proposals import aggregate
    from tilepipe.training.options import TrainOptions
    from tilepipe.training.train import train
    from tilepipe.variants.padded import Padded

# Loaded on first use: the command line's help must not wait for torch.
_HOME = {
    "BatchSummary": "tilepipe.batch",
    "ClassInfo": "tilepipe.checkpoint",
    "EvaluationOptions": "tilepipe.evaluation",
    "Job": "tilepipe.job",
    "Model": "tilepipe.checkpoint",
    "ModelCard": "tilepipe.checkpoint",
    "ModelReference": "tilepipe.loading.reference",
    "Padded": "tilepipe.variants.padded",
    "Scene": "tilepipe.batch",
    "SegmentOptions": "tilepipe.options",
    "Summary": "tilepipe.pipeline",
    "TilepipeError": "tilepipe.errors",
    "TrainOptions": "tilepipe.training.options",
    "aggregate": "tilepipe.proposals",
    "evaluate": "tilepipe.evaluation",
    "load_model": "tilepipe.checkpoint",
    "make_overviews": "tilepipe.overviews",
    "predict_raster": "tilepipe.pipeline",
    "prepare": "tilepipe.job",
    "save_model": "tilepipe.checkpoint",
    "segment": "tilepipe.arrays",
    "segment_batch": "tilepipe.batch",
    "segment_raster": "tilepipe.pipeline",
    "train": "tilepipe.training.train",
}

__all__ = [
    "BatchSummary",
    "ClassInfo",
    "EvaluationOptions",
    "Job",
    "Model",
    "ModelCard",
    "ModelReference",
    "Padded",
    "Scene",
    "SegmentOptions",
    "Summary",
    "TilepipeError",
    "TrainOptions",
    "__version__",
    "aggregate",
    "evaluate",
    "load_model",
    "make_overviews",
    "predict_raster",
    "prepare",
    "save_model",
    "segment",
    "segment_batch",
    "segment_raster",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tilepipe' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
