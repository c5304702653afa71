# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Cells on their own: what generates them, a point inside, cutting and drawing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from geometry import area

from pyro_cpa.errors import InvalidData
from pyro_cpa.partition import Intervals, Polygons, WholeSpace
from pyro_cpa.partition.walls import NOISE, Walls


def cut(cells, angle, offset):
    """The half of every cell below a line at the given angle, all of which it must cross."""
    R = len(cells)
    normal = torch.tensor([[np.cos(angle), np.sin(angle)]]).expand(R, -1)
    walls = Walls(torch.arange(R), normal, torch.full((R,), offset), *torch.full((2, R), NOISE))
    assert walls.cross(cells.generators()).all()
    return cells.halves(walls)


def polygon(*lines):
    cells = Polygons.whole_plane(torch.zeros(0))
    for angle, offset in lines:
        cells, _ = cut(cells, angle, offset)
    return cells


@pytest.mark.parametrize("n", [3, 4, 7, 30])
def test_regular_polygon(n):
    cells = polygon(*((2 * np.pi * k / n + 0.1, 1.0) for k in range(n)))
    assert int(cells.is_edge.sum()) == n
    half_side = np.tan(np.pi / n)
    assert cells.starts.numpy() == pytest.approx(-half_side, rel=1e-13)
    assert cells.ends.numpy() == pytest.approx(half_side, rel=1e-13)
    (corners,) = cells.clip_to_box(-10.0, 10.0)
    assert len(corners) == n
    assert area(corners) == pytest.approx(n * half_side, rel=1e-13)
    assert cells.interior_points().numpy() == pytest.approx(0.0, abs=1e-14)


# At 1e6 a width of 1e-9 would be below rounding.
@pytest.mark.parametrize(("width", "distance"), [(1e-9, 1.0), (1e-3, 1.0), (1e-3, 1e6)])
def test_needle_keeps_its_width(width, distance):
    # Two nearly parallel sides at a distance, closed by two others; and cut across in the middle.
    needle = polygon(
        (0.3, distance), (0.3 + np.pi, width - distance), (0.3 + np.pi / 2, 50.0), (0.3 - np.pi / 2, 50.0)
    )
    assert float(needle.offsets[0, :2].sum()) == pytest.approx(width, abs=1e-15 * distance)
    below, above = cut(needle, 0.3 + np.pi / 2, 1.0)
    for part, length in ((below, 51.0), (above, 49.0)):
        assert int(part.is_edge.sum()) == 4
        spans = (part.ends - part.starts)[0].sort().values
        assert spans[2:].numpy() == pytest.approx(length, rel=1e-9)
        assert spans[:2].numpy() == pytest.approx(width, abs=1e-15 * max(distance, 50.0))


def test_unbounded_cells_have_directions():
    wedge = polygon((np.pi, -1.0), (-np.pi / 2, -2.0))  # z1 >= 1 and z2 >= 2
    generators = wedge.generators()[0]
    points = generators[generators[:, 2] > 0]
    rays = generators[(generators[:, 2] == 0) & (generators.abs().sum(1) > 0)]
    assert torch.allclose(points[:, :2] / points[:, 2:], torch.tensor([1.0, 2.0]))
    assert torch.allclose(rays[:, :2].sum(0), torch.tensor([1.0, 1.0]))
    inside = wedge.interior_points()[0]
    assert inside[0] > 1 and inside[1] > 2
    (corners,) = wedge.clip_to_box((0.0, -5.0), (3.0, 4.0))
    assert area(corners) == pytest.approx(4.0)


@pytest.mark.parametrize("kind", ["space", "plane"])
def test_whole_plane(kind):
    cells = WholeSpace(2) if kind == "space" else Polygons.whole_plane(torch.zeros(0))
    assert torch.equal(cells.interior_points(), torch.zeros(1, 2))
    (corners,) = cells.clip_to_box((-1.0, 0.0), (1.0, 3.0))
    assert area(corners) == pytest.approx(6.0)
    directions = cells.generators()[0, :, :2]
    for angle in np.linspace(0, 2 * np.pi, 17):
        assert float((directions @ torch.tensor([np.cos(angle), np.sin(angle)])).max()) > 0.4


@pytest.mark.parametrize("angle", [0.0, 0.7, np.pi / 2, 4.0])
def test_half_planes_and_strips(angle):
    below, above = cut(Polygons.whole_plane(torch.zeros(0)), angle, 0.5)
    normal = torch.tensor([np.cos(angle), np.sin(angle)])
    assert float(below.interior_points()[0] @ normal) < 0.5 < float(above.interior_points()[0] @ normal)
    strip, _ = cut(above, angle, 0.75)
    assert 0.5 < float(strip.interior_points()[0] @ normal) < 0.75
    assert strip.is_edge.sum() == 2 and torch.isinf(strip.starts).all() and torch.isinf(strip.ends).all()
    total = sum(area(c.clip_to_box(-2.0, 2.0)[0]) for c in (below, above))
    assert total == pytest.approx(16.0, rel=1e-13)


def test_walls_that_only_touch_do_not_cross():
    triangle = polygon((0.0, 1.0), (2.0, 1.0), (4.0, 1.0))
    corner = triangle.clip_to_box(-9.0, 9.0)[0][0]
    for angle in np.linspace(0.0, np.pi, 50):
        # Lines through a corner, and the sides themselves, a rounding error off.
        for offset in (corner @ [np.cos(angle), np.sin(angle)], 1 + 1e-16):
            normal = torch.tensor([[np.cos(angle), np.sin(angle)]])
            wall = Walls(torch.zeros(1), normal, torch.tensor([offset]), *torch.full((2, 1), NOISE))
            values = triangle.clip_to_box(-9.0, 9.0)[0] @ normal[0].numpy() - offset
            truth = values.max() > 1e-12 and values.min() < -1e-12
            assert bool(wall.cross(triangle.generators())) == truth


def test_cells_outside_the_box_are_empty():
    cells = Polygons.cat(
        [polygon((0.0, -10.0)), polygon((np.pi, -10.0)), polygon((0.0, 0.0)), polygon((0.0, 10.0))]
    )
    sizes = [area(corners) for corners in cells.clip_to_box(-1.0, 1.0)]
    assert sizes == pytest.approx([0.0, 0.0, 2.0, 4.0])


def test_intervals():
    cells = Intervals(torch.tensor([-torch.inf, 0.0, 1e-9, 5.0]), torch.tensor([0.0, 1e-9, 5.0, torch.inf]))
    inside = cells.interior_points()[:, 0]
    assert ((cells.lower < inside) & (inside < cells.upper)).all()
    assert [area(ends) for ends in cells.clip_to_box(-1.0, 2.0)] == pytest.approx(
        [1.0, 1e-9, 2.0 - 1e-9, 0.0]
    )
    assert Intervals(torch.tensor([-torch.inf]), torch.tensor([torch.inf])).interior_points().item() == 0.0
    assert area(WholeSpace(1).clip_to_box(-1.0, 2.0)[0]) == 3.0


def test_sub_batches_and_concatenation():
    wedge, strip = polygon((0.0, 1.0), (1.0, 1.0)), polygon((0.0, 1.0), (np.pi, 1.0), (1.0, 3.0), (4.0, 3.0))
    both = Polygons.cat([wedge, strip])
    assert len(both) == 2 and both.is_edge.sum(1).tolist() == [2, 4]
    first = both[torch.tensor([0])]
    assert torch.equal(first.interior_points(), wedge.interior_points())
    assert torch.equal(both.interior_points()[1:], strip.interior_points())


def test_three_dimensions_are_not_drawn():
    with pytest.raises(InvalidData, match="one or two dimensions"):
        WholeSpace(3).clip_to_box(-1.0, 1.0)
