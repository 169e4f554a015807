"""A small ray tracer of spheres, cubes and cylinders on a floor, under lamps with soft shadows; NumPy, fp32.

It renders pictures in the manner of CLEVR (Johnson et al., CVPR 2017): the same camera, sizes and colours, with shading
of its own. A lamp is a disc: the share of ``LAMP_SAMPLES`` rays that reach it is a point's light. Pixels at the borders
of objects take the mean of 2 x 2 rays, and their label is the owner of most of them.
"""

from __future__ import annotations

import numpy as np

from fastslots.data.builtin.geometry import Objects, View, dot, first_hits, hits, interval, normals_at, unit

FLOOR_ALBEDO = np.float32(0.55)
LAMP_POSITIONS = np.array([[6.4, -2.9, 4.3], [-4.7, -4.0, 3.0], [-1.2, 2.6, 5.8]], np.float32)  # key, fill, back
LAMP_POWERS = np.array([10.5, 1.7, 4.0], np.float32)
LAMP_RADIUS = np.float32(0.75)
AMBIENT = np.float32(0.26)
ROUGH = np.float32(0.6)
"""Power of the cosine at objects' surfaces: rough ones look flatter than Lambert's law (Oren and Nayar 1994)."""
LAMP_SAMPLES = 12
_GOLDEN_ANGLE = np.pi * (3 - np.sqrt(5))
_TURNS = _GOLDEN_ANGLE * np.arange(LAMP_SAMPLES)
_SUNFLOWER = np.sqrt((np.arange(LAMP_SAMPLES) + 0.5) / LAMP_SAMPLES)[:, None] * np.stack(
    [np.cos(_TURNS), np.sin(_TURNS)], 1
)
"""[LAMP_SAMPLES, 2] points spread evenly over the unit disc (Vogel's spiral)."""


def render(objects: Objects, view: View, size: int) -> tuple[np.ndarray, np.ndarray]:
    """-> image uint8 [size, size, 3] (sRGB) and mask uint8 [size, size]: 0 the floor, i + 1 object i."""
    grid = (np.arange(size) + 0.5) / size
    directions = view.rays(np.tile(grid, size), np.repeat(grid, size))
    distance, owner = first_hits(objects, view, directions, size)
    colour = _shade(objects, view, directions, distance, owner)
    mask = owner.reshape(size, size)
    border = np.flatnonzero(_borders(mask))
    rows, columns = border // size, border % size
    quarters = np.array([0.25, 0.75])
    x, y = (columns + np.tile(quarters, 2)[:, None]) / size, (rows + np.repeat(quarters, 2)[:, None]) / size
    rays = view.rays(x.ravel(), y.ravel())
    near, labels = hits(objects, view.eye, rays)
    colour[:, border] = _shade(objects, view, rays, near, labels).reshape(3, 4, -1).mean(1)
    votes = np.stack([(labels.reshape(4, -1) == i).sum(0, dtype=np.uint8) for i in range(len(objects) + 1)])
    owner[border] = votes.argmax(0)
    return _to_srgb(colour).T.reshape(size, size, 3), mask


def _shade(objects: Objects, view: View, directions: np.ndarray, distance: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Linear RGB [3, n] of what rays from the eye meet; metal shows what its mirrored rays meet."""
    points = view.eye[:, None] + directions * distance
    normals = normals_at(objects, points, owner)
    colour = _surface(objects, view, points, normals, directions, owner, shadows=True)
    shiny = np.flatnonzero(np.concatenate([[False], objects.metal])[owner])
    if len(shiny):
        n, d = normals[:, shiny], directions[:, shiny]
        mirrored = d - 2 * dot(d, n) * n
        start = points[:, shiny] + 1e-3 * n
        far, seen = hits(objects, start, mirrored)
        sky = np.isinf(far)
        ends = start + mirrored * np.where(sky, 1, far)
        image = _surface(objects, view, ends, normals_at(objects, ends, seen), mirrored, seen, shadows=False)
        image = np.where(sky, 0.10 + 0.25 * np.maximum(mirrored[2], 0) ** 2, image)
        tint = objects.albedo[owner[shiny] - 1].T
        facing = 1 - np.abs(dot(d, n))
        image = 0.9 * image + _highlights(view, start, n, d, exponent=120.0, strength=0.12)
        colour[:, shiny] = 0.1 * colour[:, shiny] + (tint + (1 - tint) * 0.3 * facing**5) * image  # Schlick 1994
    return colour


def _surface(
    objects: Objects,
    view: View,
    points: np.ndarray,
    normals: np.ndarray,
    directions: np.ndarray,
    owner: np.ndarray,
    shadows: bool,
) -> np.ndarray:
    """Light that leaves points by diffuse reflection, and rubber's dull gloss."""
    albedo = np.concatenate([np.full((1, 3), FLOOR_ALBEDO), objects.albedo]).astype(np.float32)[owner].T
    light = AMBIENT * (0.55 + 0.45 * normals[2]) * _openness(objects, points, normals, owner)
    for lamp, power in zip(view.lamps, LAMP_POWERS, strict=True):
        to_lamp = lamp[:, None] - points
        squared = dot(to_lamp, to_lamp)
        # A lamp is a disc that faces the origin: one cosine at each end, and the inverse square.
        ahead = np.maximum(dot(to_lamp, np.broadcast_to(lamp[:, None], to_lamp.shape)), 0) / np.sqrt(np.sum(lamp**2))
        cosine = np.maximum(dot(normals, to_lamp), 0) / np.sqrt(squared)
        cosine = np.where(owner > 0, cosine**ROUGH, cosine)
        facing = cosine * ahead / (squared * np.sqrt(squared))
        part = power * facing
        if shadows:
            lit = np.flatnonzero(facing > 0)
            part[lit] *= _reached(objects, points[:, lit] + 2e-3 * normals[:, lit], lamp)
        light = light + part
    colour: np.ndarray = albedo * light
    rubber = np.flatnonzero((owner > 0) & ~np.concatenate([[True], objects.metal])[owner])
    if shadows and len(rubber):
        p, n, d = (part[:, rubber] for part in (points, normals, directions))
        colour[:, rubber] += _highlights(view, p, n, d, exponent=12.0, strength=0.006)
    return colour


def _reached(objects: Objects, points: np.ndarray, lamp: np.ndarray) -> np.ndarray:
    """The share [n] of a lamp's disc that each point sees."""
    across = unit(np.cross(lamp, [0, 0, 1]).astype(np.float32)[:, None])[:, 0]
    other = unit(np.cross(lamp, across).astype(np.float32)[:, None])[:, 0]
    spots = lamp + LAMP_RADIUS * (_SUNFLOWER[:, :1] * across + _SUNFLOWER[:, 1:] * other)  # [LAMP_SAMPLES, 3]
    spots = spots.T[:, :, None].astype(np.float32)
    blocked = np.zeros((LAMP_SAMPLES, points.shape[1]), bool)
    to_lamp = lamp[:, None] - points
    squared = dot(to_lamp, to_lamp)
    for i in range(len(objects)):
        to_centre = objects.centre(i)[:, None] - points
        along = np.clip(dot(to_centre, to_lamp) / squared, 0, 1)
        # The rays from a point to the disc may meet the object only where their axis passes this near its centre.
        reach = objects.bound(i) + LAMP_RADIUS * along
        away = to_centre - along * to_lamp
        near = np.flatnonzero(dot(away, away) < reach * reach)
        if not len(near):
            continue
        starts = points[:, None, near]
        enter, leave = interval(objects, i, starts, spots - starts)
        blocked[:, near] |= (enter < leave) & (leave > 1e-3) & (enter < 1)
    reached: np.ndarray = 1 - blocked.mean(0, dtype=np.float32)
    return reached


def _openness(objects: Objects, points: np.ndarray, normals: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The share [n] of the sky that a point sees past other objects, each taken for a sphere: 1 - Σ cos·(r/d)²."""
    hidden = np.zeros(points.shape[1], np.float32)
    for i in range(len(objects)):
        offset = objects.centre(i)[:, None] - points
        squared = dot(offset, offset)
        near = np.flatnonzero((squared < (6 * objects.half[i]) ** 2) & (owner != i + 1))
        if len(near):
            d2 = np.maximum(squared[near], objects.half[i] ** 2)
            facing = np.maximum(dot(offset[:, near], normals[:, near]), 0) / np.sqrt(d2)
            hidden[near] += facing * objects.half[i] ** 2 / d2
    return 1 - np.minimum(hidden, 0.9)


def _highlights(
    view: View, points: np.ndarray, normals: np.ndarray, directions: np.ndarray, exponent: float, strength: float
) -> np.ndarray:
    """Images of the lamps in a glossy surface [n] (Blinn 1977)."""
    total = np.zeros(points.shape[1], np.float32)
    for lamp, power in zip(view.lamps, LAMP_POWERS, strict=True):
        halfway = unit(unit(lamp[:, None] - points) - directions)
        total += power * np.maximum(dot(halfway, normals), 0) ** exponent
    return strength * total


def _borders(mask: np.ndarray) -> np.ndarray:
    """bool: pixels beside one of another label."""
    differs = np.zeros(mask.shape, bool)
    vertical, horizontal = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
    differs[1:] |= vertical
    differs[:-1] |= vertical
    differs[:, 1:] |= horizontal
    differs[:, :-1] |= horizontal
    return differs


def _to_srgb(linear: np.ndarray) -> np.ndarray:
    """uint8 of linear light, by the sRGB standard's curve taken as a power of 1/2.2."""
    curved: np.ndarray = np.clip(linear, 0, 1) ** np.float32(1 / 2.2)
    return (curved * 255 + 0.5).astype(np.uint8)
