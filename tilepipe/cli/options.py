"""The options that commands share, as dataclasses whose fields are annotated for typer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from tilepipe.cli.arguments import option, read_config, read_tuned
from tilepipe.cli.group import remember
from tilepipe.errors import UsageError
from tilepipe.options import SegmentOptions, parse_bytes, parse_nodata, parse_numbers, parse_pair

MAP, INPUT, OUTPUT, MACHINE, TALK = "The map", "Input", "Output", "Machine", "Telling"


@dataclass(frozen=True, slots=True)
class LabelOptions:
    """What becomes of class scores."""

    combine: Annotated[
        str,
        option(
            "--combine",
            metavar="mean|max",
            panel=MAP,
            help="Several models: the mean or the largest of their probabilities of each class.",
        ),
    ] = "mean"
    refine: Annotated[
        str | None,
        option(
            "--refine",
            metavar="crf[:KEY=VALUE,...]",
            panel=MAP,
            help="Fit labels to the image's edges by a locally connected CRF; keys are iterations, radius, "
            "appearance, position, color, smoothness, distance.",
        ),
    ] = None
    confidence: Annotated[
        bool,
        option("--confidence/--no-confidence", panel=OUTPUT, help="Also write the best class's probability x 254."),
    ] = False
    probabilities: Annotated[
        str | None,
        option(
            "--probabilities",
            metavar="uint8|float16",
            panel=OUTPUT,
            help="Also write every class's probability.",
        ),
    ] = None

    def resolve(self) -> dict[str, Any]:
        """The options as SegmentOptions takes them."""
        return {
            "combine": self.combine,
            "refine": self.refine,
            "confidence": self.confidence,
            "probabilities": self.probabilities,
        }


@dataclass(frozen=True, slots=True)
class JobOptions:
    """How a job reads, tiles, runs and writes, whatever its network gives."""

    stitch: Annotated[
        str,
        option(
            "--stitch",
            metavar="auto|exact|blend",
            panel=MAP,
            help="exact: the labels of one pass over the whole raster; blend: averaged overlaps; "
            "auto: exact where the network allows it at a fair price.",
        ),
    ] = "auto"
    tile: Annotated[
        str | None,
        option("--tile", metavar="N|RxC", panel=MAP, help="The network's input in pixels, rows x columns."),
    ] = None
    overlap: Annotated[
        int | None,
        option("--overlap", metavar="N", panel=MAP, help="Pixels that neighbouring tiles share when blending."),
    ] = None
    window: Annotated[
        str, option("--window", metavar="NAME", panel=MAP, help="The weights of a tile's pixels when blending.")
    ] = "hann"
    precision: Annotated[
        str | None,
        option(
            "--precision",
            metavar="float64|float32|bf16",
            panel=MAP,
            help="The arithmetic; by default bf16 on a GPU and float32 on a CPU.",
        ),
    ] = None
    bands: Annotated[
        str | None,
        option("--bands", metavar="4,3,2", panel=INPUT, help="Band numbers from 1, in the model's order."),
    ] = None
    nodata: Annotated[
        str | None,
        option("--nodata", metavar="VALUE|none", panel=INPUT, help="The pixel value that means no data."),
    ] = None
    region: Annotated[
        str | None,
        option(
            "--region",
            metavar="R0:R1,C0:C1|L,B,R,T",
            panel=INPUT,
            help="A part of the raster, in pixels, or as left,bottom,right,top in its CRS; "
            "its labels are those of the whole.",
        ),
    ] = None
    mask: Annotated[
        str | None,
        option(
            "--mask",
            metavar="AREA.gpkg|.geojson|.tif",
            panel=INPUT,
            help="Only the pixels inside are computed; those outside become nodata.",
        ),
    ] = None
    resample: Annotated[
        bool, option("--resample/--no-resample", panel=INPUT, help="Read at the model's ground resolution.")
    ] = False
    stage: Annotated[
        str,
        option(
            "--stage",
            metavar="auto|always|never",
            panel=INPUT,
            help="Copy the input into zarr chunks first; auto does so where the file reads badly in windows.",
        ),
    ] = "auto"
    block: Annotated[
        str | None,
        option("--block", metavar="N|RxC", panel=OUTPUT, help="Pixels per task, which are also a shard."),
    ] = None
    no_shards: Annotated[
        bool,
        option(
            "--no-shards/--shards",
            panel=OUTPUT,
            help="One file per chunk, for readers that know no shards, such as GDAL 3.12.",
        ),
    ] = False
    no_overviews: Annotated[
        bool,
        option(
            "--no-overviews/--overviews",
            panel=OUTPUT,
            help="Make no coarser maps for viewers at the end; `tilepipe overviews` makes them later.",
        ),
    ] = False
    device: Annotated[
        str | None,
        option("--device", metavar="cpu|cuda|cuda:N", panel=MACHINE, help="By default a GPU where one is."),
    ] = None
    gpus: Annotated[
        str | None,
        option("--gpus", metavar="all|0,1", panel=MACHINE, help="One worker process for each of these GPUs."),
    ] = None
    memory: Annotated[
        str | None,
        option("--memory", metavar="SIZE", panel=MACHINE, help="Host memory to stay within, such as 8G."),
    ] = None
    device_memory: Annotated[
        str | None,
        option("--device-memory", metavar="SIZE", panel=MACHINE, help="GPU memory to stay within, such as 6G."),
    ] = None
    workers: Annotated[
        int | None, option("--workers", metavar="N", panel=MACHINE, help="Worker processes; 1 by default.")
    ] = None
    threads: Annotated[
        int | None,
        option("--threads", metavar="N", panel=MACHINE, help="Tiles in flight per worker on a CPU; one per core."),
    ] = None
    scheduler: Annotated[
        str | None,
        option("--scheduler", metavar="tcp://HOST:PORT", panel=MACHINE, help="A dask scheduler that runs already."),
    ] = None

    def resolve(self, overwrite: bool = False, **others: Any) -> SegmentOptions:
        """The options as the library takes them, with those of other groups; UsageError where a value is not legal."""
        choices: dict[str, Any] = {"stitch": self.stitch, "stage": self.stage, "precision": self.precision}
        return SegmentOptions(
            **choices,
            **others,
            tile=None if self.tile is None else parse_pair(self.tile, "tile"),
            overlap=self.overlap,
            window=self.window,
            block=None if self.block is None else parse_pair(self.block, "block"),
            bands=None if self.bands is None else parse_numbers(self.bands, "bands"),
            nodata=None if self.nodata is None else parse_nodata(self.nodata),
            region=self.region,
            mask=self.mask,
            resample=self.resample,
            device=self.device,
            memory=None if self.memory is None else parse_bytes(self.memory),
            device_memory=None if self.device_memory is None else parse_bytes(self.device_memory),
            workers=self.workers,
            threads=self.threads,
            gpus=None if self.gpus is None else parse_gpus(self.gpus),
            scheduler=self.scheduler,
            shards=not self.no_shards,
            overviews=not self.no_overviews,
            overwrite=overwrite,
        )


def parse_gpus(text: str) -> tuple[int, ...]:
    """Device numbers from "all" or "0,1"; UsageError where "all" is none."""
    if text != "all":
        return parse_numbers(text, "gpus")
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        raise UsageError("--gpus all, but torch sees no CUDA device here; drop it, or use --device cpu")
    return tuple(range(count))


Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        rich_help_panel=TALK,
        envvar="TILEPIPE_CONFIG",
        show_envvar=False,
        is_eager=True,
        callback=read_config,
        help="Options from a file, by their names (tile = 1408). The command line counts first, then the "
        "environment (TILEPIPE_TILE=1408), then the file.",
    ),
]
Tuned = Annotated[
    str | None,
    typer.Option(
        "--tuned",
        metavar="FILE.toml",
        rich_help_panel=TALK,
        envvar="TILEPIPE_TUNED",
        show_envvar=False,
        is_eager=True,
        callback=read_tuned,
        help="Options that `tilepipe bench --output` found for this machine; what --config says counts first.",
    ),
]


@dataclass(frozen=True, slots=True)
class FileOptions:
    """Files that a job's options may come from; their callbacks have read them when a command runs."""

    config: Config = None
    tuned: Tuned = None


Json = Annotated[
    bool,
    option("--json/--no-json", panel=TALK, callback=remember, help="The result as one JSON object on stdout."),
]
Quiet = Annotated[
    bool,
    option("--quiet/--no-quiet", "-q", panel=TALK, callback=remember, help="No progress and no notes; errors only."),
]
Verbose = Annotated[
    bool,
    option("--verbose/--no-verbose", "-v", panel=TALK, callback=remember, help="More detail, and tracebacks."),
]
LogJson = Annotated[
    bool,
    option(
        "--log-json/--no-log-json",
        panel=TALK,
        callback=remember,
        help="Progress, notes and errors as one JSON object per line on stderr.",
    ),
]
Overwrite = Annotated[
    bool,
    option(
        "--overwrite/--no-overwrite",
        panel=OUTPUT,
        help="Replace an output that is there, its finished blocks too.",
    ),
]


@dataclass(frozen=True, slots=True)
class Talk:
    """How a command that reports once tells its result."""

    verbose: Verbose = False
    json: Json = False


@dataclass(frozen=True, slots=True)
class LongTalk:
    """How a command that runs for long tells of its progress and result."""

    quiet: Quiet = False
    verbose: Verbose = False
    json: Json = False
    log_json: LogJson = False
