"""`stonechat release`: keys, signatures, what a manifest holds, and everything that must be refused."""

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cbor2
import pycddl
import pytest
import stonechat
from stonechat import manifest
from stonechat.errors import ConfigError, StonechatError, WireError
from stonechat.linux import shipped
from stonechat.manifest import rules_of
from stonechat.response import Response
from stonechat_tools import cli
from stonechat_tools.release import keys, make

CDDL = (Path(stonechat.__file__).parent / "release.cddl").read_text()
MODEL = "linux-1"


@pytest.fixture(scope="module")
def vendor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vendor.key (release, SLH-DSA), officer.key (officer, HSS) and pw, their passphrase."""
    folder = tmp_path_factory.mktemp("vendor")
    (folder / "pw").write_text("correct horse\n")
    (folder / "pw").chmod(0o600)
    keys.make(folder / "vendor.key", "release", keys.SLH_DSA, b"correct horse")
    keys.make(folder / "officer.key", "officer", keys.HSS, b"correct horse")
    return folder


def run(vendor: Path, *args: str) -> int:
    return cli.main(
        ["release", *args, *(["--passphrase-file", str(vendor / "pw")] if args[0] in ("sign", "keygen") else [])]
    )


def sign(vendor: Path, out: Path, *more: str, model: str = MODEL, version: int = 3) -> None:
    common = ("--key", str(vendor / "vendor.key"), "--class", "pump", "--version", str(version), "--out", str(out))
    assert run(vendor, "sign", *([model] if model else []), *common, *more) == 0


def test_two_keys_sign_and_the_device_takes_it(
    vendor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = tmp_path / "pump-3"
    sign(vendor, release, "--notes", "quieter at night", "--floor", "2", "--forbid-own-model")
    public = [str(vendor / name) for name in ("vendor.key.pub", "officer.key.pub")]
    capsys.readouterr()
    assert cli.main(["release", "verify", str(release), "--keys", *public]) == 1
    assert "no valid signature of the security officer" in capsys.readouterr().err
    assert run(vendor, "sign", "--add", str(release), "--key", str(vendor / "officer.key")) == 0
    assert cli.main(["release", "verify", str(release), "--keys", *public]) == 0
    message = (release / "manifest.cbor").read_bytes()
    pycddl.Schema("start = signed-manifest\n" + CDDL).validate_cbor(message)
    packed = make.frame(message)[2]
    pycddl.Schema("start = manifest\n" + CDDL).validate_cbor(packed)
    held = [(keys.ROLES[key.role], key.data) for path in public for key in keys.read_public(Path(path))]
    found = manifest.unseal(message, held)
    data = Path(shipped.path(MODEL)).read_bytes()
    assert found.model[:2] == [hashlib.sha256(data).digest(), len(data)]
    assert (found.version, found.floor, found.device_class, found.notes) == (3, 2, "pump", "quieter at night")
    assert found.own_model is False
    assert found.sbom == hashlib.sha256((release / "sbom.cdx.json").read_bytes()).digest()
    # signing again with a key that has signed, or with a third, is refused
    assert run(vendor, "sign", "--add", str(release), "--key", str(vendor / "vendor.key")) == 1
    assert "has signed this manifest already" in capsys.readouterr().err


def test_alarm_rules_are_a_release_of_their_own(
    vendor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sign(vendor, tmp_path / "r", "--rule", "1.5:4:12", "--rule", "3:9:9.25", model="")
    shown = capsys.readouterr().out
    assert "1.5:4:12" in shown and "3:9:9.25" in shown
    found = manifest.read(make.frame((tmp_path / "r" / "manifest.cbor").read_bytes())[2])
    assert found.rules == [[384, 1024, 3072], [768, 2304, 2368]] and found.model is None
    assert not (tmp_path / "r" / "model.tflite").exists()
    assert cli.main(["release", "verify", str(tmp_path / "r"), "--keys", str(vendor / "vendor.key.pub")]) == 0
    common = ["--key", str(vendor / "vendor.key"), "--class", "pump", "--version", "3", "--out", str(tmp_path / "s")]
    for rule in ("4:1.5:12", "0:4:12", "1:200:12", "1:2:5000"):  # nothing is written
        assert run(vendor, "sign", "--rule", rule, *common) == 1
        assert "allowance < cap" in capsys.readouterr().err
    for rule in ("1:2", "a:b:c", "nan:2:3", "inf:2:3", ""):
        with pytest.raises(SystemExit):
            run(vendor, "sign", "--rule", rule, *common)
        assert "want ALLOWANCE:CAP:THRESHOLD" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_the_bill_of_materials_is_cyclonedx(vendor: Path, tmp_path: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    sign(vendor, tmp_path / "a")
    sign(vendor, tmp_path / "b")
    bill = (tmp_path / "a" / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill) is None
    assert bill == (tmp_path / "b" / "sbom.cdx.json").read_text()


def test_what_was_not_signed_is_refused(vendor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = tmp_path / "pump-3"
    sign(vendor, release)
    public = str(vendor / "vendor.key.pub")
    other = Path(shipped.path("linux-proc-1")).read_bytes()
    cases = (
        ("model.tflite", other, "is not the model that was signed"),
        ("model.tflite", b"", "is not the model that was signed"),
        ("sbom.cdx.json", b"{}", "is not the bill of materials that was signed"),
        ("manifest.cbor", b"", "cbor: malformed"),
        ("manifest.cbor", bytes(manifest.MOST_BYTES + 1), "is it the right file?"),
    )
    for name, data, error in cases:
        good = (release / name).read_bytes()
        (release / name).write_bytes(data)
        assert cli.main(["release", "verify", str(release), "--keys", public]) == 1
        assert error in capsys.readouterr().err
        (release / name).write_bytes(good)
    assert cli.main(["release", "verify", str(release), "--keys", str(vendor / "officer.key.pub")]) == 1
    assert "security officer" in capsys.readouterr().err
    assert cli.main(["release", "verify", str(release), "--keys", public]) == 0


def test_an_expired_release_is_refused(
    vendor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as then:
        then.setattr(time, "time", lambda: 1_735_700_000.0)  # 2025-01-01
        sign(vendor, tmp_path / "old", "--days", "30")
    assert cli.main(["release", "verify", str(tmp_path / "old"), "--keys", str(vendor / "vendor.key.pub")]) == 1
    assert "expired on 2025-01-31" in capsys.readouterr().err


def test_a_device_whose_clock_is_hours_behind_takes_a_new_release(vendor: Path, tmp_path: Path) -> None:
    sign(vendor, tmp_path / "new", "--days", "30")
    found = manifest.read(manifest.payload((tmp_path / "new/manifest.cbor").read_bytes()))
    assert found.not_before_s < time.time() - 20 * 3600
    assert 29 * 86400 < found.expires_s - time.time() <= 30 * 86400


def test_keys_rotate_under_the_old_key(vendor: Path, tmp_path: Path) -> None:
    new = keys.make(tmp_path / "new.key", "release", keys.SLH_DSA, b"another one")
    sign(vendor, tmp_path / "r", "--next-keys", str(tmp_path / "new.key.pub"), model="")
    held = [(keys.ROLES[key.role], key.data) for key in keys.read_public(vendor / "vendor.key.pub")]
    found = manifest.unseal((tmp_path / "r" / "manifest.cbor").read_bytes(), held)
    assert found.keys == [[0, new.data]] and found.model is None
    with pytest.raises(WireError):
        manifest.unseal((tmp_path / "r" / "manifest.cbor").read_bytes(), [(0, new.data)])


def test_secrets_have_their_modes_and_are_never_printed(
    vendor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.umask(before := os.umask(0))
    os.umask(0)
    try:
        assert run(vendor, "keygen", str(tmp_path / "k")) == 0
    finally:
        os.umask(before)
    out = capsys.readouterr()
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    private = json.loads((tmp_path / "k").read_text())["private"]
    assert private not in out.out + out.err
    assert keys.read_public(tmp_path / "k.pub")[0].line() in out.out
    assert run(vendor, "keygen", str(tmp_path / "k")) == 1
    assert "never overwritten" in capsys.readouterr().err
    (tmp_path / "k").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        keys.SigningKey(tmp_path / "k", b"correct horse")


def test_a_wrong_passphrase_or_a_damaged_key_is_one_clear_error(vendor: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="passphrase is wrong"):
        keys.SigningKey(vendor / "vendor.key", b"wrong horse")
    fields = json.loads((vendor / "vendor.key").read_text())
    place = tmp_path / "k"
    for name, value in (
        ("private", fields["private"][:-2]),
        ("private", "zz"),
        ("salt", "00" * 16),
        ("log2_n", 40),
        ("log2_n", "17"),
        ("public", "00" * 32),
        ("public", "00"),
        ("role", "root"),
        ("algorithm", "rsa"),
        ("algorithm", []),
        ("format", "2"),
    ):
        place.write_text(json.dumps(fields | {name: value}))
        place.chmod(0o600)
        with pytest.raises(ConfigError):
            keys.SigningKey(place, b"correct horse")
    for text in ("", "[]", "null", "{}", "\0"):
        place.write_text(text)
        with pytest.raises(ConfigError):
            keys.SigningKey(place, b"correct horse")


def test_a_leaf_is_on_the_disk_before_its_signature_leaves(vendor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = keys.SigningKey(vendor / "officer.key", b"correct horse")
    before = keys.leaves_used(key.path)

    class Ended(Exception):
        pass

    def end(*_: object) -> None:
        assert keys.leaves_used(key.path) == before + 1
        raise Ended

    monkeypatch.setattr(keys, "_lms", end)
    with pytest.raises(Ended):
        key.sign(b"message")
    assert keys.leaves_used(key.path) == before + 1


def test_a_copied_restored_or_missing_state_is_refused(vendor: Path, tmp_path: Path) -> None:
    for name in ("officer.key", "officer.key.state"):
        shutil.copy2(vendor / name, tmp_path / name)
    copy = keys.SigningKey(tmp_path / "officer.key", b"correct horse")
    with pytest.raises(ConfigError, match="is a copy or was restored"):
        copy.sign(b"message")
    os.unlink(tmp_path / "officer.key.state")
    os.link(vendor / "officer.key.state", tmp_path / "officer.key.state")
    try:
        with pytest.raises(ConfigError, match="is a copy or was restored"):
            copy.sign(b"message")
    finally:
        os.unlink(tmp_path / "officer.key.state")
    with pytest.raises(ConfigError, match="is missing"):
        copy.sign(b"message")
    whole = (vendor / "officer.key.state").read_text()
    cut = [whole[:at] for at in range(0, len(whole) - 2, 7)]
    for text in ("{}", "[]", '{"next_leaf": -1, "inode": 0, "machine": ""}', '{"next_leaf": true}', "x", *cut):
        (tmp_path / "officer.key.state").write_text(text)
        with pytest.raises(ConfigError, match="A leaf must never sign twice: use the original, or make a new key"):
            copy.sign(b"message")


def test_a_backup_that_is_written_over_the_state_is_refused(tmp_path: Path) -> None:
    """ext4 gives the number of an inode again, at every second signature."""
    key = tmp_path / "k"
    place = keys.state_path(key)
    keys._write_state(key, 0)
    if not keys._born_ns(place):
        pytest.skip("this file system does not keep when a file was made")
    before = []
    for leaf in range(12):
        now = place.read_bytes()
        for old in before:
            place.write_bytes(old)
            with pytest.raises(ConfigError, match="is a copy or was restored"):
                keys.leaves_used(key)
        place.write_bytes(now)
        before.append(now)
        with keys.next_leaf(key) as used:
            assert used == leaf


def test_a_state_that_is_older_than_a_release_is_refused(
    vendor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A snapshot keeps the inode: the releases beside the new one show that the leaf was used."""
    sign(vendor, tmp_path / "a")
    sign(vendor, tmp_path / "b", version=4)
    officer = vendor / "officer.key"
    leaf = keys.leaves_used(officer)
    assert run(vendor, "sign", "--add", str(tmp_path / "a"), "--key", str(officer)) == 0
    keys._write_state(officer, leaf)  # as a snapshot of the whole machine would have it
    try:
        capsys.readouterr()
        assert run(vendor, "sign", "--add", str(tmp_path / "b"), "--key", str(officer)) == 1
        assert f"has signed with leaf {leaf}" in capsys.readouterr().err
    finally:
        keys._write_state(officer, leaf + 1)


def test_two_processes_never_use_one_leaf(vendor: Path) -> None:
    """The second is refused while the first holds the key, and works when that process was killed."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom stonechat_tools.release import keys\n"
        "with keys.next_leaf(Path(sys.argv[1])) as leaf:\n    print(leaf, flush=True)\n    time.sleep(600)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(vendor / "officer.key")], stdout=subprocess.PIPE, text=True
    )
    assert first.stdout
    leaf = int(first.stdout.readline())
    try:
        with pytest.raises(ConfigError, match="another process signs"), keys.next_leaf(vendor / "officer.key"):
            pass
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    with keys.next_leaf(vendor / "officer.key") as again:
        assert again == leaf + 1


def test_an_exhausted_key_says_what_to_do(vendor: Path) -> None:
    leaf = keys.leaves_used(vendor / "officer.key")
    keys._write_state(vendor / "officer.key", keys.LEAVES)
    try:
        with (
            pytest.raises(ConfigError, match="all 1024 signatures are used; make a new key"),
            keys.next_leaf(vendor / "officer.key"),
        ):
            pass
    finally:
        keys._write_state(vendor / "officer.key", leaf)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--class", ""), "--class NAME is missing"),
        (("--class", "x" * 33), "a class of 1 to 32 bytes"),
        (("--floor", "9"), "floor of at most the version"),
        (("--notes", "x" * 201), "notes of at most 200 bytes"),
        (("--days", "4294967295"), "these options make no manifest"),
        (("--class", "a\nb"), "printable characters"),
        (("--class", "\udcff"), "printable characters"),
        (("--notes", "\udcff"), "printable characters"),
        (("--notes", "a\x1b[2J"), "printable characters"),
    ],
)
def test_options_that_make_no_manifest(
    vendor: Path, tmp_path: Path, more: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--key", str(vendor / "vendor.key"), "--class", "pump", "--version", "3", "--out", str(tmp_path / "r"))
    assert run(vendor, "sign", MODEL, *args, *more) == 1
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1
    assert not (tmp_path / "r" / "manifest.cbor").exists()


def test_a_folder_in_place_of_any_file_is_named(
    vendor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path)
    sign = ("sign", "--key", str(vendor / "vendor.key"), "--class", "pump", "--version", "3", "--out", place + "/r")
    for words in (
        (*sign, place),
        (*sign, "--policy", place),
        (*sign, "--next-keys", place),
        ("sign", MODEL, *sign[3:], "--key", place),
        ("verify", place, "--keys", place),
    ):
        assert run(vendor, *words) == 1
        said = capsys.readouterr().err
        assert place in said and said.count("\n") == 1, said


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"\xff" * 40, b"\x84\x40\xa0\x41\x00\x80", cbor2.dumps([1, 2, b"x", [3]])]
)
def test_what_is_no_manifest_is_one_clear_error(
    data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.cbor").write_bytes(data)
    assert cli.main(["release", "inspect", str(tmp_path)]) == 1
    out = capsys.readouterr()
    assert out.err.count("\n") == 1 and "Traceback" not in out.err and "unexpected" not in out.err


@pytest.mark.parametrize("key", [b"12345678", "text", 5, None])
def test_inspect_shows_a_hostile_manifest_or_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: object
) -> None:
    public = keys.PublicKey("release", keys.SLH_DSA, bytes(32))
    plan = make.Plan(1, 1, "pump", 0, 10**6, "notes", True, (public,))
    packed = make.payload(plan, None, b"").replace(b"notes", b"\x1b[2J\n")
    message = cbor2.dumps([b"", {}, packed, [[b"\xa1\x018\x2d", {4: key}, bytes(100)]]])
    (tmp_path / "manifest.cbor").write_bytes(message)
    status = cli.main(["release", "inspect", str(tmp_path)])
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and (status == 0) == isinstance(key, bytes)
    assert status == 0 or said.err.count("\n") == 1


def test_public_keys_that_are_no_keys(tmp_path: Path) -> None:
    place = tmp_path / "keys"
    for text in (
        "",
        "# nothing\n",
        "release",
        "release SLH-DSA-SHA2-128s 00",
        "root SLH-DSA-SHA2-128s " + "00" * 32,
        "\xff",
    ):
        place.write_text(text)
        with pytest.raises(StonechatError):
            keys.read_public(place)


def test_a_signature_takes_seconds_not_minutes(vendor: Path) -> None:
    """SLH-DSA by pqcrypto: about a second here; a signer in plain Python takes ten times that."""
    start = time.monotonic()
    key = keys.SigningKey(vendor / "vendor.key", b"correct horse")
    assert key.public.verify(b"message", key.sign(b"message"))
    assert time.monotonic() - start < 120


def test_a_passphrase_that_others_can_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pw").write_text("correct horse\n")
    words = ["release", "keygen", str(tmp_path / "k"), "--passphrase-file", str(tmp_path / "pw")]
    for mode in (0o640, 0o604, 0o660):
        (tmp_path / "pw").chmod(mode)
        assert cli.main(words) != 0
        assert f"chmod 600 {tmp_path / 'pw'}" in capsys.readouterr().err and not (tmp_path / "k").exists()


def test_a_policy_of_the_response_is_signed_and_refused_by_name(
    vendor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "response.toml"
    text = 'rules = [{action = "throttle", seconds = 60}, {action = "alert", level = "watch"}]\n'
    file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())  # as an editor on Windows writes it
    release = tmp_path / "pump-5"
    sign(vendor, release, "--policy", str(file), model="")
    packed = make.frame((release / "manifest.cbor").read_bytes())[2]
    pycddl.Schema("start = manifest\n" + CDDL).validate_cbor(packed)
    found = manifest.read(packed).policy
    rules = rules_of(found)
    response = Response()
    response.follow(rules)
    assert response.rules == ((2, 2, 0, 0, 60, 240), (1, 1, 0, 0, 0, 0))
    common = ["--key", str(vendor / "vendor.key"), "--class", "pump", "--version", "6", "--out", str(tmp_path / "x")]
    for text, wanted in (
        ("rules = [", "not TOML"),
        ("mode = 1", "want nothing but rules"),
        ("rules = " + "[" * 3000, "not TOML"),
        ('rules = [{action = "throttle", most_seconds = 60}]', "rule 1: most_seconds 60 is below lease_s 120"),
        ('rules = [{action = "shout"}]', "action must be one of"),
        ('rules = [{action = "throttle", seconds = 99999}]', "most_seconds"),
    ):
        file.write_text(text)
        capsys.readouterr()
        assert run(vendor, "sign", *common, "--policy", str(file)) == 1
        said = capsys.readouterr().err
        assert wanted in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize("data", [b"", b"\x81" * 9000, b"\x84\x40\xa0\x41\x00\x05", bytes(range(256))])
def test_a_manifest_that_is_none_is_named(
    vendor: Path, tmp_path: Path, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.cbor").write_bytes(data)
    for words in (
        ("inspect", str(tmp_path)),
        ("verify", str(tmp_path), "--keys", str(vendor / "vendor.key.pub")),
        ("sign", "--add", str(tmp_path), "--key", str(vendor / "vendor.key")),
    ):
        assert run(vendor, *words) == 1
        said = capsys.readouterr().err
        assert str(tmp_path) in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_a_key_without_a_name_is_refused(vendor: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(vendor, "keygen", name) == 1
    said = capsys.readouterr().err
    assert "is a folder; give the name of a file" in said and len(said.splitlines()) == 1


def test_a_state_of_which_nobody_knows_that_it_is_on_the_disk_makes_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:  # as on a file system that has none for folders
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    public = SimpleNamespace(serialize=lambda: bytes(56))
    monkeypatch.setattr(keys, "_lms", lambda private, leaf: SimpleNamespace(publicKey=lambda: public))  # takes seconds
    with pytest.raises(ConfigError, match="no fsync for folders. Keep hss keys on a local disk"):
        keys.make(tmp_path / "k", "release", keys.HSS, b"passphrase")
    assert not list(tmp_path.iterdir())


def test_what_no_device_could_use_is_not_signed(
    vendor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public = str(vendor / "vendor.key.pub")
    rule = ("--rule", "1.5:4:12", "--key", str(vendor / "vendor.key"))
    common = ("sign", *rule, "--class", "pump", "--out", str(tmp_path / "x"))
    for words, wanted in (
        ((*common, "--version", "4", "--not-before", "2020-01-01", "--days", "1"), "expired on 2020-01-02"),
        ((*common, "--version", "4", "--next-keys", public, public), "one key is there twice"),
        ((*common, "--version", "4294967295"), "no release could follow"),
        (("sign", *rule, "--add", str(tmp_path)), "--add RELEASE takes no --rule"),
        (("sign", *rule[2:], "--add", str(tmp_path), "--version", "5"), "--add RELEASE takes no --version"),
        (("sign", *rule[2:], "--add", str(tmp_path), "--days", "5"), "--add RELEASE takes no --days"),
        (("sign", *rule[2:], "--add", str(tmp_path), "--next-keys", public), "--add RELEASE takes no --next-keys"),
    ):
        assert run(vendor, *words) == 1
        said = capsys.readouterr().err
        assert wanted in said and len(said.splitlines()) == 1, said
    assert not (tmp_path / "x").exists()


def test_every_byte_of_a_passphrase_counts(tmp_path: Path) -> None:
    file = tmp_path / "pw"
    found = set()
    for data in (b"\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8", b"\x80\x81\x82\x83\x84\x85\x86\x87", "pässword".encode()):
        for more in (b"", b"\n", b"\r\n", b"\nanother line"):
            file.write_bytes(data + more)
            file.chmod(0o600)
            found.add(keys.passphrase(file, new=True))
    assert len(found) == 3
