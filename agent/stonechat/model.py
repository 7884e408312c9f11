"""A model: the .tflite, what runs it, and what it says about itself."""

from struct import unpack_from

from .compat import const
from .dense import Network, Source
from .errors import ModelError
from .metadata import END, END_BYTES, MAGIC, Metadata

_WHOLE = const(0x2144DF1C)  # the CRC-32 of anything that ends in its own CRC-32


class Model:
    """`run(x)` takes and returns int8 bytes in the tensor's order, the same buffer each time. `input_size` and
    `output_size` in bytes; `macs` per run; `digest`: the first 8 bytes of the file's SHA-256; `metadata`: Metadata, or
    None where the file carries none; `runner`: what runs it."""

    def __init__(self, runner, digest, metadata):
        self.runner = runner
        self.run = runner.run
        self.input_size = runner.input_size
        self.output_size = runner.output_size
        self.macs = runner.macs
        self.digest = digest
        self.metadata = metadata


def load_model(data, backend=None, resident_bytes=16384):
    """data: a .tflite as bytes, bytearray or memoryview (then used where it lies: flash, if it lies there), or a file
    open for reading in binary, which stays in use: the weights beyond `resident_bytes` are read from it at each run.

    backend: None for the fastest kernels there are, "plain", "viper", or a callable such as
    linux.tflite_runtime.TfliteRuntime that makes a runner from data. All give the same bytes. A file with a plan runs
    by it; one without is read whole, where the rooms for that are here. Raises ModelError.
    """
    try:
        source = Source(data)
        digest, crc = source.digests()
        metadata = None
        plan = 0
        end = source.size - END_BYTES
        if end > 0:
            size, plan, magic, _ = unpack_from(END, source.bytes(end, END_BYTES), 0)
            if magic == MAGIC:
                if crc != _WHOLE:
                    raise ModelError("the file is damaged")
                metadata = Metadata(source.bytes(end - plan - size, size))
            else:
                plan = 0
        if callable(backend):
            runner = backend(data)
        elif plan:
            runner = Network(backend, resident_bytes)
            runner.load_plan(source, end - plan, end)
        else:
            runner = _read(data, backend, resident_bytes)
        return Model(runner, digest, metadata)
    except MemoryError:
        raise ModelError("the model needs more memory than there is; open it as a file with a smaller resident_bytes")


def _read(data, backend, resident_bytes):
    try:
        from . import int8
    except ImportError:
        raise ModelError("no plan in the file: make it anew, or build the agent --with int8")
    return int8.read(data, backend, resident_bytes)
