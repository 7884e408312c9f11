"""What is in the fleet's messages once they are verified and decoded, and what their numbers mean."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .wire_release import UpdateState
from .wire_response import Decision, ResponseState

LEVELS = ("normal", "watch", "alarm")
FLAGS = {1: "learning", 2: "muted", 4: "maintenance", 8: "model does not fit", 16: "changed and steady"}
RESULTS = ("accepted", "not supported", "expired", "bad arguments", "clock not set", "failed")
COMMANDS = {
    "mute": 1,
    "maintenance": 2,
    "was-normal": 3,
    "calibrate": 4,
    "report-now": 5,
    "stop-responding": 6,
    "release": 7,
    "own-model": 8,
    "renew": 9,
    "respond": 10,
}
OWN_MODEL = {"forbid": 0, "again": 1}  # arguments of that command


def result_name(result: int) -> str:
    return RESULTS[result] if result < len(RESULTS) else f"result {result}"


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature of an explanation: its index in the schema, deviation in sd, share of the score in percent."""

    index: int
    deviation: float
    share_percent: int


@dataclass(slots=True)
class Report:
    """A report as stored; numbers in Q8 are as the device computed them. `windows` is 1 for a single window, more for
    a summary and 0 for the answer to a command and for a decision; `late_s` is the age of history, -1 where the device
    does not know it."""

    device: str
    sequence: int
    boot: int
    time_s: int | None
    uptime_s: int | None
    stream: bytes = b""
    level: int = 0
    flags: int = 0
    windows: int = 1
    score_q8: int | None = None
    score_min_q8: int | None = None
    score_max_q8: int | None = None
    surprise_q8: int | None = None
    evidence_q8: int | None = None
    packed: bytes = b""  # `features`, as the device packed them
    detail: str | None = None
    lost: int = 0
    channel: int = 0  # which of the status's channels carries it, from 1; 0 is the device itself
    late_s: int | None = None
    answer: tuple[int, int] | None = None
    decision: Decision | None = None
    body: bytes = b""  # without the age, which differs each time that the report is sent
    key: str = ""  # fingerprint of the key that it verified with,
    current: bool = True  # which is the device's current one, not one that is being rotated out

    @property
    def features(self) -> list[Feature]:
        return list(_features(self.packed))


@dataclass(slots=True)
class OwnModel:
    """A device's own model: its phase (an index of PHASES), windows so far of those wanted, models that failed their
    trial, and its digest, empty while there is none."""

    phase: int
    done: int
    wanted: int
    refused: int
    digest: bytes

    PHASES: ClassVar[tuple[str, ...]] = ("off", "collecting", "training", "on trial", "deciding")

    def __str__(self) -> str:
        name = self.PHASES[self.phase]
        return f"{name} {self.done}/{self.wanted}" if self.wanted else name


@dataclass(slots=True)
class Status:
    """A device's retained status, or its last will (`online` False)."""

    device: str
    boot: int
    time_s: int | None
    uptime_s: int
    online: bool
    stream: bytes = b""
    number: int = 0
    firmware: str | None = None
    model: bytes | None = None
    schema: bytes | None = None
    window_ms: int | None = None
    sources: tuple[str, ...] = ()
    adaptation_q8: int | None = None
    learning: bool | None = None
    agent: str | None = None
    counters: tuple[int, ...] = ()
    unscored: tuple[int, ...] = ()
    channels: tuple[str, ...] = ()  # names of those beside the device's own
    own: "OwnModel | None" = None
    heartbeat_s: int | None = None
    steady_s: int | None = None  # changed and steady for so long
    sleep_s: int | None = None  # the device sleeps now, for so long
    update: UpdateState | None = None  # None: this device takes no updates
    response: ResponseState | None = None  # None: this device decides nothing
    off_for_s: int | None = None  # its user has switched monitoring off, so long ago


def pack_features(features: Sequence[Feature]) -> bytes:
    """As a device packs them: index, sixteenths of a deviation, share."""
    return bytes([byte for f in features for byte in (f.index, round(f.deviation * 16) & 255, f.share_percent)])


def _features(packed: bytes) -> Iterator[Feature]:
    for at in range(0, len(packed), 3):
        index, z_q4, share = packed[at : at + 3]
        yield Feature(index, (z_q4 - 256 if z_q4 > 127 else z_q4) / 16, share)
