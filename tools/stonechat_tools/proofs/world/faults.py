"""Faults of processes, disks and the network.

Each kind of fault is a class with `begin` and `end`; `harms` names the devices whose windows may be missing while it
lasts, `cuts` the devices whose reports may be delayed by it.
"""

import errno
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from stonechat_tools.proofs.world.devices import Device, LinuxAgent
from stonechat_tools.proofs.world.fleet import World
from stonechat_tools.proofs.world.parts import Site
from stonechat_tools.proofs.world.sandbox import DEAD, MUTE

LOOK_UP_S = 20.0  # a stub resolver's own time-outs, after which a board's loop goes on


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


class OnDevice(Fault):
    def harms(self) -> list[Device]:
        return [self.device]


class OnSite(Fault):
    @classmethod
    def targets(cls, world: World) -> Iterable[str]:
        return [site.name for site in world.sites]

    def cuts(self) -> list[Device]:
        return [device for device in self.world.devices if device.site is self.site]


class AgentKilled(OnDevice):
    weight = 10

    def begin(self) -> None:
        self.device.kill()

    def end(self) -> None:
        self.device.start()


class AgentStopped(OnDevice):
    """SIGSTOP: the process does not run, its connection stays open."""

    lasts_s = (2.0, 12.0)

    def begin(self) -> None:
        self.device.send(signal.SIGSTOP)

    def end(self) -> None:
        self.device.send(signal.SIGCONT)


class AgentRestarted(OnDevice):
    lasts_s = (0.5, 2.0)

    def begin(self) -> None:
        status = self.device.stop()
        if isinstance(self.device, LinuxAgent) and status not in (0, -signal.SIGKILL):
            self.world.fail(f"{self.name}: an orderly stop ended with {status}")

    def end(self) -> None:
        self.device.start()


class BrokerKilled(OnSite):
    lasts_s = (0.5, 8.0)
    weight = 6

    def begin(self) -> None:
        self.site.broker.kill()

    def end(self) -> None:
        self.site.broker.start()


class BrokerStopped(OnSite):
    """SIGSTOP: connections stay open and nothing answers."""

    lasts_s = (5.0, 25.0)

    def begin(self) -> None:
        self.site.broker.send(signal.SIGSTOP)

    def end(self) -> None:
        self.site.broker.send(signal.SIGCONT)


class CollectorKilled(OnSite):
    lasts_s = (0.5, 8.0)
    weight = 6

    def begin(self) -> None:
        self.site.collector.kill()

    def end(self) -> None:
        self.site.collector.start()


class CollectorStopped(OnSite):
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


class CollectorDiskFull(OnSite):
    lasts_s = (3.0, 15.0)

    def begin(self) -> None:
        fill(self.site.collector.disk)

    def end(self) -> None:
        (self.site.collector.disk / "fill").unlink(missing_ok=True)


class DatabaseLocked(OnSite):
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


class OnResolver(Fault):
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


class ResolverSilent(OnResolver):
    def spoil(self) -> None:
        self.world.names.silent = True


class AddressesDead(OnResolver):
    """Eight addresses that never answer come before the one that does."""

    def spoil(self) -> None:
        self.world.names.addresses = [*DEAD, "127.0.0.1"]


class PeerMute(OnResolver):
    """The address takes the connection and never says a word: no TLS handshake, no CONNACK."""

    def spoil(self) -> None:
        self.world.names.addresses = [MUTE]
