"""A device's own model: what it is made of, how it is adopted and refused, and that nobody else's is taken for it."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stonechat
from agent_process import DEVICE, AgentProcess, open_the_way, quick_model, wait_for
from stonechat import model_file, own_model, own_model_fit
from stonechat.agent import Agent
from stonechat.delivery import Delivery
from stonechat.errors import ConfigError, StateError
from stonechat.features import LEVEL, RATE, SHARE
from stonechat.int8 import tflite
from stonechat.linux.own_model_slot import Slot
from stonechat.linux.schemas import LINUX_PROC_1
from stonechat.model import load_model
from stonechat.outbox_memory import MemoryOutbox
from stonechat.own_model_training import Training
from stonechat.schema import Schema
from stonechat.scorer import Scorer
from stonechat.state import State
from stonechat.window import Window
from stonechat_tools.evaluation.personalize import page, personalize
from stonechat_tools.fleet import command, keyring, wire
from stonechat_tools.fleet.collect import Collector
from stonechat_tools.fleet.local_broker import LocalBroker
from stonechat_tools.fleet.store import Store
from stonechat_tools.modeling import fit
from stonechat_tools.modeling.device_path import Network, Replay, features_q8
from stonechat_tools.modeling.golden import make
from stonechat_tools.traces.trace import Trace

WIDE = Schema("wide", [(f"c{i}", "1", (RATE, RATE, LEVEL, SHARE)[i % 4]) for i in range(12)])
WINDOW_MS = 1000
RULES = ((256, 1024, 1536),)
KEY = bytes(range(32))


def windows(count: int, seed: int = 0, shift: float = 0.0) -> np.ndarray[Any, Any]:
    """Benign counters of WIDE with two hidden causes; shift: in deviations, of the first three."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(count, 2))
    mixing = np.random.default_rng(99).normal(size=(2, len(WIDE))) * 0.3
    z = causes @ mixing + rng.normal(size=(count, len(WIDE))) * 0.2
    z[:, :3] += shift * 0.4
    return np.where(np.array(WIDE.kinds) == SHARE, 6000 + 800 * z, np.exp2(9 + z)).astype(np.int64)


def f_q8(deltas: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return features_q8(WIDE, deltas, np.full(len(deltas), WINDOW_MS), WINDOW_MS)


def trained(deltas: np.ndarray[Any, Any]) -> Training:
    rows = array("H", f_q8(deltas).ravel().tolist())
    training = Training(
        rows, WIDE, WINDOW_MS, name="own", version=3, alarm_rules=RULES, origin=[("reference", b"12345678")]
    )
    for _ in training.steps():
        pass
    return training


@pytest.fixture(scope="module")
def reference() -> bytes:
    """A model of the same schema for much more than this device."""
    rng = np.random.default_rng(5)
    wide = f_q8(windows(900, 1)) + np.rint(rng.normal(size=(900, len(WIDE))) * 900).astype(np.int64)
    made = fit.fit(wide.clip(0, 25600), WIDE, WINDOW_MS, learn_windows=8)
    made.meta.alarm_rules = RULES
    return made.to_tflite("reference", 1)


class Device:
    """The channel of a device without the counters: windows go in, verdicts come out."""

    def __init__(
        self, reference: bytes, slot: Slot | None = None, state: State | None = None, count: int = 240
    ) -> None:
        self.state = state or State(None)
        self.said: list[str] = []
        scorer = Scorer(load_model(reference), WIDE, self.state)
        self.scorer = scorer
        self.own = own_model.OwnModel(WIDE, scorer, self.state, slot, count, self.said.append)
        self.window = Window(WIDE, WINDOW_MS)

    def live(self, deltas: np.ndarray[Any, Any]) -> list[tuple[int, bool]]:
        """-> (level, changed) of each window; the training goes on between them."""
        out = []
        for row in deltas.tolist():
            self.window.deltas[:] = row
            self.window.elapsed_ms = WINDOW_MS
            verdict = self.own.judge(self.window, self.scorer.score(row, WINDOW_MS))
            while self.own.work(5):
                pass
            out.append((verdict.level, verdict.changed))
        return out

    def save(self) -> None:
        self.scorer.save()
        self.own.save()


# ----------------------------------------------------------------------------------------------------------- what it is


def test_the_file_computes_the_same_in_tflite_micro_and_is_proved_like_any_other() -> None:
    pytest.importorskip("tflite_micro")
    training = trained(windows(400))
    model_file.prove(training.data)
    vectors = make(training.data)  # TFLite Micro and tflite-runtime's reference kernels, which must agree
    model = load_model(training.data)
    assert model.metadata is not None and len(model.metadata.golden) == 3
    for x, y, _ in vectors["vectors"]:
        assert bytes(model.run(bytes.fromhex(x))).hex() == y
    scorer = Scorer(load_model(training.data), WIDE, State(None))  # verifies the golden vectors
    assert not scorer.learning and scorer.meta.version == 3


def test_the_same_windows_give_the_same_bytes_and_the_card_says_of_whose() -> None:
    import cbor2

    first, second = trained(windows(300)), trained(windows(300))
    assert first.data == second.data
    card = cbor2.loads(bytes(tflite.read(first.data).metadata(model_file.INFO_BUFFER)))
    assert card["reference"] == b"12345678" and card["figures"]["windows"] == 300
    assert [tuple(column) for column in card["columns"]] == list(WIDE.columns)


def test_the_fit_is_that_of_the_tools() -> None:
    """Two implementations, one result: the normalization, and scores that agree."""
    rows = f_q8(windows(480))
    centre, deviation = fit.front_end(rows)
    for i in range(len(WIDE)):
        own_centre, own_deviation = own_model_fit.centre_and_deviation(rows[:, i].tolist())
        assert abs(own_centre - centre[i]) <= 1 and own_deviation == pytest.approx(deviation[i])
    training = trained(windows(480))
    theirs = fit.fit(rows[:360], WIDE, WINDOW_MS, calibration=rows[360:], units=2, trim=0.1)
    later = f_q8(windows(400, 7))
    own = Replay(training.meta, Network.from_file(training.data), False)
    scores, other = own.scores(own.steps(later)), theirs.replay().scores(theirs.replay().steps(later))
    assert np.corrcoef(scores, other)[0, 1] > 0.9


def test_an_attack_in_a_tenth_of_the_windows_is_trimmed() -> None:
    deltas = windows(600)
    deltas[100:145] = windows(45, 3, shift=12)  # of 450 that make the network
    training = trained(deltas)
    assert training.figures["trimmed_windows"] >= 40
    replay = Replay(training.meta, Network.from_file(training.data), False)
    assert replay.run(f_q8(windows(8, 4, shift=12))).alarms
    assert not replay.calm().run(f_q8(windows(500, 5))).alarms


def test_a_step_is_short_and_the_whole_is_affordable() -> None:
    """A full memory of the widest schema: no step keeps the daemon from a window, on a machine ten times slower too."""
    rng = np.random.default_rng(0)
    rows = np.rint(2000 + rng.normal(size=(2000, 39)) @ rng.normal(size=(39, 39)) * 60).clip(0, 25600).astype(int)
    schema = Schema("steps", [(f"c{i}", "1", RATE) for i in range(39)])
    training = Training(array("H", rows.ravel().tolist()), schema, 5000, name="own", version=1, alarm_rules=RULES)
    start_s = time.process_time()
    longest_s, steps, last_s = 0.0, 0, time.process_time()
    for _ in training.steps():
        now_s = time.process_time()
        longest_s, last_s, steps = max(longest_s, now_s - last_s), now_s, steps + 1
    assert steps > 400 and longest_s < 0.2, (steps, longest_s)
    assert time.process_time() - start_s < 10


def test_too_few_windows_are_refused() -> None:
    with pytest.raises(own_model_fit.FitError, match="at least 240"):
        trained(windows(239))


# ------------------------------------------------------------------------------------------------------------- its life


def test_it_is_adopted_and_then_sees_what_the_reference_does_not(reference: bytes) -> None:
    device = Device(reference)
    device.live(windows(8 + 240))
    assert device.own.phase == own_model.ON_TRIAL and device.own.scorer is not None
    faint = windows(30, 6, shift=3)
    assert not any(level for level, _ in device.live(faint[:2])), "it decides nothing while on trial"
    device = Device(reference)
    device.live(windows(8 + 240 + 60))
    assert device.own.phase == own_model.DECIDING, device.said
    assert not any(level for level, _ in device.live(windows(300, 8)))
    levels = device.live(faint)
    assert any(level == 2 for level, _ in levels) and sum(changed for _, changed in levels) >= 1
    assert not any(
        level == 2 for level, _ in Device(reference, count=20_000).live(np.concatenate([windows(60), faint]))
    )
    assert device.own.status[0] == own_model.DECIDING and device.own.status[4] == device.own.scorer.model.digest


def test_it_is_refused_where_it_alarms_on_windows_it_was_not_trained_on(reference: bytes) -> None:
    device = Device(reference)
    device.live(windows(8 + 240))
    device.live(windows(40, 3, shift=3))
    assert device.own.phase == own_model.COLLECTING and device.own.refused == 1 and device.own.scorer is None
    assert "unusual" in device.said[-1]


def test_windows_under_the_references_suspicion_are_not_collected(reference: bytes) -> None:
    device = Device(reference)
    device.live(windows(108))
    collected = device.own.status[1]
    assert collected == 100
    device.live(windows(30, 3, shift=40))
    assert device.own.status[1] <= collected + 3  # until the reference suspects something


def test_an_operator_forbids_it_and_has_it_made_again(reference: bytes, tmp_path: Path) -> None:
    device = Device(reference)
    device.live(windows(100))
    device.own.forbid()
    assert device.own.phase == own_model.OFF and device.own.status[1] == 0
    device.own.restart()  # `calibrate` does not lift it
    device.live(windows(50))
    assert device.own.phase == own_model.OFF
    device.save()
    assert Device(reference, state=device.state).own.phase == own_model.OFF  # nor does a restart
    device.own.allow()
    assert device.own.phase == own_model.COLLECTING
    assert Device(reference, state=device.state).own.phase == own_model.COLLECTING


# ----------------------------------------------------------------------------------------------------- where it is kept


def slot(path: Path, key: bytes = KEY, reference: bytes = b"12345678", firmware: str = "1") -> Slot:
    said.clear()
    return Slot(str(path), key, reference, WIDE.id, firmware, said.append)


said: list[str] = []


def test_a_restart_goes_on_in_every_phase(reference: bytes, tmp_path: Path) -> None:
    path = tmp_path / "own"
    device = Device(reference, slot(path))
    for batch, phase in ((100, own_model.COLLECTING), (170, own_model.ON_TRIAL), (70, own_model.DECIDING)):
        device.live(windows(batch, batch))
        assert device.own.phase == phase
        device.save()
        before = device.own.status
        device = Device(reference, slot(path), device.state)
        assert device.own.status == before and path.stat().st_mode & 0o777 == 0o600
    assert any(level == 2 for level, _ in device.live(windows(30, 6, shift=3)))


def test_a_restart_during_the_training_begins_it_again(reference: bytes, tmp_path: Path) -> None:
    device = Device(reference, slot(tmp_path / "own"))
    device.own.work = lambda limit_ms: False  # type: ignore[method-assign]
    device.live(windows(320))
    assert device.own.phase == own_model.TRAINING
    device.save()
    again = Device(reference, slot(tmp_path / "own"), device.state)
    assert again.own.phase == own_model.TRAINING
    again.live(windows(1))
    assert again.own.phase == own_model.ON_TRIAL


def spoil_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))
    path.with_suffix(".real").write_bytes(b"x")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def huge(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(64 << 20)


def open_to_others(path: Path) -> None:
    path.chmod(0o644)


@pytest.mark.parametrize("spoil", [spoil_a_byte, cut, empty, link, fifo, huge, open_to_others])
def test_a_tampered_file_is_refused_and_made_again(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "own"
    slot(path).save(b"content" * 100)
    assert slot(path).load() == b"content" * 100
    spoil(path)
    fresh = slot(path)
    assert fresh.load() == b"" and len(said) == 1 and "\n" not in said[0] and "refused" in said[0]
    fresh.save(b"anew")
    assert slot(path).load() == b"anew" and path.stat().st_mode & 0o777 == 0o600 and path.is_file()


def test_it_is_bound_to_device_reference_schema_and_firmware(tmp_path: Path) -> None:
    path = tmp_path / "own"
    for other in ({"key": bytes(32)}, {"reference": b"87654321"}, {"firmware": "2"}):
        slot(path).save(b"content")
        assert slot(path, **other).load() == b"" and not path.exists(), other  # type: ignore[arg-type]
    slot(path).save(b"content")
    moved = Slot(str(path), KEY, b"12345678", bytes(8), "1", said.append)
    assert moved.load() == b""
    held = slot(path)
    held.save(b"content")
    held.use_key(bytes(32))  # a rotation of the device's key
    assert slot(path, bytes(32)).load() == b"content"


def test_a_medium_that_refuses_once_gets_it_later(reference: bytes, tmp_path: Path) -> None:
    """A write that failed must not count as done: a collection that an operator forbade would stay on the medium."""
    path = tmp_path / "own"
    device = Device(reference, slot(path))
    device.live(windows(100))
    device.save()
    assert path.stat().st_size > 1000
    device.own.forbid()
    refusing = tmp_path / "own.tmp"
    refusing.mkdir()
    (refusing / "full").touch()
    with pytest.raises(StateError):
        device.save()
    (refusing / "full").unlink()
    refusing.rmdir()
    device.save()
    assert path.stat().st_size < 100
    assert Device(reference, slot(path), State(None)).own.phase == own_model.OFF, "the state was lost, it was not"


def test_a_file_that_cannot_be_written_does_not_keep_the_state_from_being_saved(
    reference: bytes, tmp_path: Path
) -> None:
    (tmp_path / "own" / "in-the-way").mkdir(parents=True)
    counts = [0] * len(WIDE)

    class Counters:
        schema, sources = WIDE, ()

        def read(self, values: list[int]) -> None:
            values[:] = counts

        def close(self) -> None: ...

    def make(schema: Any, scorer: Any, state: State) -> own_model.OwnModel:
        return own_model.OwnModel(schema, scorer, state, slot(tmp_path / "own"))

    state = State(str(tmp_path / "state"))
    agent = Agent(
        Counters(),
        load_model(reference),
        reporter=Delivery(DEVICE, KEY, MemoryOutbox(4096), state=state),
        state=state,
        own=lambda collector, model, kept: own_model.OwnChannel(collector, model, kept, make),
    )
    with pytest.raises(StateError):
        agent.save()
    assert b"cal" + WIDE.id in State(str(tmp_path / "state")).sections


def test_an_own_model_that_fails_in_any_way_leaves_the_reference_deciding(reference: bytes) -> None:
    device = Device(reference)
    device.live(windows(8 + 240 + 60))
    assert device.own.phase == own_model.DECIDING and device.own.scorer is not None
    del device.own.scorer.window_ms
    assert device.live(windows(30, 3, shift=60))[-1][0] == 2
    assert device.own.phase == own_model.COLLECTING and device.own.refused == 1


def test_a_training_that_fails_in_any_way_ends_and_begins_again(reference: bytes) -> None:
    device = Device(reference)
    device.own.work = lambda limit_ms: False  # type: ignore[method-assign]
    device.live(windows(8 + 240))
    del device.own.work  # type: ignore[method-assign]
    device.own._steps = (1 // 0 for _ in range(1))
    assert not device.own.work(5) and device.own.phase == own_model.COLLECTING and device.own.refused == 1


def test_a_vendor_forbids_it_in_the_reference_model(reference: bytes) -> None:
    assert not own_model.forbidden(reference)
    rows = f_q8(windows(300))
    made = fit.fit(rows, WIDE, WINDOW_MS)
    assert own_model.forbidden(made.to_tflite("locked", 1, own_model=False))


# -------------------------------------------------------------------------------------------------------- over the wire


def test_the_collector_reads_its_state_and_an_operator_commands_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real daemon with a memory that is nearly full, a real broker and the real collector. As root the package is
    where only root may read: nothing can be imported after the change of user."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    shutil.copytree(Path(stonechat.__file__).parent, closed / "stonechat", ignore=shutil.ignore_patterns("models"))
    monkeypatch.setenv("PYTHONPATH", str(closed))
    open_the_way(tmp_path)
    quick_model(tmp_path / "model.tflite")
    with LocalBroker() as broker, Store(tmp_path / "fleet.db") as store:
        agent = AgentProcess(tmp_path, broker.port)
        text = agent.config.read_text()
        agent.config.write_text(
            text.replace("[collector]", "personalize = true\npersonalize_windows = 240\n[collector]")
        )
        nearly_full(tmp_path, agent)
        keys = keyring.Keys({DEVICE: agent.secret})
        statuses: list[wire.Status] = []
        collector = Collector(store, keys, host="127.0.0.1", port=broker.port, prefix="stonechat/1/fleet")
        collector.on_status = statuses.append

        def phase(name: str) -> bool:
            return any(status.own and status.own.PHASES[status.own.phase] == name for status in statuses)

        with collector, agent:
            wait_for(lambda: phase("on trial"), say=agent.said)
            shown = [status.own for status in statuses if status.own and status.own.digest]
            assert shown and len(shown[-1].digest) == 8
            order(store, keys, broker.port, 0)
            wait_for(lambda: phase("off"), say=agent.said)
            assert store.devices()[0]["own_model"]["shown"] == "off"
            statuses.clear()
            order(store, keys, broker.port, 1)
            wait_for(lambda: phase("collecting"), say=agent.said)
            assert agent.stop() == 0
        files = [path for path in (tmp_path / "state").iterdir() if path.name.endswith(".own-model")]
        assert len(files) == 1 and files[0].stat().st_mode & 0o777 == 0o600
    assert "Traceback" not in agent.said() and "own model: trained on 240 windows" in agent.said()


def nearly_full(folder: Path, agent: AgentProcess) -> None:
    """Put 238 windows into the slot, sealed as the device would have."""
    model = load_model((folder / "model.tflite").read_bytes())
    rng = np.random.default_rng(0)
    middle = np.array([12800 if kind == SHARE else 1500 for kind in LINUX_PROC_1.kinds])
    rows = np.rint(middle + rng.normal(size=(238, len(LINUX_PROC_1))) * 900).clip(0, 25600).astype(np.uint16)
    (folder / "state").mkdir(mode=0o700, exist_ok=True)
    path = folder / "state" / "state.own-model"
    Slot(str(path), agent.secret, model.digest, LINUX_PROC_1.id, "", print).save(
        b"\x01\0\0\0\0\0\0" + array("H", rows.ravel().tolist()).tobytes()
    )
    if os.geteuid() == 0:
        import pwd

        names = {entry.pw_name for entry in pwd.getpwall()}
        user = pwd.getpwnam("stonechat" if "stonechat" in names else "nobody")
        for one in (path.parent, path):
            os.chown(one, user.pw_uid, user.pw_gid)


def order(store: Store, keys: keyring.Keys, port: int, mode: int) -> None:
    sequence = store.next_command(DEVICE, wire.COMMANDS["own-model"], [mode])
    payload = wire.seal_command(keys.of(DEVICE)[0], sequence, int(time.time()) + 60, 8, [mode])
    command.send({"host": "127.0.0.1", "port": port}, f"stonechat/1/fleet/{DEVICE}/command", payload)
    wait_for(lambda: store.answer(DEVICE, sequence) == 0)


def test_the_command_line_checks_the_commands_argument() -> None:
    def stonechat(*words: str) -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, "-m", "stonechat_tools.cli", "command", "pump-1", "own-model", *words]
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)

    for words, reason in (
        ((), "needs --own"),
        (("--own", "never"), "invalid choice"),
        (("--until", "1h"), "no --until"),
    ):
        done = stonechat(*words)
        assert done.returncode and reason in done.stderr and "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------- reference, own model and both


def test_reference_own_and_both_are_compared_on_the_same_windows(reference: bytes) -> None:
    """A device whose reference model is too wide for a faint attack."""
    faint, loud = windows(30, 6, shift=3), windows(30, 7, shift=60)
    deltas = np.concatenate([windows(8 + 240 + 60 + 100), faint, loud])
    labels = ["benign"] * 408 + ["faint"] * 30 + ["loud"] * 30
    names = np.array(["one"] * 468, dtype=object)
    elapsed_ms, text = np.full(468, WINDOW_MS), np.array(labels, dtype=object)
    trace = Trace(WIDE, WINDOW_MS, np.arange(468.0), elapsed_ms, text, names, deltas)
    figures = personalize(reference, trace, 240, [0.05, 1.0], lambda text: None, 240)
    (device,) = figures["devices"].values()
    by_name = {outcome["attack"]: outcome for outcome in device["attacks"]}
    assert by_name["faint"]["own"] and not by_name["faint"]["reference"]
    assert by_name["faint"]["both"] == by_name["faint"]["own"]
    assert by_name["loud"]["reference"] and by_name["loud"]["both"]
    assert device["phase"] == "deciding" and device["alarms"] == {"reference": 0, "own": 0, "both": 0}
    assert device["later"] in (160, 161) and figures["exact"] == figures["checked"]
    assert figures["checked"] == (importlib.util.find_spec("tflite_micro") is not None)
    assert figures["full_memory"]["cpu_s"] < 10 and figures["full_memory"]["memory_mb"] < 5
    few, infected = figures["contaminated"]
    for outcome in few["attacks"]:
        assert outcome["own"] or outcome["phase"] != "deciding", "a twentieth of attack windows hides the attack"
    for outcome in infected["attacks"]:
        assert not outcome["own"] or outcome["phase"] == "deciding"
    lines = page(figures)
    assert any("`faint` | 1 | 0 | 1 | 1" in line for line in lines)
    with pytest.raises(ConfigError, match="too few"):
        personalize(reference, trace, 2000, [], lambda text: None, 240)
