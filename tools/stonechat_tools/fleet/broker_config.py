"""Write a mosquitto configuration for the fleet: TLS, one account a device, its own topics and no others.

The access list, the passwords or the revocation list are those of `stonechat provision` in the same folder; after a
change there, send mosquitto a SIGHUP. A device's user name is its id (the certificate's CN with mutual TLS) and becomes
its client id too, so that no device can take over another's session.

Examples:
  stonechat broker-config --name broker.example.org
  stonechat broker-config --dir fleet --listen 127.0.0.1 --name localhost --name 127.0.0.1
  mosquitto -c fleet/broker/mosquitto.conf
  stonechat broker-config --install-dir /etc/mosquitto/conf.d   # for the broker's machine: copy broker/* there
"""

import argparse
import os
import pwd
import shutil
import stat
import sys
from pathlib import Path

from stonechat.errors import ConfigError

from ..console import write_atomic
from .certificates import pem, pem_key
from .changes import alone
from .local_broker import mosquitto_path
from .provision import Fleet

HELP = "write a mosquitto configuration for the fleet"
HOLDS_KEYS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", default="fleet", metavar="FOLDER", help="the fleet's folder (default %(default)s)")
    parser.add_argument(
        "--listen", metavar="ADDRESS", help="default: every interface; without TLS the machine itself only (127.0.0.1)"
    )
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        help="another name or address of the broker, beside that of `provision init`",
    )
    parser.add_argument(
        "--user", default="mosquitto", help="who mosquitto becomes when started as root (default %(default)s)"
    )
    parser.add_argument(
        "--install-dir",
        metavar="FOLDER",
        help="where the files will be on the broker's machine, such as /etc/mosquitto/conf.d (default: broker/)",
    )


def configuration(fleet: Fleet, listen: str | None, user: str, place: Path) -> str:
    """The text of mosquitto.conf (mosquitto 2.0), alone or in Debian's conf.d. place: where the files lie."""
    settings = fleet.settings
    if listen is None:
        listen = "127.0.0.1" if settings.auth == "plain" else ""
    lines = [
        f"# mosquitto for the fleet {settings.fleet}, written by `stonechat broker-config`.",
        "# Nothing here asks for persistence: devices keep a report until the collector has it in its database.",
        *([f"user {user}"] if user != "mosquitto" else []),
        "per_listener_settings true",
        "# For a collector that is away.",
        "max_queued_messages 20000",
        "max_packet_size 65536",
        f"listener {settings.port} {listen}".rstrip(),
    ]
    if settings.auth == "plain":
        return (
            "\n".join([*lines, "# plain: no TLS and no accounts, for one machine only", "allow_anonymous true"]) + "\n"
        )
    lines += [
        f"acl_file {place}/acl",
        "allow_anonymous false",
        "# TLS 1.2 and 1.3 are mosquitto's default.",
        f"cafile {place}/ca.crt",
        f"certfile {place}/server.crt",
        f"keyfile {place}/server.key",
        "use_username_as_clientid true",
    ]
    if settings.auth == "mtls":
        lines += ["require_certificate true", "use_identity_as_username true", f"crlfile {place}/crl.pem"]
    else:
        lines += [f"password_file {place}/passwd"]
    return "\n".join(lines) + "\n"


def write(
    fleet: Fleet,
    listen: str | None = None,
    names: list[str] | None = None,
    user: str = "mosquitto",
    install_dir: Path | None = None,
) -> Path:
    """Everything into the fleet's broker/ -> the path of mosquitto.conf. Its certificate is for `names`, and always for
    the name that the devices were given.

    Run by root, the files belong to `user`, who can put no others beside them: the folder stays root's. From then on
    `provision` keeps owner and mode of the lists that it replaces."""
    if fleet.settings.auth == "managed":
        raise ConfigError("this fleet's broker is managed elsewhere: upload devices/NAME/client.crt there")
    place = fleet.folder / "broker"
    if place.is_symlink():
        raise ConfigError(f"{place}: is a link; the broker's files are only written into a folder of the fleet's own")
    owner = _account(user)
    fleet.write_broker_lists(owner)
    text = configuration(fleet, listen, user, install_dir or place.resolve())
    files: dict[str, tuple[bytes, int]] = {"mosquitto.conf": (text.encode(), 0o644)}
    if fleet.settings.auth != "plain":
        certificate, key = fleet.certificate("broker", list(dict.fromkeys([*(names or []), fleet.settings.broker])))
        files["server.key"] = (pem_key(key), 0o600)
        files["server.crt"] = (pem(certificate), 0o644)
        files["ca.crt"] = ((fleet.folder / "ca.crt").read_bytes(), 0o644)
    for name, (data, mode) in files.items():
        write_atomic(place / name, data, mode, owner)
    if owner and os.geteuid() == 0:
        _open_to(owner[1], place)
    return place / "mosquitto.conf"


def _account(user: str) -> tuple[int, int] | None:
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        return None
    return account.pw_uid, account.pw_gid


def _open_to(group: int, place: Path) -> None:
    """Let a group into broker/, and everybody through the fleet's folder to it, where both are root's own and closed;
    nothing else is changed."""
    for folder, owner, mode in ((place, group, 0o750), (place.parent, -1, 0o711)):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            found = os.fstat(handle)
            if found.st_uid == 0 and group and stat.S_IMODE(found.st_mode) == 0o700:
                os.fchown(handle, -1, owner)
                os.fchmod(handle, mode)
        finally:
            os.close(handle)


def closed_folder(place: Path, user: str) -> Path | None:
    """The first folder on the way to `place` that `user` can't pass, None where there is none."""
    owner = _account(user)
    place = place.resolve()
    for folder in reversed([place, *place.parents]):
        found = folder.stat()
        if owner is None or owner[0] in (0, found.st_uid):
            continue
        if not found.st_mode & (stat.S_IXGRP if found.st_gid == owner[1] else stat.S_IXOTH):
            return folder
    return None


def run(args: argparse.Namespace) -> int:
    fleet = Fleet(Path(args.dir))
    there = Path(args.install_dir) if args.install_dir else None
    if there and not there.is_absolute():
        raise ConfigError(f"--install-dir {there}: want an absolute path")
    with alone(fleet.folder):
        path = write(fleet, args.listen, args.name or None, args.user, there)
    if there:
        print(f"{path.parent}: copy its files to {there} and give them to {args.user}: chown {args.user}: {there}/*")
        return 0
    found = mosquitto_path()
    program = "mosquitto" if shutil.which("mosquitto") or not found else found  # Debian has it in /usr/sbin
    print(f"{path}: {program} -c {path}" + ("" if found else "   (not installed here: apt-get install mosquitto)"))
    closed = closed_folder(path.parent, args.user) if os.geteuid() == 0 else None
    if closed:
        said = f"{args.user} can't pass {closed}: copy {path.parent} to where it can, see --install-dir"
        print(f"stonechat broker-config: {said}", file=sys.stderr)
    return 0
