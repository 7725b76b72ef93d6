"""``vlv data``: collections of images into training data."""

from __future__ import annotations

import typer

from vlv.cli import data_caches, data_caption, data_look, data_shards

app = typer.Typer(
    name="data",
    help="Turn collections of images into clean, captioned, checked training data.",
    no_args_is_help=True,
)
app.command("filter")(data_shards.filter_images)
app.command("caption")(data_caption.caption)
app.command("pack")(data_shards.pack)
app.command("split")(data_shards.split)
app.command()(data_look.check)
app.command()(data_look.stats)
app.command("cache-latents")(data_caches.cache_latents)
app.command("cache-features")(data_caches.cache_features)
