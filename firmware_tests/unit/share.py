"""How much of a test that tries every place is done: all of it, or on an emulated board (proofs/boards/prove.py, which
puts another EVERY here) one place in EVERY, the first included."""

EVERY = 1


def some(places):
    """A list, tuple or range."""
    return places[::EVERY]
