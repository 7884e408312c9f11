"""The record of what was learned: it comes back whole, or not at all, and says so."""

import os

from share import some
from stonechat.errors import StateError
from stonechat.state import MAX_BYTES, State

PATH = "state-test-%d" % (os.urandom(1)[0])


def with_file(test):
    """The folder is left as it was found."""

    def run():
        try:
            test()
        finally:
            for name in (PATH, PATH + ".tmp"):
                try:
                    os.remove(name)
                except OSError:
                    pass

    return run


def saved():
    state = State(PATH)
    state.put(b"peers\x00\xff", b"")
    state.put(b"norm", bytes(range(256)) * 2)
    state.save()
    with open(PATH, "rb") as file:
        return file.read()


@with_file
def test_what_was_saved_comes_back():
    assert not State(PATH).sections
    saved()
    state = State(PATH)
    assert state.damaged is None
    assert state.sections == {b"peers\x00\xff": b"", b"norm": bytes(range(256)) * 2}
    assert state.get(b"gone") is None and state.get(b"gone", b"d") == b"d"


@with_file
def test_an_empty_record_is_a_record():
    State(PATH).save()
    assert State(PATH).damaged is None


@with_file
def test_every_cut_and_every_flipped_byte_is_noticed():
    raw = saved()
    damaged = [raw[:size] for size in some(range(0, len(raw), 7))]
    damaged += [raw[:i] + bytes((raw[i] ^ 0x10,)) + raw[i + 1 :] for i in some(range(0, len(raw), 5))]
    damaged += [raw + b"\x00", bytes(MAX_BYTES + 9)]
    for wrong in damaged:
        with open(PATH, "wb") as file:
            file.write(wrong)
        state = State(PATH)
        assert state.damaged and not state.sections


@with_file
def test_too_much_is_refused_and_the_old_record_stays():
    raw = saved()
    for size in (MAX_BYTES, 0x10003):  # the second one's length does not fit its two bytes
        state = State(PATH)
        state.put(b"much", bytes(size))
        try:
            state.save()
            assert False, "taken"
        except StateError:
            pass
    with open(PATH, "rb") as file:
        assert file.read() == raw


def test_a_medium_that_refuses_is_told():
    state = State("no-such-folder/state")
    assert state.damaged is None
    try:
        state.save()
        assert False, "saved"
    except StateError as error:
        assert "no-such-folder" in str(error)
