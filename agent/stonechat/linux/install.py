"""`stonechat-agent install` and `uninstall`: one device from its bundle to a running service, and back.

    sudo /opt/stonechat/bin/stonechat-agent install --bundle sensor-7.tar
    sudo /opt/stonechat/bin/stonechat-agent install --bundle sensor-7.tar --dry-run
    sudo /opt/stonechat/bin/stonechat-agent uninstall            # keeps keys, state and outbox
    sudo /opt/stonechat/bin/stonechat-agent uninstall --purge

Makes the user `stonechat`, /etc/stonechat with what the bundle holds, /var/lib/stonechat and the systemd unit, enables
and starts it. What it made is recorded in /etc/stonechat/installed.json, and uninstall takes back nothing else. Both
may be repeated. No link is followed; what was there before is neither overwritten nor given another owner.
"""

import argparse
import os
import shutil
import stat
import subprocess
import sys
import time

from ..errors import ConfigError, StonechatError
from . import bundle, shipped
from .install_record import RECORD, STATE, Record, digest
from .tree import Tree
from .unit import ETC, SERVICE, UNIT, USER, agent_command, unit_text

ACTS = {"install": "install the service from a bundle", "uninstall": "take back what install recorded"}
SECRETS = [ETC + "/" + name for name, (_, _, secret) in bundle.FILES.items() if secret] + [ETC + "/client.crt"]
_START_S = 20.0


class Installer:
    """Everything is read and checked first; only then is something changed, or with `dry` only printed."""

    def __init__(self, root: str = "/", dry: bool = False, say=print) -> None:
        self.tree = Tree(os.path.realpath(root))
        self.live = os.path.realpath(root) == "/"
        self.dry = dry
        self.say = say
        self.changed = False

    # --- install ------------------------------------------------------------------------------------------------------

    def install(self, path: str, start: bool = True) -> bool:
        """-> does it run (or was it not to be started)? Raises ConfigError, OSError."""
        files = bundle.read(path)
        settings = bundle.settings_of(files, ETC)
        command = agent_command(self.live)
        self._check_parents()
        record = Record(self.tree)
        model = ETC + "/model.tflite"
        if "model.tflite" not in files and settings["model"]["file"] == model and self._read(model) is None:
            name, why = shipped.choose()
            files["model.tflite"] = shipped.read(name)
            self.say("model: %s (%s)" % (name, why))
        self._check_named(settings, files)
        wanted = {ETC + "/" + name: data for name, data in files.items()}
        wanted[UNIT] = unit_text(command).encode()
        writes = self._what_differs(wanted, record)
        if bundle.readable_by_others(path):
            self.say("%s can be read by others, and holds the device's key: chmod 600 it, or remove it" % path)
        self._make_folder(ETC, 0o750, 0, 0, record)  # it holds the record of all that follows
        self._make_user(record)
        user_id, group_id = self._ids()
        self._make_folder(STATE, 0o700, user_id, group_id, record)
        if ETC in record.folders and not self.dry:
            self._give_group(group_id)
        self._check_readable(user_id, group_id)
        for target in writes:
            self._write(target, wanted[target], user_id, group_id, record)
        return self._start(record) if start else True

    def _check_parents(self) -> None:
        """Raises ConfigError where a folder is missing that every Linux system with systemd has."""
        for path in (os.path.dirname(ETC), os.path.dirname(STATE), os.path.dirname(UNIT)):
            if self.tree.stat(path) is None:
                hint = "install is for a system with systemd; start the agent by hand with --config FILE"
                if not self.live:
                    hint = "--root must be the root folder of a system's image"
                raise ConfigError("the folder %s is missing below %s: %s" % (path, self.tree.root, hint))

    def _what_differs(self, wanted: dict, record: Record) -> list:
        """The files to write. Raises ConfigError where one is in the way that install did not make."""
        writes = []
        for path, data in wanted.items():
            there = self._read(path)
            if there is None:
                writes.append(path)
            elif there == data:
                pass
            elif path not in record.files:
                raise ConfigError("%s is there already and not from install; move it away first" % path)
            elif digest(there) != record.files[path] and path == ETC + "/stonechat.toml":
                self.say("keep %s: it was changed since the installation" % path)
            else:
                writes.append(path)
        return writes

    def _read(self, path: str) -> "bytes | None":
        try:
            return self.tree.read(path)
        except PermissionError:
            if self.dry:  # by an ordinary user
                return None
            raise

    def _check_named(self, settings: dict, files: dict) -> None:
        """Is every file of ETC that the configuration names in the bundle or there? Raises ConfigError."""
        for section in settings.values():
            for key, value in section.items():
                named = isinstance(value, str) and value.startswith(ETC + "/") and value[len(ETC) + 1 :] not in files
                named = named and key != "off_file"  # the user makes that one, to switch monitoring off
                if named and self._read(value) is None:
                    raise ConfigError("the configuration names %s, which the bundle lacks" % value)

    def _make_user(self, record: Record) -> None:
        if self._entry("passwd") is not None:
            return
        command = ["useradd", "--system", "--no-create-home", "--home-dir", "/nonexistent"]
        command += ["--shell", "/usr/sbin/nologin"]
        group = self._entry("group")
        command += ["--gid", USER] if group is not None else ["--user-group"]
        if not self.live:
            command += ["--prefix", self.tree.root]
        self._change("user %s" % USER)
        if not self.dry:
            record.user, record.group = True, group is None
            record.save()
            _run([*command, USER])

    def _entry(self, name: str) -> "list | None":
        """The line of /etc/passwd or /etc/group for USER, in its fields."""
        if self.live:
            import grp
            import pwd

            try:
                found = pwd.getpwnam(USER) if name == "passwd" else grp.getgrnam(USER)
            except KeyError:
                return None
            return [str(field) for field in found]
        data = self.tree.read("/etc/" + name)
        for line in (data or b"").decode("utf-8", "replace").splitlines():
            if line.startswith(USER + ":"):
                return line.split(":")
        return None

    def _ids(self) -> "tuple[int, int]":
        entry = self._entry("passwd")
        if entry is None:
            if self.dry:
                return -1, -1
            raise ConfigError("the user %s could not be made; useradd did not say why" % USER)
        if int(entry[2]) == 0:
            raise ConfigError("the user %s is root; the agent must not be" % USER)
        return int(entry[2]), int(entry[3])

    def _make_folder(self, path: str, mode: int, user_id: int, group_id: int, record: Record) -> None:
        found = self.tree.stat(path)
        if found is not None and not stat.S_ISDIR(found.st_mode):
            raise ConfigError("%s is a link or no folder; move it away first" % path)
        if found is not None and path == ETC:
            if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
                raise ConfigError("%s can be written by others than root: chown root and chmod 750 it first" % path)
            if stat.S_IMODE(found.st_mode) == mode and found.st_gid == 0 and self.tree.is_empty(path):
                found = None  # made by an installation that was cut off before its first record
        if found is not None:
            return
        self._change("folder %s, mode %o" % (path, mode))
        if self.dry:
            return
        if path not in record.folders:
            record.folders.append(path)
        if path != ETC:
            record.save()  # before: a power cut between the two leaves nothing that uninstall does not know
        os.close(self.tree.folder(path, (mode, user_id, group_id)))
        record.save()

    def _check_readable(self, user_id: int, group_id: int) -> None:
        """Can the agent's user reach ETC, where that was there before? Raises ConfigError."""
        found = self.tree.stat(ETC)
        if found is None or self.dry:
            return
        bit = 0o100 if found.st_uid == user_id else 0o010 if found.st_gid == group_id else 0o001
        if not found.st_mode & bit:
            raise ConfigError("the user %s can't enter %s: chgrp %s and chmod 750 it first" % (USER, ETC, USER))

    def _give_group(self, group_id: int) -> None:
        fd = self.tree.folder(ETC)
        try:
            os.fchown(fd, 0 if os.geteuid() == 0 else -1, group_id)
            os.fchmod(fd, 0o750)
        finally:
            os.close(fd)

    def _write(self, path: str, data: bytes, user_id: int, group_id: int, record: Record) -> None:
        name = os.path.basename(path)
        _, mode, secret = bundle.FILES.get(name, (0, 0o644, False))
        self._change("file %s, mode %o%s" % (path, mode, ", of " + USER if secret else ""))
        if not self.dry:
            record.files[path] = digest(data)
            record.save()
            owner = user_id if secret else 0
            self.tree.write(path, data, mode, owner, group_id if mode & 0o040 and mode != 0o644 else 0)

    def _start(self, record: Record) -> bool:
        if not self.live:
            self.say("the unit starts %s: the image must have it at this path" % agent_command(False)[0])
            if shutil.which("systemctl"):
                self._change("enable %s" % SERVICE)
                if not self.dry:
                    _run(["systemctl", "--root", self.tree.root, "enable", SERVICE])
            return True
        if not os.path.isdir("/run/systemd/system"):
            command = " ".join([*agent_command(True), "--config", ETC + "/stonechat.toml"])
            self.say("systemd does not run here; start it so: %s" % command)
            return True
        active = _answer(["systemctl", "is-active", SERVICE]) == "active"
        enabled = _answer(["systemctl", "is-enabled", SERVICE]) == "enabled"
        if active and enabled and not self.changed:
            self.say("nothing to do: installed and running")
            return True
        self._change("enable and start %s" % SERVICE)
        if self.dry:
            return True
        _run(["systemctl", "daemon-reload"])
        _run(["systemctl", "enable", "--quiet", SERVICE])
        _run(["systemctl", "restart", SERVICE])
        return self._comes_up()

    def _comes_up(self) -> bool:
        """Does it stay up? A wrong configuration ends the agent within a second."""
        until_s = time.monotonic() + _START_S
        up_s = None
        while time.monotonic() < until_s:
            state = _answer(["systemctl", "show", "--value", "--property=SubState", SERVICE])
            if state == "running":
                up_s = up_s or time.monotonic()
                if time.monotonic() - up_s > 3:
                    self.say("%s is running; its messages: journalctl -u %s" % (SERVICE, SERVICE))
                    return True
            elif state in ("failed", "auto-restart"):
                break
            time.sleep(0.2)
        self.say("%s does not stay up; it says:" % SERVICE)
        self.say(_answer(["journalctl", "-u", SERVICE, "-n", "5", "-o", "cat", "--no-pager"]))
        return False

    # --- uninstall ----------------------------------------------------------------------------------------------------

    def uninstall(self, purge: bool = False) -> None:
        """Raises ConfigError, OSError."""
        record = Record(self.tree)
        if not record.there:
            self.say("nothing to do: no installation is recorded in %s" % RECORD)
            return
        self._stop(record)
        for path in list(record.files):
            there = self.tree.read(path)
            if there is None:
                record.files.pop(path)
            elif not purge and path in SECRETS:
                self.say("keep %s" % path)
            elif not purge and digest(there) != record.files[path]:
                self.say("keep %s: it was changed since the installation" % path)
            else:
                self._change("remove %s" % path)
                if not self.dry:
                    self.tree.remove(path)
                    record.files.pop(path)
                    record.save()
        if self.dry:
            self._say_what_else(record, purge)
            return
        if self.live and os.path.isdir("/run/systemd/system"):
            _run(["systemctl", "daemon-reload"])
        self._remove_folders(record, purge)

    def _say_what_else(self, record: Record, purge: bool) -> None:
        if purge:
            for path in record.folders:
                self.say("would remove folder %s" % path)
            if record.user:
                self.say("would remove user %s" % USER)

    def _remove_folders(self, record: Record, purge: bool) -> None:
        if STATE in record.folders and self.tree.remove_folder(STATE, all_of_it=purge):
            record.folders.remove(STATE)
        if not record.files and STATE not in record.folders:
            prefix = [] if self.live else ["--prefix", self.tree.root]
            if record.user and self._entry("passwd") is not None:
                self._change("remove user %s" % USER)
                _run(["userdel", *prefix, USER])
            if record.group and self._entry("group") is not None:  # userdel removes it on most systems
                _run(["groupdel", *prefix, USER])
            record.remove()
            if ETC in record.folders:
                self.tree.remove_folder(ETC)
            return
        record.save()
        self.say("kept: keys, state and outbox, and the user %s who owns them; --purge removes them" % USER)

    def _stop(self, record: Record) -> None:
        if UNIT not in record.files:
            return
        if self.live and os.path.isdir("/run/systemd/system"):
            self._change("stop and disable %s" % SERVICE)
            if not self.dry:
                _run(["systemctl", "disable", "--now", "--quiet", SERVICE], may_fail=True)
                _clear_tables()
        elif not self.live and shutil.which("systemctl") and not self.dry:
            _run(["systemctl", "--root", self.tree.root, "disable", SERVICE], may_fail=True)

    def _change(self, what: str) -> None:
        self.changed = True
        self.say("would make: " + what if self.dry and not what.startswith("remove") else self._verb(what))

    def _verb(self, what: str) -> str:
        return "would " + what if self.dry else what


def _clear_tables() -> None:
    """What a killed agent's response has left in the kernel; it stops nothing any more."""
    from .netfilter import clear

    try:
        clear()
    except OSError:  # no nf_tables: then nothing was ever set up
        pass


def _run(command: list, may_fail: bool = False) -> None:
    """Raises ConfigError with what the command said."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90)
    except FileNotFoundError:
        raise ConfigError("%s is not installed" % command[0])
    except subprocess.TimeoutExpired:
        raise ConfigError("%s takes too long" % " ".join(command))
    if done.returncode and not may_fail:
        raise ConfigError("%s: %s" % (" ".join(command), " ".join(done.stderr.split()) or done.returncode))


def _answer(command: list) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


# --- the command line -------------------------------------------------------------------------------------------------


def make_parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stonechat-agent " + verb, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if verb == "install":
        parser.add_argument("--bundle", required=True, metavar="FILE", help="what `stonechat provision add` made")
        parser.add_argument("--no-start", action="store_true", help="neither enable nor start the service")
    else:
        parser.add_argument("--purge", action="store_true", help="remove keys, state, outbox and user as well")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    parser.add_argument("--root", default="/", metavar="DIR", help="the root folder of an image to install into")
    return parser


def main(argv: list) -> int:
    """argv: ["install" or "uninstall", option ...] -> exit status: 0 done, 1 not (the message says why)."""
    args = make_parser(argv[0]).parse_args(argv[1:])
    try:
        if os.geteuid() and not args.dry_run:
            raise ConfigError("needs root: sudo %s/bin/stonechat-agent %s" % (sys.prefix, " ".join(argv)))
        installer = Installer(args.root, args.dry_run)
        if argv[0] == "uninstall":
            installer.uninstall(args.purge)
        elif not installer.install(args.bundle, not args.no_start):
            return 1
    except (StonechatError, OSError) as error:
        sys.stderr.write("stonechat-agent %s: %s\n" % (argv[0], error))
        return 1
    return 0
