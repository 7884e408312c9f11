"""A model: the .tflite, what runs it, and what it says about itself."""

from . import int8, tflite
from .compat import const, sha256
from .errors import ModelError

_CHUNK_BYTES = const(256)


class Model:
    """`run(x)` takes and returns int8 bytes in the tensor's order, the same buffer each time. `input_size` and
    `output_size` in bytes; `macs` per run; `digest`: the first 8 bytes of the file's SHA-256."""

    def __init__(self, graph, runner):
        self.graph = graph
        self.runner = runner
        self.run = runner.run
        self.input_size = runner.input_size
        self.output_size = runner.output_size
        self.macs = runner.macs
        self.digest = _digest(graph)
        self._metadata = None

    @property
    def metadata(self):
        """metadata.Metadata, or None where the file carries none. Raises ModelError when it is malformed."""
        if self._metadata is None:
            from . import metadata  # a graph that is only run needs none of it

            packed = self.graph.metadata(metadata.BUFFER)
            if packed is not None:
                self._metadata = metadata.parse(packed)
        return self._metadata


def load_model(data, backend=None, resident_bytes=16384):
    """data: a .tflite as bytes, bytearray or memoryview (then used where it lies: flash, if it lies there), or a file
    open for reading in binary, which stays in use: the weights beyond `resident_bytes` are read from it at each run.

    backend: None for the fastest kernels there are, "plain", "viper", or a callable such as
    linux.tflite_runtime.TfliteRuntime that makes a runner from data. All give the same bytes. Raises ModelError.
    """
    graph = tflite.read(data)
    if callable(backend):
        return Model(graph, backend(data))
    if backend not in (None, "plain", "viper"):
        raise ModelError("backend %s: known are plain and viper" % backend)
    try:
        return Model(graph, int8.Interpreter(graph, backend, resident_bytes))
    except MemoryError:
        raise ModelError("the model needs more memory than there is; open it as a file with a smaller resident_bytes")


def _digest(graph):
    digest = sha256()
    for at in range(0, graph.size, _CHUNK_BYTES):
        digest.update(graph.bytes(at, min(_CHUNK_BYTES, graph.size - at)))
    return digest.digest()[:8]
