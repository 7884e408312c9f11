"""The folder of one fleet: its settings, CA, secrets, keys, and what devices, broker, collector and operator get."""

import contextlib
import json
import os
import re
import secrets
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stonechat.errors import ConfigError

from ..board_files import FOLDER, write_board
from ..console import read_toml, write_atomic
from . import certificates, keyring
from .broker_lists import acl, password_entries, password_entry
from .bundle import check_model, make_bundle
from .certificates import new_ca, pem, pem_key
from .changes import Unfinished
from .fleet_settings import ACCOUNTS, Settings

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

RESERVED = (
    "collector",
    "operator",
    "broker",
    "admin",
    "homeassistant",
    "homebridge",
)  # user names at the broker that no device may have
AUTHS = ("mtls", "passwords", "managed", "plain")
FOLDERS = ("keys", "secrets", "issued", "devices", "broker", "revoked", "operator", "operator/keys")


def write_file(path: Path, data: bytes | str, mode: int = 0o600) -> None:
    """write_atomic, for a secret where nothing else is given."""
    write_atomic(path, data, mode)


def no_link(path: Path) -> None:
    """Raises ConfigError for a link: what lies behind it is not the fleet's."""
    if path.is_symlink():
        raise ConfigError(f"{path}: is a link; put a folder of the fleet's own in its place")


def make_folder(path: Path) -> None:
    """A new folder is private; one that is there keeps its owner and mode."""
    no_link(path)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


class Fleet:
    """The folder of one fleet. Raises ConfigError where it is not one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            values = read_toml(folder / "fleet.toml")
            self.settings = Settings(**values)
        except OSError:
            raise ConfigError(f"{folder}: no fleet here; `stonechat provision init` makes one") from None
        except TypeError:
            wrong = sorted({"broker", "port"} - values.keys()) or sorted(values.keys() - vars(Settings("", 0)).keys())
            copy = f"keys/ and operator/keys/ of {folder} have copies"
            raise ConfigError(f"{folder}/fleet.toml: {', '.join(wrong)} missing or unknown; {copy}") from None
        for name, default in vars(Settings("", 0)).items():
            if type(values.get(name, default)) is not type(default):
                raise ConfigError(f"{folder}/fleet.toml: {name} is not a {type(default).__name__}")

    @classmethod
    def init(cls, folder: Path, settings: Settings) -> "Fleet":
        if (folder / "fleet.toml").exists():
            raise ConfigError(
                f"{folder}: there is a fleet already; `stonechat provision add DEVICE` adds to it, --dir makes another"
            )
        if folder.is_symlink() or folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder}: is there already and not empty; choose a new folder")
        settings.check()
        try:
            return cls._make(folder, settings)
        except BaseException:  # a full disk, ^C: half a fleet would be in the way of the next try
            shutil.rmtree(folder, ignore_errors=True)
            raise

    @classmethod
    def _make(cls, folder: Path, settings: Settings) -> "Fleet":
        for name in ("", *FOLDERS):
            make_folder(folder / name)
        if settings.auth != "plain":
            certificate, key = new_ca(f"stonechat fleet {settings.fleet}".encode()[:64].decode(errors="ignore"))
            write_file(folder / "ca.key", pem_key(key))
            write_file(folder / "ca.crt", pem(certificate), 0o644)
        fleet = cls._with(folder, settings)
        for name in ACCOUNTS:
            fleet._issue(name, folder / name)
        fleet.write_broker_lists()
        return fleet

    @classmethod
    def _with(cls, folder: Path, settings: Settings) -> "Fleet":
        """The fleet in `folder` with these settings, which are written where they are read."""
        for place in (folder, folder / "keys", folder / "operator/keys"):
            write_file(place / "fleet.toml", settings.to_toml())
        return cls(folder)

    def add_home_assistant(self, bridge: bool = False) -> Path:
        """Give Home Assistant an account -> the account's folder. It may read what is announced to it, and nothing
        else. bridge: it is announced by `stonechat home-assistant`, which gets an account too; else by the devices
        themselves. The accounts are there before the setting that grants something; where something fails, all is as
        before."""
        before = self.settings
        wanted = replace(before, home_bridge=True) if bridge else replace(before, home_assistant=True)
        self._check_folders(*(self.folder / name for name in wanted.accounts))
        added = [name for name in wanted.accounts if name not in before.accounts]
        kept = {name: (self._serials(name), (self.folder / name).exists()) for name in added}
        try:
            for name in added:
                self._issue(name, self.folder / name)
            if wanted != before:
                self.settings = wanted
                self._with(self.folder, wanted)
            self.write_broker_lists()
        except BaseException:
            self.settings = before
            with contextlib.suppress(OSError):
                self._with(self.folder, before)
                for name, (serials, was_there) in kept.items():
                    if not was_there:
                        shutil.rmtree(self.folder / name, ignore_errors=True)
                        (self.folder / "issued" / name).unlink(missing_ok=True)
                        self._write_serials(name, serials)
                self.write_broker_lists()
            raise
        return self.folder / "homeassistant"

    @property
    def devices(self) -> list[str]:
        return sorted(path.name[:-4] for path in (self.folder / "secrets").glob("*.key"))

    def secrets(self, device: str) -> list[bytes]:
        """Of a device: the current one, then that which is being rotated out. Raises ConfigError."""
        keyring.check_device_id(device)
        path = self.folder / "secrets" / (device + ".key")
        try:
            return keyring.read_secrets(path)
        except FileNotFoundError:
            known = ", ".join(self.devices) or "no devices"
            raise ConfigError(f"{device} is not in this fleet; there are {known}") from None
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None

    def _check_folders(self, *more: Path) -> None:
        """Before anything is changed: no folder that will be written to is a link. Raises ConfigError."""
        for path in (*(self.folder / name for name in FOLDERS), *more):
            no_link(path)

    def add(self, device: str, model: Path | None = None, board: bool = False) -> Path:
        """A new device -> the folder to copy to it. board: with files for a MicroPython board."""
        keyring.check_device_id(device)
        if device in RESERVED:
            raise ConfigError(f"{device} is the name of an account at the broker; choose another")
        unfinished = Unfinished(self.folder, device)
        if (self.folder / "secrets" / (device + ".key")).exists() and "add" not in unfinished:
            raise ConfigError(f"{device} is in the fleet already; `rotate` gives it new keys")
        if device.endswith(".tar") or self.bundle(device).is_dir():
            raise ConfigError(f"{device}: its files would have the place of another device's bundle; choose another id")
        place = self.folder / "devices" / device
        self._check_folders(place)
        secret = keyring.new_secret()
        data = check_model(model) if model else b""  # before anything is made
        with unfinished.marked("add"):
            self._issue(device, place)
            if model:
                write_file(place / "model.tflite", data, 0o644)
            if board:
                make_folder(place / FOLDER)
            self._hand_out(device, place, secret)
            self._write_keys(device, [secret])
            self.write_broker_lists()
        return place

    def rotate(self, device: str, board: bool = False) -> Path:
        """New keys; reports under the old ones are accepted until finish_rotation(). board: as for add(); files for a
        board that are there already are renewed without it. The account of a collector or operator has no key: it gets
        another certificate or password, in the folder that it has."""
        if device in self.settings.accounts:
            self._check_folders(self.folder / device)
            self._issue(device, self.folder / device)
            self.write_broker_lists()
            return self.folder / device
        current = self.secrets(device)
        unfinished = Unfinished(self.folder, device)
        if len(current) > 1 and "rotate" not in unfinished:
            raise ConfigError(
                f"{device} is being rotated already; run `stonechat provision finish-rotation {device}` first"
            )
        place = self.folder / "devices" / device
        self._check_folders(place)
        secret = current[0] if len(current) > 1 else keyring.new_secret()  # what was cut short goes on with its secret
        with unfinished.marked("rotate"):
            self._write_keys(device, [secret, current[-1]])  # the collector knows the new keys before the device
            self._issue(device, place)
            if board:
                make_folder(place / FOLDER)
            self._hand_out(device, place, secret)
            self.write_broker_lists()
        return place

    def finish_rotation(self, device: str) -> None:
        self._check_folders()
        if device not in self.settings.accounts:
            current = self.secrets(device)
            Unfinished(self.folder, device).check()
            self._write_keys(device, current[:1])
        serials = self._serials(device)
        self._revoke(device, serials[1:])
        self._write_serials(device, serials[:1])
        self.write_broker_lists()

    def revoke(self, device: str) -> None:
        """The collector forgets its keys and refuses its reports at once; the broker refuses its next connection after
        a SIGHUP (one that is open lasts until it ends: restart the broker to cut it). What was handed out to the device
        need not be here any more."""
        keyring.check_device_id(device)
        serials = self._serials(device) if device not in RESERVED else []
        if not serials and not os.path.lexists(self.folder / "secrets" / (device + ".key")):
            self.secrets(device)  # raises; a damaged one can be revoked
        self._check_folders()
        place = self.folder / "devices" / device
        if place.is_symlink():
            place.unlink()
        for name in ("secrets/%s.key", "keys/%s.keys", "operator/keys/%s.keys"):
            (self.folder / (name % device)).unlink(missing_ok=True)
        self._revoke(device, serials)
        (self.folder / "issued" / device).unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        self.bundle(device).unlink(missing_ok=True)
        Unfinished(self.folder, device).forget()
        self.write_broker_lists()

    def _write_keys(self, device: str, found: list[bytes]) -> None:
        """found: the device's secrets, the current one first. The keys of collector and operator are derived from
        them."""
        for place, labels in (("keys", keyring.COLLECTOR_LABELS), ("operator/keys", keyring.OPERATOR_LABELS)):
            make_folder(self.folder / place)
            write_file(self.folder / place / (device + ".keys"), keyring.derived_text(found, labels))
        write_file(self.folder / "secrets" / (device + ".key"), "".join(secret.hex() + "\n" for secret in found))

    def _issue(self, name: str, place: Path) -> None:
        """What `name` shows the broker: a certificate or a password."""
        make_folder(place)
        if self.settings.auth in ("mtls", "managed"):
            certificate, key = self.certificate(name)
            self._write_serials(name, [certificate.serial_number, *self._serials(name)])
            write_file(place / "client.key", pem_key(key))
            write_file(place / "client.crt", pem(certificate), 0o644)
        if self.settings.auth in ("mtls", "passwords"):
            write_file(place / "ca.crt", (self.folder / "ca.crt").read_bytes(), 0o644)
        if self.settings.auth == "passwords":
            write_file(place / "password", secrets.token_urlsafe(24) + "\n")

    def _hand_out(self, device: str, place: Path, secret: bytes) -> None:
        write_file(place / "device.key", secret.hex() + "\n")
        if not (place / "stonechat.toml").exists():  # somebody may have changed it
            write_file(place / "stonechat.toml", self.device_toml(device))
        write_file(self.bundle(device), make_bundle(place))
        if (place / FOLDER).exists():
            more: dict[str, Any] = {"fleet": self.settings.fleet, "prefix": self.settings.prefix}
            if self.settings.auth != "managed":
                more |= {"host": self.settings.broker, "port": self.settings.port}
            write_board(place, device, secret, self.settings.auth, more)

    def bundle(self, device: str) -> Path:
        """All that `stonechat-agent install` puts on the device, in one file."""
        return self.folder / "devices" / f"{device}.tar"

    def device_toml(self, device: str) -> str:
        lines = [f"# {device}, made by `stonechat provision`; `stonechat-agent --example-config` explains every key."]
        for section, values in self.settings.device_sections(device).items():
            lines += ["", f"[{section}]"] + [f"{name} = {json.dumps(value)}" for name, value in values.items()]
        return "\n".join(lines) + "\n"

    # --- certificates -----------------------------------------------------------------------------------------------

    def certificate(
        self, name: str, addresses: list[str] | None = None
    ) -> "tuple[x509.Certificate, ec.EllipticCurvePrivateKey]":
        """One signed by the fleet's CA: for a client, or with `addresses` (names or IPs) for the broker."""
        return certificates.issue(*certificates.load_ca(self.folder), name, addresses)

    def _serials(self, name: str) -> list[int]:
        """Of the certificates that `name` may use, the current one first."""
        try:
            return [int(line, 16) for line in (self.folder / "issued" / name).read_text().split()]
        except FileNotFoundError:
            return []
        except ValueError:
            raise ConfigError(f"{self.folder}/issued/{name}: want one serial number in hex a line") from None

    def _write_serials(self, name: str, serials: list[int]) -> None:
        if serials:
            make_folder(self.folder / "issued")
            write_file(self.folder / "issued" / name, "".join(f"{serial:x}\n" for serial in serials))

    def _revoke(self, name: str, serials: list[int]) -> None:
        for serial in serials:
            write_file(self.folder / "revoked" / f"{serial:x}", name + "\n")

    # --- what the broker needs ----------------------------------------------------------------------------------------

    def write_broker_lists(self, owner: tuple[int, int] | None = None) -> None:
        """broker/acl, passwd, crl.pem as they have to be now; a running mosquitto takes them up on SIGHUP. They keep
        their owners where none is given."""
        place = self.folder / "broker"
        if self.settings.auth == "managed":
            return
        make_folder(place)
        write_atomic(
            place / "acl",
            acl(self.settings.topics, self.settings.home_assistant, self.settings.home_bridge),
            0o600,
            owner,
        )
        if self.settings.auth == "passwords":
            accounts = [(name, self.folder / name) for name in self.settings.accounts]
            accounts += [(device, self.folder / "devices" / device) for device in self.devices]
            before = password_entries(place / "passwd")
            lines = [password_entry(name, home / "password", before) for name, home in accounts]
            write_atomic(place / "passwd", "".join(lines), 0o600, owner)
        if self.settings.auth == "mtls":
            write_atomic(place / "crl.pem", self._crl(), 0o644, owner)

    def _crl(self) -> bytes:
        names = (path.name for path in sorted((self.folder / "revoked").iterdir()))
        serials = [int(name, 16) for name in names if re.fullmatch("[0-9a-f]{1,40}", name)]
        return certificates.revocation_list(*certificates.load_ca(self.folder), serials)
