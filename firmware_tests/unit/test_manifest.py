"""The signed manifest of a release: two keys, one key, and everything that must be refused."""

from cbor_maps import dumps
from share import some
from stonechat import cbor_decode, manifest
from stonechat.errors import WireError

HERE = __file__.rsplit("/", 1)[0] if "/" in __file__ else "."

GOOD = {
    0: 1,
    1: 3,
    2: 2,
    3: "sensor-7",
    4: 1790000000,
    5: 1830000000,
    6: [bytes(32), 6144, bytes(8), bytes(32)],
}


def signed():
    """-> the keys [[role, public], ...] of release (HSS) and officer (SLH-DSA), the manifest signed by both, and the
    same signed by the release key alone."""
    with open(HERE + "/../golden/releases/manifest.cbor", "rb") as file:
        return cbor_decode.loads(file.read())


def refused(call, *args):
    try:
        call(*args)
    except WireError as error:
        return str(error)
    return ""


def without(key):
    return {k: GOOD[k] for k in GOOD if k != key}


def having(**changes):
    out = dict(GOOD)
    for key in changes:
        out[int(key[1:])] = changes[key]
    return out


def test_both_roles_have_signed():
    keys, both, _ = signed()
    found = manifest.unseal(both, keys)
    assert (found.version, found.floor, found.device_class) == (3, 2, "sensor-7")
    assert (found.not_before_s, found.expires_s) == (1790000000, 1830000000)
    assert found.model == [bytes(range(32)), 6144, bytes(range(8)), bytes(range(32, 64))]
    assert found.rules == [[256, 384, 3200], [256, 512, 5120]]
    assert found.notes == "quieter at night"
    assert found.own_model is True
    assert found.policy is None and found.keys is None and found.sbom is None


def test_one_role_is_enough_where_the_device_knows_one():
    keys, both, one = signed()
    assert manifest.unseal(one, keys[:1]).version == 3
    assert manifest.unseal(both, keys[:1]).version == 3
    assert manifest.unseal(both, keys[1:]).version == 3


def test_a_missing_signature_is_named():
    keys, _, one = signed()
    assert "security officer" in refused(manifest.unseal, one, keys)
    assert "release key" in refused(manifest.unseal, one, [[0, keys[1][1]]])
    assert "release key" in refused(manifest.unseal, one, [[0, keys[0][1][:-1] + b"\0"]])
    assert "holds no key" in refused(manifest.unseal, one, [])


def test_one_signature_does_not_count_for_both_roles():
    keys, _, one = signed()
    public = keys[0][1]
    frame = cbor_decode.loads(one)
    twice = dumps(frame[:3] + [frame[3] * 2])
    assert "security officer" in refused(manifest.unseal, twice, keys)
    # the same key in both roles is a choice of the vendor's; each role still wants a signature of its own
    assert refused(manifest.unseal, one, [[0, public], [1, public]])


def test_a_changed_byte_is_refused():
    keys, _, one = signed()
    step = 1 + len(one) // 150
    for at in some(range(0, len(one), step)):
        changed = bytearray(one)
        changed[at] ^= 1 << at % 8
        assert refused(manifest.unseal, bytes(changed), keys[:1]), at


def test_every_cut_is_refused():
    keys, _, one = signed()
    for end in range(0, len(one), 37):
        assert refused(manifest.unseal, one[:end], keys[:1]), end
    assert refused(manifest.unseal, one + b"\0", keys[:1])
    assert "more than" in refused(manifest.unseal, bytes(manifest.MOST_BYTES + 1), keys[:1])


def test_payloads_that_are_taken():
    assert manifest.read(dumps(GOOD)).model
    rules = manifest.read(dumps(having(_6=GOOD[6], _7=[[256, 384, 3200]])))
    assert rules.rules == [[256, 384, 3200]]
    for key, value in ((7, [[1, 2, 3]]), (8, b"policy"), (9, [[0, bytes(32)], [1, bytes(60)]])):
        fields = without(6)
        fields[key] = value
        assert manifest.read(dumps(fields)).model is None
    assert manifest.read(dumps(having(_11=False))).own_model is False


def test_payloads_that_are_refused():
    wrong = [without(key) for key in GOOD]
    wrong += [
        having(_0=2),
        having(_1=0, _2=0),
        having(_1=1 << 32),
        having(_1=-1),
        having(_1=True),
        having(_1=b"3"),
        having(_2=4),
        having(_2=-1),
        having(_3=""),
        having(_3="x" * 33),
        having(_3=b"sensor-7"),
        having(_3=7),
        having(_4=1830000000),
        having(_5=None),
        having(_6=[bytes(31), 1, bytes(8), bytes(32)]),
        having(_6=[bytes(32), -1, bytes(8), bytes(32)]),
        having(_6=[bytes(32), 1, bytes(8)]),
        having(_6={}),
        having(_6=None),
        having(_7=[]),
        having(_7=[[1, 2, 3]] * 5),
        having(_7=[[2, 2, 3]]),
        having(_7=[[0, 2, 3]]),
        having(_7=[[1, 2]]),
        having(_7=[[1, 2, 1 << 20]]),
        having(_7=[[1, 2, 0]]),
        having(_7=7),
        having(_8=b""),
        having(_8=bytes(513)),
        having(_9=[]),
        having(_9=[[2, bytes(32)]]),
        having(_9=[[0, bytes(33)]]),
        having(_9=[[0, "x" * 32]]),
        having(_9=[[0, bytes(32)]] * 5),
        having(_9=[[[], bytes(32)]]),
        having(_10="x" * 201),
        having(_10=b"x"),
        having(_11=1),
        having(_12=bytes(31)),
        having(_13=1),
        [],
        {},
        {"0": 1},
        1,
        None,
        "text",
    ]
    for fields in wrong:
        assert refused(manifest.read, dumps(fields)), fields
    assert refused(manifest.read, b"")
