r"""What devices send each other when a sequence is split over them: on paper, and as compiled.

An element of the exact filter is E = 3 K² + 2 V K numbers a head, an affine map of means K² + V K,
and a part of a linear memory 2 K + V K (`layers.sharded`). In one pass over N devices each takes in

    (N − 1) E                      numbers in one round, up to `GATHERED` devices
    (1 + ⌈log₂(N − 1)⌉) E          numbers in as many rounds, beyond

whatever the length of the sequence; its gradient sends the same back. Kernels send E of K = V = 64
for every 64 values of a head, and 2 K² + 2 V K for the gradient (`kernels.devices`).
"""

import math
import re
from dataclasses import dataclass

from .exchange import GATHERED
from .rules import Additive, Exact, Reset, Rule

_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
_COLLECTIVE = re.compile(
    r"= (?P<shapes>\(.*?\)|\S+) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|"
    r"collective-permute|collective-broadcast)(?P<start>-start)?\("
)
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_GROUP = re.compile(r"replica_groups=mesh\[(?P<sizes>.*?)\] \{(?P<axes>.*?)\}")
_SIZE = re.compile(r"('\w+')=(\d+)")


@dataclass(frozen=True)
class Traffic:
    """Of one pass.

    Args:
        rounds: messages that follow each other.
        numbers: that each device takes in.
    """

    rounds: int
    numbers: int


def predicted(rule: Rule, devices: int, value: int, key: int) -> Traffic:
    """What one head's forward pass takes, by the formulas above; kernels' at 64 is the same.

    Args:
        rule: `Exact`, `Reset` or `Additive`.
        devices: that the sequence is split over.
        value: rows of the memory.
        key: columns.
    """
    element = {
        Exact: 3 * key**2 + 2 * value * key,
        Reset: key**2 + value * key,
        Additive: 2 * key + value * key,
    }[type(rule)]
    if devices == 1:
        return Traffic(0, 0)
    if devices <= GATHERED:
        return Traffic(1, (devices - 1) * element)
    rounds = 1 + math.ceil(math.log2(devices - 1))
    return Traffic(rounds, rounds * element)


def counted(program: str, devices: int) -> dict[str, tuple[int, int]]:
    """Of a compiled program: how often it has each collective, and bytes each device takes in.

    Args:
        program: HLO, as `jax.jit(f).lower(...).compile().as_text()`; loops count once.
        devices: of a collective that names no groups.
    """
    found: dict[str, tuple[int, int]] = {}
    for line in program.splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        sizes = [
            _BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
            for dtype, shape in _SHAPE.findall(match["shapes"])
        ]
        if match["start"] and match["kind"] != "all-reduce":
            # What goes in stands before what comes out, and handles of four bytes after both.
            sizes = [size for size in sizes if size > 4]
            sizes = sizes[len(sizes) // 2 :]
        members, group = devices, _GROUP.search(line)
        if group is not None:
            along = group["axes"].split(",")
            members = math.prod(
                int(n) for axis, n in _SIZE.findall(group["sizes"]) if axis in along
            )
        share = {
            "all-gather": (members - 1) / members,  # of what comes out
            "reduce-scatter": members - 1,
            "all-reduce": 2 * (members - 1) / members,  # in a ring
            "all-to-all": (members - 1) / members,
        }.get(match["kind"], 1)
        count, total = found.get(match["kind"], (0, 0))
        found[match["kind"]] = count + 1, total + round(share * sum(sizes))
    return found
