"""Faults of identity: keys, accounts, memories and clocks that are not what they were, and strangers."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterable

from stonechat_tools.proofs.world.devices import Device, LinuxAgent, token
from stonechat_tools.proofs.world.faults import Fault, OnDevice, OnSite
from stonechat_tools.proofs.world.fleet import World

CLOCKS = (-1_790_000_000, 5_000_000_000)  # about 1970, about 2185


class Reflashed(OnDevice):
    lasts_s = (1.0, 3.0)

    def begin(self) -> None:
        self.device.kill()
        self.world.lose_pending(self.device)
        self.device.wipe()

    def end(self) -> None:
        self.device.start()


class Restored(OnDevice):
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


class Rotated(OnDevice):
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


class Added(OnSite):
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


class ClockWrong(OnDevice):
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


class KeyFileBad(OnSite):
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


class Garbage(OnSite):
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
