"""Images of littlefs, as a board's firmware would write them: made by the unix port's own littlefs."""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from stonechat_tools.console import working_copy
from stonechat_tools.proofs.boards.firmware import BuildError

MAKE = """
import os, sys, vfs
folder, image, size, blocks, program = sys.argv[1:]
size, blocks = int(size), int(blocks)
class Disk:
    def __init__(self):
        self.bytes = memoryview(bytearray(b"\\xff" * (size * blocks)))
    def readblocks(self, block, buffer, offset=0):
        at = size * block + offset
        buffer[:] = self.bytes[at:at + len(buffer)]
    def writeblocks(self, block, buffer, offset=0):
        at = size * block + offset
        self.bytes[at:at + len(buffer)] = buffer
    def ioctl(self, request, argument):
        return {4: blocks, 5: size}.get(request, 0)
disk = Disk()
vfs.VfsLfs2.mkfs(disk, progsize=int(program))
vfs.mount(vfs.VfsLfs2(disk, progsize=int(program)), "/board")
def copy(here, there):
    for name, kind in [entry[:2] for entry in os.ilistdir(here)]:
        if kind & 0x4000:
            os.mkdir(there + "/" + name)
            copy(here + "/" + name, there + "/" + name)
        else:
            with open(here + "/" + name, "rb") as source, open(there + "/" + name, "wb") as target:
                target.write(source.read())
copy(folder, "/board")
vfs.umount("/board")
with open(image, "wb") as file:
    file.write(disk.bytes)
"""


def image(files: Mapping[str, bytes], block_bytes: int, blocks: int, program_bytes: int) -> bytes:
    """files: contents by absolute path on the board -> the medium. Raises BuildError."""
    sys.path.insert(0, str(working_copy() / "firmware_tests"))
    from targets import targets

    target = next((one for one in targets() if one.missing is None), None)
    if target is None:
        raise BuildError("no MicroPython for this machine; run `make setup`")
    with tempfile.TemporaryDirectory(prefix="stonechat-disk-") as scratch:
        root = Path(scratch)
        for path, data in files.items():
            place = root / "files" / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        (root / "script").write_text(MAKE)
        numbers = [str(number) for number in (block_bytes, blocks, program_bytes)]
        done = target.run(
            str(root / "script"), str(root / "files"), str(root / "image"), *numbers, heap="16m", timeout_s=300
        )
        if done.returncode:
            raise BuildError(f"littlefs image: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        return (root / "image").read_bytes()
