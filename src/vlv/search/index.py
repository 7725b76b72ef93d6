"""An index of images on disk, to be searched by text, by image or by caption embedding."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from vlv.data.source import Source
from vlv.errors import ConfigError
from vlv.models.arguments import as_embeddings, whole_number
from vlv.models.search_net import Embedded
from vlv.search.build import IndexJob, ModelName, check_model
from vlv.search.space import max_sim, read_texts
from vlv.search.store import Store
from vlv.storage import Json

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vlv.models.arguments import Embeddings
    from vlv.models.pipeline import VLVPipeline
    from vlv.models.pixels import OneImage
    from vlv.models.search_space import Space
    from vlv.search.store import Keys

MOST_HITS = 1000
CANDIDATES = 300
"""Images that the first stage hands on to late interaction."""


@dataclass(frozen=True)
class Hit:
    """One image that was found."""

    rank: int
    """From 1."""
    score: float
    """Weighted mean cosine of late interaction, from -1 to 1; comparable within one query."""
    id: str
    file_name: str
    sha256: str | None
    """Of the image file."""
    key: int
    """Number of the image in the index."""

    def to_dict(self) -> Json:
        """As a row of a table."""
        row = asdict(self)
        del row["key"]
        return row | {"score": round(self.score, 6)}


Query = Embedded
"""What is searched for, in the search space: tokens (T, d), weights (T,) and pooled vector (d,)."""


class Index:
    """An index and the model that it was built with.

    Shapes: Q queries, D text width, d width of the search space, L tokens of an image.

    Args:
        folder: What `vlv index build` or `build` wrote.
        pipe: The model.

    Raises:
        DataError: The folder is no index, is not finished or damaged, or was built with another model.
        ConfigError: The package usearch is missing.
    """

    def __init__(self, folder: str | os.PathLike[str], pipe: VLVPipeline) -> None:
        self.store, self.pipe = Store(Path(folder)), pipe
        check_model(self.store.folder, self.store.about, pipe)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], pipe: VLVPipeline) -> Self:
        """Open an index; see the class."""
        return cls(folder, pipe)

    @classmethod
    def build(
        cls,
        inputs: Sequence[str | os.PathLike[str]],
        folder: str | os.PathLike[str],
        pipe: VLVPipeline,
        *,
        space: Space | None = None,
        batch_size: int = 32,
    ) -> Self:
        """Build an index, or add to one what is new, and open it.

        Args:
            inputs: Image files, folders, tar shards, tables, or embeddings of `vlv embed`.
            folder: The index.
            pipe: The model.
            space: A fitted search space; None takes that of the index or of the model.
            batch_size: Images embedded together.

        Raises:
            DataError: An input cannot be read, none is an image, or the index is one of another model.
            OutputError: The folder cannot be written, or holds something else.
        """
        name = ModelName(str(pipe.config.get("_name_or_path")))
        job = IndexJob(Source(inputs).records(), name, Path(folder), space)
        job.run(lambda: pipe, batch_size=batch_size)
        return cls(folder, pipe)

    def __len__(self) -> int:
        return len(self.store)

    @property
    def space(self) -> Space:
        """Where queries and images are compared."""
        return self.store.space

    # --- queries ---------------------------------------------------------------------------------

    def search(
        self,
        text: str | None = None,
        *,
        image: OneImage | None = None,
        z: Embeddings | None = None,
        k: int = 10,
        candidates: int = CANDIDATES,
    ) -> list[Hit]:
        """Find the images that are nearest to a text, an image or a caption embedding.

        Args:
            text: In words.
            image: Or a PIL image, a path, an array (H, W, 3) or a tensor (3, H, W).
            z: Or a caption embedding (Q, D).
            k: How many hits; fewer where the index holds fewer images.
            candidates: How many images of the first stage are compared token by token.

        Returns:
            The hits, best first.

        Raises:
            ConfigError: Not exactly one query is given, or it is empty or of another shape.
        """
        if sum(x is not None for x in (text, image, z)) != 1:
            raise ConfigError("give one query: a text, an image or a caption embedding z=")
        if text is not None:
            (query,) = self.text_queries([text])
        elif image is not None:
            (query,) = self.image_queries(self.pipe.embed([image]))
        else:
            given = as_embeddings(z if z is not None else [])
            if given.ndim != 2:
                raise ConfigError(
                    f"z= is one caption embedding (Q, D) here, got the shape {tuple(given.shape)}"
                )
            (query,) = self.image_queries(given[None])
        return self.rank(query, k, candidates)

    def text_queries(self, texts: Sequence[str]) -> list[Query]:
        """Queries of texts.

        Raises:
            ConfigError: A text is empty.
        """
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise ConfigError("the query is empty; describe in words what to find")
        return [self.space.text(c) for c in read_texts(self.pipe, texts)]

    def image_queries(self, z: Embeddings) -> list[Query]:
        """Queries of caption embeddings (B, Q, D)."""
        found = self.space.image_queries(self.pipe.context(z).sequence)
        return [Query(*one) for one in zip(*found, strict=True)]

    def rank(self, query: Query, k: int = 10, candidates: int = CANDIDATES) -> list[Hit]:
        """The images nearest to a query, best first."""
        whole_number("k", k, 1, MOST_HITS)
        whole_number("candidates", candidates, 1)
        keys = np.sort(self._nearest(query, max(k, candidates))[0])
        scores = max_sim(query, self.store.tokens(keys)).numpy()
        best = np.argsort(-scores, kind="stable")[:k]
        return self._hits(keys[best], scores[best])

    def first_stage(self, query: Query, k: int = 10) -> list[Hit]:
        """The images whose pooled vectors are nearest to that of a query, without late interaction."""
        whole_number("k", k, 1, MOST_HITS)
        return self._hits(*self._nearest(query, k))

    def picture(self, hit: Hit) -> bytes:
        """A small JPEG of an image that was found; empty where only its embedding was indexed."""
        return self.store.picture(hit.key)

    def _nearest(self, query: Query, count: int) -> tuple[Keys, NDArray[np.float32]]:
        return self.store.nearest(query.pooled.numpy(), count)

    def _hits(self, keys: Keys, scores: NDArray[np.float32]) -> list[Hit]:
        found = zip(keys.tolist(), scores.tolist(), strict=True)
        return [
            _hit(n, key, score, self.store.image(key)) for n, (key, score) in enumerate(found, 1)
        ]


def _hit(rank: int, key: int, score: float, image: Json) -> Hit:
    return Hit(rank, score, str(image["id"]), str(image["file_name"]), image.get("sha256"), key)
