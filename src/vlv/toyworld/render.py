"""A small analytic ray caster: scene in, anti-aliased 64x64 image out.

Shapes in comments: P the rays or points that a step works on. All lengths are world units; colours
are linear RGB in [0, 1] until the last step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlv.toyworld.scene import HALF_HEIGHT, HALF_WIDTH, Scene, Solid

Array = NDArray[np.float32]

SIZE_PX = 64
CAMERA_Y = -7.4
TARGET = np.array((0.0, 0.9, 1.0), np.float32)
HALF_FIELD = 0.56  # tangent of half the field of view
BOUND = {"sphere": 1.0, "cube": 1.48, "cylinder": 1.21, "cone": 1.45}  # bounding radius / radius

PALETTE = {
    "red": (0.86, 0.09, 0.08),
    "yellow": (0.96, 0.80, 0.06),
    "green": (0.07, 0.52, 0.13),
    "turquoise": (0.10, 0.80, 0.80),
    "blue": (0.08, 0.18, 0.88),
    "purple": (0.56, 0.10, 0.68),
}
GROUND = {"grass": (0.44, 0.62, 0.30), "sand": (0.84, 0.70, 0.46), "snow": (0.90, 0.93, 0.97)}
SKY = {  # horizon, zenith
    "day": ((0.80, 0.90, 0.98), (0.36, 0.62, 0.94)),
    "sunset": ((1.00, 0.72, 0.42), (0.62, 0.36, 0.55)),
    "night": ((0.16, 0.18, 0.34), (0.04, 0.05, 0.14)),
}
LIGHT = {  # ambient, directional, elevation of the light in radians
    "day": ((0.42, 0.44, 0.48), (0.66, 0.64, 0.60), 0.75),
    "sunset": ((0.40, 0.34, 0.36), (0.78, 0.56, 0.38), 0.50),
    "night": ((0.30, 0.32, 0.42), (0.42, 0.46, 0.58), 0.72),
}


@dataclass(frozen=True, slots=True)
class Rendering:
    """An image and where its objects are."""

    image: NDArray[np.uint8]
    """(S, S, 3) RGB."""
    objects: NDArray[np.int8]
    """(S, S) index of the solid seen at each pixel's centre, -1 for none."""


@dataclass(slots=True)
class _Hits:
    """What each ray meets first."""

    depth: Array  # (P,)
    solid: NDArray[np.int8]  # (P,) -1 for the ground, -2 for the sky
    normal: Array  # (P, 3)
    albedo: Array  # (P, 3)
    gloss: Array  # (P,)
    band: Array  # (P,) 1 where a light stripe lies


def render(scene: Scene, size: int = SIZE_PX, supersample: int = 2) -> Rendering:
    """Render a scene; the same scene gives the same bytes, on other processors too.

    Args:
        scene: what to draw.
        size: edge of the image in pixels.
        supersample: rays per pixel along each axis.
    """
    grid = size * supersample
    origin = np.array((0.0, CAMERA_Y, scene.camera_height), np.float32)
    rays = _camera_rays(origin, grid)  # (P, 3)
    hits = _trace(scene, origin, rays, grid)
    points = origin + rays * np.minimum(hits.depth, 1e4)[:, None]
    light = _light_direction(scene)
    lit = _lit(scene, points, hits, light)
    colour = _STYLE[scene.style](scene, rays, hits, lit, light, grid)
    picture = colour.reshape(size, supersample, size, supersample, 3).mean((1, 3))
    owner = hits.solid.reshape(grid, grid)[
        supersample // 2 :: supersample, supersample // 2 :: supersample
    ]
    image = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return Rendering(image, np.maximum(owner, -1))


def _dot(a: Array, b: Array) -> Array:
    """Products (..., 3) @ (3,) or (..., 3) @ (3, 3), summed in one order: BLAS rounds as the processor's kernel happens to."""
    x, y, z = (a[..., axis, *[None] * (b.ndim - 1)] * b[axis] for axis in range(3))
    return np.asarray(x + y + z)


def _angle(side: Array, ahead: Array) -> NDArray[np.float64]:
    """Angle of (P,) directions, radians; in double precision, where no processor's rounding reaches a colour."""
    return np.asarray(np.arctan2(side.astype(np.float64), ahead.astype(np.float64)))


def _camera_axes(origin: Array) -> tuple[Array, Array, Array]:
    forward = TARGET - origin
    forward /= np.sqrt(_dot(forward, forward))
    right = np.array((1.0, 0.0, 0.0), np.float32)
    return right, np.cross(right, forward).astype(np.float32), forward


def _camera_rays(origin: Array, grid: int) -> Array:
    right, up, forward = _camera_axes(origin)
    steps = ((np.arange(grid, dtype=np.float32) + 0.5) / grid * 2 - 1) * HALF_FIELD
    rays = forward + steps[None, :, None] * right - steps[:, None, None] * up  # (G, G, 3)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    return rays.reshape(-1, 3).astype(np.float32)


def project(scene: Scene, points: Array, size: int = SIZE_PX) -> Array:
    """Project world points (P, 3) to pixel coordinates (P, 2), x to the right and y down."""
    origin = np.array((0.0, CAMERA_Y, scene.camera_height), np.float32)
    right, up, forward = _camera_axes(origin)
    offset = points - origin
    depth = _dot(offset, forward)
    plane = np.stack((_dot(offset, right) / depth, -_dot(offset, up) / depth), -1) / HALF_FIELD
    return np.asarray((plane + 1) * size / 2, np.float32)


def image_box(scene: Scene, solid: Solid, size: int = SIZE_PX) -> tuple[int, int, int, int]:
    """Pixel box (left, top, right, bottom) around a solid, clipped to the image."""
    cx, cy, cz = solid.centre
    half = solid.radius * HALF_WIDTH[solid.shape]
    height = solid.radius * HALF_HEIGHT[solid.shape]
    turn = abs(math.sin(solid.yaw)) + abs(math.cos(solid.yaw)) if solid.shape == "cube" else 1.0
    half *= turn
    corners = [
        (cx + i * half, cy + j * half, cz + k * height)
        for i in (-1, 1)
        for j in (-1, 1)
        for k in (-1, 1)
    ]
    pixels = project(scene, np.array(corners, np.float32), size)
    low = np.clip(np.floor(pixels.min(0)), 0, size).astype(int)
    high = np.clip(np.ceil(pixels.max(0)), 0, size).astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _light_direction(scene: Scene) -> Array:
    side = -1.0 if scene.light == "left" else 1.0
    elevation = LIGHT[scene.time][2]
    flat = math.cos(elevation)
    azimuth = scene.light_azimuth
    direction = (side * flat * math.sin(azimuth), -flat * math.cos(azimuth), math.sin(elevation))
    return np.array(direction, np.float32)


def _trace(scene: Scene, origin: Array, rays: Array, grid: int) -> _Hits:
    count = len(rays)
    with np.errstate(divide="ignore"):
        depth = np.where(rays[:, 2] < -1e-4, -origin[2] / rays[:, 2], np.inf).astype(np.float32)
    hits = _Hits(
        depth=depth,
        solid=np.where(np.isinf(depth), -2, -1).astype(np.int8),
        normal=np.tile(np.array((0, 0, 1), np.float32), (count, 1)),
        albedo=np.zeros((count, 3), np.float32),
        gloss=np.zeros(count, np.float32),
        band=np.zeros(count, np.float32),
    )
    for index, solid in enumerate(scene.solids):
        near = _near_rays(origin, rays, solid)  # (P',) ray numbers that may meet the solid
        start, step = _to_local(solid, origin[None], rays[near])
        t = _intersect(solid.shape, start, step)
        closer = t < hits.depth[near]
        chosen, t = near[closer], t[closer]
        local = start + step[closer] * t[:, None]
        hits.depth[chosen] = t
        hits.solid[chosen] = index
        _surface(solid, local, chosen, hits)
    return hits


def _near_rays(origin: Array, rays: Array, solid: Solid) -> NDArray[np.intp]:
    """Rays (P, 3) from `origin` that pass the bounding sphere of a solid."""
    offset = np.array(solid.centre, np.float32) - origin  # (3,) or (P, 3)
    along = (rays * offset).sum(-1)
    distance2 = (offset * offset).sum(-1) - along * along
    return np.flatnonzero(distance2 < (solid.radius * BOUND[solid.shape]) ** 2)


def _to_local(solid: Solid, points: Array, rays: Array) -> tuple[Array, Array]:
    """Into the frame of the unit solid: centred, turned back by yaw, divided by its radius."""
    c, s = math.cos(solid.yaw), math.sin(solid.yaw)
    turn = np.array(((c, -s, 0), (s, c, 0), (0, 0, 1)), np.float32) / solid.radius
    return _dot(points - np.array(solid.centre, np.float32), turn), _dot(rays, turn)


def _quadratic(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """Both roots of a t^2 + 2 b t + c = 0, infinite where there are none."""
    root = b * b - a * c
    missing = root < 0
    root = np.sqrt(np.maximum(root, 0))
    a = np.where(np.abs(a) < 1e-9, 1e-9, a)
    first, second = (-b - root) / a, (-b + root) / a
    first, second = np.minimum(first, second), np.maximum(first, second)
    return np.where(missing, np.inf, first), np.where(missing, np.inf, second)


def _intersect(shape: str, o: Array, d: Array) -> Array:
    """First positive ray parameter (P,) at which o + t d meets the unit solid, else infinity."""
    o, d = np.broadcast_arrays(o, d)
    if shape == "cube":
        return _box(o, d)
    if shape == "sphere":
        first, second = _quadratic((d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1)
        return _first_positive(first, second)
    if shape == "cylinder":
        radius = HALF_WIDTH[shape]
        a = d[:, 0] ** 2 + d[:, 1] ** 2
        b = o[:, 0] * d[:, 0] + o[:, 1] * d[:, 1]
        c = o[:, 0] ** 2 + o[:, 1] ** 2 - radius**2
        return _capped(_quadratic(a, b, c), o, d, HALF_HEIGHT[shape], (radius, radius))
    return _cone(o, d)


def _first_positive(first: Array, second: Array) -> Array:
    return np.where(first > 1e-3, first, np.where(second > 1e-3, second, np.inf)).astype(np.float32)


def _box(o: Array, d: Array) -> Array:
    half = HALF_WIDTH["cube"]
    safe = np.where(np.abs(d) < 1e-9, 1e-9, d)
    low, high = (-half - o) / safe, (half - o) / safe
    near = np.minimum(low, high).max(-1)
    far = np.maximum(low, high).min(-1)
    return np.where((far >= near) & (far > 1e-3), np.where(near > 1e-3, near, far), np.inf).astype(
        np.float32
    )


def _cone(o: Array, d: Array) -> Array:
    half = HALF_HEIGHT["cone"]
    slope = HALF_WIDTH["cone"] / (2 * half)  # radius gained per unit below the apex
    down = half - o[:, 2]
    a = d[:, 0] ** 2 + d[:, 1] ** 2 - (slope * d[:, 2]) ** 2
    b = o[:, 0] * d[:, 0] + o[:, 1] * d[:, 1] + slope**2 * down * d[:, 2]
    c = o[:, 0] ** 2 + o[:, 1] ** 2 - (slope * down) ** 2
    return _capped(_quadratic(a, b, c), o, d, half, (HALF_WIDTH["cone"], 0.0))


def _capped(
    roots: tuple[Array, Array], o: Array, d: Array, half: float, radii: tuple[float, float]
) -> Array:
    """Side hits kept between z = -half and half, and the discs that close bottom and top."""
    best = np.full(len(o), np.inf, np.float32)
    for t in roots:
        z = o[:, 2] + np.where(np.isinf(t), 0, t) * d[:, 2]
        good = (t > 1e-3) & (np.abs(z) <= half) & (t < best)
        best = np.where(good, t, best)
    dz = np.where(np.abs(d[:, 2]) < 1e-9, 1e-9, d[:, 2])
    for end, radius in zip((-half, half), radii, strict=True):
        there = (end - o[:, 2]) / dz
        at = o[:, :2] + d[:, :2] * there[:, None]
        good = (there > 1e-3) & ((at * at).sum(-1) <= radius**2) & (there < best)
        best = np.where(good, there, best)
    return best.astype(np.float32)


def _surface(solid: Solid, local: Array, where: NDArray[np.intp], hits: _Hits) -> None:
    """Fill in normal, colour, stripes and gloss of the hits on one solid."""
    normal = _local_normal(solid.shape, local)
    c, s = math.cos(solid.yaw), math.sin(solid.yaw)
    back = np.array(((c, s, 0), (-s, c, 0), (0, 0, 1)), np.float32)
    hits.normal[where] = _dot(normal, back)
    hits.albedo[where] = PALETTE[solid.colour]
    hits.band[where] = 0.0
    hits.gloss[where] = 0.0
    if solid.material == "striped":
        height = HALF_HEIGHT[solid.shape]
        bands = np.floor((local[:, 2] + height) / (2 * height) * 5 - 1e-4)
        hits.band[where] = (bands % 2 == 1).astype(np.float32)
    if solid.material == "shiny":
        hits.gloss[where] = _gloss(solid, _dot(local, back), _dot(normal, back))


def _local_normal(shape: str, p: Array) -> Array:
    if shape == "sphere":
        return p
    if shape == "cube":
        axis = np.abs(p).argmax(-1)
        normal = np.zeros_like(p)
        rows = np.arange(len(p))
        normal[rows, axis] = np.sign(p[rows, axis])
        return normal
    rise = 0.0 if shape == "cylinder" else HALF_WIDTH["cone"] / (2 * HALF_HEIGHT["cone"])
    radial = np.maximum(np.linalg.norm(p[:, :2], axis=-1, keepdims=True), 1e-6)
    side = np.concatenate((p[:, :2] / radial, np.full((len(p), 1), rise, np.float32)), -1)
    side /= math.hypot(1.0, rise)
    half = HALF_HEIGHT[shape]
    flat = np.abs(p[:, 2:]) > half - 1e-3 if shape == "cylinder" else p[:, 2:] < -half + 1e-3
    return np.where(flat, np.sign(p[:, 2:]) * np.array((0, 0, 1), np.float32), side)


def _gloss(solid: Solid, p: Array, n: Array) -> Array:
    """Highlight (P,) in [0, 1] of shiny solids, always in sight (camera axes).

    A spot on spheres, a streak down the side of cylinders and cones, a diagonal one over cubes.
    """
    if solid.shape == "sphere":
        spot = np.array((-0.35, -0.70, 0.62), np.float32)
        return np.asarray(np.clip((_dot(n, spot) - 0.86) / 0.06, 0, 1))
    if solid.shape == "cube":
        return np.clip((0.20 - np.abs(p[:, 0] + 0.8 * p[:, 2] + 0.15)) / 0.08, 0, 1)
    angle = _angle(n[:, 0], -n[:, 1]) + 0.45
    streak = np.clip((0.30 - np.abs(angle)) / 0.12, 0, 1)
    return np.where(np.abs(n[:, 2]) > 0.9, 0.0, streak)


def _lit(scene: Scene, points: Array, hits: _Hits, light: Array) -> Array:
    """1 where the light reaches a point (P,), 0 in the shadow of a solid."""
    lit = np.ones(len(points), np.float32)
    ground = np.flatnonzero((hits.solid > -2) & (hits.depth < 60))
    start = points[ground] + hits.normal[ground] * 2e-2
    for index, solid in enumerate(scene.solids):
        offset = np.array(solid.centre, np.float32) - start
        along = _dot(offset, light)
        distance2 = (offset * offset).sum(-1) - along * along
        near = (distance2 < (solid.radius * BOUND[solid.shape]) ** 2) & (
            hits.solid[ground] != index
        )
        chosen = np.flatnonzero(near)
        o, d = _to_local(solid, start[chosen], light[None])
        lit[ground[chosen[~np.isinf(_intersect(solid.shape, o, d))]]] = 0.0
    return lit


def _hills(scene: Scene, rays: Array) -> NDArray[np.bool_]:
    """Sky rays (P, 3) that meet the far hills."""
    angle = _angle(rays[:, 0], rays[:, 1])
    height = (
        0.035 + 0.030 * np.sin(5.0 * angle + scene.phase) + 0.012 * np.sin(11 * angle - scene.phase)
    )
    return rays[:, 2] < height


def _background(scene: Scene, rays: Array, hits: _Hits, *, flat: bool) -> Array:
    """Unshaded colour (P, 3) of sky, hills and ground."""
    horizon, zenith = (np.array(c, np.float32) for c in SKY[scene.time])
    rise = np.clip(rays[:, 2:] / 0.45, 0, 1)
    sky = (0.35 * horizon + 0.65 * zenith)[None] if flat else horizon + (zenith - horizon) * rise
    base = np.array(GROUND[scene.ground], np.float32)
    ambient, directional, _ = (np.array(c, np.float32) for c in LIGHT[scene.time])
    shaded = base * (ambient + directional * (0.7 if flat else 0.78))
    hills = shaded * 0.72 + horizon * 0.16
    far = np.clip(hits.depth[:, None] / 60, 0, 1) if not flat else np.float32(0)
    ground = shaded + (horizon * 0.9 - shaded) * far * 0.6
    colour = np.where((hits.solid == -2)[:, None], np.broadcast_to(sky, rays.shape), ground)
    return np.where(((hits.solid == -2) & _hills(scene, rays))[:, None], hills, colour)


def _photo(scene: Scene, rays: Array, hits: _Hits, lit: Array, light: Array, grid: int) -> Array:
    del grid
    ambient, directional, _ = (np.array(c, np.float32) for c in LIGHT[scene.time])
    lambert = np.clip(_dot(hits.normal, light), 0, 1) * lit
    base = np.where(hits.band[:, None] > 0, np.float32(0.95), hits.albedo)
    solid = base * (ambient + directional * (0.15 + 0.95 * lambert[:, None]))
    solid = solid + (0.98 - solid) * (0.85 * hits.gloss[:, None])
    colour = _background(scene, rays, hits, flat=False)
    dark = np.where(hits.solid == -1, 0.52 + 0.48 * lit, 1.0)[:, None]
    return np.where((hits.solid >= 0)[:, None], solid, colour * dark)


def _cartoon(scene: Scene, rays: Array, hits: _Hits, lit: Array, light: Array, grid: int) -> Array:
    ambient, directional, _ = (np.array(c, np.float32) for c in LIGHT[scene.time])
    step = (_dot(hits.normal, light) * lit > 0.25).astype(np.float32)[:, None]
    base = np.where(hits.band[:, None] > 0, np.float32(0.98), hits.albedo * 1.1)
    solid = base * (ambient + directional * (0.35 + 0.65 * step))
    solid = np.where(hits.gloss[:, None] > 0.5, np.float32(0.98), solid)
    colour = _background(scene, rays, hits, flat=True)
    dark = np.where(hits.solid == -1, 0.6 + 0.4 * lit, 1.0)[:, None]
    colour = np.where((hits.solid >= 0)[:, None], solid, colour * dark)
    return colour * (1 - 0.9 * _outline(hits, grid))[:, None]


def _sketch(scene: Scene, rays: Array, hits: _Hits, lit: Array, light: Array, grid: int) -> Array:
    del scene, rays
    tone = 0.50 + 0.38 * np.clip(_dot(hits.normal, light), 0, 1) * lit
    tone = np.where(hits.band > 0, 0.97, tone)
    tone = tone + (0.98 - tone) * hits.gloss
    paper = np.where(hits.solid == -1, 0.66 + 0.30 * lit, 0.96)
    grey = np.where(hits.solid >= 0, tone, paper) * (1 - 0.82 * _outline(hits, grid))
    return np.asarray(grey[:, None] * np.array((1.0, 0.99, 0.96), np.float32))


def _sepia(scene: Scene, rays: Array, hits: _Hits, lit: Array, light: Array, grid: int) -> Array:
    colour = _photo(scene, rays, hits, lit, light, grid)
    grey = _dot(colour, np.array((0.35, 0.50, 0.15), np.float32))
    steps = np.linspace(-1, 1, grid, dtype=np.float32)
    vignette = 1 - 0.30 * np.clip(steps[None] ** 2 + steps[:, None] ** 2 - 0.5, 0, 1)
    tone = (0.10 + 0.86 * grey) * vignette.reshape(-1)
    return np.asarray(tone[:, None] * np.array((1.0, 0.82, 0.58), np.float32))


def _outline(hits: _Hits, grid: int) -> Array:
    """1 on the silhouettes and sharp edges of solids and on the horizon (P,), about 1.5 px wide."""
    owner = hits.solid.reshape(grid, grid).astype(np.int16)
    normal = hits.normal.reshape(grid, grid, 3)
    edge = np.zeros((grid, grid), bool)
    for shift in ((0, 1), (1, 0)):
        a = slice(None, -1 if shift[0] else None), slice(None, -1 if shift[1] else None)
        b = slice(shift[0], None), slice(shift[1], None)
        crease = (normal[a] * normal[b]).sum(-1) < 0.6
        differs = (owner[a] != owner[b]) | (crease & (owner[a] >= 0))
        edge[a] |= differs
        edge[b] |= differs
    return edge.reshape(-1).astype(np.float32)


_STYLE = {"photo": _photo, "cartoon": _cartoon, "sketch": _sketch, "sepia": _sepia}
