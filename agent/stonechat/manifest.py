"""Reads the signed manifest of a release: a COSE_Sign message (RFC 9052 section 4.1), described in release.cddl.

The vendor signs it once for a whole class of devices, with HSS/LMS (lms.py) or SLH-DSA (slh_dsa.py). Where a device
holds keys of two roles, release and security officer, both must have signed. Nothing in a message is decoded before
its signatures are verified, but for the frame that holds them."""

from .cbor import head
from .cbor_decode import loads
from .compat import const, sha256
from .cose_open import is_count
from .errors import WireError

MOST_BYTES = const(18432)  # two SLH-DSA signatures and the largest payload
_PAYLOAD_BYTES = const(1024)
_CONTEXT = b"stonechat/1/manifest"  # the external data: what is signed for this purpose serves for no other
RELEASE = const(0)
OFFICER = const(1)
MAX_KEYS = const(4)


class Manifest:
    """What a verified manifest holds.

    version, floor: counts; a device refuses a version below its floor. device_class: text. not_before_s, expires_s:
    Unix seconds. model: (SHA-256, bytes, schema id, digest of the golden vectors), or None. rules: alarm rules as in
    the metadata, ((allowance_q8, cap_q8, threshold_q8), ...), or None. policy: bytes, or None. keys: those that replace
    the device's own, ((role, public key), ...), or None. notes: text, or None. own_model: whether a device may train
    one. sbom: SHA-256 of the release's bill of materials, or None."""

    def __init__(self, fields):
        self.version, self.floor = fields[1], fields[2]
        self.device_class = fields[3]
        self.not_before_s, self.expires_s = fields[4], fields[5]
        get = fields.get
        self.model, self.rules, self.policy, self.keys = get(6), get(7), get(8), get(9)
        self.notes, self.own_model, self.sbom = get(10), get(11, True), get(12)


def _is_bytes(value, low, high):
    return isinstance(value, bytes) and low <= len(value) <= high


def is_key(pair):
    """Whether `pair` is (role, public key): 32 bytes of SLH-DSA-SHA2-128s, 52 or 60 of HSS/LMS."""
    return (
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and pair[0] in (RELEASE, OFFICER)
        and isinstance(pair[1], bytes)
        and len(pair[1]) in (32, 52, 60)
    )


def _is_rule(rule):
    return (
        isinstance(rule, list)
        and len(rule) == 3
        and all([is_count(n) for n in rule])
        and 0 < rule[0] < rule[1] < 0x8000
        and 0 < rule[2] < 0x100000
    )


def _is_model(model):
    return (
        isinstance(model, list)
        and len(model) == 4
        and _is_bytes(model[0], 32, 32)
        and is_count(model[1])
        and _is_bytes(model[2], 8, 8)
        and _is_bytes(model[3], 32, 32)
    )


def _are(value, most, test):
    return isinstance(value, list) and 1 <= len(value) <= most and all([test(item) for item in value])


def read(payload) -> Manifest:
    """The payload of a manifest, its map. Raises WireError where it is not as release.cddl says."""
    fields = loads(payload)
    try:
        good = (
            isinstance(fields, dict)
            and fields[0] == 1
            and all([is_count(fields[key]) for key in (1, 2, 4, 5)])
            and fields[1] > 0
            and fields[2] <= fields[1]
            and fields[4] < fields[5]
            and isinstance(fields[3], str)
            and 1 <= len(fields[3].encode()) <= 32
        )
        some = 0
        for key in fields if good else ():
            value = fields[key]
            if key == 6:
                good &= _is_model(value)
            elif key == 7:
                good &= _are(value, 4, _is_rule)
            elif key == 8:
                good &= _is_bytes(value, 1, 512)
            elif key == 9:
                good &= _are(value, MAX_KEYS, is_key)
            elif key == 10:
                good &= isinstance(value, str) and len(value.encode()) <= 200
            elif key == 11:
                good &= value is True or value is False
            elif key == 12:
                good &= _is_bytes(value, 32, 32)
            else:
                good &= key in (0, 1, 2, 3, 4, 5)
            some |= key in (6, 7, 8, 9)
    except (TypeError, KeyError, AttributeError):
        good = some = False
    if not good or not some:
        raise WireError("manifest: malformed")
    return Manifest(fields)


def key_id(public) -> bytes:
    """The 8 bytes that name a public key in a message."""
    return sha256(public).digest()[:8]


def algorithm(public) -> bytes:
    """The protected header of a signature by `public`: HSS-LMS is -46 (RFC 8778), SLH-DSA-SHA2-128s -51 (requested in
    draft-ietf-cose-sphincs-plus)."""
    return b"\xa1\x01\x38\x32" if len(public) == 32 else b"\xa1\x01\x38\x2d"


def to_sign(public, payload) -> bytes:
    """What a signature by `public` covers: the Sig_structure of RFC 9052 section 4.4."""
    out = bytearray(b"\x85\x69Signature\x40\x44" + algorithm(public))
    head(out, 2, len(_CONTEXT))
    out += _CONTEXT
    head(out, 2, len(payload))
    return bytes(out + payload)


def verify(public, payload, signature) -> bool:
    """Whether `signature` over the payload is by the holder of `public`."""
    if len(public) == 32:  # only the verifier that is used is loaded
        from .slh_dsa import verify
    else:
        from .lms import verify
    return verify(public, to_sign(public, payload), signature)


def payload(message) -> bytes:
    """The payload of a message that unseal() has verified."""
    return loads(message)[2]


def unseal(message, keys) -> Manifest:
    """message: a manifest, bytes; keys: the device's, ((role, public key), ...). Each role that they name must have
    signed. Raises WireError for anything else."""
    if len(message) > MOST_BYTES:
        raise WireError("manifest: %d bytes, more than %d" % (len(message), MOST_BYTES))
    frame = loads(message)
    good = (
        isinstance(frame, list)
        and len(frame) == 4
        and frame[0] == b""
        and frame[1] == {}
        and _is_bytes(frame[2], 1, _PAYLOAD_BYTES)
        and _are(frame[3], 2, lambda signer: isinstance(signer, list) and len(signer) == 3)
    )
    if not good or not keys:
        raise WireError("manifest: malformed" if keys else "manifest: this device holds no key for releases")
    packed = frame[2]
    missing = set([role for role, _ in keys])
    for protected, unprotected, signature in frame[3]:
        for role, public in keys:
            if (
                role in missing
                and protected == algorithm(public)
                and unprotected == {4: key_id(public)}
                and isinstance(signature, bytes)
                and verify(public, packed, signature)
            ):
                missing.remove(role)
                break  # one signature counts for one role
    if missing:
        raise WireError("manifest: no valid signature of the %s" % ("release key", "security officer")[min(missing)])
    return read(packed)


def rules_of(policy) -> tuple:
    """A release's policy -> rules as policy.py has them, in whatever range. Raises WireError."""
    rules = loads(policy)
    if not isinstance(rules, list):
        raise WireError
    for rule in rules:
        if not isinstance(rule, list) or len(rule) != 6 or not all([is_count(number) for number in rule]):
            raise WireError
    return tuple([tuple(rule) for rule in rules])


def golden_digest(meta):
    """SHA-256 over each golden vector of a model's metadata: input, output, score (2 bytes, little-endian)."""
    digest = sha256(b"")
    for x, y, score_q8 in meta.golden:
        digest.update(x + y + bytes((score_q8 & 255, score_q8 >> 8)))
    return digest.digest()
