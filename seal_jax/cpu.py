"""This machine's processor, as Linux tells of it in /proc/cpuinfo; on other systems nothing is known of it."""

from __future__ import annotations

import functools
import pathlib

INFO = pathlib.Path("/proc/cpuinfo")


@functools.cache
def _told() -> dict[str, str]:
    """What is said of the first core."""
    try:
        lines = INFO.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def name() -> str | None:
    """What it is sold as; None where there are only numbers for it, as on Arm."""
    return _told().get("model name") or None


def features() -> frozenset[str]:
    """The extensions of its instruction set, by Linux's names for them."""
    told = _told()
    return frozenset((told.get("flags") or told.get("Features") or "").split())
