"""What the tests of updates share: a vendor who signs, and a collector that does what the test says."""

import contextlib
import hashlib
import struct
import time
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import cbor2
import pyhsslms
from agent_process import DEVICE, wait_for
from fleet_support import Peer
from stonechat import manifest
from stonechat.metadata import Metadata
from stonechat.model import load_model
from stonechat_tools.fleet import keyring, wire, wire_release

KIND = {"lms_type": pyhsslms.lms_sha256_m24_h5, "lmots_type": pyhsslms.lmots_sha256_n24_w8}
DAY_S = 86_400


def golden_digest(metadata: Metadata) -> bytes:
    """As release.cddl has it, beside the agent's own."""
    digest = hashlib.sha256()
    for x, y, score_q8 in metadata.golden:
        digest.update(bytes(x) + bytes(y) + struct.pack("<H", score_q8))
    return digest.digest()


def described(model: bytes) -> list[object]:
    meta = load_model(model).metadata
    return [hashlib.sha256(model).digest(), len(model), bytes(meta.schema_id), golden_digest(meta)]


class Vendor:
    def __init__(self, folder: Path, name: str = "vendor.key.pub") -> None:
        self.key = pyhsslms.HssPrivateKey(levels=1, **KIND)
        self.public = self.key.publicKey().serialize()
        self.file = folder / name
        self.file.write_text(f"release HSS/LMS-SHA256-H10-W4 {self.public.hex()}\n")

    def sign(self, model: bytes, version: int, **changes: object) -> bytes:
        now_s = int(time.time())
        fields: dict[int, object] = {0: 1, 1: version, 2: 0, 3: "pump", 4: now_s - DAY_S, 5: now_s + DAY_S}
        fields[6] = described(model)
        fields |= {int(key[1:]): value for key, value in changes.items()}
        packed = cbor2.dumps({key: value for key, value in fields.items() if value is not None}, canonical=True)
        signature = self.key.sign(manifest.to_sign(self.public, packed))
        entry = [manifest.algorithm(self.public), {4: manifest.key_id(self.public)}, signature]
        return cbor2.dumps([b"", {}, packed, [entry]], canonical=True)


class Hand:
    """A collector that does what the test says, with the tools' own seals. parts: of the release that it serves, None
    for nothing; wanted: what the device asked for; said(): for a failure, what the device printed."""

    def __init__(self, port: int, secret: bytes, said: Callable[[], object]) -> None:
        self.keys = keyring.DeviceKeys(secret, DEVICE)
        self.parts: list[bytes] | None = None
        self.version = self.offers = 0
        self.wanted: list[wire_release.Want] = []
        self.status: wire.Status | None = None
        self.scored = 0
        self.level = -1  # of the last report
        self.peer = Peer(port, "collector")
        self.peer.topics = [f"stonechat/1/fleet/{DEVICE}/{name}" for name in ("want", "status", "report")]
        self.peer.on_message = self._on_message
        self._said = said

    def _on_message(self, topic: str, payload: bytes) -> None:
        with contextlib.suppress(keyring.Rejected):  # sealed with the key that the device had before
            self._take(topic, payload)

    def _take(self, topic: str, payload: bytes) -> None:
        if topic.endswith("/status"):
            status = wire.open_status(DEVICE, self.keys, payload)
            self.status = status if status.online else self.status
        elif topic.endswith("/report"):
            report = wire.open_report(DEVICE, self.keys, payload)
            self.scored += report.score_q8 is not None
            self.level = report.level
            ranges = [(report.sequence, report.sequence)]
            ack = wire.seal_ack(self.keys, report.stream, ranges)
            self.peer.client.publish(f"stonechat/1/fleet/{DEVICE}/ack", ack, 1)
        else:
            want = wire_release.open_want(DEVICE, self.keys, payload)
            self.wanted.append(want)
            if self.parts is not None and want.version == self.version:
                part = self.parts[want.part]
                self.send(wire_release.seal_chunk(self.keys, want, part))

    def send(self, message: bytes) -> None:
        self.peer.client.publish(f"stonechat/1/fleet/{DEVICE}/model", message, 1)

    def serve(self, version: int, message: bytes, model: bytes, served: bytes | None = None) -> None:
        """Offer `message`; served: what is sent in its place."""
        self.version, self.parts = version, [message if served is None else served, model]
        self.offer(version, message)

    def offer(self, version: int, message: bytes) -> None:
        assert self.status is not None
        self.offers += 1
        self.send(wire_release.seal_offer(self.keys, version, message, self.status.stream, self.offers))

    def chunk(self, version: int, part: int, at: int, content: bytes, keys: keyring.DeviceKeys | None = None) -> None:
        """To this start of the device."""
        assert self.status is not None
        want = wire_release.Want(version, part, at, self.status.stream)
        self.send(wire_release.seal_chunk(keys or self.keys, want, content))

    def until(self, *wanted: int, timeout_s: float = 40.0) -> None:
        """The status's key 24 begins with `wanted`."""
        wait_for(
            lambda: self.status and self.status.update and astuple(self.status.update)[: len(wanted)] == wanted,
            timeout_s,
            lambda: f"{self.status and self.status.update}; {str(self._said())[-1500:]}",
        )

    def __enter__(self) -> "Hand":
        self.peer.start()
        assert self.peer.connected.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.stop()
