"""Shapes on a floor, a camera, and where rays meet what: NumPy, fp32, vectors as rows [3, n].

Every shape is convex, so a ray meets it in one interval [near, far], which serves the picture, the shadows and the
mirror images in metal alike. No BLAS is called, so the number of threads cannot change a bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SPHERE, CUBE, CYLINDER = 2, 1, 3
"""Codes of the shapes in the published factors."""
FOCAL, CENTRE, FRAME = 350.0, (160.0, 120.0), (64.0, 29.0, 192.0)
"""In pixels of a 320 x 240 picture: focal length (35 mm on a film of 32 mm), centre (x, y), and the square of the
common crop (left, top, side), which is all that is rendered."""
BEVEL = 0.12
"""Share of a cube's or cylinder's half-height that its rounded edges take."""


@dataclass(frozen=True)
class Objects:
    """Objects of one scene, an entry each; units are those of the scene, whose objects lie within 3 of the origin."""

    shape: np.ndarray  # int [n]: SPHERE, CUBE or CYLINDER
    x: np.ndarray  # [n] place of the centre on the floor
    y: np.ndarray
    half: np.ndarray  # [n] radius of a sphere, half the height of the others; objects stand on the floor
    angle: np.ndarray  # [n] radians about the vertical
    albedo: np.ndarray  # [n, 3] share of light reflected, linear RGB
    metal: np.ndarray  # bool [n]

    def __len__(self) -> int:
        return len(self.shape)

    def bound(self, i: int) -> float:
        """Radius of a sphere around object i's centre that holds it."""
        return float(self.half[i]) * {SPHERE: 1.0, CUBE: 3**0.5, CYLINDER: 2**0.5}[int(self.shape[i])]

    def centre(self, i: int) -> np.ndarray:
        return np.array([self.x[i], self.y[i], self.half[i]], np.float32)


@dataclass(frozen=True)
class View:
    """Where the picture is taken from, and its lamps."""

    eye: np.ndarray  # [3]; the camera looks at the origin
    lamps: np.ndarray  # [3 lamps, 3]

    def rays(self, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Directions of unit length [3, n] through points of a picture whose corners are (0, 0) and (1, 1)."""
        left, top, side = FRAME
        right, up, forward = self._axes()
        u = ((left + side * columns - CENTRE[0]) / FOCAL).astype(np.float32)
        v = ((CENTRE[1] - top - side * rows) / FOCAL).astype(np.float32)
        return unit(forward[:, None] + right[:, None] * u + up[:, None] * v)

    def window(self, centre: np.ndarray, radius: float, size: int) -> tuple[slice, slice]:
        """Rows and columns of a picture of ``size`` that hold the image of a sphere."""
        right, up, forward = self._axes()
        offset = centre - self.eye
        depth = float(offset @ forward)
        left, top, side = FRAME
        u = CENTRE[0] + FOCAL * float(offset @ right) / depth
        v = CENTRE[1] - FOCAL * float(offset @ up) / depth
        reach = 1.1 * FOCAL * radius / max(depth - radius, 0.1)
        low = [int(np.floor(((at - reach) - edge) / side * size)) for at, edge in ((v, top), (u, left))]
        high = [int(np.ceil(((at + reach) - edge) / side * size)) for at, edge in ((v, top), (u, left))]
        rows, columns = (slice(max(a, 0), max(min(b, size), 0)) for a, b in zip(low, high, strict=True))
        return rows, columns

    def _axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        forward = -self.eye / np.sqrt(np.sum(self.eye**2))
        right = np.array([forward[1], -forward[0], 0], np.float32)
        right /= np.sqrt(np.sum(right**2))
        return right, np.cross(right, forward).astype(np.float32), forward.astype(np.float32)


def first_hits(objects: Objects, view: View, directions: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance to what each pixel sees, and its label; an object is looked for where its bounding sphere is seen."""
    distance = (-view.eye[2] / directions[2]).astype(np.float32).reshape(size, size)
    owner = np.zeros((size, size), np.uint8)
    for i in range(len(objects)):
        window = view.window(objects.centre(i), objects.bound(i), size)
        rays = directions.reshape(3, size, size)[(slice(None), *window)]
        near, far = interval(objects, i, view.eye[:, None], rays.reshape(3, -1))
        near, far = (t.reshape(rays.shape[1:]) for t in (near, far))
        closer = (near < far) & (near < distance[window])
        distance[window] = np.where(closer, near, distance[window])
        owner[window] = np.where(closer, i + 1, owner[window])
    return distance.ravel(), owner.ravel()


def hits(objects: Objects, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance along rays from ``origin`` ([3] or [3, n]) to what they meet first, and its label; inf: the sky."""
    start = origin.reshape(3, -1)
    down = directions[2] < -1e-6
    distance = np.where(down, -start[2] / np.where(down, directions[2], -1), np.inf).astype(np.float32)
    owner = np.zeros(directions.shape[1], np.uint8)
    for i in range(len(objects)):
        near, far = interval(objects, i, start, directions)
        closer = (near < far) & (near > 1e-3) & (near < distance)
        distance = np.where(closer, near, distance)
        owner = np.where(closer, np.uint8(i + 1), owner)
    return distance, owner


def interval(objects: Objects, i: int, start: np.ndarray, along: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[near, far] of the stretch of each ray inside object i, in units of ``along``; near >= far: none."""
    half = np.float32(objects.half[i])
    from_centre = start - objects.centre(i).reshape(3, *[1] * (start.ndim - 1))
    if objects.shape[i] == SPHERE:
        return _quadratic(dot(along, along), dot(from_centre, along), dot(from_centre, from_centre) - half * half)
    (x, y, z), (dx, dy, dz) = _turned(objects, i, from_centre), _turned(objects, i, along)
    near, far = _slab(z, dz, half)
    if objects.shape[i] == CYLINDER:
        side = _quadratic(dx * dx + dy * dy, x * dx + y * dy, x * x + y * y - half * half)
        return np.maximum(near, side[0]), np.minimum(far, side[1])
    for at, step in ((x, dx), (y, dy)):
        enter, leave = _slab(at, step, half)
        near, far = np.maximum(near, enter), np.minimum(far, leave)
    return near, far


def _quadratic(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Roots of a t² + 2 b t + c; near > far where there are none."""
    inside = b * b - a * c
    root = np.sqrt(np.maximum(inside, 0))
    a = np.maximum(a, 1e-12)
    return np.where(inside > 0, (-b - root) / a, np.inf), np.where(inside > 0, (-b + root) / a, -np.inf)


def _slab(at: np.ndarray, step: np.ndarray, half: np.float32) -> tuple[np.ndarray, np.ndarray]:
    step = np.where(np.abs(step) < 1e-9, np.float32(1e-9), step)
    first, second = (-half - at) / step, (half - at) / step
    return np.minimum(first, second), np.maximum(first, second)


def _turned(
    objects: Objects, i: int, vectors: np.ndarray, back: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors in the axes of object i, or from them ``back`` into the scene's."""
    cos, sin = np.float32(np.cos(objects.angle[i])), np.float32(np.sin(objects.angle[i]))
    sin = -sin if back else sin
    x, y, z = vectors
    return cos * x + sin * y, cos * y - sin * x, z


def normals_at(objects: Objects, points: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Unit normals [3, n]; those of cubes and cylinders turn over their rounded edges."""
    normals = np.zeros_like(points)
    normals[2] = 1
    for i in range(len(objects)):
        at = np.flatnonzero(owner == i + 1)
        if not len(at):
            continue
        local = points[:, at] - objects.centre(i)[:, None]
        if objects.shape[i] != SPHERE:
            local = np.stack(_turned(objects, i, local))
            flat = (1 - BEVEL) * np.float32(objects.half[i])
            if objects.shape[i] == CUBE:
                local = np.sign(local) * np.maximum(np.abs(local) - flat, 0)
            else:
                radial = np.sqrt(local[0] ** 2 + local[1] ** 2) + 1e-9
                part = np.maximum(radial - flat, 0) / radial
                upright = np.sign(local[2]) * np.maximum(np.abs(local[2]) - flat, 0)
                local = np.stack([local[0] * part, local[1] * part, upright])
            local = np.stack(_turned(objects, i, local, back=True))
        normals[:, at] = unit(local)
    return normals


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    product: np.ndarray = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return product


def unit(vectors: np.ndarray) -> np.ndarray:
    normed: np.ndarray = vectors / np.sqrt(np.maximum(dot(vectors, vectors), 1e-20))
    return normed
