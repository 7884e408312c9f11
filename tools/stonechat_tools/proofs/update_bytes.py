"""Changes and cuts a release at each of its bytes, and each of the messages about it. A device must refuse every one,
name why, and run what it ran before."""

import hashlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cbor2
from stonechat import cose, slots
from stonechat.cose_open import fields_of
from stonechat.errors import WireError
from stonechat.slots import Slots
from stonechat.update import CHUNK_BYTES, OFFER, Update

from ..console import working_copy
from ..fleet import keyring, wire_release

STREAM = b"boot"
NOW_S = 1_800_000_000
MODEL = bytes(i * 7 & 255 for i in range(1000))  # of updates.cbor
SECRET = bytes(range(32))


def soak(step: int = 1) -> bool:
    """Every step-th byte; prints the figures."""
    began_s = time.monotonic()
    vectors = cbor2.loads((working_copy() / "firmware_tests/golden/releases/updates.cbor").read_bytes())
    message: bytes = vectors["second"]
    tried = 0
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="stonechat-bytes-") as folder:
        for name, manifest, model, results in _releases(message, step):
            tried += 1
            found = _take(Path(folder), vectors["key"], manifest, model)
            if found[1:] != (0, 0) or found[0] not in results:
                wrong.append(f"{name}: {found}")
    messages, taken = _messages(message, step)
    wrong += taken
    print(
        f"{tried} changed or cut releases, {messages} changed or cut messages, {len(wrong)} taken or misnamed"
        f" {'; '.join(wrong[:3])}; {time.monotonic() - began_s:.0f} s"
    )
    return not wrong


def _releases(message: bytes, step: int) -> Iterator[tuple[str, bytes, bytes, tuple[int, ...]]]:
    for at in range(0, len(message), step):
        changed = bytearray(message)
        changed[at] ^= 1 << at % 8
        yield f"manifest byte {at}", bytes(changed), MODEL, (slots.SIGNATURE, slots.MALFORMED)
        if at:
            yield f"manifest cut at {at}", message[:at], MODEL, (slots.SIGNATURE, slots.MALFORMED)
    for at in range(0, len(MODEL), step):
        changed = bytearray(MODEL)
        changed[at] ^= 1 << at % 8
        yield f"model byte {at}", message, bytes(changed), (slots.DIGEST,)


def _take(folder: Path, key: bytes, manifest: bytes, model: bytes) -> tuple[int, int, int]:
    """-> result, slot on trial and version after the release was offered and served."""
    for path in folder.iterdir():
        path.unlink()
    store = Slots(str(folder))
    store.start()
    update = Update(store, STREAM, [[0, key]], "pump", b"schema-1", 16_384, lambda *_: b"", lambda _: True)
    update.on_message({1: 2, 2: OFFER, 3: 1, 5: hashlib.sha256(manifest).digest(), 6: len(manifest), 7: STREAM})
    for _ in range(40):
        want = update.want()
        if want:
            part, at = want
            data = (manifest, model)[part][at : at + CHUNK_BYTES]
            update.on_message({1: 2, 2: part, 3: at, 4: data, 7: STREAM})
        elif update.step(NOW_S, 1) or not update.offered:
            break
    return store.result, store.trial, store.version


def _messages(manifest: bytes, step: int) -> tuple[int, list[str]]:
    """Each message of the collector, changed and cut at each byte -> how many, and what was taken for authentic."""
    keys = keyring.DeviceKeys(SECRET, "pump-1")
    mac: Any = cose.Mac(SECRET, b"offer", "pump-1")
    sealed = (
        wire_release.seal_offer(keys, 2, manifest, STREAM, 1),
        wire_release.seal_chunk(keys, wire_release.Want(2, 0, 0, STREAM), manifest),
        wire_release.seal_confirm(keys, 2, STREAM),
        wire_release.seal_withdraw(keys, 2, STREAM),
    )
    tried = 0
    taken = []
    for number, message in enumerate(sealed):
        fields_of(mac, message)
        for at in range(0, len(message), step):
            changed = bytearray(message)
            changed[at] ^= 1 << at % 8
            for bad in (bytes(changed), message[:at]):
                tried += 1
                try:
                    fields_of(mac, bad)
                    taken.append(f"message {number} at {at}")
                except WireError:
                    pass
    return tried, taken
