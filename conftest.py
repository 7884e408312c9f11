"""The order of the test files, and the option --allowed-skips.

Several workers take the files one by one: those that take longest come first, so that no worker works alone at the end.
A file's length is the sum of the seconds in its tests' marks: `slow(SECONDS)`.

--allowed-skips FILE: a run in which a test is skipped for a reason that is not in FILE fails. FILE holds one pattern a
line (fnmatch, * for anything); # begins a comment.
"""

from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest

_REASONS: pytest.StashKey[dict[str, str]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--allowed-skips", metavar="FILE", help="fail where a test is skipped for a reason not in FILE")


def _no_health_check_by_the_clock() -> None:
    """A busy machine is no fault of an example's generator."""
    try:
        from hypothesis import HealthCheck, settings
    except ModuleNotFoundError:
        return
    settings.register_profile("stonechat", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("stonechat")


def pytest_configure(config: pytest.Config) -> None:
    _no_health_check_by_the_clock()
    config.stash[_REASONS] = {}
    if config.getoption("--allowed-skips"):
        config.pluginmanager.register(_Watch(config))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker of several: the files with the longest tests first, each file's tests in their own order."""
    if not hasattr(config, "workerinput"):
        return
    seconds: Counter[Path] = Counter()
    for item in items:
        mark = item.get_closest_marker("slow")
        seconds[item.path] += sum(mark.args) if mark else 0
    items.sort(key=lambda item: -seconds[item.path])


class _Watch:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: "pytest.TestReport | pytest.CollectReport") -> None:
        if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
            self._config.stash[_REASONS][report.nodeid] = str(report.longrepr[2]).removeprefix("Skipped: ")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        lines = Path(self._config.getoption("--allowed-skips")).read_text().splitlines()
        allowed = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        reasons = self._config.stash[_REASONS]
        unknown = {test: why for test, why in reasons.items() if not any(fnmatch(why, line) for line in allowed)}
        self._config.stash[_REASONS] = unknown
        if unknown and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for test, why in self._config.stash[_REASONS].items():
            terminalreporter.write_line(f"SKIP NOT ALLOWED {test}: {why}", red=True)
