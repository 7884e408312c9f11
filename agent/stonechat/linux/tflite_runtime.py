"""The other back end: tflite-runtime 2.14 with its integer reference kernels, with the bytes of int8/interpreter.py.

Its default kernels and LiteRT's round otherwise (a score then differs by up to 12 percent), so no other resolver is
asked for. Needs numpy; Debian's python3-numpy will do where pip has no wheel.
"""

from ..errors import ModelError


class TfliteRuntime:
    """Hand it to load_model(data, backend=TfliteRuntime). data: the file's bytes, or open for reading in binary."""

    macs = 0  # not counted here

    def __init__(self, data):
        try:
            import numpy
            from tflite_runtime import interpreter
        except ImportError as error:
            raise ModelError("tflite-runtime is not installed (pip install 'stonechat[tflite]'): %s" % error)
        if hasattr(data, "read"):
            data.seek(0)
            data = data.read()
        try:
            self._interpreter = interpreter.Interpreter(
                model_content=bytes(data),
                experimental_op_resolver_type=interpreter.OpResolverType.BUILTIN_REF,
            )
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ModelError("tflite-runtime refuses the model: %s" % error)
        self._numpy = numpy
        source, target = self._interpreter.get_input_details()[0], self._interpreter.get_output_details()[0]
        if source["dtype"] is not numpy.int8 or target["dtype"] is not numpy.int8:
            raise ModelError("tflite-runtime: input and output must be int8")
        self._source, self._shape, self._target = source["index"], source["shape"], target["index"]
        self.input_size = int(source["shape"].prod())
        self.output_size = int(target["shape"].prod())
        self._out = bytearray(self.output_size)

    def run(self, x):
        """As Interpreter.run of int8/interpreter.py."""
        if len(x) != self.input_size:
            raise ModelError("input: %d bytes, not %d" % (len(x), self.input_size))
        values = self._numpy.frombuffer(x, self._numpy.int8).reshape(self._shape)
        self._interpreter.set_tensor(self._source, values)
        self._interpreter.invoke()
        self._out[:] = self._interpreter.get_tensor(self._target).tobytes()
        return self._out
