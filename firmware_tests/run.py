"""Runs the portable tests of one file on any runtime, from any folder: `micropython firmware_tests/run.py
unit/test_cbor.py`.

A portable test is a function `test_*` without arguments that asserts. No pytest there: a board has none.
"""

import os
import sys

HERE = __file__.rsplit("/", 1)[0] if "/" in __file__ else "."


def main(path: str, wanted: "list[str] | None" = None) -> int:
    """path: of a test file, from here or from where the interpreter was started; wanted: names of its tests, default
    all -> the exit status."""
    try:
        os.stat(path)
    except OSError:
        path = HERE + "/" + path
    folder, _, name = path.rpartition("/")
    for place in (HERE, HERE + "/../tools", HERE + "/../agent", folder or "."):
        sys.path.insert(0, place)
    module = __import__(name[:-3])
    failed = 0
    names = wanted or sorted(n for n in dir(module) if n.startswith("test_"))
    for test in names:
        try:
            getattr(module, test)()
        except Exception as error:  # a failing test must not hide the ones after it
            failed += 1
            print("FAILED", test)
            if hasattr(sys, "print_exception"):
                sys.print_exception(error)
            else:
                import traceback

                traceback.print_exception(error)
    print("%d passed, %d failed" % (len(names) - failed, failed))
    return 1 if failed or not names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
