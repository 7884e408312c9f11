"""Loads a model file.

A model is the object that runs it (int8.network.Network, int8.interpreter.Interpreter or another back end): `run(x)`
takes and returns int8 bytes in the tensor's order, the same buffer each time; `input_size` and `output_size` in bytes;
`macs` per run; `digest`: the first 8 bytes of the file's SHA-256; `metadata`: Metadata, or None where the file carries
none.
"""

import sys
from struct import unpack_from

from .compat import const, tidy
from .errors import ModelError
from .int8.network import Network, Source
from .metadata import Metadata

END = "<II4sI"  # see metadata.py
END_BYTES = const(16)
MAGIC = b"SCM2"  # format 2; format 1 was a CBOR map
_IN_PLACE_BYTES = const(1024)  # of weights that are copied into memory from a ROM partition
_WHOLE = const(0x2144DF1C)  # the CRC-32 of anything that ends in its own CRC-32


def load_model(data, backend=None, resident_bytes=16384):
    """data: a .tflite as bytes, bytearray or memoryview (in flash perhaps), or a file open for reading in binary. It
    stays in use where the weights take more than `resident_bytes`: those beyond are read from it at each run, through
    a buffer of a kilobyte (`model.chunk`).

    backend: None for the fastest kernels there are, "plain", "viper", or a callable such as
    linux.tflite_runtime.TfliteRuntime that makes from data what runs it. All give the same bytes. A file with a plan
    runs by it; one without needs the full reader (int8/interpreter.py). Raises ModelError, also where there is
    too little memory: then open it as a file, with a smaller resident_bytes.
    """
    source = Source(data)
    metadata = None
    try:
        digest, crc = source.digests()
        end = source.size - END_BYTES
        size, plan, magic, _ = unpack_from(END, source.bytes(end, END_BYTES), 0)
        if magic != MAGIC:
            plan = 0
        elif crc != _WHOLE:
            raise ModelError("damaged")
        else:
            metadata = Metadata(source.bytes(end - plan - size, size))
        tidy()
        if callable(backend):
            model = backend(data)
        elif plan:
            model = Network(backend, resident_bytes)
            model.load_plan(source, end - plan, end)
        else:
            try:
                from .int8.interpreter import read
            except ImportError:
                raise ModelError("no plan (--with int8)")
            model = read(data, backend, resident_bytes)
    except MemoryError:
        raise ModelError("out of memory")
    model.digest = digest  # pyright: ignore[reportAttributeAccessIssue] - a back end is any class with run(x)
    model.metadata = metadata  # pyright: ignore[reportAttributeAccessIssue]
    return model


def open_model(path: str):
    """The model in the file `path`, or in the file of that name below a folder of sys.path: mip puts it into /lib, and
    a ROM partition is /rom, where its bytes are used in place. Raises ModelError, OSError."""
    for folder in [""] + sys.path:  # noqa: RUF005 - MicroPython has no [*a]
        try:
            file = open(folder + "/" + path if folder else path, "rb")
        except OSError:
            continue
        try:
            data = memoryview(file)  # type: ignore[arg-type]  # a file of a ROM partition only
        except TypeError:
            model = load_model(file)
            if not model.chunk:  # pyright: ignore[reportAttributeAccessIssue] - nothing is read from it any more
                file.close()
            return model
        return load_model(data, None, _IN_PLACE_BYTES)
    raise ModelError(path + ": no such file")
