"""Puts the stonechat metadata and the plan at the end of a .tflite (metadata.py says how they lie there)."""

import struct

from stonechat import model_file
from stonechat.errors import ModelError
from stonechat.metadata import Metadata
from stonechat.model_file import BUFFER

PLACEHOLDER = bytes(16)  # what a file holds in that buffer until it is sealed


def seal(data: bytes, meta: Metadata) -> bytes:
    """A .tflite that has a stonechat metadata buffer, whatever is in it -> the file that a board runs. Raises
    ModelError where the metadata or the graph can't be."""
    sealed = model_file.seal(replace_metadata(data, BUFFER, model_file.content(data, meta)))
    model_file.prove(sealed)
    return sealed


def replace_metadata(data: bytes, name: str, value: bytes) -> bytes:
    """The .tflite with another content in a metadata buffer that it has: the new bytes are at its end, the buffer
    points there, the old ones are blanked. Nothing else moves, so weights and operators stay as they were."""
    import tflite

    model = tflite.Model.GetRootAs(data, 0)
    for i in range(model.MetadataLength()):
        entry = model.Metadata(i)
        if entry.Name() == name.encode():
            buffer = model.Buffers(entry.Buffer())
            break
    else:
        raise ModelError(f"the model carries no {name} metadata: make it with `stonechat train`")
    at = buffer._tab.Pos + buffer._tab.Offset(4)
    old = buffer._tab.Vector(buffer._tab.Offset(4))
    out = bytearray(data)
    length = buffer.DataLength()
    if old + length == len(data):  # it is already at the end: put the new one in its place
        del out[old - 4 :]
    else:
        out[old : old + length] = bytes(length)
    while (len(out) + 4) % 16:
        out.append(0)
    struct.pack_into("<I", out, at, len(out) - at)
    return bytes(out + struct.pack("<I", len(value)) + value)
