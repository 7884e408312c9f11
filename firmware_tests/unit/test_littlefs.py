"""Reads of a model that lies on littlefs. Its versions up to 2.8 (MicroPython 1.25) give bytes of the wrong block to a
seek behind a read that ended where a block does; the reader must not depend on that.
"""

import io

from stonechat.int8.network import Source

BLOCK = 512
BLOCKS = 16
DATA = bytes([(i * 7 + (i >> 8) * 13) & 255 for i in range(3000)])


class Disk:
    def __init__(self):
        self.bytes = memoryview(bytearray(BLOCK * BLOCKS))

    def readblocks(self, block, buffer, offset=0):
        at = BLOCK * block + offset
        buffer[:] = self.bytes[at : at + len(buffer)]

    def writeblocks(self, block, buffer, offset=0):
        at = BLOCK * block + offset
        self.bytes[at : at + len(buffer)] = buffer

    def ioctl(self, request, _):
        return {4: BLOCKS, 5: BLOCK}.get(request, 0)


def each_pair(file):
    """Each read that ends where a block does (positions of littlefs: a block begins with pointers to others), and one
    elsewhere behind it."""
    source = Source(file)
    ends = [512, 1020, 1524, 2032, 2532, 3000, 200]
    for end in ends:
        for size in (1, 128):
            for at in range(0, len(DATA), 61):
                assert bytes(source.bytes(end - size, size)) == DATA[end - size : end], (end, size)
                there = min(size, len(DATA) - at)
                assert bytes(source.bytes(at, there)) == DATA[at : at + there], (end, size, at)


def test_reads_in_any_order():
    try:
        import vfs
    except ImportError:  # CPython
        each_pair(io.BytesIO(DATA))
        return
    disk = Disk()
    vfs.VfsLfs2.mkfs(disk)
    vfs.mount(vfs.VfsLfs2(disk), "/littlefs")
    try:
        with open("/littlefs/data", "wb") as file:
            file.write(DATA)
        with open("/littlefs/data", "rb") as file:
            each_pair(file)
    finally:
        vfs.umount("/littlefs")
