"""Seeds by name: every draw of a study has its own, so that leaving one out or repeating one changes no other."""

from __future__ import annotations

import hashlib


def derive(seed: int, *labels: object) -> int:
    """A seed in [0, 2^48) for what `labels` name, from a study's seed. The same on every machine and in every order."""
    text = "/".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")
