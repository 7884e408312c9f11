"""An agent that takes releases: pulled, proven on its own windows, tried, confirmed, rolled back, withdrawn; and what
is wrong with a release, through the agent's own messages. tools/tests/update_vectors.py makes the releases."""

import os

from release_vectors import VECTORS
from share import some
from stonechat import cbor, cbor_decode, slots, updater
from stonechat.agent import Agent
from stonechat.compat import sha256, ticks_add
from stonechat.cose import Mac
from stonechat.cose_open import fields_of
from stonechat.delivery import Delivery
from stonechat.features import RATE
from stonechat.model import open_model
from stonechat.outbox_memory import MemoryOutbox
from stonechat.policy import DRY_RUN, RULES
from stonechat.response import Response
from stonechat.schema import Schema
from stonechat.state import State
from stonechat.update import CHUNK_BYTES, CONFIRM, OFFER, WITHDRAW
from stonechat.updater import Updater

FOLDER = "/tmp/stonechat-test-updater-%d" % int.from_bytes(os.urandom(3), "little")
KEY = bytes(range(32))
NOW_S = 1_800_000_000
SCHEMA = Schema("test-updates", [(name, "1", RATE) for name in ("a", "b", "c")])
WINDOWS = 16  # in the ring

RELEASES = VECTORS["releases"]
clock = [0]
updater.ticks_ms = lambda: clock[0]


def wipe():
    for folder in (FOLDER + "/moved", FOLDER + "/update", FOLDER):
        try:
            for name in os.listdir(folder):
                os.remove(folder + "/" + name)
            os.rmdir(folder)
        except OSError:
            pass  # nothing is there


def in_a_folder(test):
    def run():
        wipe()
        os.mkdir(FOLDER)
        with open(FOLDER + "/factory.tflite", "wb") as file:
            file.write(VECTORS["factory"])
        try:
            test()
        finally:
            wipe()

    return run


class Counters:
    schema = SCHEMA
    sources = ()

    def __init__(self):
        self.total = [0, 0, 0]
        self.turns = 0

    def read(self, values):
        values[:] = self.total

    def pass_window(self, loud):
        self.turns += 1
        for i in range(3):
            self.total[i] += 100_000 if loud else 92 + (self.turns * (7 + i)) % 17

    def close(self):
        pass


class Device:
    """One start. state: what the last one saved; restart: as for the Updater."""

    def __init__(self, state=None, restart=None, most_bytes=16_384, bytes_per_day=0, windows=WINDOWS, response=None):
        self.sent = []
        self.now_ms = 0
        self.state = state or State(None)
        self.update = Updater(
            "pump",
            ((0, VECTORS["key"]),),
            FOLDER + "/update",
            most_bytes,
            bytes_per_day,
            windows,
            restart,
        )
        self.counters = Counters()
        model = self.update.open(FOLDER + "/factory.tflite", open_model, SCHEMA.id, KEY)
        reporter = Delivery("pump-1", KEY, MemoryOutbox(8192), bytes_per_day=40_000, state=self.state)
        reporter.now_s = lambda: NOW_S
        self.agent = Agent(
            self.counters,
            model,
            reporter=reporter,
            state=self.state,
            publish=self.publish,
            update=self.update,
            response=response,
        )
        self.reporter = reporter
        self.store = self.update.store
        self.mac = Mac(KEY, b"offer", "pump-1")
        self.wants = Mac(KEY, b"want", "pump-1")

    offers = 0

    def publish(self, topic, payload, qos, retain):
        self.sent.append((topic, bytes(payload)))

    def windows(self, count, loud=False):
        """-> the highest level."""
        highest = 0
        for _ in range(count):
            self.counters.pass_window(loud)
            self.now_ms += 1000  # a clock of its own: pulling takes no time here
            verdict = self.agent.end_window(self.now_ms)
            if verdict is not None:
                highest = max(highest, verdict.level)
        return highest

    def hear(self, fields, mac=None, topic="model"):
        """A message of the collector to this start. fields: {key: value}."""
        packed = [None] * 7 + [self.reporter.stream]
        for key in fields:
            packed[key] = fields[key]
        value = bytearray()
        cbor.encode_fields(packed, value)
        self.agent.on_message("stonechat/1/fleet/pump-1/" + topic, bytes((mac or self.mac).seal(value)))

    def offer(self, version, manifest):
        self.offers += 1
        self.hear({0: 1, 1: version, 2: OFFER, 3: self.offers, 5: sha256(manifest).digest(), 6: len(manifest)})

    def end(self, what, version, stream=None):
        self.hear({0: 1, 1: version, 2: what, 7: stream or self.reporter.stream})

    def turn(self):
        """Some time passes -> the chunk that the device asks for, or None."""
        clock[0] += 250
        self.agent.due_ms = ticks_add(clock[0], 900)
        del self.sent[:]
        self.update.turn()
        for topic, payload in self.sent:
            if topic.endswith("/want"):
                fields = fields_of(self.wants, payload)
                assert fields[7] == self.reporter.stream
                return fields[1], fields[2], fields[3]
        return None

    def answer(self, want, parts):
        version, part, at = want
        self.hear({0: 1, 1: version, 2: part, 3: at, 4: parts[part][at : at + CHUNK_BYTES]})

    def take(self, name, version=2, turns=200):
        """Offer a release and serve it until the device asks for nothing more."""
        parts = RELEASES[name]
        self.offer(version, parts[0])
        idle = 0
        for _ in range(turns):
            want = self.turn()
            if want:
                self.answer(want, parts)
            idle = 0 if want else idle + 1
            if idle > 3:
                return self
        raise AssertionError("it never ends")

    @property
    def status(self):
        return self.update.status

    @property
    def digest(self):
        return self.agent.channels[0].scorer.model.digest


def ready(**options):
    """A device that has learned, with a full ring."""
    device = Device(**options)
    device.windows(9 + WINDOWS)
    assert not device.agent.learning
    return device


def again(device, save=True):
    """Reset it -> the device of the next start."""
    if save:
        device.agent.save()
    return Device(device.state)


@in_a_folder
def test_a_release_is_pulled_tried_and_confirmed_and_no_window_is_missed():
    device = ready()
    before = device.agent.windows
    factory = device.digest
    device.take("second")
    assert device.status == [0, 0, 1, 2, slots.NONE, 0]
    assert device.digest == sha256(RELEASES["second"][1]).digest()[:8] != factory
    assert not device.agent.learning  # it learned from the last windows what it has to
    assert device.windows(20) == 0 and device.agent.windows == before + 20
    device.end(CONFIRM, 2)
    assert device.status == [2, 1, 0, 2, slots.CONFIRMED, 0]
    assert device.windows(20, loud=True) == 2  # and it alarms
    next_one = again(device)
    assert next_one.status == [2, 1, 0, 2, slots.CONFIRMED, 0]
    assert next_one.digest == device.digest and not next_one.agent.learning


@in_a_folder
def test_what_was_learned_goes_over_and_comes_back():
    device = ready()
    scorer = device.agent.channels[0].scorer
    learned = list(scorer.adaptation.learned_q8)
    location = scorer.detector.location_q8
    assert any(learned)
    device.take("second")
    scorer = device.agent.channels[0].scorer
    assert [abs(scorer.adaptation.learned_q8[i] - learned[i]) < 120 for i in range(3)] == [True] * 3
    device.end(WITHDRAW, 2)
    scorer = device.agent.channels[0].scorer
    assert device.status == [0, 0, 0, 2, slots.WITHDRAWN, 0]
    assert list(scorer.adaptation.learned_q8) == learned and scorer.detector.location_q8 == location
    assert not device.agent.learning


@in_a_folder
def test_it_goes_on_after_a_power_cut_without_another_offer():
    device = ready()
    parts = RELEASES["second"]
    device.offer(2, parts[0])
    for _ in range(2):
        device.answer(device.turn(), parts)
    device = again(device)
    assert device.turn() == (2, 0, 2 * CHUNK_BYTES)
    device.windows(1 + WINDOWS)
    assert device.take("second").status == [0, 0, 1, 2, slots.NONE, 0]


@in_a_folder
def test_wants_are_sent_again_less_and_less_often():
    device = ready()
    device.offer(2, RELEASES["second"][0])
    asked = []
    for i in range(3600):
        if device.turn():
            asked.append(i)
        clock[0] += 750
    gaps = [asked[i + 1] - asked[i] for i in range(len(asked) - 1)]
    assert gaps[:4] == [15, 30, 60, 120] and max(gaps) == 900 and len(asked) < 12, gaps
    device.offer(2, RELEASES["second"][0])  # the collector is back
    assert device.turn()


@in_a_folder
def test_the_byte_budget_of_updates_is_bounded_and_its_own():
    device = ready(bytes_per_day=8000)
    parts = RELEASES["second"]
    device.offer(2, parts[0])
    chunks = 0
    began_ms = clock[0]
    while device.update.update.offered:
        want = device.turn()
        if want:
            chunks += 1
            device.answer(want, parts)
        clock[0] += 30_000
    hours = (clock[0] - began_ms) / 3_600_000
    assert device.store.trial == 1
    assert 4 < hours < 24 and chunks * 488 <= 1000 + 7000 * hours / 24 + 488, (chunks, hours)
    assert device.reporter.budget.sent == device.reporter.budget.most


@in_a_folder
def test_three_starts_without_confirmation_roll_back():
    device = ready().take("second")
    for trial in (1, 1, 0):
        device = again(device)
        assert device.store.trial == trial
    assert device.status[:5] == [0, 0, 0, 2, slots.RESTARTS]
    assert device.digest == sha256(VECTORS["factory"]).digest()[:8] and not device.agent.learning
    assert not device.update.update.offered and device.turn() is None  # it is not pulled once more
    device.take("second")
    assert device.store.trial == 0 and device.status[5] == 1


@in_a_folder
def test_the_model_before_the_last_is_still_known():
    device = ready()
    learned = list(device.agent.channels[0].scorer.adaptation.learned_q8)
    device.take("second")
    device.end(CONFIRM, 2)
    device.take("third", 3)
    device.end(WITHDRAW, 3)
    assert device.status[:5] == [2, 1, 0, 3, slots.WITHDRAWN] and not device.agent.learning
    device.end(WITHDRAW, 2)
    assert device.status[:5] == [0, 0, 0, 3, slots.WITHDRAWN] and not device.agent.learning
    assert list(device.agent.channels[0].scorer.adaptation.learned_q8) == learned


@in_a_folder
def test_a_day_without_confirmation_rolls_back_in_the_running_agent():
    device = ready().take("second")
    device.turn()
    device.reporter.uptime_s += 86_402
    device.turn()
    assert device.status[:5] == [0, 0, 0, 2, slots.UNCONFIRMED]
    assert device.digest == sha256(VECTORS["factory"]).digest()[:8]
    assert device.windows(10) == 0 and not device.agent.learning


@in_a_folder
def test_it_restarts_where_the_firmware_wants_it_so():
    calls = []
    device = ready(restart=lambda: calls.append(1)).take("second")
    assert calls == [1] and device.store.trial == 1
    # the state was written for the start that follows
    device = again(device, save=False)
    assert device.store.trial == 1 and not device.agent.learning
    assert device.digest == sha256(RELEASES["second"][1]).digest()[:8]


@in_a_folder
def test_a_slot_whose_model_is_damaged_falls_back():
    device = ready().take("second")
    device.end(CONFIRM, 2)
    with open(FOLDER + "/update/a.model", "r+b") as file:
        file.seek(300)
        file.write(b"\x55\xaa")
    device = again(device)
    assert device.status[:5] == [0, 0, 0, 2, slots.MODEL]
    assert device.digest == sha256(VECTORS["factory"]).digest()[:8]


@in_a_folder
def test_rules_and_policy_come_without_a_model_and_go_with_the_version():
    device = ready().take("second")
    device.end(CONFIRM, 2)
    own = device.agent.channels[0].scorer.meta.alarm_rules
    device.take("rules", 4)
    assert device.status[:4] == [2, 1, 2, 4]
    device.end(CONFIRM, 4)
    rules = ((200, 900, 1400), (384, 870, 896))
    assert device.agent.channels[0].scorer.meta.alarm_rules == rules
    device.take("policy", 5)
    assert device.status[4] == slots.NOTHING  # there is no response here
    assert device.agent.channels[0].scorer.meta.alarm_rules == rules != own


@in_a_folder
def test_the_response_follows_the_policy_of_a_release():
    response = Response(mode=DRY_RUN, sent=-1)
    device = ready(response=response).take("bad policy", 4)
    assert device.status[3:5] == [4, slots.MALFORMED] and response.rules == RULES
    device.take("policy", 5)
    followed = ((1, 1, 0, 2, 0, 0), (3, 2, 1, 5, 60, 600))
    assert device.store.trial == 1 and response.rules == followed  # on trial, too
    device.end(CONFIRM, 5)
    device.agent.save()
    response = Response(mode=DRY_RUN, sent=-1)
    device = Device(device.state, response=response)
    assert device.status[:2] == [5, 1] and response.rules == followed
    device.end(WITHDRAW, 5)
    assert device.status[:2] == [0, 0] and response.rules == RULES


@in_a_folder
def test_a_proof_waits_for_windows_and_for_the_end_of_an_alarm():
    device = Device()
    device.windows(9 + 4)
    device.take("second")
    assert device.store.trial == 0 and device.update.update.offered == 2  # whole, and not proven
    device.windows(WINDOWS)
    device.windows(30, loud=True)
    assert device.agent.channels[0].scorer.verdict.level == 2
    device.turn()
    assert device.store.trial == 0
    device.reporter.uptime_s += 86_401
    device.turn()
    assert device.store.trial == 1


@in_a_folder
def test_a_medium_that_refuses_ends_the_update_and_nothing_else():
    device = ready()
    parts = RELEASES["second"]
    device.offer(2, parts[0])
    device.answer(device.turn(), parts)
    os.rename(FOLDER + "/update", FOLDER + "/moved")
    with open(FOLDER + "/update", "wb") as file:
        file.write(b"in the way")
    for _ in range(80):
        want = device.turn()
        if want:
            device.answer(want, parts)
    assert device.status[3:5] == [2, slots.STORAGE] and device.status[5] >= 1
    os.remove(FOLDER + "/update")
    os.rename(FOLDER + "/moved", FOLDER + "/update")
    assert device.windows(5) == 0
    assert device.take("second").store.trial == 1


# --- what is wrong: refused, counted, named in the status, and the old model still scores -----------------------------

WRONG = (
    ("class", 2, slots.CLASS),
    ("schema", 2, slots.SCHEMA),
    ("schema of the file", 2, slots.MODEL),
    ("windows", 2, slots.MODEL),
    ("golden", 2, slots.MODEL),
    ("damaged", 2, slots.MODEL),
    ("no model", 2, slots.MODEL),
    ("unsuited", 2, slots.UNSUITED),
    ("expired", 2, slots.EXPIRED),
    ("early", 2, slots.EARLY),
    ("large", 2, slots.TOO_LARGE),
    ("forged", 2, slots.SIGNATURE),
    ("second", 3, slots.VERSION),
)


def still_the_old_one(device, result, refusals=1):
    assert device.store.trial == 0 and device.store.slot == 0 and device.store.version == 0
    assert device.status[4:] == [result, refusals], (device.status, result)
    assert device.digest == sha256(VECTORS["factory"]).digest()[:8]
    windows = device.agent.windows
    assert device.windows(2) == 0 and device.agent.windows == windows + 2


@in_a_folder
def test_wrong_releases_are_refused():
    device = ready()
    for number, (name, version, result) in enumerate(WRONG):
        device.store.tried = 0
        device.take(name, version)
        still_the_old_one(device, result, number + 1)


@in_a_folder
def test_an_older_version_and_one_below_the_floor_are_refused():
    device = ready().take("third", 3)
    device.end(CONFIRM, 3)
    assert device.store.floor == 2
    device.take("second", 2)
    assert device.status == [3, 1, 0, 3, slots.CONFIRMED, 1]
    device.end(WITHDRAW, 3)  # the model that it came with is below the floor
    assert device.status[:2] == [3, 1]


@in_a_folder
def test_ten_megabytes_are_refused_before_a_byte_is_pulled():
    device = ready()
    device.hear({0: 1, 1: 2, 2: OFFER, 3: 1, 5: bytes(32), 6: 10_000_000})
    assert device.turn() is None
    still_the_old_one(device, slots.TOO_LARGE)


@in_a_folder
def test_replays_to_a_later_start_are_refused():
    device = ready()
    last = device.reporter.stream
    device = again(device)
    device.windows(1 + WINDOWS)
    device.take("second")
    device.end(CONFIRM, 2, last)
    assert device.store.trial == 1 and device.status[5] == 1
    device.end(CONFIRM, 2)
    device.end(WITHDRAW, 2, last)
    assert device.status[:3] == [2, 1, 0] and device.status[5] == 2
    before = device.status
    device.take("second")  # a manifest that runs already
    assert device.status == before


@in_a_folder
def test_chunks_out_of_order_truncated_and_of_another_key():
    device = ready()
    parts = RELEASES["second"]
    device.offer(2, parts[0])
    version, part, at = device.turn()
    device.answer((version, part, at + CHUNK_BYTES), parts)
    device.answer((version, 1, 0), parts)
    device.answer((version + 1, part, at), parts)
    rejected = device.reporter.rejected
    device.hear({0: 1, 1: version, 2: part, 3: at, 4: parts[0][:CHUNK_BYTES]}, Mac(KEY, b"want", "pump-1"))
    device.hear({0: 1, 1: version, 2: part, 3: at, 4: parts[0][:CHUNK_BYTES]}, Mac(KEY, b"offer", "pump-2"))
    device.hear({0: 1, 1: version, 2: part, 3: at, 4: parts[0][:CHUNK_BYTES]}, Mac(bytes(32), b"offer", "pump-1"))
    device.hear({0: 1, 1: version, 2: part, 3: at, 4: bytes(CHUNK_BYTES + 1)})
    device.hear({0: 1, 1: version, 2: part, 3: at, 4: b""})
    device.hear({0: 1, 1: version, 2: 2, 3: at, 4: b"1"})
    device.hear({0: 2, 1: version, 2: part, 3: at, 4: b"1"})
    assert device.reporter.rejected == rejected + 7
    assert device.update.update.want() == (0, 0)
    device.answer((version, part, at), (parts[0][:100], b""))  # truncated: the rest is asked for
    assert device.turn() == (2, 0, 100)
    assert device.take("second").store.trial == 1


def fields_and_places(message, count):
    """Where to change a byte of a signed manifest: in the frame, in the key and in the value of each of its fields, in
    the signature's head, and at `count` places that a seed gives."""
    payload = cbor_decode.loads(message)[2]
    begin = message.find(payload)
    places = set(range(begin))
    at = begin + 1
    fields = cbor_decode.loads(payload)
    for key in fields:
        value = bytearray()
        cbor.encode(fields[key], value)
        places |= {at, at + 1, at + len(value)}
        at += 1 + len(value)
    places |= set(range(at, at + 24))
    seed = 12345
    for _ in range(count):
        seed = (seed * 1103515245 + 12345) & 0x3FFFFFFF
        places.add(seed % len(message))
    return sorted(places)


@in_a_folder
def test_a_changed_byte_of_manifest_or_model_is_refused():
    parts = RELEASES["second"]
    device = ready()
    refused = 0
    for at in some(fields_and_places(parts[0], 64)):
        changed = bytearray(parts[0])
        changed[at] ^= 1 << at % 8
        device.offer(2, bytes(changed))
        for _ in range(20):
            want = device.turn()
            if want:
                device.answer(want, (bytes(changed), parts[1]))
        refused += 1
        assert device.status[4] in (slots.SIGNATURE, slots.MALFORMED) and device.status[5] == refused, at
        device.store.tried = 0
    for at in some(range(0, len(parts[1]), len(parts[1]) // 64 + 1)):
        changed = bytearray(parts[1])
        changed[at] ^= 1 << at % 8
        device.offer(2, parts[0])
        for _ in range(20):
            want = device.turn()
            if want:
                device.answer(want, (parts[0], bytes(changed)))
        refused += 1
        assert device.status[4:] == [slots.DIGEST, refused], at
    still_the_old_one(device, slots.DIGEST, refused)


@in_a_folder
def test_a_changed_byte_of_a_message_is_rejected():
    parts = RELEASES["second"]
    device = ready()
    value = bytearray()
    digest = sha256(parts[0]).digest()
    cbor.encode_fields([1, 2, OFFER, 1, None, digest, len(parts[0]), device.reporter.stream], value)
    message = bytes(device.mac.seal(value))
    for at in range(len(message)):
        changed = bytearray(message)
        changed[at] ^= 1 << at % 8
        device.agent.on_message("stonechat/1/fleet/pump-1/model", bytes(changed))
        device.agent.on_message("stonechat/1/fleet/pump-1/model", message[:at])
    assert device.reporter.rejected == 2 * len(message) and not device.update.update.offered
    device.agent.on_message("stonechat/1/fleet/pump-1/model", message)
    assert device.update.update.offered == 2
