"""Makes firmware_tests/golden/releases/updates.cbor: releases that a device takes, and those that it must refuse.

    python tools/tests/update_vectors.py

The keys are HSS, one level, H5, W8, hashes of 24 bytes: the smallest signatures. They sign nothing else."""

from pathlib import Path
from typing import Any

import cbor2
import pyhsslms
from stonechat import manifest

PLACE = Path(__file__).resolve().parents[2] / "firmware_tests/golden/releases/updates.cbor"
NOW_S = 1_800_000_000
YEAR_S = 31_536_000
MODEL = bytes(i * 7 & 255 for i in range(1000))


def main() -> None:
    import hashlib

    kind = {"lms_type": pyhsslms.lms_sha256_m24_h5, "lmots_type": pyhsslms.lmots_sha256_n24_w8}
    first, second = (pyhsslms.HssPrivateKey(levels=1, **kind) for _ in range(2))
    old, new = (key.publicKey().serialize() for key in (first, second))
    digest = hashlib.sha256(MODEL).digest()
    base: dict[int, Any] = {
        0: 1,
        1: 2,
        2: 0,
        3: "pump",
        4: NOW_S - YEAR_S,
        5: NOW_S + YEAR_S,
        6: [digest, len(MODEL), b"schema-1", bytes(32)],
    }

    def signed(changes: dict[int, Any], signer: Any = first) -> bytes:
        fields = {key: value for key, value in (base | changes).items() if value is not None}
        packed = cbor2.dumps(fields, canonical=True)
        public = signer.publicKey().serialize()
        signature = signer.sign(manifest.to_sign(public, packed))
        entry = [manifest.algorithm(public), {4: manifest.key_id(public)}, signature]
        return cbor2.dumps([b"", {}, packed, [entry]], canonical=True)

    def model(**changes: Any) -> list[Any]:
        found = list(base[6])
        for name, value in changes.items():
            found[("digest", "size", "schema").index(name)] = value
        return found

    releases = {
        "second": signed({}),
        "third": signed({1: 3, 2: 2}),
        "class": signed({3: "valve"}),
        "schema": signed({6: model(schema=b"schema-2")}),
        "expired": signed({5: NOW_S}),
        "early": signed({4: NOW_S + 1}),
        "large": signed({6: model(size=10_000_000)}),
        "digest": signed({6: model(digest=bytes(32))}),
        "nothing": signed({6: None, 7: [[256, 384, 3200]]}),
        "keys": signed({1: 4, 6: None, 9: [[0, new]]}),
        "fifth": signed({1: 5, 2: 5}, second),
        "sixth": signed({1: 6, 9: [[0, old]]}, second),
        "forged": signed({}, second),
    }
    PLACE.write_bytes(cbor2.dumps({"key": old, "new key": new, **releases}, canonical=True))


if __name__ == "__main__":
    main()
