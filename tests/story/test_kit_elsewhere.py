"""The conformance kit runs in somebody else's project, whose pytest is strict."""

import pytest

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
