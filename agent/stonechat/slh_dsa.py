"""SLH-DSA-SHA2-128s signatures (FIPS 205), verification alone, with SHA-256 from hashlib.

Stateless, so that a vendor can sign without hardware that keeps a state; a signature has 7,856 bytes and takes about
2,160 hashes to check. The context string is empty. Signing is `stonechat release`."""

from .compat import const, sha256

SIGNATURE_BYTES = const(7856)
_N = const(16)  # bytes of a hash
_LAYERS = const(7)
_HEIGHT = const(9)  # of one of the hypertree's trees
_FORS_TREES = const(14)
_FORS_HEIGHT = const(12)
_WOTS_HASH = const(0)
_WOTS_PK = const(1)
_TREE = const(2)
_FORS_TREE = const(3)
_FORS_ROOTS = const(4)


class _Hash:
    """SHA-256 of the public seed, padded to a block, the compressed address (FIPS 205 section 11.2) and what it is
    given; cut to 16 bytes."""

    def __init__(self, seed):
        self.block = bytearray(102)  # seed, 48 zeros, address, one hash
        self.block[:_N] = seed
        self.address = memoryview(self.block)[64:86]  # layer 1, tree 8, type 1, key pair 4, chain or height 4, index 4

    def word(self, at, value):
        self.address[at : at + 4] = value.to_bytes(4, "big")

    def of(self, *parts):
        digest = sha256(memoryview(self.block)[:86])
        for part in parts:
            digest.update(part)
        return digest.digest()[:_N]

    def climb(self, node, index, height, path):
        """The root over `node`, number `index` of its level, by the authentication path (algorithms 11 and 17)."""
        for level in range(height):
            other = path[level * _N : level * _N + _N]
            odd = index & 1
            index >>= 1
            self.word(14, level + 1)
            self.word(18, index)
            node = self.of(other, node) if odd else self.of(node, other)
        return node

    def kind(self, kind, pair):
        """Set the type; the key pair stays where the type has one, the rest is zero."""
        self.address[9] = kind
        self.address[10:22] = bytes(12)
        self.word(10, pair)


def verify(public, message, signature) -> bool:
    """Whether `signature` is one of `message` under the `public` key of 32 bytes (FIPS 205 algorithms 20, 24); all are
    bytes. False for whatever is malformed, never an error."""
    if len(public) != 2 * _N or len(signature) != SIGNATURE_BYTES:
        return False
    signature = memoryview(signature)
    seed = bytes(public[:_N])
    start = bytes(signature[:_N]) + seed
    hashed = sha256(start + public[_N:] + b"\0\0")
    hashed.update(message)
    digest = sha256(start + hashed.digest() + bytes(4)).digest()
    tree = int.from_bytes(digest[21:28], "big") & (1 << 54) - 1
    leaf = int.from_bytes(digest[28:30], "big") & 511
    hash = _Hash(seed)
    address = hash.address
    address[1:9] = tree.to_bytes(8, "big")
    at = _N
    hash.kind(_FORS_TREE, leaf)
    roots = bytearray()
    for i in range(_FORS_TREES):
        j = i * 3 >> 1
        index = digest[j] << 8 | digest[j + 1]
        index = index & 0xFFF if i & 1 else index >> 4
        index += i << _FORS_HEIGHT
        hash.word(14, 0)
        hash.word(18, index)
        node = hash.of(signature[at : at + _N])
        at += _N
        roots += hash.climb(node, index, _FORS_HEIGHT, signature[at:])
        at += _FORS_HEIGHT * _N
    hash.kind(_FORS_ROOTS, leaf)
    node = hash.of(roots)
    for layer in range(_LAYERS):
        address[0] = layer
        address[1:9] = tree.to_bytes(8, "big")
        hash.kind(_WOTS_HASH, leaf)
        ends = bytearray()
        checksum = 0
        for i in range(35):
            if i == 32:
                node += (checksum << 4).to_bytes(2, "big")
            digit = node[i >> 1] >> (0 if i & 1 else 4) & 15
            checksum += 15 - digit
            value = signature[at : at + _N]
            at += _N
            address[17] = i
            for step in range(digit, 15):
                address[21] = step
                value = hash.of(value)
            ends += value
        hash.kind(_WOTS_PK, leaf)
        node = hash.of(ends)
        hash.kind(_TREE, 0)
        node = hash.climb(node, leaf, _HEIGHT, signature[at:])
        at += _HEIGHT * _N
        leaf = tree & 511
        tree >>= _HEIGHT
    return node == public[_N:]
