"""The releases of the tests. A module of its own, to be imported before the agent: reading takes twice their 40 KB for
a moment, which a board of 190 KB of heap has only then."""

from stonechat import cbor_decode

HERE = __file__.rsplit("/", 1)[0] if "/" in __file__ else "."

with open(HERE + "/../golden/releases/models.cbor", "rb") as golden:
    VECTORS = cbor_decode.loads(golden.read())
