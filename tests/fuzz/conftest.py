"""How many cases there were, at the end."""

from typing import Any

import pytest

from tests.fuzz._cases import COUNTS


@pytest.fixture(autouse=True)
def _counted(request: pytest.FixtureRequest) -> Any:
    before = COUNTS.total()
    yield
    request.node.user_properties.append(("fuzzed cases", COUNTS.total() - before))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found = [
        number
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "teardown"
        for name, number in report.user_properties
        if name == "fuzzed cases"
    ]
    if found:
        terminalreporter.write_line(f"fuzzed cases: {sum(found)}")
