"""A device and its releases: taken, refused, tried, confirmed, rolled back, withdrawn; power cuts are in life/."""

import os

from share import some
from stonechat import cbor_decode, manifest, slots
from stonechat.compat import sha256
from stonechat.errors import ModelError, WireError
from stonechat.slots import Slots
from stonechat.update import CHUNK_BYTES, CONFIRM, OFFER, WITHDRAW, Update

HERE = __file__.rsplit("/", 1)[0] if "/" in __file__ else "."
FOLDER = "/tmp/stonechat-test-update-%d" % int.from_bytes(os.urandom(3), "little")  # a folder for each process
NOW_S = 1_800_000_000
MODEL = bytes([i * 7 & 255 for i in range(1000)])
STREAM = b"boot"


def releases():
    """{name: manifest}, and "key", "new key"; tools/tests/update_vectors.py makes them."""
    with open(HERE + "/../golden/releases/updates.cbor", "rb") as file:
        return cbor_decode.loads(file.read())


def wipe():
    try:
        for name in os.listdir(FOLDER):
            os.remove(FOLDER + "/" + name)
        os.rmdir(FOLDER)
    except OSError:
        pass  # nothing is there


def in_a_folder(test):
    def run():
        wipe()
        try:
            test()
        finally:
            wipe()

    return run


def load(path, rules=None, golden=None):
    with open(path, "rb") as file:
        data = file.read()
    if data != MODEL:
        raise ModelError("golden vector differs")
    return data


def quiet(model):
    return True


def device(stream=STREAM, load=load, suits=quiet, most=16_384):
    store = Slots(FOLDER)
    store.start()
    return Update(store, stream, [[0, releases()["key"]]], "pump", b"schema-1", most, load, suits)


offers = [0]  # the number of the last


def offer(update, version, message, stream=STREAM, number=None):
    if number is None:
        number = offers[0] = offers[0] + 1
    digest = sha256(message).digest()
    update.on_message({0: 1, 1: version, 2: OFFER, 3: number, 5: digest, 6: len(message), 7: stream})


def chunk(update, version, parts, want, stream=STREAM):
    part, at = want
    update.on_message({0: 1, 1: version, 2: part, 3: at, 4: parts[part][at : at + CHUNK_BYTES], 7: stream})


def pull(update, version, message, model=MODEL, now_s=NOW_S, offered=True):
    """What a collector does until the device wants nothing more -> whether another model is to run."""
    if offered:
        offer(update, version, message)
    for _ in range(200):
        want = update.want()
        if want:
            chunk(update, version, (message, model), want)
        elif update.step(now_s, 10):
            return True
        elif not update.offered:
            return False
    raise AssertionError("it never ends")


def close(update, what, version, stream=STREAM):
    return update.on_message({0: 1, 1: version, 2: what, 7: stream})


def raises(error, call, *args):
    try:
        call(*args)
    except error:
        return True
    return False


@in_a_folder
def test_a_release_is_tried_and_final_once_it_is_confirmed():
    message = releases()["second"]
    update = device()
    assert pull(update, 2, message)
    store = update.store
    assert (store.slot, store.trial, store.version, store.tried) == (0, 1, 0, 2)
    assert Slots(FOLDER).start() == 1
    again = device()
    assert again.store.trial == 1 and not again.step(NOW_S, 0)
    close(again, CONFIRM, 2)
    assert (again.store.slot, again.store.trial, again.store.version, again.store.result) == (1, 0, 2, slots.CONFIRMED)
    after = Slots(FOLDER)
    assert after.start() == 1 and after.version == 2
    with open(after.path(1) + ".model", "rb") as file:
        assert file.read() == MODEL


@in_a_folder
def test_a_small_file_is_read_in_little_memory_whatever_it_may_have():
    wipe()
    os.mkdir(FOLDER)
    with open(FOLDER + "/manifest", "wb") as file:
        file.write(b"small")
    assert slots.read(FOLDER + "/manifest", 1 << 29) == b"small"
    assert slots.read(FOLDER + "/manifest", 2) == b"sm"
    assert slots.read(FOLDER + "/none", 1 << 29) == b""
    wipe()


def test_an_update_goes_on_where_a_restart_left_it():
    message = releases()["second"]
    update = device()
    offer(update, 2, message)
    for _ in range(2):
        chunk(update, 2, (message, MODEL), update.want())
    again = device()
    assert again.want() == (0, 2 * CHUNK_BYTES)  # without another offer
    offer(again, 2, message)
    assert again.want() == (0, 2 * CHUNK_BYTES)
    assert pull(again, 2, message)


@in_a_folder
def test_another_release_begins_anew():
    update = device()
    offer(update, 2, releases()["second"])
    chunk(update, 2, (releases()["second"], MODEL), update.want())
    assert update.want() == (0, CHUNK_BYTES)
    offer(update, 3, releases()["third"])
    assert update.want() == (0, 0)
    assert pull(update, 3, releases()["third"], offered=False)


@in_a_folder
def test_whatever_is_wrong_is_refused_counted_and_changes_nothing():
    every = releases()
    cases = (
        ("class", 2, slots.CLASS),
        ("schema", 2, slots.SCHEMA),
        ("expired", 2, slots.EXPIRED),
        ("early", 2, slots.EARLY),
        ("large", 2, slots.TOO_LARGE),
        ("digest", 2, slots.DIGEST),
        ("forged", 2, slots.SIGNATURE),
        ("fifth", 5, slots.SIGNATURE),
        ("second", 3, slots.VERSION),  # offered as another version than was signed
    )
    for name, version, result in cases:
        wipe()
        update = device()
        assert not pull(update, version, every[name]), name
        assert (update.store.result, update.refusals) == (result, 1), name
        assert (update.store.slot, update.store.trial, update.store.version) == (0, 0, 0), name
        again = Slots(FOLDER)
        assert again.start() == 0 and again.result == result, name


@in_a_folder
def test_a_release_that_expires_while_its_model_comes_is_refused():
    message = releases()["second"]
    expires_s = manifest.read(manifest.payload(message)).expires_s
    for now_s, result in ((0, slots.CLOCK), (expires_s, slots.EXPIRED)):
        update = device()
        offer(update, 2, message)
        while update.want():
            chunk(update, 2, (message, MODEL), update.want())
            if not update.whole:
                update.step(NOW_S, 10)
        assert update.whole
        assert not update.step(now_s, 10) and update.store.result == result and update.refusals == 1


@in_a_folder
def test_a_clock_that_is_not_set_refuses_for_the_time_being():
    message = releases()["second"]
    update = device()
    assert not pull(update, 2, message, now_s=0)
    assert update.store.result == slots.CLOCK
    assert pull(update, 2, message)


@in_a_folder
def test_a_changed_byte_is_refused():
    message = releases()["second"]
    for at in some(range(0, len(message), 61)):
        wipe()
        changed = bytearray(message)
        changed[at] ^= 1
        update = device()
        assert not pull(update, 2, bytes(changed)), at
        assert update.store.result in (slots.SIGNATURE, slots.MALFORMED), at
        # and where the offer names the good one, but the parts differ
        wipe()
        update = device()
        offer(update, 2, message)
        while update.want():
            chunk(update, 2, (bytes(changed), MODEL), update.want())
        assert not update.step(NOW_S, 0) and update.store.result == slots.DIGEST, at
    for at in some(range(0, len(MODEL), 97)):
        wipe()
        changed = bytearray(MODEL)
        changed[at] ^= 1
        update = device()
        assert not pull(update, 2, message, bytes(changed))
        assert update.store.result == slots.DIGEST


@in_a_folder
def test_a_model_that_does_not_load_or_does_not_suit_is_refused():
    message = releases()["second"]

    def fails(path, rules, golden):
        raise ModelError("golden vector differs")

    def no_memory(path, rules, golden):
        raise MemoryError

    for bad, suits, result in (
        (fails, quiet, slots.MODEL),
        (no_memory, quiet, slots.MODEL),
        (load, bool, 0),
        (load, lambda model: False, slots.UNSUITED),
    ):
        wipe()
        update = device(load=bad, suits=suits)
        assert pull(update, 2, message) == (not result)
        assert update.store.result == result
        if result:  # the same version is not taken again
            offer(update, 2, message)
            assert update.want() is None and update.refusals == 2


@in_a_folder
def test_older_versions_and_the_floor():
    every = releases()
    update = device()
    assert pull(update, 3, every["third"])
    close(update, CONFIRM, 3)
    assert (update.store.version, update.store.floor) == (3, 2)
    before = update.refusals
    offer(update, 2, every["second"])
    assert update.want() is None and update.refusals == before + 1
    offer(update, 3, every["third"])
    assert update.want() is None and update.refusals == before + 1  # what runs already is no fault
    # back to the version that the device came with would be below the floor
    assert not close(update, WITHDRAW, 3) and update.store.slot == 1


@in_a_folder
def test_withdrawal_goes_back_one_version():
    every = releases()
    update = device()
    assert pull(update, 2, every["second"])
    close(update, CONFIRM, 2)
    assert pull(update, 3, every["third"])
    close(update, CONFIRM, 3)
    assert (update.store.slot, update.store.version) == (2, 3)
    assert close(update, WITHDRAW, 3)
    assert (update.store.slot, update.store.version, update.store.result) == (1, 2, slots.WITHDRAWN)
    offer(update, 3, every["third"])
    assert update.want() is None
    assert Slots(FOLDER).start() == 1


@in_a_folder
def test_withdrawal_of_a_trial_and_of_a_download():
    every = releases()
    update = device()
    assert pull(update, 2, every["second"])
    assert close(update, WITHDRAW, 2)
    assert (update.store.trial, update.store.slot, update.store.result) == (0, 0, slots.WITHDRAWN)
    offer(update, 3, every["third"])
    assert update.want() == (0, 0)
    assert not close(update, WITHDRAW, 3)
    assert update.want() is None and update.store.result == slots.WITHDRAWN


@in_a_folder
def test_confirmation_and_withdrawal_of_an_earlier_start_are_replays():
    update = device()
    assert pull(update, 2, releases()["second"])
    close(update, CONFIRM, 2, b"last")
    assert update.store.trial == 1 and update.refusals == 1
    assert not close(update, WITHDRAW, 2, b"last")
    assert update.store.trial == 1 and update.refusals == 2
    close(update, CONFIRM, 3)  # another version
    assert update.store.trial == 1
    close(update, CONFIRM, 2)
    assert update.store.trial == 0
    close(update, CONFIRM, 2)  # twice
    assert update.store.version == 2


@in_a_folder
def test_without_an_acknowledgement_it_goes_back():
    update = device()
    assert pull(update, 2, releases()["second"])
    assert not update.step(NOW_S, 100)
    assert not update.step(NOW_S, 100 + 86_400)
    assert update.step(NOW_S, 101 + 86_400)
    assert (update.store.trial, update.store.slot, update.store.result) == (0, 0, slots.UNCONFIRMED)


@in_a_folder
def test_a_model_that_ends_the_device_at_each_start_goes_back():
    update = device()
    assert pull(update, 2, releases()["second"])
    started = [Slots(FOLDER).start() for _ in range(6)]
    assert started == [1, 1, 1, 0, 0, 0]
    assert Slots(FOLDER).result == slots.RESTARTS


@in_a_folder
def test_a_slot_that_can_not_be_read_falls_back():
    update = device()
    assert pull(update, 2, releases()["second"])
    assert Slots(FOLDER).broken() == 0
    assert Slots(FOLDER).result == slots.MODEL
    wipe()
    update = device()
    assert pull(update, 2, releases()["second"])
    close(update, CONFIRM, 2)
    assert Slots(FOLDER).broken() == 0 and Slots(FOLDER).start() == 0


@in_a_folder
def test_keys_rotate():
    every = releases()
    update = device()
    assert not pull(update, 4, every["keys"])
    assert (update.store.version, update.store.result, update.store.slot) == (4, slots.CONFIRMED, 0)
    again = device()
    assert pull(again, 5, every["fifth"])
    close(again, CONFIRM, 5)
    assert (again.store.version, again.store.floor) == (5, 5)
    # a release with a model and new keys: they count once it is confirmed
    assert pull(again, 6, every["sixth"])
    assert again.store.keys(None) == [[0, every["new key"]]]
    close(again, CONFIRM, 6)
    assert again.store.keys(None) == [[0, every["key"]]]


@in_a_folder
def test_a_rotation_that_the_power_cut_in_the_middle_goes_on():
    every = releases()
    update = device()

    def cut(version, floor):
        raise KeyboardInterrupt

    update.store.adopt = cut
    raises(KeyboardInterrupt, lambda: pull(update, 4, every["keys"]))
    update = device()
    assert update.offered == 4 and update.store.version == 0
    update.step(NOW_S, 1)
    assert (update.store.version, update.store.result, update.refusals) == (4, slots.CONFIRMED, 0)
    # the way back is to the version before, on the same model; the keys stay
    close(update, WITHDRAW, 4)
    assert (update.store.version, update.store.slot, update.store.result) == (0, 0, slots.WITHDRAWN)
    assert update.store.keys(None) == [[0, every["new key"]]]
    # what is not of keys alone is verified with the new ones in any case
    update = device()
    pull(update, 6, every["sixth"])
    close(update, WITHDRAW, 6)
    update.store.put_keys([[0, every["key"]]], sha256(every["sixth"]).digest())
    update.store.tried = 0
    assert not pull(update, 6, every["sixth"]) and update.store.result == slots.SIGNATURE


@in_a_folder
def test_a_medium_that_refuses_the_trial_gives_none():
    """Neither in this start: a confirmation would make a model final that never ran."""
    update = device()

    def refuse():
        raise OSError(28)

    save, update.store.save = update.store.save, refuse
    raises(OSError, lambda: pull(update, 2, releases()["second"]))
    assert (update.store.trial, update.store.tried) == (0, 0)
    update.store.save = save
    update.failed()
    assert (update.store.trial, update.store.result) == (0, slots.STORAGE)
    assert pull(update, 2, releases()["second"])  # offered again
    for name, arguments in (("confirm", (0,)), ("adopt", (9, 9)), ("begin_trial", (2, 9))):
        before = update.store._pack()
        update.store.save = refuse
        raises(OSError, lambda name=name, arguments=arguments: getattr(update.store, name)(*arguments))
        assert update.store._pack() == before, name


class Full(Slots):
    """On a medium that takes no record."""

    def _pack(self):
        raise OSError(28)


@in_a_folder
def test_what_the_record_names_is_not_written_over_where_the_medium_refused():
    """A start on a full medium runs what is final, while the record goes on naming the trial: whatever is pulled then
    is not verified, and a power cut would have the next start run it."""
    assert pull(device(), 2, releases()["second"])
    store = Full(FOLDER)
    assert store.trial == 1
    raises(OSError, store.start)
    update = Update(store, b"full", [[0, releases()["key"]]], "pump", b"schema-1", 16_384, load, quiet)
    assert store.trial == 0 and raises(OSError, lambda: offer(update, 3, releases()["third"], b"full"))
    update.failed()
    with open(FOLDER + "/a.model", "rb") as file:
        assert file.read() == MODEL
    store._pack = lambda: Slots._pack(store)  # it takes one again
    offer(update, 3, releases()["third"], b"full")
    assert Slots(FOLDER).trial == 0 and update.want() == (0, 0)


@in_a_folder
def test_a_confirmation_counts_once_in_a_start():
    """Whoever holds the broker can send all of a withdrawn release again, to the same start."""
    update = device()
    assert pull(update, 2, releases()["second"])
    close(update, CONFIRM, 2)
    assert close(update, WITHDRAW, 2)
    update.store.tried = 3  # another one has failed meanwhile
    assert pull(update, 2, releases()["second"])
    close(update, CONFIRM, 2)
    assert (update.store.trial, update.store.version, update.refusals) == (1, 0, 1)


@in_a_folder
def test_an_offer_or_a_chunk_that_is_sent_again_begins_no_trial():
    """Whoever holds the broker keeps what was sent, and sends it after the release was withdrawn."""
    every = releases()
    update = device()
    offer(update, 2, every["second"], number=10)
    chunk(update, 2, (every["second"], MODEL), (0, 0))
    close(update, WITHDRAW, 2)
    offer(update, 3, every["third"], number=20)
    close(update, WITHDRAW, 3)  # `tried` no longer names version 2
    before = update.refusals
    offer(update, 2, every["second"], number=10)
    assert update.want() is None and update.refusals == before + 1
    # to the next start
    update = device(stream=b"next")
    offer(update, 2, every["second"], number=10)
    assert update.want() is None and update.refusals == 1
    # a download that goes on in the next start takes only what was sent to that one
    offer(update, 2, every["second"], b"next", number=21)
    chunk(update, 2, (every["second"], MODEL), (0, 0))
    assert update.want() == (0, 0) and update.refusals == 1
    chunk(update, 2, (every["second"], MODEL), (0, 0), b"next")
    assert update.want() == (0, CHUNK_BYTES)


@in_a_folder
def test_a_release_that_nobody_confirmed_is_taken_again_when_it_is_offered_anew():
    message = releases()["second"]
    update = device()
    assert pull(update, 2, message)
    assert not update.step(NOW_S, 0) and update.step(NOW_S, 86_401)
    assert update.store.result == slots.UNCONFIRMED
    offer(update, 2, message, number=offers[0])  # the offer of before
    assert update.want() is None and update.refusals == 1
    offer(update, 2, message)
    assert update.want() == (0, 0) and update.store.result == slots.NONE  # the status no longer reports the first try
    assert Slots(FOLDER).result == slots.NONE
    assert pull(update, 2, message, offered=False)
    close(update, CONFIRM, 2)
    assert update.store.version == 2


@in_a_folder
def test_messages_that_are_malformed():
    update = device()
    good = {0: 1, 1: 2, 2: OFFER, 3: 1, 5: bytes(32), 6: 100, 7: STREAM}
    for changes in (
        {3: None},
        {3: -1},
        {3: b"1"},
        {1: 0},
        {1: None},
        {1: True},
        {2: 3},
        {2: None},
        {5: bytes(31)},
        {5: "x" * 32},
        {6: 0},
        {6: -1},
        {6: b""},
    ):
        fields = dict(good)
        fields.update(changes)
        assert raises(WireError, update.on_message, fields), changes
    offer(update, 2, releases()["second"])
    good = {0: 1, 1: 2, 2: 0, 3: 0, 4: b"x", 7: STREAM}
    for changes in (
        {2: 2},
        {2: None},
        {2: b"0"},
        {3: -1},
        {3: None},
        {4: b""},
        {4: bytes(CHUNK_BYTES + 1)},
        {4: "x"},
        {4: None},
    ):
        fields = dict(good)
        fields.update(changes)
        assert raises(WireError, update.on_message, fields), changes
    for fields in ({7: STREAM}, {0: 1, 7: STREAM}, {1: 2, 7: STREAM}, {4: b"x", 7: STREAM}):
        assert raises(WireError, update.on_message, fields), fields
    assert update.want() == (0, 0)


@in_a_folder
def test_chunks_out_of_order_twice_or_of_another_version_are_passed_over():
    message = releases()["second"]
    update = device()
    offer(update, 2, message)
    chunk(update, 2, (message, MODEL), (0, CHUNK_BYTES))
    chunk(update, 2, (message, MODEL), (1, 0))
    chunk(update, 3, (message, MODEL), (0, 0))
    assert update.want() == (0, 0)
    chunk(update, 2, (message, MODEL), (0, 0))
    chunk(update, 2, (message, MODEL), (0, 0))
    assert update.want() == (0, CHUNK_BYTES)
    last = len(message) - len(message) % CHUNK_BYTES
    while update.want() != (0, last):
        chunk(update, 2, (message, MODEL), update.want())
    # more than was announced
    assert raises(WireError, update.on_message, {0: 1, 1: 2, 2: 0, 3: last, 4: bytes(CHUNK_BYTES), 7: STREAM})
    assert pull(update, 2, message, offered=False)


@in_a_folder
def test_an_offer_of_ten_megabytes_is_refused_before_a_byte_is_pulled():
    update = device()
    update.on_message({0: 1, 1: 2, 2: OFFER, 3: 1, 5: bytes(32), 6: 10_000_000, 7: STREAM})
    assert update.want() is None and update.store.result == slots.TOO_LARGE and update.refusals == 1


@in_a_folder
def test_a_record_that_is_damaged_is_that_of_a_new_device():
    update = device()
    assert pull(update, 2, releases()["second"])
    close(update, CONFIRM, 2)
    with open(FOLDER + "/record", "rb") as file:
        record = file.read()
    for at in range(len(record)):
        with open(FOLDER + "/record", "wb") as file:
            file.write(record[:at] + bytes([record[at] ^ 1]) + record[at + 1 :])
        assert Slots(FOLDER).start() == 0
        with open(FOLDER + "/record", "wb") as file:
            file.write(record[:at])
        assert Slots(FOLDER).start() == 0
