"""The files that `provision` makes: modes, configurations, what is refused."""

import errno
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stonechat.errors import ConfigError
from stonechat.linux import config, config_keys
from stonechat_tools.fleet import fleet_folder, keyring, provision


def test_secrets_are_private_and_stay_unprinted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from stonechat_tools.cli import main

    os.umask(0o022)
    base = str(tmp_path / "f")
    assert main(["provision", "--dir", base, "init", "--broker", "h", "--auth", "passwords"]) == 0
    assert main(["provision", "--dir", base, "add", "a", "b"]) == 0
    assert main(["provision", "--dir", base, "rotate", "a"]) == 0
    assert main(["provision", "--dir", base, "list"]) == 0
    assert main(["provision", "--dir", base, "revoke", "b"]) == 0
    assert main(["broker-config", "--dir", base, "--user", "nobody-at-all"]) == 0
    said = capsys.readouterr()
    secrets = [line for path in tmp_path.rglob("*.key") for line in path.read_text().split()]
    secrets += [path.read_text().strip() for path in tmp_path.rglob("password")]
    assert len(secrets) > 5
    for secret in secrets:
        assert secret not in said.out + said.err
    public = {"ca.crt", "client.crt", "server.crt", "old.crt", "crl.pem", "mosquitto.conf"}
    for path in tmp_path.rglob("*"):
        mode = path.stat().st_mode & 0o777
        if path.is_dir():
            assert mode == 0o700, path
        elif path.name not in public:
            assert mode == 0o600, path


@pytest.mark.parametrize("auth", provision.AUTHS)
def test_the_devices_configuration_is_one_the_agent_takes(auth: str, tmp_path: Path) -> None:
    port = 443 if auth == "managed" else 8883
    settings = provision.Settings(
        "b.example", port, fleet="west", prefix="v/1", auth=auth, alpn="mqtt", username_file="/u"
    )
    place = provision.Fleet.init(tmp_path / "f", settings).add("pump-1")
    loaded = config.load(str(place / "stonechat.toml"))
    assert loaded["device"]["id"] == "pump-1" and loaded["device"]["fleet"] == "west"
    assert loaded["mqtt"]["port"] == port and loaded["mqtt"]["alpn"] == "mqtt"
    assert loaded["mqtt"]["username_file"] == "/u"
    assert loaded["mqtt"]["tls"] is (auth != "plain")
    assert len(keyring.read_secrets(place / "device.key")[0]) == 32


def test_what_is_refused(tmp_path: Path) -> None:
    fleet = provision.Fleet.init(tmp_path / "f", provision.Settings("b", 8883, auth="plain"))
    fleet.add("pump-1")
    for bad in ("collector", "a/b", "+", "#", "", "..", "a b", "x" * 65, "pump-1"):
        with pytest.raises(ConfigError):
            fleet.add(bad)
    for bad in ("pump-9", "../keys/pump-1"):
        for act in (fleet.rotate, fleet.finish_rotation, fleet.revoke):
            with pytest.raises(ConfigError):
                act(bad)
    with pytest.raises(ConfigError):
        provision.Fleet(tmp_path)
    with pytest.raises(ConfigError):
        provision.Fleet.init(tmp_path / "f", provision.Settings("b", 8883))


@pytest.mark.parametrize(
    "settings",
    [
        {"fleet": "a/b"},
        {"fleet": "x" * 65},
        {"fleet": "x\udcff"},
        {"fleet": "x\ny"},
        {"prefix": "$SYS/x"},
        {"prefix": "x" * 129},
        {"alpn": "x" * 300},
        {"broker": "h h"},
        {"broker": "a..b"},
        {"broker": "[::1]"},
        {"broker": "mqtts://b"},
        {"install_dir": "relative"},
        {"install_dir": "/a\nb"},
        {"username_file": "/a\nb"},
    ],
)
def test_settings_that_the_agent_would_refuse_make_no_fleet(settings: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        provision.Fleet.init(tmp_path / "f", provision.Settings(**{"broker": "b", "port": 8883, **settings}))  # type: ignore[arg-type]
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("fleet", ["x" * 64, "\u00e9" * 32])
def test_the_longest_name_of_a_fleet(fleet: str, tmp_path: Path) -> None:
    place = provision.Fleet.init(tmp_path / "f", provision.Settings("b", 8883, fleet=fleet)).add("pump-1")
    assert config.load(str(place / "stonechat.toml"))["device"]["fleet"] == fleet


def test_no_device_has_the_place_of_another_ones_bundle(tmp_path: Path) -> None:
    fleet = provision.Fleet.init(tmp_path / "f", provision.Settings("b", 8883, auth="plain"))
    fleet.add("a")
    for bad in ("a.tar", "b.tar"):
        with pytest.raises(ConfigError, match="bundle"):
            fleet.add(bad)
    (fleet.folder / "devices" / "c.tar").mkdir()  # of a fleet that was made before
    with pytest.raises(ConfigError, match="bundle"):
        fleet.add("c")
    assert fleet.devices == ["a"] and not (fleet.folder / "devices" / "c").exists()


@pytest.mark.parametrize("name", [*provision.FOLDERS, "devices/a", "devices/b"])
def test_nothing_is_written_through_a_link(name: str, tmp_path: Path) -> None:
    fleet = provision.Fleet.init(tmp_path / "f", provision.Settings("b", 8883))
    fleet.add("a")
    away = tmp_path / "away"
    if (fleet.folder / name).exists():
        (fleet.folder / name).rename(away)
    else:
        away.mkdir()
    (fleet.folder / name).symlink_to(away)

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = files()
    for act, device in ((fleet.add, "b"), (fleet.rotate, "a"), (fleet.finish_rotation, "a"), (fleet.revoke, "a")):
        if name.startswith("devices/") and not (act.__name__ in ("add", "rotate") and name[-1] == device):
            continue  # the other device's, or nothing is written there
        with pytest.raises(ConfigError, match="is a link"):
            act(device)
        assert files() == before
    if name == "devices/a":
        behind = sorted(os.listdir(away))
        fleet.revoke("a")
        assert sorted(os.listdir(away)) == behind and not os.path.lexists(fleet.folder / name)
        assert fleet.devices == []


def test_agent_and_collector_take_the_same_device_ids() -> None:
    check = config_keys.KEYS["device"]["id"].check
    for device in ("a", "7", "a.", ".a", "-x", "A_b-C.9", "x" * 64, "", ".", "..", "-", "_", "x" * 65, "a b", "\u00e9"):
        try:
            keyring.check_device_id(device)
            taken = True
        except ConfigError:
            taken = False
        assert (check(device) is None) == taken, device


def test_the_name_of_a_broker_in_its_certificate(tmp_path: Path) -> None:
    from cryptography import x509

    fleet = provision.Fleet.init(tmp_path / "f", provision.Settings("b", 8883))
    certificate, _ = fleet.certificate("broker", ["b\u00fccher.example", "::1"])
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["xn--bcher-kva.example"]
    for bad in ("a b", "a..b", "x" * 70, "", "\udcff"):
        with pytest.raises(ConfigError, match="host"):
            fleet.certificate("broker", [bad])


def test_the_collector_and_the_operator_hold_only_what_they_need(tmp_path: Path) -> None:
    fleet = provision.Fleet.init(tmp_path / "f", provision.Settings("b", 8883, auth="plain"))
    place = fleet.add("pump-1")
    secret = keyring.read_secrets(place / "device.key")[0]
    whole = keyring.DeviceKeys(secret, "pump-1")
    (collector,) = keyring.Keys(fleet.folder / "keys").of("pump-1")
    (operator,) = keyring.Keys(fleet.folder / "operator/keys").of("pump-1")
    assert collector.ack.seal(b"x") == whole.ack.seal(b"x") and operator.command.seal(b"x") == whole.command.seal(b"x")
    for theirs in ("keys", "collector", "operator"):
        for path in (fleet.folder / theirs).rglob("*"):
            assert path.is_dir() or secret.hex() not in path.read_text()
    assert whole.command._key.hex() not in (fleet.folder / "keys/pump-1.keys").read_text()
    fleet.rotate("pump-1")
    assert len(keyring.Keys(fleet.folder / "keys").of("pump-1")) == 2
    fleet.finish_rotation("pump-1")
    (now,) = keyring.Keys(fleet.folder / "keys").of("pump-1")
    assert now.fingerprint != collector.fingerprint
    fleet.revoke("pump-1")
    assert not list(fleet.folder.rglob("pump-1*"))


def test_rotate_leaves_a_configuration_that_somebody_edited(tmp_path: Path) -> None:
    fleet = provision.Fleet.init(tmp_path / "f", provision.Settings("b", 8883))
    place = fleet.add("pump-1")
    edited = (place / "stonechat.toml").read_text() + "\n[report]\nheartbeat_windows = 5\n"
    (place / "stonechat.toml").write_text(edited)
    before = (place / "device.key").read_text()
    fleet.rotate("pump-1")
    assert (place / "stonechat.toml").read_text() == edited and (place / "device.key").read_text() != before
    (place / "stonechat.toml").unlink()
    fleet.finish_rotation("pump-1")
    fleet.rotate("pump-1")
    assert "heartbeat_windows" not in (place / "stonechat.toml").read_text()


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir(mode=0o755)
    (tmp_path / "etc/passwd").write_text("theirs")
    os.chmod(tmp_path / "etc", 0o755)
    with pytest.raises(ConfigError, match="not empty"):
        provision.Fleet.init(tmp_path / "etc", provision.Settings("b", 8883))
    assert (tmp_path / "etc").stat().st_mode & 0o777 == 0o755 and os.listdir(tmp_path / "etc") == ["passwd"]
    (tmp_path / "link").symlink_to(tmp_path / "etc")
    with pytest.raises(ConfigError):
        provision.Fleet.init(tmp_path / "link", provision.Settings("b", 8883))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_what_belongs_to_another_account_still_does_after_it_was_replaced(tmp_path: Path) -> None:
    fleet = provision.Fleet.init(tmp_path / "f", provision.Settings("b", 8883, auth="passwords"))
    fleet.add("pump-1")
    keys = fleet.folder / "keys"
    for path in (keys, *keys.iterdir(), fleet.folder / "devices/pump-1", fleet.folder / "devices/pump-1/device.key"):
        os.chown(path, 65534, 65534)
    os.chmod(keys / "pump-1.keys", 0o640)
    fleet.rotate("pump-1")
    fleet.add("pump-2")
    assert {path.name: (path.stat().st_uid, path.stat().st_mode & 0o777) for path in keys.iterdir()} == {
        "fleet.toml": (65534, 0o600),
        "pump-1.keys": (65534, 0o640),
        "pump-2.keys": (65534, 0o600),
    }
    assert (fleet.folder / "devices/pump-1/device.key").stat().st_uid == 65534
    assert (fleet.folder / "secrets/pump-2.key").stat().st_uid == 0


@pytest.mark.slow(9)
@pytest.mark.parametrize("auth", ["mtls", "passwords"])
def test_home_assistant_is_let_in_wholly_or_not_at_all(
    auth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever write fails: settings, account and the broker's lists are as before, and it can be done again."""
    made = provision.Fleet.init(tmp_path / "f", provision.Settings("b", 1883, auth=auth))
    made.add("pump-1")

    def files() -> dict[str, bytes]:
        left_out = ("crl.pem",)  # it has a date
        found = [path for path in made.folder.rglob("*") if path.is_file() and path.name not in left_out]
        return {str(path.relative_to(made.folder)): path.read_bytes() for path in found}

    before, whole = files(), fleet_folder.write_atomic
    for fails_at in range(1, 40):
        count = 0

        def limited(path: Path, data: bytes | str, mode: int = 0o600, *more: Any, at: int = fails_at) -> None:
            nonlocal count
            count += 1
            if count == at:
                raise OSError(28, "No space left on device")
            whole(path, data, mode, *more)

        with monkeypatch.context() as patch:
            patch.setattr(fleet_folder, "write_atomic", limited)
            try:
                provision.Fleet(made.folder).add_home_assistant()
            except OSError:
                assert files() == before, fails_at
                continue
        break
    assert fails_at > 2
    assert provision.Fleet(made.folder).settings.home_assistant
    assert (made.folder / "homeassistant").is_dir() and "homeassistant" in (made.folder / "broker/acl").read_text()


class Cut:
    """Every file that a change writes passes here; the `fail`-th is not written, as on a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail = self.calls = 0
        for name in ("write_file", "write_atomic", "write_board"):
            real = getattr(fleet_folder, name)

            def write(*args: Any, real: Any = real, **more: Any) -> Any:
                self.calls += 1
                if self.calls == self.fail:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*args, **more)

            monkeypatch.setattr(fleet_folder, name, write)

    def run(self, change: Callable[[], Any], fail: int) -> bool:
        """-> whether the change was whole, because it writes fewer files."""
        self.fail, self.calls = fail, 0
        try:
            change()
        except OSError:
            return False
        finally:
            self.fail = 0
        return True


@pytest.mark.slow(9)
@pytest.mark.parametrize("auth", ["mtls", "passwords"])
def test_a_change_that_is_cut_short_at_any_file_can_be_made_again(
    auth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = provision.Settings("h", 1, auth=auth)
    cut = Cut(monkeypatch)
    number = 1
    while not cut.run(lambda: provision.Fleet.init(tmp_path / "f", settings), number):
        assert not (tmp_path / "f").exists()
        number += 1
    assert number > 3
    fleet = provision.Fleet(tmp_path / "f")

    def works(device: str, *old: bytes) -> bytes:
        """The keys of collector and operator are those of the bundle, then the old; the broker has the account."""
        key = bytes.fromhex((fleet.folder / "devices" / device / "device.key").read_text())
        with tarfile.open(fleet.bundle(device)) as bundle:
            file = bundle.extractfile("device.key")
            assert file is not None and bytes.fromhex(file.read().decode()) == key
        for folder, labels in (("keys", keyring.COLLECTOR_LABELS), ("operator/keys", keyring.OPERATOR_LABELS)):
            text = (fleet.folder / folder / f"{device}.keys").read_text()
            assert text == keyring.derived_text([key, *old], labels)
        assert auth != "passwords" or device in (fleet.folder / "broker/passwd").read_text()
        return key

    number = 1
    while True:
        device = f"d-{number}"
        if cut.run(lambda: fleet.add(device, board=True), number):  # noqa: B023
            break
        fleet.add(device, board=True)
        works(device)
        number += 1
    assert number > 5 and not [path for path in (fleet.folder / "secrets").iterdir() if path.suffix != ".key"]
    with pytest.raises(ConfigError, match="already"):
        fleet.add("d-1")
    number = 1
    while True:
        device = f"r-{number}"
        fleet.add(device)
        installed = works(device)
        if cut.run(lambda: fleet.rotate(device), number):  # noqa: B023
            break
        with pytest.raises(ConfigError, match=f"provision rotate {device}"):
            fleet.finish_rotation(device)
        with pytest.raises(ConfigError, match="already"):
            fleet.add(device)  # it would end the key that the device has
        fleet.rotate(device)
        new = works(device, installed)
        assert new != installed
        with pytest.raises(ConfigError, match="finish-rotation"):
            fleet.rotate(device)
        fleet.finish_rotation(device)
        assert fleet.secrets(device) == [new]
        number += 1
    assert number > 5


def test_two_provisions_at_once_lose_no_device(tmp_path: Path) -> None:
    base = tmp_path / "f"
    provision.Fleet.init(base, provision.Settings("h", 1, auth="passwords"))
    command = [sys.executable, "-m", "stonechat_tools.cli", "provision", "--dir", str(base), "add"]
    adding = [subprocess.Popen([*command, f"d-{i}", f"e-{i}"], stdout=subprocess.DEVNULL) for i in range(4)]
    assert [each.wait(120) for each in adding] == [0] * 4
    accounts = {line.split(":")[0] for line in (base / "broker/passwd").read_text().splitlines()}
    assert {f"{kind}-{i}" for kind in "de" for i in range(4)} <= accounts


@pytest.mark.parametrize("auth", ["mtls", "passwords"])
def test_an_account_can_be_renewed_as_a_device_can(auth: str, tmp_path: Path) -> None:
    fleet = provision.Fleet.init(tmp_path / "f", provision.Settings("h", 1, auth=auth))
    place = fleet.folder / "collector"
    file = place / ("client.crt" if auth == "mtls" else "password")
    before = file.read_bytes()
    assert fleet.rotate("collector") == place and file.read_bytes() != before
    serials = fleet._serials("collector")
    fleet.finish_rotation("collector")
    assert [f"{serial:x}" for serial in serials[1:]] == [path.name for path in (fleet.folder / "revoked").iterdir()]
    assert fleet.devices == []
    with pytest.raises(ConfigError, match="not in this fleet"):
        fleet.rotate("homebridge")


@pytest.mark.parametrize(
    ("text", "says"), [("", "broker, port missing"), ('broker = "h"\nport = 1\nx = 2\n', "x missing or unknown")]
)
def test_a_cut_or_foreign_fleet_toml_names_its_copies(text: str, says: str, tmp_path: Path) -> None:
    fleet = provision.Fleet.init(tmp_path / "f", provision.Settings("h", 1, auth="plain"))
    (fleet.folder / "fleet.toml").write_text(text)
    with pytest.raises(ConfigError, match=says) as raised:
        provision.Fleet(fleet.folder)
    assert "keys/" in str(raised.value)
    (fleet.folder / "fleet.toml").write_bytes((fleet.folder / "operator/keys/fleet.toml").read_bytes())
    assert provision.Fleet(fleet.folder).settings == fleet.settings


@pytest.mark.parametrize("file", ["ca.key", "ca.crt"])
@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "another"])
def test_a_damaged_ca_is_one_line_and_changes_nothing(file: str, damage: str, tmp_path: Path) -> None:
    settings = provision.Settings("h", 1)
    fleet = provision.Fleet.init(tmp_path / "f", settings)
    other = provision.Fleet.init(tmp_path / "g", settings)
    path = fleet.folder / file
    whole = path.read_bytes()
    noise = {"cut": whole[:60], "empty": b"", "noise": bytes(range(256)), "another": (other.folder / file).read_bytes()}
    path.write_bytes(noise[damage])
    with pytest.raises(ConfigError, match="from a backup"):
        fleet.add("pump-1")
    path.write_bytes(whole)
    fleet.add("pump-1")


def test_the_list_has_the_others_where_one_key_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from stonechat_tools.cli import main

    fleet = provision.Fleet.init(tmp_path / "f", provision.Settings("h", 1, auth="plain"))
    for device in ("a", "b", "c"):
        fleet.add(device)
    (fleet.folder / "secrets/b.key").write_text("zz\n")
    assert main(["provision", "--dir", str(fleet.folder), "list"]) == 0
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == ["a", "b", "c"] and "damaged" in said.out
    assert said.err.count("\n") == 1 and "b.key" in said.err and "backup" in said.err
    assert main(["provision", "--dir", str(fleet.folder), "revoke", "b"]) == 0
    assert main(["provision", "--dir", str(fleet.folder), "add", "b"]) == 0
