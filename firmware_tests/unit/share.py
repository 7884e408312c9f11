"""How much of a test that tries every place is done: all of it, or one place in EVERY, the first included.

Where a processor is emulated EVERY is more than 1: on a Unix port by the environment, on a board because
proofs/boards/prove.py puts another EVERY here."""

import os

EVERY = 1
if hasattr(os, "getenv"):
    EVERY = int(os.getenv("STONECHAT_EVERY") or EVERY)


def some(places):
    """A list, tuple or range."""
    return [places[i] for i in range(0, len(places), EVERY)]  # MicroPython slices no tuple by steps
