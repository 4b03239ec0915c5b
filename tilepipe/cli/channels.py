"""What the channels of a store of values hold, for people."""

from __future__ import annotations

from typing import Any

from tilepipe.cli import show


def channel_table(channels: dict[str, dict[str, Any]], nodata: int) -> str:
    """Each channel's figures, as `ChannelSummary.describe` gives them, and how many pixels hold no data.

    >>> print(channel_table({"slope": {"pixels": 1200, "min": 0.0, "mean": 12.5, "max": 61.25}}, 30))
    channel  pixels  min  mean    max
    slope     1,200    0  12.5  61.25
    nodata       30
    """
    rows = [
        (name, f"{found['pixels']:,}", *(_number(found[what]) for what in ("min", "mean", "max")))
        for name, found in channels.items()
    ]
    if nodata:
        rows.append(("nodata", f"{nodata:,}", "", "", ""))
    return show.table(("channel", "pixels", "min", "mean", "max"), rows, right=(1, 2, 3, 4))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
