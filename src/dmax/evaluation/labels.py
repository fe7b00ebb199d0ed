"""Where the labels of a plot go: beside what they name, and over nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

DISTANCES = (7, 12, 20, 30, 42, 56, 72, 90, 110, 135, 165, 200, 240)  # of a label, pixels
NUM_DIRECTIONS = 32
MARGIN = 2.0  # around a label
ON_A_LINE = 30.0  # cost of each point of a line under a label, as pixels of distance
ON_A_LABEL = 1e6


def place_labels(
    anchors: Points, sizes: Points, obstacles: Points, lowest: Points, highest: Points
) -> Points:
    """Lower left corners of labels, each near its anchor.

    Labels never overlap where the room allows it, and cover as few obstacles as they can. They are
    placed one after another, in the order given: the most important one comes first.

    Args:
        anchors: [N, 2] what the labels name, pixels.
        sizes: [N, 2] width and height of each label, pixels.
        obstacles: [M, 2] points to keep clear of, pixels.
        lowest: [2] lower left corner of the room that labels have.
        highest: [2] its upper right corner.

    Returns:
        [N, 2] corners, pixels.
    """
    placed = np.empty_like(anchors)
    for index, (anchor, size) in enumerate(zip(anchors, sizes, strict=True)):
        corners = _candidates(anchor, size)
        corners = np.clip(corners, lowest, np.maximum(highest - size, lowest))
        nearest = np.clip(anchor, corners, corners + size)
        cost = np.linalg.norm(nearest - anchor, axis=1)
        cost += ON_A_LINE * _covered(corners, size, obstacles)
        overlaps = _overlaps(corners, size, placed[:index], sizes[:index])
        placed[index] = corners[np.argmin(cost + ON_A_LABEL * overlaps)]
    return placed


def _candidates(anchor: Points, size: Points) -> Points:
    """Corners all around an anchor, the nearest first, and right of it before left of it."""
    angles = np.linspace(0, 2 * np.pi, NUM_DIRECTIONS, endpoint=False)
    directions = np.stack((np.cos(angles), np.sin(angles)), axis=1)
    reach = np.array(DISTANCES)[:, None, None] * directions
    sideways = np.array((size[0] / 2, size[1] / 2)) * np.sign(directions.round(6))
    return (anchor + reach + sideways - size / 2).reshape(-1, 2)


def _covered(corners: Points, size: Points, obstacles: Points) -> Points:
    """[K] how many obstacles lie under a label at each corner."""
    offsets = obstacles[None] - corners[:, None]
    inside = (offsets >= -MARGIN) & (offsets <= size + MARGIN)
    return inside.all(axis=-1).sum(axis=1).astype(np.float64)


def _overlaps(corners: Points, size: Points, others: Points, other_sizes: Points) -> Points:
    """[K] how many labels one at each corner would touch."""
    low = corners[:, None] < others[None] + other_sizes + MARGIN
    high = corners[:, None] + size + MARGIN > others[None]
    return (low & high).all(axis=-1).sum(axis=1).astype(np.float64)


def along(curves: Sequence[Points], step: float) -> Points:
    """[M, 2] points along lines of segments, about `step` apart."""
    found = [np.empty((0, 2))]
    for curve in curves:
        for start, end in zip(curve[:-1], curve[1:], strict=True):
            count = max(int(np.linalg.norm(end - start) / step), 1)
            found.append(start + (end - start) * np.linspace(0, 1, count, endpoint=False)[:, None])
        found.append(curve[-1:])
    return np.concatenate(found)
