from binascii import unhexlify

from cbor_maps import dumps
from stonechat import cbor
from stonechat.cbor_decode import MAX_DEPTH, loads
from stonechat.errors import WireError

# RFC 8949 appendix A, as far as stonechat's subset goes
VECTORS = (
    (0, "00"),
    (23, "17"),
    (24, "1818"),
    (100, "1864"),
    (1000, "1903e8"),
    (1000000, "1a000f4240"),
    (1000000000000, "1b000000e8d4a51000"),
    (18446744073709551615, "1bffffffffffffffff"),
    (-18446744073709551616, "3bffffffffffffffff"),
    (-1, "20"),
    (-100, "3863"),
    (-1000, "3903e7"),
    (False, "f4"),
    (True, "f5"),
    (None, "f6"),
    (b"", "40"),
    (b"\x01\x02\x03\x04", "4401020304"),
    ("", "60"),
    ("IETF", "6449455446"),
    ("\u6c34", "63e6b0b4"),
    ([], "80"),
    ([1, [2, 3], [4, 5]], "8301820203820405"),
    (list(range(1, 26)), "98190102030405060708090a0b0c0d0e0f101112131415161718181819"),
    ({}, "a0"),
    ({1: 2, 3: 4}, "a201020304"),
    ({"a": 1, "b": [2, 3]}, "a26161016162820203"),
)


def refused(call, *args):
    try:
        call(*args)
    except WireError:
        return True
    return False


def test_published_vectors_both_ways():
    for value, text in VECTORS:
        assert dumps(value) == unhexlify(text), value
        assert loads(unhexlify(text)) == value, text


def test_keys_are_sorted_by_their_encoding():
    assert dumps({"b": 1, 300: 2, -1: 3, 5: 4, "a": 5}) == unhexlify(
        "a505041901 2c0220036161056162 01".replace(" ", "")
    )


def encoded(fields):
    out = bytearray()
    cbor.encode_fields(fields, out)
    return out


def test_fields_are_a_map_without_the_absent():
    fields = [1, None, 70000, None, (1, 2)]
    assert encoded(fields) == dumps({0: 1, 2: 70000, 4: [1, 2]})
    many = list(range(31))  # keys and a count of more than one byte
    assert encoded(many) == dumps(dict(zip(many, many)))
    assert encoded([None] * 25 + [7]) == dumps({25: 7})


def test_anything_but_one_deterministic_item_is_refused():
    bad = (
        "",  # nothing
        "1801",  # 1 in two bytes
        "190017",
        "1a0000ffff",
        "1b00000000ffffffff",
        "0000",  # two items
        "18",  # cut
        "4401",
        "62",
        "61ff",  # not UTF-8
        "9bffffffffffffffff",  # an array longer than anything
        "5bffffffffffffffff",
        "bb0000000100000000",
        "a2020101 02",  # keys not sorted
        "a201010102",  # twice the same
        "a18001",  # an array as a key
        "5f42010243030405ff",  # indefinite
        "9fff",
        "bfff",
        "f93c00",  # floats
        "fb3ff199999999999a",
        "c074323031332d30332d32315432303a30343a30305a",  # a tag
        "f7",  # undefined
        "f818",
        "fc",
        "ff",
        "81" * 9 + "00",  # too deep
        "a100" * 9 + "00",
    )
    for text in bad:
        assert refused(loads, unhexlify(text.replace(" ", ""))), text


def test_depth_is_bounded():
    value = 0
    for _ in range(MAX_DEPTH):
        value = [value]
    assert loads(dumps(value)) == value
    assert refused(loads, dumps([value]))
    assert refused(loads, b"\x81" * 5000)


def test_what_it_can_not_hold_is_refused():
    for value in (1.5, {1.5: 1}, 1 << 64, -(1 << 64) - 1, object()):
        assert refused(dumps, value)


def test_every_truncation_is_refused():
    whole = dumps({0: 1, 1: [1000, -70000, b"abc", "text"], 2: {"k": None}, 3: True})
    for n in range(len(whole)):
        assert refused(loads, whole[:n]), n
    assert refused(loads, whole + b"\x00")
