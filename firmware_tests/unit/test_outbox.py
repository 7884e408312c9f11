import os

import stonechat.outbox
import stonechat.outbox_memory
from stonechat.errors import OutboxError
from stonechat.outbox import Outbox
from stonechat.outbox_memory import MemoryOutbox

PATH = "/tmp/stonechat-test-outbox"


def at_clock(now_s):
    """The clock that a test sees; put back afterwards, as pytest runs them all in one process."""

    def decorate(test):
        def run():
            real = stonechat.outbox.first_number
            stonechat.outbox.first_number = stonechat.outbox_memory.first_number = lambda: now_s or 1
            try:
                test()
            finally:
                stonechat.outbox.first_number = stonechat.outbox_memory.first_number = real
                try:
                    os.rmdir(wiped())  # nothing is left behind
                except OSError:
                    pass  # this test made no folder

        return run

    return decorate


def wiped():
    try:
        for name in os.listdir(PATH):
            os.remove(PATH + "/" + name)
    except OSError:
        pass
    return PATH


def pending(outbox):
    found = []
    record = outbox.after(0)
    while record is not None:
        found.append((record[0], bytes(record[1])))
        record = outbox.after(record[0])
    return found


def numbers(outbox):
    return [record[0] for record in pending(outbox)]


def segments():
    return sorted([name for name in os.listdir(PATH) if name.endswith(".seg")])


@at_clock(0)
def test_records_come_back_in_order_and_after_a_restart():
    outbox = Outbox(wiped())
    bodies = [bytes([i]) * (20 + i) for i in range(40)]
    for i, body in enumerate(bodies):
        assert outbox.append(body) == i + 1
    assert [body for _, body in pending(outbox)] == bodies
    again = Outbox(PATH)
    assert [body for _, body in pending(again)] == bodies
    assert again.boot == outbox.boot + 1
    assert again.damaged == 0


@at_clock(0)
def test_numbers_are_never_used_twice():
    used = set()
    wiped()
    for life in range(6):
        outbox = Outbox(PATH)
        for _ in range(life):
            number = outbox.append(b"x" * 40)
            assert number not in used
            used.add(number)
        outbox.ack(0, outbox.sequence)
        if life % 2:
            outbox.save()


@at_clock(0)
def test_an_orderly_stop_leaves_no_gap_and_remembers_what_is_acknowledged():
    outbox = Outbox(wiped())
    for _ in range(5):
        outbox.append(b"x" * 40)
    outbox.ack(1, 3)
    outbox.save()
    again = Outbox(PATH)
    assert again.sequence == 6
    assert numbers(again) == [4, 5]


@at_clock(0)
def test_acknowledged_out_of_order():
    outbox = Outbox(wiped())
    for _ in range(25):
        outbox.append(b"x" * 40)
    outbox.ack(3, 5)
    outbox.ack(20, 20)
    assert outbox.oldest == 1
    assert numbers(outbox)[:3] == [1, 2, 6]
    assert 20 not in numbers(outbox)
    outbox.ack(1, 2)
    assert outbox.oldest == 6
    outbox.ack(6, 19)
    assert outbox.oldest == 21
    outbox.ack(1, 1000000)  # beyond what was ever sent
    assert outbox.oldest == outbox.sequence == 26
    assert pending(outbox) == []


@at_clock(0)
def test_a_report_that_begins_a_segment_waits_though_all_before_it_is_acknowledged():
    outbox = Outbox(wiped())
    for _ in range(40):
        number = outbox.append(b"x" * 60)
        assert numbers(outbox) == [number]
        outbox.ack(number, number)


@at_clock(0)
def test_a_gap_in_the_numbers_is_passed_over():
    outbox = Outbox(wiped())
    outbox.append(b"first")
    again = Outbox(PATH)  # no orderly stop: the reserve is skipped
    later = again.append(b"second")
    assert later > 40
    again.ack(1, 1)
    assert again.oldest == later
    again.ack(later, later)
    assert pending(again) == []


@at_clock(0)
def test_full_drops_the_oldest_and_counts():
    outbox = Outbox(wiped(), max_bytes=2048)
    for i in range(100):
        outbox.append(bytes([i]) * 50)
    left = numbers(outbox)
    assert left[-1] == 100
    assert left == list(range(left[0], 101))
    assert outbox.lost == 100 - len(left)
    assert outbox.oldest == left[0]
    assert len(segments()) <= 4
    assert sum([os.stat(PATH + "/" + name)[6] for name in segments()]) <= 2048


@at_clock(0)
def test_what_is_acknowledged_leaves_the_medium():
    outbox = Outbox(wiped())
    for _ in range(200):
        number = outbox.append(b"x" * 60)
        outbox.ack(number, number)
    assert outbox.lost == 0
    assert len(segments()) <= 2


@at_clock(0)
def test_a_torn_tail_costs_only_itself():
    for cut in range(1, 60):
        outbox = Outbox(wiped())
        for i in range(4):
            outbox.append(bytes([i]) * 50)
        path = PATH + "/" + segments()[-1]
        with open(path, "rb") as file:
            data = file.read()
        with open(path, "wb") as file:
            file.write(data[:-cut])
        again = Outbox(PATH)
        assert numbers(again) == [1, 2, 3]
        assert again.append(b"new") > 4
        assert [body for _, body in pending(again)][-1] == b"new"


@at_clock(0)
def test_a_flipped_bit_is_never_a_report():
    outbox = Outbox(wiped())
    for i in range(4):
        outbox.append(bytes([65 + i]) * 20)
    path = PATH + "/" + segments()[-1]
    with open(path, "rb") as file:
        data = file.read()
    for at in range(18, len(data), 3):
        broken = bytearray(data)
        broken[at] ^= 4
        wiped()
        with open(path, "wb") as file:
            file.write(broken)
        again = Outbox(PATH)
        for number, body in pending(again):
            assert body == bytes([64 + number]) * 20
        assert again.damaged == 1
        assert again.sequence > 4


@at_clock(0)
def test_rubbish_in_the_folder_is_survived():
    wiped()
    Outbox(PATH).append(b"kept")
    for name, data in (("00000090.seg", b""), ("00000091.seg", b"\xff" * 512), ("00000092.seg", bytes(512))):
        with open(PATH + "/" + name, "wb") as file:
            file.write(data)
    outbox = Outbox(PATH)
    assert [body for _, body in pending(outbox)] == [b"kept"]
    assert outbox.append(b"more") in numbers(outbox)


@at_clock(0)
def test_a_segment_that_goes_bad_does_not_hold_up_the_rest():
    for harm in (lambda path: os.remove(path), lambda path: open(path, "wb").close(), flip_in_the_middle):
        outbox = Outbox(wiped())
        for i in range(60):
            outbox.append(bytes([i]) * 40)
        harm(PATH + "/" + segments()[2])
        left = numbers(outbox)
        assert len(left) < 60 and left[-1] == 60
        assert outbox.lost == 60 - len(left)
        assert outbox.damaged
        for number in left:
            outbox.ack(number, number)
        assert outbox.oldest == 61


def flip_in_the_middle(path):
    with open(path, "rb") as file:
        data = bytearray(file.read())
    data[len(data) // 2] ^= 1
    with open(path, "wb") as file:
        file.write(data)


class FullMedium:
    def __init__(self, file):
        self.file = file

    def write(self, data):
        raise OSError(28)

    def close(self):
        self.file.close()


@at_clock(0)
def test_a_full_medium_is_told_and_reuses_nothing():
    outbox = Outbox(wiped())
    outbox.append(b"x" * 40)
    outbox._file = FullMedium(outbox._file)
    try:
        outbox.append(b"y" * 40)
        assert False, "not told"
    except OutboxError as error:
        assert "28" in str(error)
    assert outbox.spare
    assert outbox.append(b"z" * 40) == 3  # number 2 is used up
    assert numbers(Outbox(PATH)) == [1, 3]


@at_clock(0)
def test_sizes_are_checked():
    outbox = Outbox(wiped())
    for call in (
        (lambda: outbox.append(b"x" * 485)),
        (lambda: Outbox(PATH, 1023)),
        (lambda: Outbox("/nowhere/at/all")),
    ):
        try:
            call()
            assert False, "taken"
        except OutboxError:
            pass
    outbox.append(b"x" * 484)


@at_clock(1800000000)
def test_a_wiped_device_with_a_clock_does_not_start_from_one():
    assert Outbox(wiped()).sequence == 1800000000
    assert MemoryOutbox().sequence == 1800000000
    outbox = Outbox(wiped())  # numbers beyond a small int of 32 bit
    for _ in range(25):
        outbox.append(b"x" * 40)
    outbox.ack(1800000003, 1800000005)
    outbox.ack(1800000000, 1800000002)
    assert outbox.oldest == 1800000006
    assert len(pending(Outbox(PATH))) == 25  # acknowledgements are written down with the next segment


@at_clock(0)
def test_queue_does_the_same_in_ram():
    queue = MemoryOutbox(max_bytes=500)
    for i in range(20):
        assert queue.append(bytes([i]) * 50) == i + 1
    assert numbers(queue) == list(range(11, 21))
    assert queue.lost == 10 and queue.oldest == 11
    queue.ack(12, 13)
    assert queue.oldest == 11
    queue.ack(1, 11)
    assert queue.oldest == 14
    queue.ack(14, 20)
    assert queue.oldest == 21 and pending(queue) == []
