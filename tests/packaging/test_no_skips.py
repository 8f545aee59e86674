"""On CI a test that is skipped has failed: tests/conftest.py."""

from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"

SKIPPED_IN_THREE_WAYS = """
import pytest

@pytest.mark.skip(reason="by its mark")
def test_marked(): ...

def test_in_its_body():
    pytest.skip("no server here")

@pytest.mark.xfail(reason="known")
def test_expected_to_fail():
    assert False
"""

SKIPPED_WHOLE = """
import pytest

pytest.importorskip("a_module_that_nobody_has")
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(test_some=SKIPPED_IN_THREE_WAYS, test_whole=SKIPPED_WHOLE)
    return pytester


@pytest.mark.slow
def test_a_skip_on_ci_is_a_failure(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")

    result = suite.runpytest_subprocess("--continue-on-collection-errors")

    result.assert_outcomes(failed=1, errors=2, xfailed=1)
    result.stdout.fnmatch_lines(["*On CI no test may be skipped. Skipped: no server here"])


@pytest.mark.slow
def test_elsewhere_a_skip_is_a_skip(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)

    result = suite.runpytest_subprocess()

    result.assert_outcomes(skipped=3, xfailed=1)
