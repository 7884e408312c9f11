"""The bundle: what provision makes, the device takes; of anything else it takes nothing."""

import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from stonechat.errors import ConfigError, StonechatError
from stonechat.linux import bundle, shipped
from stonechat_tools.fleet import provision

KEY = b"5a" * 32 + b"\n"


def archive(
    *entries: tuple[str, bytes], edit: Callable[[tarfile.TarInfo], None] = lambda _: None, **more: int
) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=more.get("format", tarfile.USTAR_FORMAT)) as tar:
        for name, data in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            edit(entry)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


GOOD = (("stonechat.toml", b"[device]\n"), ("device.key", KEY))


def test_what_provision_makes_is_taken(tmp_path: Path) -> None:
    fleet = provision.Fleet.init(tmp_path / "fleet", provision.Settings(broker="b", port=8883))
    folder = fleet.add("sensor-7")
    path = fleet.bundle("sensor-7")
    assert path.stat().st_mode & 0o777 == 0o600
    found = bundle.read(str(path))
    assert set(found) == {"stonechat.toml", "device.key", "ca.crt", "client.crt", "client.key"}
    assert all((folder / name).read_bytes() == data for name, data in found.items())
    first = path.read_bytes()
    fleet.rotate("sensor-7")
    assert bundle.read(str(path))["device.key"] == (folder / "device.key").read_bytes() and path.read_bytes() != first
    fleet.revoke("sensor-7")
    assert not path.exists()


def test_a_model_goes_along_and_stays_through_a_rotation(tmp_path: Path) -> None:
    fleet = provision.Fleet.init(tmp_path / "fleet", provision.Settings(broker="b", port=1883, auth="plain"))
    model = Path(shipped.path("linux-proc-1"))
    fleet.add("sensor-7", model)
    fleet.rotate("sensor-7")
    assert bundle.read(str(fleet.bundle("sensor-7")))["model.tflite"] == model.read_bytes()


@pytest.mark.parametrize("data", [b"", b"a model", bytes((1 << 20) + 1)])
def test_a_model_that_no_agent_takes_is_refused_before_anything_is_made(tmp_path: Path, data: bytes) -> None:
    fleet = provision.Fleet.init(tmp_path / "fleet", provision.Settings(broker="b", port=1883, auth="plain"))
    model = tmp_path / "my.tflite"
    model.write_bytes(data)
    with pytest.raises(StonechatError, match=r"--model .*my\.tflite: "):
        fleet.add("sensor-7", model)
    assert not (fleet.folder / "devices/sensor-7").exists() and fleet.devices == []


def refused(data: bytes) -> str:
    with pytest.raises(ValueError) as error:
        bundle.parse(data)
    return str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../device.key",
        "./device.key",
        "etc/device.key",
        "device.key/",
        "DEVICE.KEY",
        "x",
        "a" * 90,
        "\u00e9",
    ],
)
def test_only_names_of_the_list_are_taken(name: str) -> None:
    assert "not a file of a bundle" in refused(archive(*GOOD, (name, b"")))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"S", b"7"]
)
def test_only_regular_files_are_taken(kind: bytes) -> None:
    def edit(entry: tarfile.TarInfo) -> None:
        if entry.name == "ca.crt":
            entry.type = kind
            entry.linkname = "/etc/shadow"

    assert "ca.crt" in refused(archive(*GOOD, ("ca.crt", b""), edit=edit))  # a folder as `ca.crt/`


def test_other_forms_of_tar_are_refused() -> None:
    long_name = ("a" * 200, b"")
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert refused(archive(long_name, *GOOD, format=form))
    assert refused(b"\x1f\x8b" + archive(*GOOD))
    prefixed = bytearray(archive(*GOOD))
    prefixed[345:349] = b"/etc"
    assert refused(bytes(prefixed)) == "a damaged header"
    total = sum(prefixed[:148]) + 8 * 32 + sum(prefixed[156:512])
    prefixed[148:156] = b"%06o\0 " % total
    assert "not a file of a bundle" in refused(bytes(prefixed))


def test_sizes_are_bounded_before_anything_is_read() -> None:
    assert "at most 256 are taken" in refused(archive(GOOD[0], ("device.key", bytes(257))))
    assert "at most 1048576" in refused(archive(*GOOD, ("model.tflite", bytes((1 << 20) + 1))))
    assert bundle.parse(archive(*GOOD, ("model.tflite", bytes(1 << 20))))["model.tflite"] == bytes(1 << 20)


def test_a_file_twice_a_missing_one_and_a_tail_are_refused() -> None:
    assert refused(archive(*GOOD, GOOD[1])) == "it holds device.key twice"
    assert refused(archive(GOOD[0])) == "it lacks device.key"
    assert "behind its end" in refused(archive(*GOOD) + b"x")
    assert refused(b"") == "not a tar archive, or cut off"


def test_an_endless_file_is_not_read_whole(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="larger than"):
        bundle.read("/dev/zero")
    with pytest.raises(ConfigError, match="No such file"):
        bundle.read(str(tmp_path / "none.tar"))


def test_no_damage_gives_another_error_or_another_name() -> None:
    """Every cut, and 20,000 changed bytes: a ValueError, or names of the list with what they may hold."""
    data = archive(*GOOD, ("ca.crt", b"-----BEGIN"))
    for end in range(0, len(data), 7):
        try:
            bundle.parse(data[:end])
        except ValueError:
            continue
    random_bytes = random.Random(5)
    for _ in range(20_000):
        damaged = bytearray(data[:4096])
        for _ in range(random_bytes.randint(1, 4)):
            damaged[random_bytes.randrange(len(damaged))] = random_bytes.randrange(256)
        try:
            found = bundle.parse(bytes(damaged))
        except ValueError:
            continue
        assert set(found) <= set(bundle.FILES)
        assert all(len(held) <= bundle.FILES[name][0] for name, held in found.items())
