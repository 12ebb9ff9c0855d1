"""Where the benchmark keeps what is not committed: fetched packages, prepared data, weights."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(os.environ.get("BENCHMARK_CACHE", Path(__file__).parent / ".cache"))


def cached(name: str) -> Path:
    """The path of a file or folder in the cache; `BENCHMARK_CACHE` moves it elsewhere."""
    return FOLDER / name
