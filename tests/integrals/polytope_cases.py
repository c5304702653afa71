# Copyright the pyro_cpa developers
# SPDX-License-Identifier: Apache-2.0
"""Polytopes for tests, made from half-spaces alone, and Gaussian integrals over them by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from pyro_cpa.partition.cells import Polytopes
from pyro_cpa.partition.walls import NOISE, Walls

__all__ = [
    "affine_image",
    "brute_force",
    "box",
    "cone",
    "equicorrelated",
    "polytopes",
    "prism",
    "random_polytopes",
    "rotation",
]

INF = math.inf


def polytopes(cells):
    """Polytopes from lists of half-spaces [(normal, offset), ...], none of them redundant."""
    dim = len(cells[0][0][0])
    parts = []
    for half_spaces in cells:
        cell = Polytopes.whole_space(dim, torch.zeros(0, dtype=torch.float64))
        for normal, offset in half_spaces:
            normal = torch.as_tensor(normal, dtype=torch.float64)
            size = normal.norm()
            noise = torch.full((2, 1), NOISE, dtype=torch.float64)
            wall = Walls(torch.zeros(1).long(), normal[None] / size, (offset / size)[None], *noise)
            cell, _ = cell.halves(wall)
        parts.append(cell)
    return Polytopes.cat(parts)


def box(*sides):
    """Half-spaces of a product of intervals [low, high], of which infinite ends are left out."""
    eye = np.eye(len(sides))
    cell = []
    for axis, (low, high) in zip(eye, sides, strict=True):
        cell += [(-axis, -low)] * int(low > -INF) + [(axis, high)] * int(high < INF)
    return cell


def rotation(seed, dim=3):
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))
    return matrix


def affine_image(cell, matrix, shift):
    """The image of a cell under z -> matrix z + shift."""
    inverse = np.linalg.inv(matrix)
    turned = [(inverse.T @ n, c) for n, c in cell]
    return [(n, c + n @ np.asarray(shift)) for n, c in turned]


def cone(facets, slope, twist=0.3):
    """A pyramid without end, its tip at the origin, around the first axis: radius about slope times height."""
    angles = twist + 2 * math.pi * np.arange(facets) / facets
    return [(np.array([-slope, math.cos(a), math.sin(a)]), 0.0) for a in angles]


def prism(corners, radius, low, high):
    """A regular polygon across the second and third axis, from low to high along the first."""
    angles = 0.1 + 2 * math.pi * np.arange(corners) / corners
    sides = [(np.array([0.0, math.cos(a), math.sin(a)]), radius) for a in angles]
    return sides + box((low, high), (-INF, INF), (-INF, INF))


def random_polytopes(count, seed):
    """Bounded cells with 4 to 9 facets: sizes 1e-3 to 1, aspect ratios to 1e-4, distances to 30."""
    rng = np.random.default_rng(seed)
    while count:
        normals = rng.normal(size=(rng.integers(4, 10), 3))
        normals /= np.linalg.norm(normals, axis=1)[:, None]
        if _unbounded(normals):
            continue
        size, aspect = 10 ** rng.uniform(-3, 0), 10 ** rng.choice([0.0, rng.uniform(-4, 0)])
        stretch = size * np.diag(rng.permutation([1.0, 1.0, aspect]))
        shift = rng.normal(size=3) * 10 ** rng.uniform(-1, 1.2)
        cell = _irredundant(affine_image([(n, 1.0) for n in normals], stretch @ rotation(count), shift))
        factor = (
            np.eye(3) if count % 3 else np.linalg.cholesky(np.cov(rng.normal(size=(3, 8))) + 0.05 * np.eye(3))
        )
        yield cell, rng.normal(size=3), factor
        count -= 1


def corners_of(cell):
    """Triples (V, 3) of facets that meet in a vertex, and the vertices (V, 3); one of many facets comes often."""
    normals, offsets = np.array([n for n, _ in cell]), np.array([c for _, c in cell])
    scale = np.linalg.norm(normals, axis=1)
    normals, offsets = normals / scale[:, None], offsets / scale
    triples, corners = [], []
    for triple in itertools.combinations(range(len(cell)), 3):
        matrix = normals[list(triple)]
        if abs(np.linalg.det(matrix)) < 1e-12:
            continue
        corner = np.linalg.solve(matrix, offsets[list(triple)])
        others = np.delete(normals @ corner - offsets, triple)
        if (others <= 1e-13 * (1 + np.abs(corner).max())).all():
            triples.append(triple)
            corners.append(corner)
    return np.array(triples), np.array(corners)


def _unbounded(normals):
    """Whether there is a direction in which every normal falls: one among the cross products of two."""
    for a, b in itertools.combinations(normals, 2):
        for direction in (np.cross(a, b), np.cross(b, a)):
            if (normals @ direction <= 1e-3).all():
                return True
    return False


def _irredundant(cell):
    """Half-spaces that vertices lie on."""
    triples, _ = corners_of(cell)
    return [half_space for k, half_space in enumerate(cell) if k in triples]


def brute_force(cell, loc, factor, nodes=32):
    """Log-mass, mean and covariance of N(loc, factor factor') on a bounded cell of R^3.

    The whitened cell is cut into tetrahedra, on each of which Gauss-Legendre points of a cube are used.
    """
    white = [(factor.T @ n, c - n @ loc) for n, c in cell]
    triples, corners = corners_of(white)
    middle = corners.mean(0)
    tetrahedra = []
    for facet, (normal, _) in enumerate(white):
        on = corners[(triples == facet).any(1)]
        if len(on) < 3:
            continue
        center = on.mean(0)
        u = on[np.linalg.norm(on - center, axis=1).argmax()] - center
        v = np.cross(normal, u)
        order = np.argsort(
            np.arctan2((on - center) @ v / np.linalg.norm(v), (on - center) @ u / np.linalg.norm(u))
        )
        on = on[order]
        for a, b in zip(on, np.roll(on, -1, axis=0), strict=True):
            tetrahedra.append(np.stack([middle, center, a, b]))
    tetrahedra = np.array(tetrahedra)
    x, w = np.polynomial.legendre.leggauss(nodes)
    x, w = 0.5 * (x + 1), 0.5 * w
    a, b, c = np.meshgrid(x, x, x, indexing="ij")
    weight = np.einsum("i,j,k->ijk", w, w, w) * a**2 * b
    share = np.stack([1 - a, a * (1 - b), a * b * (1 - c), a * b * c], -1).reshape(-1, 4)
    edges = tetrahedra[:, 1:] - tetrahedra[:, :1]
    volume = np.abs(np.linalg.det(edges))
    # Relative to the point of highest density among the nodes, and moments relative to that point.
    points = share @ tetrahedra
    log_density = -0.5 * (points**2).sum(-1)
    top = np.unravel_index(log_density.argmax(), log_density.shape)
    density = np.exp(log_density - log_density[top]) * weight.reshape(-1) * volume[:, None]
    offset = points - points[top]
    mass = density.sum()
    mean = np.einsum("tp,tpi->i", density, offset) / mass
    second = np.einsum("tp,tpi,tpj->ij", density, offset, offset) / mass
    log_mass = math.log(mass) + log_density[top] - 1.5 * math.log(2 * math.pi)
    covariance = factor @ (second - np.outer(mean, mean)) @ factor.T
    return log_mass, loc + factor @ (points[top] + mean), covariance


def equicorrelated(dim, shift):
    """Log of P(y > shift in all coordinates) for N(0, (1 + 11')/2), as an integral over what they have in common."""
    # Entire and fading at both ends: a sum over an even grid is exact to rounding.
    t = torch.linspace(-60.0, 60.0, 6001)
    common = -0.5 * t**2 - 0.5 * math.log(2 * math.pi)
    tails = dim * torch.special.log_ndtr(t - shift * math.sqrt(2))
    return (common + tails).logsumexp(0).item() + math.log(0.02)
