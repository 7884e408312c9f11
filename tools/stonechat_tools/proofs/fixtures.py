"""The small models of firmware_tests/golden: each kind of scale, every operator, accumulators of every size.

python -m stonechat_tools.proofs.fixtures      remakes them and their golden.json
"""

import numpy as np

from ..console import working_copy
from ..modeling.golden import write_golden
from . import generated


def make_fixtures() -> None:
    generator = np.random.default_rng(3)
    models = {
        "dense-tensor": generated.chain(generator, [24, 16, 8, 16, 24], False),
        "dense-channel": generated.chain(generator, [19, 11, 5, 11, 19], True),
        "extreme": generated.chain(generator, [7, 9, 6], True, extreme=True),
        "wide": generated.chain(generator, [640, 3, 4], False),
        "operators": generated.operators(generator, 6),
    }
    for name, data in models.items():
        folder = working_copy() / "firmware_tests" / "golden" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.tflite").write_bytes(data)
        write_golden(folder, 6 if name == "wide" else 12)


if __name__ == "__main__":
    make_fixtures()
