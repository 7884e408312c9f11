"""`stonechat-agent install` and `uninstall` below a root folder: modes, owners, links, repetition, refusals."""

import json
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from agent_process import readable_agent
from stonechat.errors import ConfigError
from stonechat.linux import install, shipped, unit
from stonechat.linux.install_record import Record, digest
from stonechat.linux.tree import Tree
from stonechat_tools.fleet import provision
from stonechat_tools.fleet.bundle import make_bundle

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: users and owners")
needs_useradd = pytest.mark.skipif(
    shutil.which("useradd", path="/usr/sbin:/usr/bin") is None, reason="useradd is missing"
)
pytestmark = [pytest.mark.root, needs_root, needs_useradd]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    for path in ("etc/systemd/system", "var/lib", "usr/sbin"):
        (folder / path).mkdir(parents=True)
    wants = folder / "etc/systemd/system/multi-user.target.wants"  # systemctl removes it where it is empty
    wants.mkdir()
    (wants / "cron.service").symlink_to("/lib/systemd/system/cron.service")
    (folder / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (folder / "etc/group").write_text("root:x:0:\n")
    (folder / "etc/shadow").write_text("root:*:19000::::::\n")
    (folder / "etc/gshadow").write_text("root:*::\n")
    return folder


@pytest.fixture
def fleet(tmp_path: Path) -> provision.Fleet:
    made = provision.Fleet.init(tmp_path / "fleet", provision.Settings(broker="b", port=8883))
    made.add("sensor-7", Path(shipped.path("linux-proc-1")))
    return made


def bundle(fleet: provision.Fleet) -> str:
    return str(fleet.bundle("sensor-7"))


def remake(fleet: provision.Fleet, edit: "tuple[str, str] | None" = None, **files: bytes) -> str:
    folder = fleet.folder / "devices/sensor-7"
    if edit:
        config = folder / "stonechat.toml"
        config.write_text(config.read_text().replace(*edit))
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    provision.write_file(fleet.bundle("sensor-7"), make_bundle(folder))
    return bundle(fleet)


def files(root: Path) -> dict[str, tuple[str, int, int, str]]:
    found = {}
    for path in sorted(root.rglob("*")):
        facts = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_text(errors="replace") if path.is_file() else ""
        if not path.name.endswith("-"):
            found["/" + str(path.relative_to(root))] = (oct(facts.st_mode), facts.st_uid, facts.st_gid, content)
    return found


def installer(root: Path, dry: bool = False) -> tuple[install.Installer, list[str]]:
    said: list[str] = []
    return install.Installer(str(root), dry, said.append), said


def test_files_owners_and_modes(root: Path, fleet: provision.Fleet) -> None:
    before = files(root)
    assert installer(root)[0].install(bundle(fleet))
    made = {path: facts for path, facts in files(root).items() if path not in before}
    user_id, group_id = map(int, (root / "etc/passwd").read_text().splitlines()[1].split(":")[2:4])
    assert user_id not in (0, pwd.getpwuid(os.geteuid()).pw_uid)
    etc = "/etc/stonechat"
    assert {path: facts[:3] for path, facts in made.items()} == {
        etc: ("0o40750", 0, group_id),
        f"{etc}/stonechat.toml": ("0o100640", 0, group_id),
        f"{etc}/device.key": ("0o100600", user_id, 0),
        f"{etc}/client.key": ("0o100600", user_id, 0),
        f"{etc}/client.crt": ("0o100644", 0, 0),
        f"{etc}/ca.crt": ("0o100644", 0, 0),
        f"{etc}/model.tflite": ("0o100644", 0, 0),
        f"{etc}/installed.json": ("0o100600", 0, 0),
        "/var/lib/stonechat": ("0o40700", user_id, group_id),
        "/etc/systemd/system/stonechat-agent.service": ("0o100644", 0, 0),
        "/etc/systemd/system/multi-user.target.wants/stonechat-agent.service": ("0o120777", 0, 0),
    }
    unit = (root / "etc/systemd/system/stonechat-agent.service").read_text()
    assert f"ExecStart={sys.prefix}/bin/stonechat-agent --config /etc/stonechat/stonechat.toml\n" in unit
    assert unit.count("ExecStart=") == 1


def test_twice_is_once_and_purge_leaves_what_was_there(root: Path, fleet: provision.Fleet) -> None:
    before = files(root)
    installer(root)[0].install(bundle(fleet))
    made = files(root)
    again, said = installer(root)
    again.install(bundle(fleet))
    assert files(root) == made and not [line for line in said if line.startswith(("file", "folder", "user"))]
    gone, said = installer(root)
    gone.uninstall()
    assert "keep /etc/stonechat/device.key" in said
    left = {path for path in files(root) if path not in before}
    keys = {f"/etc/stonechat/{name}" for name in ("device.key", "client.key", "client.crt", "installed.json")}
    assert left == {"/etc/stonechat", *keys}
    installer(root)[0].uninstall()
    installer(root)[0].install(bundle(fleet))
    assert files(root) == made
    (root / "var/lib/stonechat/outbox").mkdir()
    (root / "var/lib/stonechat/outbox/0").write_text("a report")
    installer(root)[0].uninstall()
    assert (root / "var/lib/stonechat/outbox/0").exists()
    installer(root)[0].uninstall(purge=True)
    assert files(root) == before
    nothing, said = installer(root)
    nothing.uninstall(purge=True)
    assert said == ["nothing to do: no installation is recorded in /etc/stonechat/installed.json"]


def test_a_dry_run_changes_nothing_and_says_all(root: Path, fleet: provision.Fleet) -> None:
    before = files(root)
    dry, said = installer(root, dry=True)
    dry.install(bundle(fleet))
    assert files(root) == before
    text = "\n".join(said)
    for word in (
        "user stonechat",
        "/etc/stonechat,",
        "device.key",
        "model.tflite",
        "stonechat-agent.service",
        "enable",
    ):
        assert word in text
    assert any(line.startswith("the unit starts /") for line in said)
    assert all(line.startswith(("would ", "the unit starts ")) for line in said)
    installer(root)[0].install(bundle(fleet))
    made = files(root)
    dry, said = installer(root, dry=True)
    dry.uninstall(purge=True)
    assert files(root) == made and all(line.startswith("would ") for line in said) and "user stonechat" in "".join(said)


def test_new_keys_replace_the_old_and_an_edited_configuration_is_kept(root: Path, fleet: provision.Fleet) -> None:
    installer(root)[0].install(bundle(fleet))
    config = root / "etc/stonechat/stonechat.toml"
    config.write_text(config.read_text() + '\n[log]\nlevel = "debug"\n')
    edited = config.read_text()
    fleet.rotate("sensor-7")
    again, said = installer(root)
    again.install(bundle(fleet))
    key = fleet.folder / "devices/sensor-7/device.key"
    assert (root / "etc/stonechat/device.key").read_bytes() == key.read_bytes()
    assert config.read_text() == edited and any("changed since" in line for line in said)
    installer(root)[0].uninstall()
    assert config.read_text() == edited
    installer(root)[0].uninstall(purge=True)
    assert not config.exists()


@pytest.mark.parametrize("name", ["device.key", "stonechat.toml", "model.tflite"])
def test_a_file_that_was_there_is_not_overwritten(root: Path, fleet: provision.Fleet, name: str) -> None:
    (root / "etc/stonechat").mkdir(mode=0o755)
    (root / "etc/stonechat" / name).write_text("somebody's own")
    before = files(root)
    with pytest.raises(ConfigError, match=f"{name} is there already and not from install"):
        installer(root)[0].install(bundle(fleet))
    assert files(root) == before


def test_what_was_there_keeps_owner_and_mode_and_survives_a_purge(root: Path, fleet: provision.Fleet) -> None:
    same = fleet.folder / "devices/sensor-7/ca.crt"
    (root / "etc/stonechat").mkdir(mode=0o755)
    shutil.copyfile(same, root / "etc/stonechat/ca.crt")
    os.chown(root / "etc/stonechat/ca.crt", 1234, 1234)
    (root / "var/lib/stonechat").mkdir(mode=0o755)
    before = files(root)
    installer(root)[0].install(bundle(fleet))
    now = files(root)
    assert all(now[path][:3] == before[path][:3] for path in before if "stonechat" in path)
    installer(root)[0].uninstall(purge=True)
    left = files(root)
    assert left == before


LINKED = [
    "etc/stonechat",
    "etc/stonechat/device.key",
    "etc/stonechat/installed.json",
    "var/lib/stonechat",
    "etc/systemd/system",
]


@pytest.mark.parametrize("path", LINKED)
def test_no_link_is_followed(root: Path, fleet: provision.Fleet, tmp_path: Path, path: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("precious")
    if path.count("/") > 1 and not path.startswith("etc/systemd"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).symlink_to(elsewhere / "file")
    else:
        shutil.rmtree(root / path, ignore_errors=True)
        (root / path).symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=r"is a link|not a regular file"):
        installer(root)[0].install(bundle(fleet))
    assert {path.name: path.read_text() for path in elsewhere.iterdir()} == {"file": "precious"}


def test_a_link_put_in_later_is_not_followed_by_uninstall(root: Path, fleet: provision.Fleet, tmp_path: Path) -> None:
    installer(root)[0].install(bundle(fleet))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (root / "var/lib/stonechat/link").symlink_to(precious)
    installer(root)[0].uninstall(purge=True)
    assert (precious / "file").read_text() == "x" and not (root / "var/lib/stonechat").exists()


def test_uninstall_removes_nothing_but_its_own_paths(root: Path, fleet: provision.Fleet) -> None:
    installer(root)[0].install(bundle(fleet))
    record = root / "etc/stonechat/installed.json"
    facts = json.loads(record.read_text())
    victim = root / "etc/passwd"
    facts["files"]["/etc/passwd"] = digest(victim.read_bytes())
    facts["files"]["/etc/stonechat/../shadow"] = digest((root / "etc/shadow").read_bytes())
    facts["folders"] += ["/etc", "/var/lib"]
    record.write_text(json.dumps(facts))
    installer(root)[0].uninstall(purge=True)
    assert victim.exists() and (root / "etc/shadow").exists() and (root / "var/lib").is_dir()


@pytest.mark.parametrize("text", ["", "[]", "{", "7", '{"files": 7}', '{"files": {"a": 1}, "folders": 3}'])
def test_a_damaged_record_is_one_line(root: Path, fleet: provision.Fleet, text: str) -> None:
    installer(root)[0].install(bundle(fleet))
    (root / "etc/stonechat/installed.json").write_text(text)
    with pytest.raises(ConfigError, match="damaged"):
        installer(root)[0].uninstall()


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (("/etc/stonechat/device.key", "/srv/device.key"), "provision with --install-dir"),
        (("[mqtt]", "[mqqt]"), "unknown section"),
        (("/etc/stonechat/client.crt", "/etc/stonechat/other.crt"), "which the bundle lacks"),
        (("[device]", "[device"), "not TOML"),
    ],
)
def test_a_configuration_that_would_not_run_is_refused_at_once(
    root: Path, fleet: provision.Fleet, edit: tuple[str, str], why: str
) -> None:
    before = files(root)
    with pytest.raises(ConfigError, match=why):
        installer(root)[0].install(remake(fleet, edit))
    assert files(root) == before


def test_a_key_that_is_none_is_refused(root: Path, fleet: provision.Fleet) -> None:
    before = files(root)
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        installer(root)[0].install(remake(fleet, device_key=b"zz\n"))
    assert files(root) == before


def test_a_folder_that_others_can_write_to_is_refused(root: Path, fleet: provision.Fleet) -> None:
    (root / "etc/stonechat").mkdir()
    (root / "etc/stonechat").chmod(0o777)
    with pytest.raises(ConfigError, match="written by others"):
        installer(root)[0].install(bundle(fleet))


def test_a_folder_that_the_agent_can_not_enter_is_refused(root: Path, fleet: provision.Fleet) -> None:
    (root / "etc/stonechat").mkdir(mode=0o700)
    with pytest.raises(ConfigError, match="can't enter /etc/stonechat: chgrp"):
        installer(root)[0].install(bundle(fleet))


def test_an_interrupted_installation_is_finished_or_taken_back(
    root: Path, fleet: provision.Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each of its writes in turn; then uninstall leaves what was there, or install goes on."""
    before = files(root)
    installer(root)[0].install(bundle(fleet))
    whole = files(root)
    installer(root)[0].uninstall(purge=True)
    real = Tree.write
    for stop_at in range(40):
        left = [stop_at]

        def write(self: Tree, *args: object, left: list[int] = left) -> None:
            if left[0] == 0:
                raise OSError("power cut")
            left[0] -= 1
            real(self, *args)  # type: ignore[arg-type]

        for ending in ("uninstall", "install"):
            left[0] = stop_at
            with monkeypatch.context() as patch:
                patch.setattr(Tree, "write", write)
                try:
                    installer(root)[0].install(bundle(fleet))
                    stopped = False
                except OSError:
                    stopped = True
            if ending == "install":
                installer(root)[0].install(bundle(fleet))
                assert files(root) == whole
            installer(root)[0].uninstall(purge=True)
            rest = {path: facts for path, facts in files(root).items() if path != "/etc/stonechat"}
            assert rest == before
        if not stopped:
            return
    raise AssertionError("it never ends")


@pytest.mark.parametrize("path", ["etc", "etc/systemd/system", "var/lib"])
@pytest.mark.parametrize("dry", [False, True])
def test_a_folder_that_is_no_image_is_refused_before_anything_is_made(
    root: Path, fleet: provision.Fleet, path: str, dry: bool
) -> None:
    shutil.rmtree(root / path)
    before = files(root)
    with pytest.raises(ConfigError, match=f"/{path.partition('/')[0]}.* is missing below {root}: --root must be"):
        installer(root, dry)[0].install(bundle(fleet))
    assert files(root) == before


def test_without_systemd_the_command_by_hand_names_the_configuration(
    root: Path, fleet: provision.Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, said = installer(root)
    there.install(bundle(fleet), start=False)
    there.live = True
    monkeypatch.setattr(install, "agent_command", lambda check: ["/opt/stonechat/bin/stonechat-agent"])
    monkeypatch.setattr(os.path, "isdir", lambda path: path != "/run/systemd/system")
    assert there._start(Record(there.tree))
    _, _, named = said[-1].partition(" --config ")
    assert (root / named.lstrip("/")).is_file(), said[-1]


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: object, **more: object) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-m", "stonechat.linux.cli", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, **more)  # type: ignore[call-overload,no-any-return]


def test_the_command_installs_and_says_one_line_where_it_can_not(root: Path, fleet: provision.Fleet) -> None:
    done = command("install", "--bundle", bundle(fleet), "--root", root)
    assert done.returncode == 0 and "device.key" in done.stdout, done.stderr
    assert command("uninstall", "--root", root, "--purge").returncode == 0
    wrong = command("install", "--bundle", "none.tar", "--root", root)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == "stonechat-agent install: bundle none.tar: No such file or directory\n"
    assert command("install").returncode == 2


def test_an_ordinary_user_is_told_to_use_sudo() -> None:
    def become_nobody() -> None:
        os.setgid(65534)
        os.setuid(65534)

    script = f"import sys; sys.path.insert(0, {str(readable_agent())!r}); from stonechat.linux.install import main; "
    script += "sys.exit(main(['install', '--bundle', 'a.tar']))"
    words = ["/usr/bin/python3", "-B", "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, preexec_fn=become_nobody, cwd="/")
    assert done.returncode == 1 and "needs root: sudo" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", ["/home/a/venv/bin/x", "/root/venv/x", "/tmp/x", "/var/tmp/x", "/run/user/0/x"])
def test_an_agent_that_the_service_can_not_see_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"python3 -m venv /opt/stonechat"):
        unit._check_reachable(path)


def test_an_agent_below_a_private_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit, "_HIDDEN", ())
    folder = tmp_path / "venv"
    folder.mkdir()
    (folder / "agent").write_text("")
    folder.chmod(0o700)
    with pytest.raises(ConfigError, match="can't read"):
        unit._check_reachable(str(folder / "agent"))
