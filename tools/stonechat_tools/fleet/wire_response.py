"""The response to alarms on the wire: decisions in reports, its state in the status, and the collector's renewals."""

from dataclasses import dataclass
from typing import Any

import cbor2

from .keyring import DeviceKeys, Rejected

ACTIONS = ("observe", "alert", "throttle", "quarantine", "hook")
MODES = ("off", "dry-run", "on")
ENDS = ("expired", "released", "stop responding", "monitoring switched off", "replaced", "failed", "agent ended")
FAMILIES = {1: "network", 2: "programs", 4: "files", 8: "machine"}
BEGAN, ENDED, FAILED = range(3)
RENEW = 9  # code of the command
MOST_RULES = 16

_COUNT_MAX = 0xFFFFFFFF
_SIZES = (7, 12, 6)  # of each kind's array


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision of a device. kind: BEGAN, ENDED or FAILED; done: False where it is what would have been done; lease:
    its number, 0 for an action without one; seconds: of the lease, or how long it was in force where it ended; end: an
    index of ENDS; passed, stopped: packets (on boards: calls) that the enforcer counted; before, after: what the device
    sent in the window in which it began, and in the mean of those while it was in force; code: an errno or the exit
    status of the vendor's hook."""

    kind: int
    action: int
    done: bool
    rule: int
    lease: int
    seconds: int = 0
    families: int = 0
    end: int = 0
    renewals: int = 0
    passed: int = 0
    stopped: int = 0
    before: int = 0
    after: int = 0
    code: int = 0

    def __str__(self) -> str:
        name = ACTIONS[self.action]
        if self.kind == FAILED:
            return f"{name} failed ({self.code})"
        would = "" if self.done else "would have been: "
        if self.kind == BEGAN:
            return f"{would}{name}" + (f" for {self.seconds} s" if self.lease else "")
        return f"{would}{name} ended after {self.seconds} s, {ENDS[self.end]}"


@dataclass(frozen=True, slots=True)
class ResponseState:
    """A device's response, of its status: mode; stopped: by an operator; action and lease in force and the seconds left
    of it; decisions and refused renewals since its start."""

    mode: int
    stopped: bool
    action: int
    lease: int
    left_s: int
    decisions: int
    refused: int

    def __str__(self) -> str:
        if self.action:
            return f"{ACTIONS[self.action]} for {self.left_s} s"
        return "responses stopped" if self.stopped else "" if self.mode == 1 else f"responses {MODES[self.mode]}"


def _counts(value: Any, key: int) -> list[int]:
    if not isinstance(value, (list, tuple)) or any(type(n) is not int or not 0 <= n <= _COUNT_MAX for n in value):
        raise Rejected("malformed", f"key {key}")
    return list(value)


def decision(value: Any) -> Decision:
    """A report's key 18. Raises Rejected."""
    numbers = _counts(value, 18)
    if len(numbers) < 6 or numbers[0] > FAILED or len(numbers) != _SIZES[numbers[0]]:
        raise Rejected("malformed", "key 18")
    kind, action, done, rule, lease, *rest = numbers
    if not 0 < action < len(ACTIONS) or done > 1 or rule >= MOST_RULES:
        raise Rejected("malformed", "key 18")
    head = (kind, action, bool(done), rule, lease)
    if kind == BEGAN:
        return Decision(*head, seconds=rest[0], families=rest[1] & 15)
    if kind == FAILED:
        return Decision(*head, code=rest[0])
    seconds, end, renewals, passed, stopped, before, after = rest
    if end >= len(ENDS):
        raise Rejected("malformed", "key 18")
    return Decision(*head, seconds, 0, end, renewals, passed, stopped, before, after)


def response_state(value: Any) -> ResponseState | None:
    """A status's key 22; None where the device has none. Raises Rejected."""
    if value is None:
        return None
    numbers = _counts(value, 22)
    if len(numbers) != 7 or numbers[0] >= len(MODES) or numbers[1] > 1 or numbers[2] >= len(ACTIONS):
        raise Rejected("malformed", "key 22")
    mode, stopped, *rest = numbers
    return ResponseState(mode, bool(stopped), *rest)


def seal_renewal(keys: DeviceKeys, number: int, expires_s: int, lease: int) -> bytes:
    """The collector's renewal of a lease, for the device's topic `ack`; number: rising, modulo 2**32."""
    fields = {0: 1, 1: number, 2: expires_s, 3: RENEW, 4: [lease]}
    return keys.renew.seal(cbor2.dumps(fields, canonical=True))
