"""What a process says on standard error besides its own words: warnings, and of other packages errors only."""

from __future__ import annotations

import logging


def setup() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for noisy in ("absl", "orbax", "jax", "httpx", "openai"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
