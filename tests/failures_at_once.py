"""Of a run on a GPU, which may be cut off by a time limit, failures are told when they happen."""

import pytest


class FailuresAtOnce:
    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._tell(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._tell(report)

    def _tell(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            self._terminal.write_line(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)


@pytest.hookimpl(trylast=True)  # the reporter is made by one of these
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")  # a process of xdist's has none
    if config.option.markexpr.split(" ")[0] == "gpu" and terminal is not None:
        config.pluginmanager.register(FailuresAtOnce(terminal))
