"""The messages of one batch: each opened with its device's keys, or refused; and what acknowledges the reports."""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from stonechat import limits
from stonechat.errors import ConfigError

from . import wire, wire_release
from .keyring import DeviceKeys, Keys, Rejected, Signer
from .mqtt_codec import Message
from .updates import Wanted

MAX_ACK_RANGES = limits.ACK_NUMBERS // 2
MAX_NAME_BYTES = 64  # of a device that is not known

Kind = TypeVar("Kind")
Open = Callable[[str, DeviceKeys, bytes], Kind]


class Batch:
    """What verified, in the order of its arrival: `reports`, and in `signers` the keys of each; `statuses`; `wants`.
    `rejections`: (device, reason) of what is not taken; `refused`: (device, stream, sequence number, keys) of authentic
    reports that never will be, which their devices have to stop sending."""

    def __init__(self, keys: Keys, prefix: str) -> None:
        self._keys = keys
        self._prefix = prefix
        self.reports: list[wire.Report] = []
        self.signers: list[Signer] = []
        self.statuses: list[wire.Status] = []
        self.wants: list[Wanted] = []
        self.rejections: list[tuple[str, str]] = []
        self.refused: list[tuple[str, bytes, int, Signer]] = []

    def open(self, messages: Iterable[Message]) -> None:
        self._keys.refresh()
        prefix, start = self._prefix, len(self._prefix)
        reports, signers, hot = self.reports, self.signers, self._keys.hot
        known: dict[str, Sequence[DeviceKeys]] = {}  # of the others, one object for each key of the batch
        for topic, payload, _, _ in messages:
            device = "(no device)"
            try:
                if not topic.startswith(prefix):
                    raise Rejected("malformed", "topic")
                if topic.endswith("/report"):
                    device = topic[start:-7]
                    first: Signer | None = hot.get(device)
                    if first is None:
                        first = (known.get(device) or known.setdefault(device, self._keys.held(device)))[0]
                    try:
                        reports.append(wire.open_report(device, first, payload))
                        signers.append(first)
                    except Rejected as rejected:
                        self._by_others(device, known.get(device, (first,)), payload, rejected)
                elif topic.endswith("/status"):
                    device = topic[start:-7]
                    self.statuses.append(self._opened(device, payload, wire.open_status)[0])
                elif topic.endswith("/want"):
                    device = topic[start:-5]
                    self.wants.append(self._opened(device, payload, wire_release.open_want))
                else:
                    device = topic[start:].partition("/")[0]
                    raise Rejected("malformed", "topic")
            except Rejected as rejected:
                # whoever may publish, and the broker, choose this name: no control characters in mails and terminals
                self.rejections.append((wire.plain(device, MAX_NAME_BYTES), rejected.reason))

    def _by_others(self, device: str, keys: Sequence[Signer], payload: bytes, failure: Rejected) -> None:
        """A report that the first key does not open: those that are being rotated out may. Raises Rejected."""
        signer = keys[0]
        for other in keys[1:]:
            if failure.reason != "forged":
                break
            try:
                self.reports.append(wire.open_report(device, other, payload))
                self.signers.append(other)
                return
            except Rejected as rejected:
                failure, signer = rejected, other
        if failure.identity:
            self.refused.append((device, *failure.identity, signer))
        raise failure

    def _opened(self, device: str, payload: bytes, opened: Open[Kind]) -> tuple[Kind, DeviceKeys]:
        """A status or a want, with the keys that it verifies with. Raises Rejected."""
        failure = Rejected("unknown device", device)
        for keys in self._keys.held(device):
            try:
                return opened(device, keys, payload), keys
            except Rejected as rejected:
                failure = rejected
                if rejected.reason != "forged":
                    break
            except ConfigError as error:  # a key file from before there were such messages
                failure = Rejected("key file", str(error))
        raise failure

    def acknowledgements(self) -> list[tuple[str, bytes]]:
        """(topic, payload) of each, once the reports are committed."""
        time_s = int(time.time())
        reports, signers, refused, prefix = self.reports, self.signers, self.refused, self._prefix
        made = []
        if not refused and len({report.device for report in reports}) == len(reports):  # most batches of a large fleet
            for report, keys in zip(reports, signers, strict=True):
                with contextlib.suppress(ConfigError):  # a key file without the key for it: the device keeps its report
                    sealed = wire.seal_one_ack(report.device, keys, report.stream, report.sequence, time_s)
                    made.append((f"{prefix}{report.device}/ack", sealed))
            return made
        committed: dict[tuple[str, Signer, bytes], list[int]] = {}
        never: dict[tuple[str, Signer, bytes], list[int]] = {}
        for report, keys in zip(reports, signers, strict=True):
            numbers = committed.get(name := (report.device, keys, report.stream))
            if numbers is None:
                committed[name] = [report.sequence]
            else:
                numbers.append(report.sequence)
        for device, stream, sequence, keys in refused:
            never.setdefault((device, keys, stream), []).append(sequence)
            committed.setdefault((device, keys, stream), [])
        for (device, keys, stream), numbers in committed.items():
            topic = f"{prefix}{device}/ack"
            try:
                taken, left = wire.ranges_of(numbers), wire.ranges_of(never.get((device, keys, stream), []))
                for at in range(0, max(len(taken), len(left)), MAX_ACK_RANGES):
                    part = slice(at, at + MAX_ACK_RANGES)
                    made.append((topic, wire.seal_ack(keys, stream, taken[part], left[part], time_s, device)))
            except ConfigError:  # a key file without the key for it: the device keeps its reports
                continue
        return made
