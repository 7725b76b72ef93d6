"""Scenes made by hand."""

from __future__ import annotations

from dataclasses import replace

from vlv.toyworld.scene import COLUMNS, Scene, Solid


def make_solid(
    shape: str = "cube",
    colour: str = "red",
    size: str = "large",
    material: str = "matte",
    column: str = "middle",
    row: str = "front",
) -> Solid:
    x, y = (COLUMNS.index(column) - 1) * 2.2, -0.7 if row == "front" else 1.7
    return Solid(shape, colour, size, material, column, row, x, y, yaw=0.3)


def make_scene(*solids: Solid, **facts: str) -> Scene:
    scene = Scene(
        solids=solids or (make_solid(),),
        style="photo",
        ground="grass",
        time="day",
        light="left",
        view="low",
        light_azimuth=1.0,
        camera_height=4.6 if facts.get("view") == "high" else 2.1,
        phase=1.0,
    )
    return replace(scene, **facts)  # type: ignore[arg-type]  # all of these are words
