"""The schedule of faults: made from a seed alone, so that a run that failed can be repeated."""

import random
from dataclasses import dataclass

from stonechat_tools.proofs.world.faults import (
    AddressesDead,
    AgentDiskFull,
    AgentKilled,
    AgentRestarted,
    AgentStopped,
    BrokerKilled,
    BrokerStopped,
    CollectorDiskFull,
    CollectorKilled,
    CollectorStopped,
    DatabaseLocked,
    Fault,
    OnResolver,
    PeerMute,
    ResolverSilent,
)
from stonechat_tools.proofs.world.faults_of_identity import (
    Added,
    CgroupRestarted,
    ClockWrong,
    Garbage,
    KeyFileBad,
    Reflashed,
    Restored,
    Revoked,
    Rotated,
    SecondInstance,
    Strange,
)
from stonechat_tools.proofs.world.fleet import World


@dataclass
class Entry:
    """One line of the schedule: what begins `at_s` seconds after the start, on which part, and lasts how long."""

    at_s: float
    kind: str
    target: str
    lasts_s: float

    def __str__(self) -> str:
        return f"{self.at_s:7.1f} s  {self.kind:18} {self.target:18} for {self.lasts_s:.1f} s"


KINDS: dict[str, type[Fault]] = {
    kind.__name__: kind
    for kind in (
        AgentKilled, AgentStopped, AgentRestarted, BrokerKilled, BrokerStopped, CollectorKilled, CollectorStopped,
        AgentDiskFull, CollectorDiskFull, DatabaseLocked, ResolverSilent, AddressesDead, PeerMute, Reflashed, Restored,
        Rotated, Revoked, Added, CgroupRestarted, SecondInstance, ClockWrong, Strange, KeyFileBad, Garbage,
    )
}  # fmt: skip
_ALONE = (OnResolver,)  # one of these at a time


def schedule(world: World, seed: int, seconds: float, count: int) -> list[Entry]:
    """`count` faults over `seconds`, the same for the same seed and fleet; no part meets two at once."""
    rng = random.Random(seed)
    kinds = [kind for kind in KINDS.values() if list(kind.targets(world))]
    busy: dict[str, float] = {}
    entries: list[Entry] = []
    first_s = 5.0
    times = sorted(rng.uniform(first_s, max(first_s, seconds - 5.0)) for _ in range(count))
    for at_s in times:
        for _ in range(20):
            kind = rng.choices(kinds, [kind.weight for kind in kinds])[0]
            target = rng.choice(list(kind.targets(world)))
            lasts_s = rng.uniform(*kind.lasts_s)
            keys = {target, "resolver"} if issubclass(kind, _ALONE) else {target}
            if at_s + lasts_s < seconds and all(busy.get(key, 0.0) < at_s for key in keys):
                busy |= dict.fromkeys(keys, at_s + lasts_s + 2.0)
                entries.append(Entry(round(at_s, 1), kind.__name__, target, round(lasts_s, 1)))
                break
    return entries


def describe(entries: list[Entry]) -> str:
    return "\n".join(str(entry) for entry in entries)
