"""A model: the .tflite, what runs it, and what it says about itself."""

from . import int8, tflite
from .compat import const, sha256
from .errors import ModelError

_CHUNK_BYTES = const(256)


class Model:
    """input_size, output_size in bytes; macs per run; digest: the first 8 bytes of the file's SHA-256;
    metadata: metadata.Metadata, or None where the file carries none."""

    def __init__(self, graph, runner):
        self.graph = graph
        self.runner = runner
        self.run = runner.run
        self.input_size = runner.input_size
        self.output_size = runner.output_size
        self.macs = getattr(runner, "macs", 0)
        self.digest = _digest(graph)
        self._metadata = None

    @property
    def metadata(self):
        if self._metadata is None:
            packed = self.graph.metadata("stonechat")
            if packed is not None:
                from .metadata import parse

                self._metadata = parse(packed)
        return self._metadata


def load_model(data, backend=None):
    """data: a .tflite as bytes, bytearray or memoryview, or open for reading in binary (the file then stays in use).

    backend: None for the fastest kernels there are, "plain", "viper", or "tflite" for tflite-runtime's reference
    kernels (Linux). All give the same bytes. Raises ModelError.
    """
    graph = tflite.read(data)
    if backend == "tflite":
        from .linux.tflite_runtime import TfliteRuntime

        return Model(graph, TfliteRuntime(data))
    if backend not in (None, "plain", "viper"):
        raise ModelError("backend %s: known are plain, viper, tflite" % backend)
    return Model(graph, int8.Interpreter(graph, backend))


def _digest(graph):
    digest = sha256()
    for at in range(0, graph.size, _CHUNK_BYTES):
        digest.update(graph.bytes(at, min(_CHUNK_BYTES, graph.size - at)))
    return digest.digest()[:8]
