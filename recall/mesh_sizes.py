"""How a mesh of devices is named on the command line."""

import argparse

AXES = ("data", "heads", "sequence")
"""Rows of a batch, heads of a mixer, and time, which is innermost: its devices are closest."""

Sizes = dict[str, int]
"""Devices of each axis that is named."""


def read_sizes(text: str) -> Sizes:
    """Read "data=2,sequence=4", for `argparse`."""
    sizes: Sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes or not size.isdigit() or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r} names no mesh; give {', '.join(AXES)}, as in data=2,sequence=4"
            )
        sizes[axis] = int(size)
    return sizes
