"""Images of a ROMFS, MicroPython's read-only file system in a ROM partition. A board runs .mpy files in place
there, and reads a model in place: neither takes heap.

An image is a record that holds records: the kind and the length as variable-length numbers, then the content. A
folder's content is its name's length, its name and its entries; a file's is the same with one record of data.
"""

from pathlib import PurePosixPath

MARK = b"\xd2\xcd\x31"  # the kind of the outermost record: "RM1" with the top bits of a number
_DATA, _FOLDER, _FILE = 2, 4, 5


def image(files: dict[str, bytes]) -> bytes:
    """files: path -> content -> the image. Raises ValueError for a name that is not ASCII or a file that is a folder
    too."""
    tree: dict[str, object] = {}
    for path, data in sorted(files.items()):
        folder = tree
        *parents, name = PurePosixPath(path).parts
        for parent in parents:
            inner = folder.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{path}: {parent} is a file")
            folder = inner
        if name in folder:
            raise ValueError(f"{path} is a folder")
        folder[name] = data
    body = _entries(tree)
    length = _number(len(body))
    if (len(MARK) + len(length) + len(body)) % 2:
        length = b"\x80" + length  # records begin at even places
    return MARK + length + body


def _entries(folder: dict[str, object]) -> bytes:
    out = b""
    for name, content in sorted(folder.items()):
        label = name.encode("ascii")
        label = _number(len(label)) + label
        if isinstance(content, dict):
            out += _record(_FOLDER, label + _entries(content))
        else:
            assert isinstance(content, bytes)
            out += _record(_FILE, label + _record(_DATA, content))
    return out


def _record(kind: int, content: bytes) -> bytes:
    return _number(kind) + _number(len(content)) + content


def _number(value: int) -> bytes:
    """Seven bits a byte, the highest first; all but the last with the top bit set."""
    out = bytes([value & 127])
    while value := value >> 7:
        out = bytes([128 | value & 127]) + out
    return out
