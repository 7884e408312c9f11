"""The schedule of faults: made from a seed alone, so that a run that failed can be repeated.

Each kind of fault is a class with `begin` and `end`; `harms` names the devices whose windows may be missing while it
lasts, `cuts` the devices whose reports may be delayed by it.
"""

import contextlib
import errno
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stonechat_tools.proofs.world.fleet import World
from stonechat_tools.proofs.world.parts import Device, LinuxAgent, Site, token
from stonechat_tools.proofs.world.sandbox import DEAD, MUTE

LOOK_UP_S = 20.0  # a stub resolver's own time-outs, after which a board's loop goes on
CLOCKS = (-1_790_000_000, 5_000_000_000)  # about 1970, about 2185


@dataclass
class Entry:
    """One line of the schedule: what begins `at_s` seconds after the start, on which part, and lasts how long."""

    at_s: float
    kind: str
    target: str
    lasts_s: float

    def __str__(self) -> str:
        return f"{self.at_s:7.1f} s  {self.kind:18} {self.target:18} for {self.lasts_s:.1f} s"


class Fault:
    """`target`: what it is done to. It is begun and ended once each."""

    lasts_s: ClassVar[tuple[float, float]] = (1.0, 5.0)
    weight: ClassVar[int] = 4

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name

    @classmethod
    def targets(cls, world: World) -> Iterable[str]:
        return [device.name for device in world.devices]

    def begin(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        pass

    def harms(self) -> list[Device]:
        return []

    def cuts(self) -> list[Device]:
        return self.harms()

    @property
    def device(self) -> Device:
        return next(device for device in self.world.devices if device.name == self.name)

    @property
    def site(self) -> Site:
        return next(site for site in self.world.sites if site.name == self.name)


class _OnDevice(Fault):
    def harms(self) -> list[Device]:
        return [self.device]


class _OnSite(Fault):
    @classmethod
    def targets(cls, world: World) -> Iterable[str]:
        return [site.name for site in world.sites]

    def cuts(self) -> list[Device]:
        return [device for device in self.world.devices if device.site is self.site]


class AgentKilled(_OnDevice):
    weight = 10

    def begin(self) -> None:
        self.device.kill()

    def end(self) -> None:
        self.device.start()


class AgentStopped(_OnDevice):
    """SIGSTOP: the process does not run, its connection stays open."""

    lasts_s = (2.0, 12.0)

    def begin(self) -> None:
        self.device.send(signal.SIGSTOP)

    def end(self) -> None:
        self.device.send(signal.SIGCONT)


class AgentRestarted(_OnDevice):
    lasts_s = (0.5, 2.0)

    def begin(self) -> None:
        status = self.device.stop()
        if isinstance(self.device, LinuxAgent) and status not in (0, -signal.SIGKILL):
            self.world.fail(f"{self.name}: an orderly stop ended with {status}")

    def end(self) -> None:
        self.device.start()


class BrokerKilled(_OnSite):
    lasts_s = (0.5, 8.0)
    weight = 6

    def begin(self) -> None:
        self.site.broker.kill()

    def end(self) -> None:
        self.site.broker.start()


class BrokerStopped(_OnSite):
    """SIGSTOP: connections stay open and nothing answers."""

    lasts_s = (5.0, 25.0)

    def begin(self) -> None:
        self.site.broker.send(signal.SIGSTOP)

    def end(self) -> None:
        self.site.broker.send(signal.SIGCONT)


class CollectorKilled(_OnSite):
    lasts_s = (0.5, 8.0)
    weight = 6

    def begin(self) -> None:
        self.site.collector.kill()

    def end(self) -> None:
        self.site.collector.start()


class CollectorStopped(_OnSite):
    lasts_s = (2.0, 15.0)

    def begin(self) -> None:
        self.site.collector.send(signal.SIGSTOP)

    def end(self) -> None:
        self.site.collector.send(signal.SIGCONT)


def fill(folder: Path) -> Path:
    """Leave no byte free in the file system of `folder` -> the file that takes the place."""
    path = folder / "fill"
    with open(path, "wb", buffering=0) as file:
        for size in (65536, 512):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return path


class AgentDiskFull(Fault):
    lasts_s = (4.0, 20.0)
    weight = 6

    def begin(self) -> None:
        fill(self.device.disk)
        self.world.unsaved.setdefault(self.name, []).append((time.time(), time.time() + 3600))

    def end(self) -> None:
        (self.device.disk / "fill").unlink(missing_ok=True)
        begin, _ = self.world.unsaved[self.name].pop()
        self.world.unsaved[self.name].append((begin, time.time()))


class CollectorDiskFull(_OnSite):
    lasts_s = (3.0, 15.0)

    def begin(self) -> None:
        fill(self.site.collector.disk)

    def end(self) -> None:
        (self.site.collector.disk / "fill").unlink(missing_ok=True)


class DatabaseLocked(_OnSite):
    """Another program holds the database's write lock."""

    lasts_s = (2.0, 14.0)

    def begin(self) -> None:
        import sys

        code = (
            "import sqlite3,sys,time\nd=sqlite3.connect(sys.argv[1],timeout=5,isolation_level=None)\n"
            "d.execute('BEGIN IMMEDIATE')\ntime.sleep(60)\n"
        )
        uid = self.site.collector.uid()
        command = [sys.executable, "-c", code, str(self.site.collector.database)]
        self._holder = subprocess.Popen(command, user=uid, group=uid, extra_groups=[], stderr=subprocess.DEVNULL)

    def end(self) -> None:
        self._holder.kill()
        self._holder.wait(10)


class _OnResolver(Fault):
    """The name server is one for all: every device's next look-up meets it. One broker is killed meanwhile, so that
    there are look-ups."""

    lasts_s = (10.0, 40.0)
    weight = 5

    @classmethod
    def targets(cls, world: World) -> Iterable[str]:
        return [site.name for site in world.sites]

    def cuts(self) -> list[Device]:
        return self.world.devices

    def begin(self) -> None:
        self.begun_s = time.time()
        self.spoil()
        self.site.broker.kill()
        self.site.broker.start()

    def end(self) -> None:
        self.world.unresolved.append((self.begun_s, time.time() + LOOK_UP_S))
        self.world.names.silent = False
        self.world.names.addresses = ["127.0.0.1"]

    def spoil(self) -> None:
        raise NotImplementedError


class ResolverSilent(_OnResolver):
    def spoil(self) -> None:
        self.world.names.silent = True


class AddressesDead(_OnResolver):
    """Eight addresses that never answer come before the one that does."""

    def spoil(self) -> None:
        self.world.names.addresses = [*DEAD, "127.0.0.1"]


class PeerMute(_OnResolver):
    """The address takes the connection and never says a word: no TLS handshake, no CONNACK."""

    def spoil(self) -> None:
        self.world.names.addresses = [MUTE]


class Reflashed(_OnDevice):
    lasts_s = (1.0, 3.0)

    def begin(self) -> None:
        self.device.kill()
        self.world.lose_pending(self.device)
        self.device.wipe()

    def end(self) -> None:
        self.device.start()


class Restored(_OnDevice):
    """The disk's image of some minutes ago comes back."""

    lasts_s = (1.0, 3.0)

    def begin(self) -> None:
        device = self.device
        image = device.folder / "image"
        device.kill()
        if image.exists():
            self.world.lose_pending(device)
            device.restore(image)
        else:
            device.image(image)

    def end(self) -> None:
        self.device.start()


class Rotated(_OnDevice):
    lasts_s = (3.0, 10.0)
    weight = 3

    def begin(self) -> None:
        site = self.device.site
        with self.world.provisioning:
            site.provision("rotate", self.name)
            site.renew()
        self.device.install()
        self.device.stop()
        self.device.start()

    def end(self) -> None:
        site = self.device.site
        with self.world.provisioning:
            site.provision("finish-rotation", self.name)
            site.renew()


class Revoked(Fault):
    """The site's victim is revoked: nothing of it may be taken from then on. Later it joins again with new keys."""

    lasts_s = (8.0, 20.0)
    weight = 2

    @classmethod
    def targets(cls, world: World) -> Iterable[str]:
        return [device.name for device in world.victims]

    @property
    def device(self) -> Device:
        return next(device for device in self.world.victims if device.name == self.name)

    def harms(self) -> list[Device]:
        return [self.device]

    def begin(self) -> None:
        site = self.device.site
        with self.world.provisioning:
            site.provision("revoke", self.name)
            site.renew()
        self.revoked_s = time.time()

    def end(self) -> None:
        site = self.device.site
        self.world.revoked.setdefault(self.name, []).append((self.revoked_s, time.time()))
        self.device.kill()
        with self.world.provisioning:
            site.provision("add", self.name)
            site.renew()
        self.device.wipe()
        self.device.install()
        self.device.start()


class Added(_OnSite):
    """Another device joins while everything runs: owners and modes of what the broker reads must stay."""

    weight = 2

    def cuts(self) -> list[Device]:
        return []

    def begin(self) -> None:
        folder = self.site.fleet / "broker"
        before = {path.name: (path.stat().st_uid, path.stat().st_mode) for path in folder.iterdir() if path.is_file()}
        with self.world.provisioning:
            self.site.provision("add", f"later-{token()}")
            self.site.renew()
        for name, (uid, mode) in before.items():
            now = (folder / name).stat()
            if (now.st_uid, now.st_mode) != (uid, mode):
                self.world.fail(f"{self.name}: `provision add` changed owner or mode of broker/{name}")


class CgroupRestarted(Fault):
    """The watched cgroup is removed and made again, as by a restart of its service."""

    lasts_s = (1.0, 4.0)

    @classmethod
    def targets(cls, world: World) -> Iterable[str]:
        return [device.name for device in world.devices if isinstance(device, LinuxAgent) and device.cgroup]

    def begin(self) -> None:
        self.world.service.stop()

    def end(self) -> None:
        self.world.service.start()


class SecondInstance(Fault):
    """A second agent on the same state folder must end by itself, with one line, and change nothing."""

    weight = 2
    lasts_s = (0.1, 0.2)

    @classmethod
    def targets(cls, world: World) -> Iterable[str]:
        return [device.name for device in world.devices if isinstance(device, LinuxAgent) and not device.bpf]

    def begin(self) -> None:
        if not self.device.running:
            return
        try:
            done = subprocess.run(self.device.command(), capture_output=True, text=True, timeout=30, check=False)
        except subprocess.TimeoutExpired:
            self.world.fail(f"{self.name}: a second instance on the same folder went on")
            return
        if done.returncode == 0 or len(done.stderr.strip().splitlines()) != 1:
            self.world.fail(f"{self.name}: a second instance ended with {done.returncode}: {done.stderr[-300:]}")


class ClockWrong(_OnDevice):
    """The device's clock is in 1970 or 2185 for a while (libfaketime)."""

    lasts_s = (10.0, 25.0)
    weight = 3

    @classmethod
    def targets(cls, world: World) -> Iterable[str]:
        if not world.has_faketime:
            return []
        return [device.name for device in world.devices if isinstance(device, LinuxAgent) and not device.bpf]

    def begin(self) -> None:
        self.device.stop()
        self.device.clock_offset_s = self.world.random.choice(CLOCKS)
        self.device.start()

    def end(self) -> None:
        self.device.stop()
        self.device.clock_offset_s = 0
        self.device.start()


class Strange(Fault):
    """The device's own counter moves a thousand times as fast: the table must show an alarm within a minute."""

    lasts_s = (75.0, 100.0)
    weight = 5

    @classmethod
    def targets(cls, world: World) -> Iterable[str]:
        return [device.name for device in world.devices if device.can_alarm]

    def begin(self) -> None:
        self.device.strange = True

    def end(self) -> None:
        self.device.strange = False


class KeyFileBad(_OnSite):
    """Something that is no key file lies among the collector's keys."""

    weight = 2

    def cuts(self) -> list[Device]:
        return []

    def begin(self) -> None:
        keys = self.site.collector.home / "keys"
        kind = self.world.random.choice(("garbage", "folder", "unreadable", "fifo"))
        self._paths = [keys / f"bad-{token()}{suffix}" for suffix in (".key", ".keys")]
        for path in self._paths:
            if kind == "folder":
                path.mkdir()
            elif kind == "fifo":
                os.mkfifo(path)
            else:
                path.write_bytes(b"\0\xff not a key")
            if kind == "unreadable":
                path.chmod(0)
        for path in self._paths:
            device = path.name.rpartition(".")[0]
            self.world.shout(self.site, f"stonechat/1/{self.site.name}/{device}/report", b"x")

    def end(self) -> None:
        for path in self._paths:
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()


class Garbage(_OnSite):
    """A stranger sends what no reader may trust, where the broker lets anybody publish."""

    @classmethod
    def targets(cls, world: World) -> Iterable[str]:
        return [site.name for site in world.sites if site.auth == "plain"]

    def cuts(self) -> list[Device]:
        return []

    def begin(self) -> None:
        rng = self.world.random
        device = rng.choice([device for device in self.world.devices if device.site is self.site])
        base = f"stonechat/1/{self.site.name}/"
        for payload in (b"", b"\xff" * 600, rng.randbytes(60), b"\x9f" * 400, rng.randbytes(60_000)):
            for topic in (base + device.name + "/report", base + device.name + "/status", base + "[red]x[/]/report"):
                self.world.shout(self.site, topic, payload)


KINDS: dict[str, type[Fault]] = {
    kind.__name__: kind
    for kind in (
        AgentKilled, AgentStopped, AgentRestarted, BrokerKilled, BrokerStopped, CollectorKilled, CollectorStopped,
        AgentDiskFull, CollectorDiskFull, DatabaseLocked, ResolverSilent, AddressesDead, PeerMute, Reflashed, Restored,
        Rotated, Revoked, Added, CgroupRestarted, SecondInstance, ClockWrong, Strange, KeyFileBad, Garbage,
    )
}  # fmt: skip
_ALONE = (_OnResolver,)  # one of these at a time


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
