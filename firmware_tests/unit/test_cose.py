from binascii import unhexlify

from cbor_maps import dumps
from stonechat import cose
from stonechat.cose_open import unseal
from stonechat.errors import WireError

SECRET = bytes(range(32))


def refused(call, *args):
    try:
        call(*args)
    except WireError:
        return True
    return False


def test_hmac_published_vectors():
    # RFC 4231: cases 1 and 2 (no key here is longer than a block)
    vectors = (
        (b"\x0b" * 20, b"Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
        (b"Jefe", b"what do ya want for nothing?", "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"),
    )
    for key, message, want in vectors:
        assert cose.hmac_sha256(key, message) == unhexlify(want)


def test_derived_keys_are_those_of_hkdf():
    # from cryptography's HKDF(SHA256, 32, salt=b"stonechat/1", info=label) over bytes 0..31
    assert cose.derive(SECRET, b"report") == unhexlify(
        "8e751e02d0476a16a2987c99db80aae23279508a48c152efadbbbd0fd6d24cb5"
    )
    assert cose.derive(SECRET, b"command") == unhexlify(
        "274debc5598ba5d59f9ec1eb5f0b3c77d8ff225392e2414b0f067f27a6eea21e"
    )
    labels = (b"report", b"status", b"ack", b"command", b"peers")
    assert len(set([cose.derive(SECRET, label) for label in labels])) == 5
    assert refused(cose.derive, SECRET[:31], b"report")


def test_a_sealed_message_byte_for_byte():
    # the same bytes that cwt makes of it (tools/tests/test_fleet_wire.py)
    mac = cose.Mac(SECRET, b"report", "pump-1")
    assert mac.seal(dumps({0: 1, 1: 7})) == unhexlify("8443a10104a045a20001010748854dd6563189a4fd")


def test_overhead_is_seventeen_bytes():
    mac = cose.Mac(SECRET, b"report", "pump-1")
    for n in (24, 47, 255):
        assert len(mac.seal(bytes(n))) == n + 17


def test_it_opens_what_it_sealed_and_nothing_else():
    mac = cose.Mac(SECRET, b"report", "pump-1")
    message = mac.seal(b"payload of some length")
    assert unseal(mac, message) == b"payload of some length"
    for i in range(len(message)):
        forged = bytearray(message)
        forged[i] ^= 1
        assert refused(unseal, mac, bytes(forged)), i
    for n in range(len(message)):
        assert refused(unseal, mac, message[:n]), n
    assert refused(unseal, mac, message + b"\x00")


def test_it_does_not_open_for_another_device_or_key():
    message = cose.Mac(SECRET, b"report", "pump-1").seal(b"x" * 30)
    assert refused(unseal, cose.Mac(SECRET, b"report", "pump-2"), message)
    assert refused(unseal, cose.Mac(SECRET[1:] + b"x", b"report", "pump-1"), message)


def test_a_payload_that_is_no_byte_string_is_refused_though_its_tag_fits():
    mac = cose.Mac(SECRET, b"report", "pump-1")
    wrapped = b"\x19\x03\xe8"  # 1000
    message = b"\x84\x43\xa1\x01\x04\xa0" + wrapped + b"\x48" + mac.tag(wrapped)
    assert refused(unseal, mac, message)
