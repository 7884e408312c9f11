"""Runs the portable tests of one file on any runtime: `micropython run.py unit/test_cbor.py`.

A portable test is a function `test_*` without arguments that asserts. No pytest there: a board has none.
"""

import sys


def main(path: str) -> int:
    folder, _, name = path.rpartition("/")
    sys.path.insert(0, folder or ".")
    module = __import__(name[:-3])
    failed = 0
    names = sorted(n for n in dir(module) if n.startswith("test_"))
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
