import os

import stonechat.outbox
from share import some
from stonechat.errors import OutboxError
from stonechat.outbox_memory import MemoryOutbox

PATH = "/tmp/stonechat-test-outbox-%d" % int.from_bytes(os.urandom(3), "little")  # a folder for each process


OPEN = []  # a file that the garbage collection closes would call a block device written in Python, with no memory


def Outbox(*args, **options):
    outbox = stonechat.outbox.Outbox(*args, **options)
    OPEN.append(outbox)
    return outbox


def in_a_folder(test):
    """The test's outboxes are closed and its folder, if it made one, is removed again: all run in one process."""

    def run():
        try:
            test()
        finally:
            while OPEN:
                try:
                    OPEN.pop()._close()
                except OSError:
                    pass  # its medium is one that refuses
            try:
                os.rmdir(wiped())
            except OSError:
                pass  # this test made no folder

    return run


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


@in_a_folder
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


@in_a_folder
def test_numbers_on_the_medium_are_not_used_twice():
    used = set()
    wiped()
    for life in range(6):
        outbox = Outbox(PATH)
        for _ in range(life):
            number = outbox.append(b"x" * 40)
            assert number not in used
            used.add(number)
        outbox.ack(0, outbox.sequence, outbox.stream)
        if life % 2:
            outbox.save()


@in_a_folder
def test_an_orderly_stop_leaves_no_gap_and_remembers_what_is_acknowledged():
    outbox = Outbox(wiped())
    for _ in range(5):
        outbox.append(b"x" * 40)
    outbox.ack(1, 3, outbox.stream)
    outbox.save()
    again = Outbox(PATH)
    assert again.sequence == 6
    assert numbers(again) == [4, 5]


@in_a_folder
def test_acknowledged_out_of_order():
    outbox = Outbox(wiped())
    for _ in range(25):
        outbox.append(b"x" * 40)
    outbox.ack(3, 5, outbox.stream)
    outbox.ack(20, 20, outbox.stream)
    assert outbox.oldest == 1
    assert numbers(outbox)[:3] == [1, 2, 6]
    assert 20 not in numbers(outbox)
    outbox.ack(1, 2, outbox.stream)
    assert outbox.oldest == 6
    outbox.ack(6, 19, outbox.stream)
    assert outbox.oldest == 21
    outbox.ack(1, 1000000, outbox.stream)  # beyond what was ever sent
    assert outbox.oldest == outbox.sequence == 26
    assert pending(outbox) == []


@in_a_folder
def test_a_report_that_begins_a_segment_waits_though_all_before_it_is_acknowledged():
    outbox = Outbox(wiped())
    for _ in range(40):
        number = outbox.append(b"x" * 60)
        assert numbers(outbox) == [number]
        outbox.ack(number, number, outbox.stream)


@in_a_folder
def test_a_gap_in_the_numbers_is_passed_over():
    outbox = Outbox(wiped())
    outbox.append(b"first")
    for _ in range(40):
        refuse(outbox)
    assert outbox.append(b"second") == 42
    for i in range(40):
        outbox.append(b"%d" % i)
    outbox.ack(1, 1, outbox.stream)
    assert outbox.oldest == 42
    assert outbox.ack(2, 82, outbox.stream) == 41
    assert pending(outbox) == []


@in_a_folder
def test_an_acknowledgement_frees_only_its_stream():
    first = Outbox(wiped())
    for i in range(30):
        first.append(b"%d" % i * 20)
    second = Outbox(PATH)
    for i in range(30):
        second.append(b"%d" % i * 20)
    assert first.stream != second.stream and second.sequence == 61
    assert second.ack(1, 60, b"none") == second.ack(1, 60, None) == 0
    assert second.ack(1, 0xFFFFFFFF, second.stream) == 0 and second.oldest == 1  # 31..: too far ahead of the oldest
    assert second.ack(1, 0xFFFFFFFF, first.stream) == 30 and second.oldest == 31
    assert second.ack(29, 33, second.stream) == 3 and second.ack(29, 33, second.stream) == 0
    third = Outbox(PATH)  # the acknowledgements were not written down
    assert third.ack(1, 30, first.stream) == 30 and third.oldest == 31
    assert third.ack(31, 60, third.stream) == 0
    assert third.ack(31, 60, second.stream) == 30 and third.oldest == third.sequence == 61


@in_a_folder
def test_a_restored_image_uses_numbers_again_under_another_stream():
    outbox = Outbox(wiped())
    outbox.append(b"kept")
    image = {}
    for name in os.listdir(PATH):
        with open(PATH + "/" + name, "rb") as file:
            image[name] = file.read()
    outbox.append(b"after the image was taken")
    outbox._close()
    wiped()
    for name in image:
        with open(PATH + "/" + name, "wb") as file:
            file.write(image[name])
    again = Outbox(PATH)
    assert again.append(b"another") == 2
    assert again.ack(2, 2, outbox.stream) == 0
    assert pending(again) == [(1, b"kept"), (2, b"another")]


def refuse(outbox):
    """One append() to a full medium."""
    if outbox._at < 1000:
        outbox._file = FullMedium(outbox._file)
    write = stonechat.outbox.write_atomic
    stonechat.outbox.write_atomic = FullMedium(None).write
    try:
        outbox.append(b"y" * 40)
        assert False, "not reported"
    except OutboxError as error:
        assert "28" in str(error)
    finally:
        stonechat.outbox.write_atomic = write


@in_a_folder
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


@in_a_folder
def test_what_is_acknowledged_leaves_the_medium():
    outbox = Outbox(wiped())
    for _ in range(200):
        number = outbox.append(b"x" * 60)
        outbox.ack(number, number, outbox.stream)
    assert outbox.lost == 0
    assert len(segments()) <= 2


@in_a_folder
def test_a_torn_tail_costs_only_itself():
    for cut in some(range(1, 60)):
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
        assert again.append(b"new") == 4 and again.stream != outbox.stream
        assert [body for _, body in pending(again)][-1] == b"new"


@in_a_folder
def test_a_flipped_bit_is_never_a_report():
    outbox = Outbox(wiped())
    for i in range(4):
        outbox.append(bytes([65 + i]) * 20)
    path = PATH + "/" + segments()[-1]
    with open(path, "rb") as file:
        data = file.read()
    for at in some(range(22, len(data), 3)):
        broken = bytearray(data)
        broken[at] ^= 4
        wiped()
        with open(path, "wb") as file:
            file.write(broken)
        again = Outbox(PATH)
        for number, body in pending(again):
            assert body == bytes([64 + number]) * 20
        assert again.damaged == 1


@in_a_folder
def test_rubbish_in_the_folder_is_survived():
    wiped()
    Outbox(PATH).append(b"kept")
    for name, data in (("00000090.seg", b""), ("00000091.seg", b"\xff" * 512), ("00000092.seg", bytes(512))):
        with open(PATH + "/" + name, "wb") as file:
            file.write(data)
    outbox = Outbox(PATH)
    assert [body for _, body in pending(outbox)] == [b"kept"]
    assert outbox.append(b"more") in numbers(outbox)


@in_a_folder
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
            outbox.ack(number, number, outbox.stream)
        assert outbox.oldest == 61


@in_a_folder
def test_a_segment_that_goes_bad_before_numbers_acknowledged_out_of_order():
    outbox = Outbox(wiped())
    for i in range(20):
        outbox.append(bytes([i]) * 40)
    begin = outbox._segments[1][1]  # the first number of the second segment
    outbox.ack(begin, begin + 1, outbox.stream)
    os.remove(PATH + "/" + segments()[0])
    assert numbers(outbox) == list(range(begin + 2, 21))
    assert outbox.lost == begin - 1


def flip_in_the_middle(path):
    with open(path, "rb") as file:
        data = bytearray(file.read())
    data[len(data) // 2] ^= 1
    with open(path, "wb") as file:
        file.write(data)


class FullMedium:
    def __init__(self, file):
        self.file = file

    def write(self, data, _=None):
        raise OSError(28)

    def close(self):
        self.file.close()


@in_a_folder
def test_a_full_medium_is_told_and_reuses_nothing():
    outbox = Outbox(wiped())
    outbox.append(b"x" * 40)
    refuse(outbox)
    assert outbox.append(b"z" * 40) == 3  # number 2 is used up
    assert numbers(Outbox(PATH)) == [1, 3]


@in_a_folder
def test_sizes_are_checked():
    outbox = Outbox(wiped())
    for call in (
        (lambda: outbox.append(b"x" * 481)),
        (lambda: Outbox(PATH, 1023)),
        (lambda: Outbox("/nowhere/at/all")),
    ):
        try:
            call()
            assert False, "taken"
        except OutboxError:
            pass
    outbox.append(b"x" * 480)


@in_a_folder
def test_queue_does_the_same_in_ram():
    queue = MemoryOutbox(max_bytes=500)
    for i in range(20):
        assert queue.append(bytes([i]) * 50) == i + 1
    assert numbers(queue) == list(range(11, 21))
    assert queue.lost == 10 and queue.oldest == 11
    queue.ack(12, 13, queue.stream)
    assert queue.oldest == 11
    queue.ack(1, 11, queue.stream)
    assert queue.oldest == 14
    queue.ack(14, 20, queue.stream)
    assert queue.oldest == 21 and pending(queue) == []
