"""What a compiled program sends from device to device, read off XLA's text of it: which collectives, how often, and along which mesh axes.

Bytes are those that one device sends, by the usual algorithms on a ring of n devices: of S bytes, an all-gather or all-to-all sends
(n - 1) / n, an all-reduce twice that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from seal_jax.parallel import hlo

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(-start)?\(")


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str  # as XLA calls it
    axes: tuple[str, ...]  # of the mesh, along which its groups of devices extend
    size: int  # devices of a group
    times: float  # a call of the program
    bytes: float  # that a device sends each time


def of_text(text: str, mesh: Mapping[str, int], trips: float = 1) -> list[Collective]:
    """The collectives of a program, from `compiled.as_text()`, over devices laid out as `mesh` (sizes by axis, in order).

    `trips`: how often loops run that the text does not say. Of the branches of a condition, the one that sends the most counts.
    Raises ValueError for groups of devices in a form that is not known.
    """
    computations, entry = hlo.computations(text)
    seen: set[str] = set()  # where compute runs beside a collective, each of the fusions that it is cut into names it again

    def walk(name: str) -> Iterator[Collective]:
        for line in computations.get(name, ()):
            if found := _COLLECTIVE.search(line):
                channel = re.search(r"channel_id=(\d+)", line)
                if channel is None or channel[1] not in seen:
                    yield from _read(line, found, mesh)
                seen.update(channel.groups() if channel else ())
            elif loop := hlo.loop(line):
                condition, body = loop
                times = hlo.trips(line, computations.get(condition, ()), trips)
                yield from (one._replace(times=one.times * times) for one in walk(body))
            elif " conditional(" in line:
                yield from max((list(walk(branch)) for branch in hlo.called(line)), key=total, default=[])
            else:
                for called in hlo.called(line):
                    yield from walk(called)

    return list(walk(entry))


def total(found: Sequence[Collective]) -> float:
    """Bytes that a device sends in a call of the program."""
    return sum(one.times * one.bytes for one in found)


def by_axes(found: Sequence[Collective]) -> dict[str, float]:
    """`total` by the axes of the mesh, their names joined by "+"."""
    sums: dict[str, float] = {}
    for one in found:
        sums["+".join(one.axes)] = sums.get("+".join(one.axes), 0.0) + one.times * one.bytes
    return sums


def _read(line: str, found: re.Match[str], mesh: Mapping[str, int]) -> Iterator[Collective]:
    kind, size = found[2], hlo.size(found[1])
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
        groups = np.asarray(re.findall(r"\d+", pairs[1]) if pairs else [], int).reshape(-1, 2)
        count, sent = 2, size / 2 if found[3] else size  # the start of one names its operand too
    else:
        groups = _groups(line, int(np.prod(list(mesh.values()))))
        count = groups.shape[1]
        if kind == "all-gather" and found[3]:
            size *= count / (count + 1)
        share = (count - 1) / count
        sent = size * {"all-reduce": 2 * share, "reduce-scatter": count - 1}.get(kind, share)
    if sent := sent if count > 1 else 0.0:
        yield Collective(kind, _axes(groups, mesh), count, 1, sent)


def _groups(line: str, devices: int) -> np.ndarray[Any, Any]:
    """The groups of a collective [groups, devices of each], in any of the three forms that XLA writes."""
    if found := re.search(r"replica_groups=\{\{([\d,{} ]+)\}\}", line):
        return np.asarray([[int(n) for n in group.split(",")] for group in re.split(r"\},\s*\{", found[1])])
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return _iota(found[3], found[4]).reshape(int(found[1]), int(found[2]))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        across = re.findall(r"'(\w+)'", found[4])
        order = [name for name in sizes if name not in across] + across
        if ":" not in found[4]:
            ids = _iota(found[2], found[3]) if found[2] else np.arange(devices)
            ids = ids.reshape(list(sizes.values())).transpose([list(sizes).index(name) for name in order])
            return ids.reshape(-1, int(np.prod([sizes[name] for name in across])))
    if re.search(r"replica_groups=\{\}", line):
        return np.arange(devices)[None]
    raise ValueError(f"groups of devices in a form that is not known: {line.strip()[:300]}")


def _iota(shape: str, order: str | None) -> np.ndarray[Any, Any]:
    """0, 1, 2, ... laid out as `shape`, with its axes then in another `order`: both as XLA writes them, "2,4"."""
    sizes = [int(n) for n in shape.split(",")]
    ids = np.arange(int(np.prod(sizes))).reshape(sizes)
    return ids if order is None else ids.transpose([int(n) for n in order.split(",")])


def _axes(groups: np.ndarray[Any, Any], mesh: Mapping[str, int]) -> tuple[str, ...]:
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axes, groups, devices]
    return tuple(axis for axis, place in zip(mesh, places, strict=True) if (place != place[:, :1]).any())
