"""Reads rated texts out of the archive, in place: four sources, each text with the ratings of all who rated it.

A source is two tab-separated files: `GroundTruth` (id, mean, text) and `anonDataRatings` (id, mean, standard deviation,
list of ratings from -4 to 4). Lines of another form are counted and left out.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import digest

SOURCES = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "tweets": "tweets",
}
"""The stem of a source's files, by the source's name."""

_INNER = "hutto_ICWSM_2014.tar.gz"
_MOST = 4  # ratings are from -4 to 4
_SAME_MEAN = 1e-3


@dataclass(frozen=True)
class RatedTexts:
    """Texts of one source.

    Attributes:
        source: its name.
        texts: N of them, no two the same.
        ratings: of each text, in the order of the file; nothing says which person a rating is of.
        malformed: lines of either file that were left out for their form.
        unpaired: ids that only one of the files has.
        repeated: texts left out because they had come before.
        disagreeing: texts whose mean in the one file is not that of their ratings in the other (in `tweets` one in 21);
            they are kept, and the ratings count.
    """

    source: str
    texts: tuple[str, ...]
    ratings: tuple[tuple[int, ...], ...]
    malformed: int
    unpaired: int
    repeated: int
    disagreeing: int

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def gold(self) -> torch.Tensor:
        """Mean over all who rated a text: fp64 [N]."""
        return torch.tensor([sum(one) / len(one) for one in self.ratings], dtype=torch.float64)

    @property
    def digest(self) -> str:
        """SHA-256 of texts and ratings."""
        return digest([list(self.texts), [list(one) for one in self.ratings]])

    def select(self, index: list[int]) -> RatedTexts:
        """The chosen texts; the counts remain those of the whole."""
        texts, ratings = (tuple(values[i] for i in index) for values in (self.texts, self.ratings))
        return RatedTexts(self.source, texts, ratings, self.malformed, self.unpaired, self.repeated, self.disagreeing)


def read_ratings(archive: Path, source: str) -> RatedTexts:
    """Reads one source.

    Args:
        archive: the package's source archive, or the data's own within it.
        source: one of `SOURCES`.

    Raises:
        ValueError: there is no such source, or the archive holds none of its files.
    """
    if source not in SOURCES:
        raise ValueError(f"`source` must be one of {', '.join(SOURCES)}, got {source!r}.")
    stem = SOURCES[source]
    truths, ratings = _files(archive, (f"{stem}_GroundTruth.txt", f"{stem}_anonDataRatings.txt"))
    malformed = 0
    texts: dict[str, tuple[float, str]] = {}
    for parts in _rows(truths):
        try:
            name, mean, text = parts
            texts[name] = (float(mean), text.strip())
        except ValueError:
            malformed += 1
    rated: dict[str, tuple[int, ...]] = {}
    for parts in _rows(ratings):
        try:
            name, _, _, given = parts
            rated[name] = _ratings(given)
        except ValueError:
            malformed += 1
    found: dict[str, tuple[int, ...]] = {}
    repeated = disagreeing = 0
    for name in (name for name in texts if name in rated):
        mean, text = texts[name]
        if text in found:
            repeated += 1
            continue
        found[text] = rated[name]
        disagreeing += abs(sum(rated[name]) / len(rated[name]) - mean) > _SAME_MEAN
    if not found:
        raise ValueError(f"`archive` must hold rated texts of {source}, and {archive} holds no readable one.")
    unpaired = len(set(texts) ^ set(rated))
    return RatedTexts(source, tuple(found), tuple(found.values()), malformed, unpaired, repeated, disagreeing)


def _ratings(text: str) -> tuple[int, ...]:
    """A list of ratings; raises ValueError for anything else."""
    values = json.loads(text)
    if not isinstance(values, list) or not values or not all(type(v) is int and abs(v) <= _MOST for v in values):
        raise ValueError(text)
    return tuple(values)


def _rows(data: bytes) -> Iterator[list[str]]:
    """Fields of each line that is not empty. What is not UTF-8 becomes a mark that fits no number and harms no text."""
    for line in data.decode("utf-8-sig", errors="replace").split("\n"):
        if line.strip():
            yield line.rstrip("\r").split("\t")


def _files(archive: Path, names: tuple[str, str]) -> tuple[bytes, bytes]:
    """The content of two files of the archive."""
    try:
        with tarfile.open(archive) as outer:
            inner = _member(outer, _INNER)
            if inner is None:
                first, second = (_member(outer, name) for name in names)
            else:
                with tarfile.open(fileobj=io.BytesIO(inner)) as data:
                    first, second = (_member(data, name) for name in names)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"`archive` must be a tar archive of rated texts, and {archive} is none: {error}.") from error
    if first is None or second is None:
        raise ValueError(f"`archive` must hold {' and '.join(names)}, and {archive} does not.")
    return first, second


def _member(archive: tarfile.TarFile, name: str) -> bytes | None:
    """The content of the file of that name, in whatever folder it is."""
    for one in archive:
        if one.isfile() and one.name.rpartition("/")[2] == name:
            opened = archive.extractfile(one)
            return opened.read() if opened else None
    return None
