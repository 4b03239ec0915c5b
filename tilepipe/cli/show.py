"""Plain text for people: numbers with units, and aligned columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def size(count: float) -> str:
    """Bytes in the largest unit that leaves at least 1.

    >>> size(3 << 20)
    '3.0 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def pixels(count: float) -> str:
    """Pixels as megapixels or gigapixels.

    >>> pixels(3_145_728), pixels(10**10), pixels(900)
    ('3.15 Mpx', '10 Gpx', '900 px')
    """
    for unit, scale in (("Gpx", 1e9), ("Mpx", 1e6)):
        if count >= 0.01 * scale and (unit == "Mpx" or count >= scale):
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} px"


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(4.25), duration(75), duration(7500)
    ('4.2 s', '1 min 15 s', '2 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def area(square_metres: float) -> str:
    """An area on the ground, in the unit that fits it.

    >>> area(2_500_000), area(12_000), area(40)
    ('2.50 km2', '1.20 ha', '40.0 m2')
    """
    for unit, scale in (("km2", 1e6), ("ha", 1e4)):
        if square_metres >= scale:
            return f"{square_metres / scale:.2f} {unit}"
    return f"{square_metres:.1f} m2"


def count(number: int, noun: str) -> str:
    """A number of things.

    >>> count(1, "block"), count(1200, "block")
    ('1 block', '1200 blocks')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def by(pair: Sequence[int]) -> str:
    """Two sizes.

    >>> by((1408, 1024))
    '1408 x 1024'
    """
    return f"{pair[0]} x {pair[1]}"


def share(part: float, whole: float) -> str:
    """A percentage.

    >>> share(1, 3)
    '33.33 %'
    """
    return f"{100 * part / whole:.2f} %" if whole else "-"


def entries(pairs: Iterable[tuple[str, str]]) -> str:
    """Lines of "name  value", the values aligned; a value's further lines are indented beneath it."""
    rows = list(pairs)
    width = max((len(name) for name, _ in rows), default=0) + 2
    return "\n".join(name.ljust(width) + value.replace("\n", "\n" + " " * width) for name, value in rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligned columns under a head; the columns whose numbers are in `right` are right-aligned.

    >>> print(table(("class", "share"), [("field", "40 %"), ("road", "6 %")], right=[1]))
    class  share
    field   40 %
    road     6 %
    """
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def cell(text: str, i: int) -> str:
        return text.rjust(widths[i]) if i in right else text.ljust(widths[i])

    return "\n".join("  ".join(cell(text, i) for i, text in enumerate(line)).rstrip() for line in lines)
