"""Makes firmware_tests/golden/releases/: releases that a device takes, and those that it must refuse.

    python tools/tests/update_vectors.py

updates.cbor has releases of a file that is no model, for the protocol alone; models.cbor has real models of a schema of
three counters, for a whole agent. The keys are HSS, one level, H5, W8, hashes of 24 bytes: the smallest signatures.
They sign nothing else, and are not kept."""

import hashlib
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pyhsslms
from release_support import golden_digest
from stonechat import manifest
from stonechat.features import RATE
from stonechat.model import load_model
from stonechat.schema import Schema
from stonechat_tools.modeling.fit import fit

PLACE = Path(__file__).resolve().parents[2] / "firmware_tests/golden/releases"
NOW_S = 1_800_000_000
YEAR_S = 31_536_000
MODEL = bytes(i * 7 & 255 for i in range(1000))
SCHEMA = Schema("test-updates", [(name, "1", RATE) for name in ("a", "b", "c")])
OTHER = Schema("other-updates", [(name, "1", RATE) for name in ("a", "b", "d")])
WINDOW_MS = 1000
LEARN_WINDOWS = 8
KIND = {"lms_type": pyhsslms.lms_sha256_m24_h5, "lmots_type": pyhsslms.lmots_sha256_n24_w8}


class Vendor:
    """Two keys, and the manifests that they sign."""

    def __init__(self, schema_id: bytes) -> None:
        self.first, self.second = (pyhsslms.HssPrivateKey(levels=1, **KIND) for _ in range(2))
        self.schema_id = schema_id

    @property
    def keys(self) -> tuple[bytes, bytes]:
        return self.first.publicKey().serialize(), self.second.publicKey().serialize()

    def model(self, data: bytes, golden: bytes = bytes(32), schema_id: bytes | None = None) -> list[Any]:
        return [hashlib.sha256(data).digest(), len(data), schema_id or self.schema_id, golden]

    def sign(self, changes: dict[int, Any], signer: Any = None) -> bytes:
        base = {0: 1, 1: 2, 2: 0, 3: "pump", 4: NOW_S - YEAR_S, 5: NOW_S + YEAR_S}
        fields = {key: value for key, value in (base | changes).items() if value is not None}
        packed = cbor2.dumps(fields, canonical=True)
        signer = signer or self.first
        public = signer.publicKey().serialize()
        signature = signer.sign(manifest.to_sign(public, packed))
        entry = [manifest.algorithm(public), {4: manifest.key_id(public)}, signature]
        return cbor2.dumps([b"", {}, packed, [entry]], canonical=True)


def protocol() -> dict[str, bytes]:
    vendor = Vendor(b"schema-1")
    old, new = vendor.keys
    model = vendor.model(MODEL)
    large = [model[0], 10_000_000, *model[2:]]
    return {
        "key": old,
        "new key": new,
        "second": vendor.sign({6: model}),
        "third": vendor.sign({1: 3, 2: 2, 6: model}),
        "class": vendor.sign({3: "valve", 6: model}),
        "schema": vendor.sign({6: vendor.model(MODEL, schema_id=b"schema-2")}),
        "expired": vendor.sign({5: NOW_S, 6: model}),
        "early": vendor.sign({4: NOW_S + 1, 6: model}),
        "large": vendor.sign({6: large}),
        "digest": vendor.sign({6: [bytes(32), *model[1:]]}),
        "rules": vendor.sign({7: [[256, 384, 3200]]}),
        "policy": vendor.sign({1: 3, 8: b"policy"}),
        "keys": vendor.sign({1: 4, 9: [[0, new]]}),
        "fifth": vendor.sign({1: 5, 2: 5, 6: model}, vendor.second),
        "sixth": vendor.sign({1: 6, 6: model, 9: [[0, old]]}, vendor.second),
        "forged": vendor.sign({6: model}, vendor.second),
    }


def made(version: int, schema: Schema = SCHEMA, window_ms: int = WINDOW_MS, centre: int = 1700) -> bytes:
    """A model for windows of about 100 counts of each column."""
    rng = np.random.default_rng(version)
    rows = np.rint(centre + rng.normal(size=(400, len(schema))) * 60).clip(0, 25600)
    return fit(rows, schema, window_ms, learn_windows=LEARN_WINDOWS).to_tflite("updates", version)


def models() -> dict[str, Any]:
    vendor = Vendor(SCHEMA.id)
    factory, second, third = made(1), made(2), made(3)
    others = {"schema": made(2, OTHER), "windows": made(2, window_ms=2000), "damaged": second[:-9] + bytes(9)}

    def signed(data: bytes, changes: dict[int, Any] | None = None, **more: Any) -> bytes:
        golden = golden_digest(load_model(second if data is others["damaged"] else data).metadata)
        return vendor.sign({6: vendor.model(data, **({"golden": golden} | more)), **(changes or {})})

    releases = {
        "second": (signed(second), second),
        "third": (signed(third, {1: 3, 2: 2}), third),
        "rules": (vendor.sign({1: 4, 7: [[200, 900, 1400], [384, 870, 896]]}), b""),
        "policy": (vendor.sign({1: 5, 8: cbor2.dumps([[1, 1, 0, 2, 0, 0], [3, 2, 1, 5, 60, 600]])}), b""),
        "bad policy": (vendor.sign({1: 4, 8: cbor2.dumps([[9, 1, 0, 2, 0, 0]])}), b""),
        "no own model": (signed(second, {11: False}), second),
        "class": (signed(second, {3: "valve"}), second),
        "schema": (signed(others["schema"], schema_id=OTHER.id), others["schema"]),
        "schema of the file": (signed(others["schema"]), others["schema"]),
        "windows": (signed(others["windows"]), others["windows"]),
        "golden": (signed(second, golden=bytes(32)), second),
        "damaged": (signed(others["damaged"]), others["damaged"]),
        "no model": (vendor.sign({6: vendor.model(MODEL)}), MODEL),
        "unsuited": (signed(second, {7: [[1, 2, 1]]}), second),
        "expired": (signed(second, {5: NOW_S}), second),
        "early": (signed(second, {4: NOW_S + 1}), second),
        "large": (vendor.sign({6: [bytes(32), 10_000_000, SCHEMA.id, bytes(32)]}), bytes(100)),
        "forged": (vendor.sign({6: vendor.model(second)}, vendor.second), second),
    }
    return {
        "key": vendor.keys[0],
        "factory": factory,
        "releases": {name: list(pair) for name, pair in releases.items()},
    }


def main() -> None:
    (PLACE / "updates.cbor").write_bytes(cbor2.dumps(protocol(), canonical=True))
    (PLACE / "models.cbor").write_bytes(cbor2.dumps(models(), canonical=True))


if __name__ == "__main__":
    main()
