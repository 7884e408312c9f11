"""HSS/LMS signatures (RFC 8554, NIST SP 800-208): verification alone, with SHA-256 from hashlib.

Every parameter set with SHA-256: trees of height 5 to 25, Winternitz parameter 1, 2, 4 or 8, hashes of 32 or 24 bytes,
and 1 to 8 levels of HSS with hashes of one size. Signing is `stonechat release`."""

from .compat import sha256


def _u32(data, at):
    return int.from_bytes(bytes(data[at : at + 4]), "big")


def _lms(public, message, signature, at):
    """Check the LMS signature at `at` under an LMS public key (RFC 8554 algorithms 4b, 6a). message None: what it signs
    is the public key of the next level, which follows it. -> where it ends, or 0."""
    tree, chains = _u32(public, 0), _u32(public, 4)
    n = len(public) - 24
    if not (5 <= tree <= 9 and 1 <= chains <= 4 if n == 32 else 10 <= tree <= 14 and 5 <= chains <= 8):
        return 0
    height = tree % 5 * 5 + 5
    width = 1 << (chains - 1 & 3)
    top = (1 << width) - 1
    digits = 8 * n // width
    checks = -(-(len(bin(digits * top)) - 2) // width)
    leaf = _u32(signature, at)
    path = at + 8 + n * (1 + digits + checks)
    end = path + 4 + n * height
    if len(signature) < end or leaf >> height or _u32(signature, at + 4) != chains or _u32(signature, path) != tree:
        return 0
    identity = bytes(public[8:24])
    block = bytearray(23 + n)
    block[:20] = prefix = identity + leaf.to_bytes(4, "big")
    value = memoryview(block)[23:]
    at += 8
    hashed = sha256(prefix + b"\x81\x81")
    hashed.update(signature[at : at + n])
    hashed.update(signature[end : end + len(public)] if message is None else message)
    digest = hashed.digest()[:n]
    total = 0
    key = sha256(prefix + b"\x80\x80")
    for i in range(digits + checks):
        if i == digits:
            digest += (total << 16 - checks * width).to_bytes(2, "big")
        digit = digest[i * width >> 3] >> (8 - width - (i * width & 7)) & top
        total += top - digit
        at += n
        block[20], block[21] = i >> 8, i & 255
        value[:] = signature[at : at + n]
        for j in range(digit, top):
            block[22] = j
            value[:] = sha256(block).digest()[:n]
        key.update(value)
    leaf += 1 << height
    node = sha256(identity + leaf.to_bytes(4, "big") + b"\x82\x82" + key.digest()[:n]).digest()[:n]
    at = path + 4
    while leaf > 1:
        other = bytes(signature[at : at + n])
        at += n
        pair = other + node if leaf & 1 else node + other
        leaf >>= 1
        node = sha256(identity + leaf.to_bytes(4, "big") + b"\x83\x83" + pair).digest()[:n]
    return end if node == public[24:] else 0


def verify(public, message, signature) -> bool:
    """Whether `signature` is one of `message` under the HSS `public` key of 52 or 60 bytes (RFC 8554 algorithm 7); all
    are bytes. False for whatever is malformed, never an error."""
    signature = memoryview(signature)
    levels = _u32(public, 0)
    if len(public) not in (52, 60) or not 1 <= levels <= 8 or _u32(signature, 0) != levels - 1:
        return False
    public = public[4:]
    at = 4
    for _ in range(levels - 1):
        at = _lms(public, None, signature, at)
        if not at:
            return False
        public = bytes(signature[at : at + len(public)])
        at += len(public)
    at = _lms(public, message, signature, at)
    return 0 < at == len(signature)
