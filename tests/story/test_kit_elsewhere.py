"""The conformance kit runs in somebody else's project, whose pytest is strict."""

import re

import pytest

from tests.story.pages import ROOT

TEST_OF_A_TRANSPORT = """
import pytest
from ekiden.testing.conformance import TransportConformance

class TestTheirs(TransportConformance):
    @pytest.fixture
    def url(self):
        return "memory://theirs"
"""


@pytest.mark.slow
def test_the_kit_can_be_imported_where_marks_are_strict(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_theirs=TEST_OF_A_TRANSPORT)

    result = pytester.runpytest_subprocess(
        "--strict-markers", "-W", "error", "-m", "not slow", "-k", "Theirs and depth"
    )

    result.stdout.no_fnmatch_line("*Unknown pytest.mark*")
    assert result.ret == pytest.ExitCode.OK


@pytest.mark.slow
def test_the_page_says_how_many_tests_the_kit_has(pytester: pytest.Pytester) -> None:
    page = (ROOT / "docs" / "writing-a-transport.md").read_text()
    told = re.search(r"^1 failed, (\d+) passed$", page, re.MULTILINE)
    module = pytester.makepyfile(
        """
        from ekiden.testing.conformance import LeaseExpiryConformance, TransportConformance

        class TestTheirs(TransportConformance, LeaseExpiryConformance):
            pass
        """
    )

    collected, _ = pytester.inline_genitems(module, "-p", "no:cacheprovider")

    assert told is not None
    assert len(collected) == int(told[1]) + 1
