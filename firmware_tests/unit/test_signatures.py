"""The verifiers of HSS/LMS and SLH-DSA: the vectors of RFC 8554 (appendix F, both) and of NIST (ACVP, SLH-DSA sigGen of
FIPS 205, those without a context), and what two independent signers each made.

golden/signatures: each file is [public key, message, signature]."""

import os

from share import some
from stonechat import cbor_decode, lms, slh_dsa

HERE = __file__.rsplit("/", 1)[0] if "/" in __file__ else "."
FOLDER = HERE + "/../golden/signatures/"


def vectors():
    """(verify, public, message, signature) of every file."""
    found = []
    for name in sorted(os.listdir(FOLDER)):
        with open(FOLDER + name, "rb") as file:
            vector = cbor_decode.loads(file.read())
        found.append([slh_dsa.verify if name.startswith("slh") else lms.verify] + vector)
    return found


def positions(length, seed):
    """64 of them, the same in each run, and both ends."""
    found = [0, length - 1]
    for _ in range(64):
        seed = (seed * 1103515245 + 12345) & 0x3FFFFFFF
        found.append(seed % length)
    return found


def changed(data, at):
    data = bytearray(data)
    data[at] ^= 1 << at % 8
    return bytes(data)


def test_vectors_verify():
    found = vectors()
    assert len(found) >= 8
    for verify, public, message, signature in found:
        assert verify(public, message, signature) is True


def test_a_changed_bit_is_refused():
    # A 32-bit board takes minutes for all bits of all: the seeded ones of the shortest vector of each verifier.
    for verify in (lms.verify, slh_dsa.verify):
        _, public, message, signature = min([v for v in vectors() if v[0] is verify], key=size)
        for at in some(positions(len(signature), len(signature))):
            assert verify(public, message, changed(signature, at)) is False, at
        for at in some(range(len(public))):
            assert verify(changed(public, at), message, signature) is False, at
        for at in some(range(0, len(message), 7)):
            assert verify(public, changed(message, at), signature) is False, at


def size(vector):
    return len(vector[3])


def test_whatever_is_malformed_is_refused_without_an_error():
    for verify, public, message, signature in vectors():
        for cut in (0, 1, 3, 4, 8, 12, 100, len(signature) - 1):
            assert verify(public, message, signature[:cut]) is False
        assert verify(public, message, signature + b"\0") is False
        assert verify(public, message, signature * 2) is False
        assert verify(public, message, b"") is False
        assert verify(public, message, b"\xff" * len(signature)) is False
        assert verify(public, message + b"\0", signature) is False
        assert verify(public, b"", signature) is False
        for cut in some(range(len(public))):
            assert verify(public[:cut], message, signature) is False
        assert verify(b"\xff" * len(public), message, signature) is False


def test_parameters_of_hss_that_do_not_exist_are_refused():
    for verify, public, message, signature in vectors():
        if verify is lms.verify:
            for at in (3, 7, 11):  # levels, tree, chains
                for value in (0, 9, 10, 15, 255):
                    if public[at] != value:
                        other = public[:at] + bytes([value]) + public[at + 1 :]
                        assert verify(other, message, signature) is False
                        both = signature[:11] + bytes([value]) + signature[12:]
                        assert verify(other, message, both) is False
