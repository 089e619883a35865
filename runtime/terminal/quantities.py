"""Numbers as people read them, for the terminal and the report."""

import math


def short(value: float) -> str:
    """Three digits with k, M or G: 8123 -> '8.12k'."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999.6 would be rounded up to a fourth digit.
        if abs(value) >= limit * 0.9995:
            return f"{three_digits(value / limit)}{unit}"
    return three_digits(value)


def three_digits(value: float) -> str:
    """At least three significant digits, at most four decimals: 0.0132, 7.88, 1234; 'n/a' for what is not finite."""
    if not math.isfinite(value):
        return "n/a"
    if value == 0:
        return "0"
    # Of the rounded value: 0.9997 is 1.00, not 1.000.
    decimals = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.2e}")))))
    return f"{value:.{min(decimals, 4)}f}"


def counted(number: int, noun: str) -> str:
    """1, seed -> '1 seed'; 3, seed -> '3 seeds'."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 83 -> '1:23', 3723 -> '1:02:03'."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def milliseconds(seconds: float) -> str:
    """A short time: '0.61 ms', '258 ms', '1.52 s'."""
    return f"{three_digits(seconds)} s" if seconds >= 1 else f"{three_digits(seconds * 1e3)} ms"


def percent(share: float) -> str:
    """0.2071 -> '20.7 %', 0.0023 -> '0.23 %'."""
    if not math.isfinite(share):
        return "n/a"
    return f"{share * 100:.1f} %" if share >= 0.01 else f"{share * 100:.2f} %"


def byte_size(num_bytes: float) -> str:
    """Three digits and a binary unit: '0 B', '87.5 KiB', '614 GiB'."""
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= limit * 0.9995:
            return f"{three_digits(num_bytes / limit)} {unit}"
    return f"{three_digits(num_bytes)} B"
