"""No password of a URL is shown, whatever characters it has and wherever in the URL it was typed."""

import traceback
from collections.abc import Callable, Iterator
from urllib.parse import quote

import pytest
from ekiden import Ekiden
from ekiden.app import load_app
from ekiden.errors import EkidenError
from ekiden.plugins import BACKENDS, TRANSPORTS, installed, open_backend, open_transport
from ekiden.settings import Settings
from ekiden.urls import parse_url, without_password
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

MARK = "s3cret"
"""Each part of a secret holds it, so that no part can be shown unseen."""

SCHEMES = sorted(
    {*installed(TRANSPORTS), *installed(BACKENDS), "redis+sentinel", "redis+cluster", "mongodb+srv", "none"}
)

between = st.text(st.sampled_from("/?#@:&=%+,;[]\\ '\"\n\0.$1") | st.characters(), max_size=6)
secrets = st.lists(between, min_size=1, max_size=3).map(lambda parts: MARK + "".join(part + MARK for part in parts))

POSITIONS: dict[str, Callable[[str, str], str]] = {
    "behind the user": "{0}://user:{1}@127.0.0.1:1/0".format,
    "without a user": "{0}://:{1}@127.0.0.1/".format,
    "before several hosts": "{0}://user:{1}@127.0.0.1:1,[::1]:1/x?timeout=1".format,
    "behind a port-like beginning": "{0}://user:12/{1}@127.0.0.1".format,
    "behind a path-like beginning": "{0}://user:12?a={1}@127.0.0.1".format,
    "without //": "{0}:user:{1}@127.0.0.1".format,
    "without // and user": "{0}:{1}@127.0.0.1".format,
    "with one slash": "{0}:/user:{1}@127.0.0.1".format,
    "with three slashes": "{0}:///user:{1}@127.0.0.1/0".format,
    "without the scheme": lambda _, secret: f"user:{secret}@127.0.0.1:1/0",
    "behind a space": " {0}://user:{1}@127.0.0.1".format,
    "as an option": "{0}://127.0.0.1:1/?password={1}".format,
    "as an option of a plugin": "{0}://127.0.0.1:1/x?sentinel_password={1}&timeout=1".format,
    "as an encoded option": "{0}://127.0.0.1:1/?pass%77ord={1}".format,
    "as a token": "{0}://127.0.0.1:1/?authMechanismProperties=AWS_SESSION_TOKEN:{1}".format,
    "with the host forgotten": lambda scheme, secret: f"{scheme}://user:{secret.replace('@', '%40')}",
}

urls = st.builds(
    lambda scheme, position, secret, encoded: position(
        scheme, quote(secret, safe="", errors="replace") if encoded else secret
    ),
    st.sampled_from(SCHEMES),
    st.sampled_from(list(POSITIONS.values())),
    secrets,
    st.booleans(),
)


def told(act: Callable[[], object]) -> str:
    """All that a person or a log may get to see of what ``act`` returns, or raises."""
    try:
        found = act()
    except (EkidenError, UnicodeError) as error:
        return f"{error} {error!r}" + "".join(traceback.format_exception(error))
    rich = getattr(found, "__rich_repr__", None)
    inside = [getattr(each, "__rich_repr__", None) for each in getattr(found, "__dict__", {}).values()]
    fields = f"{vars(found)!r} {[each() for each in inside if each]}" if hasattr(found, "__dict__") else ""
    if hasattr(found, "close"):
        found.close()
    return f"{found} {found!r} {(found,)} {rich() if rich else ''} {fields}"


@given(urls)
@example("redis:user:s3cret@host")
@example("redis:user:s3://s3cret@host")
@example("redis://user:s3cret@h?s3cret=1@h")
@example("redis://h/?password=s3cret&s3cret=1")
@example("mongodb://user:s3cret%@127.0.0.1/")
@example("redis://h:1/?password=s3cret@s3cret")
def test_a_url_hides_its_password(url: str) -> None:
    assert MARK not in without_password(url)
    assert MARK not in told(lambda: parse_url(url))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(urls)
def test_what_opens_a_url_hides_its_password(url: str) -> None:
    for open_it in (open_transport, open_backend):
        assert MARK not in told(lambda open_it=open_it: open_it(url))


def of_an_app(url: str) -> Iterator[Callable[[], object]]:
    """What an app makes of ``url`` in each place where settings come from."""
    yield lambda: Ekiden("shop", broker=url).conf
    yield lambda: Ekiden("shop", broker="memory://", backend=url).conf
    yield lambda: Settings(broker_url=url, result_backend=url)
    yield lambda: Settings().update(broker_read_url=url, broker_transport=url, cache_backend=url, result_backend=url)
    yield lambda: Settings().update({"CELERY_RESULT_BACKEND": url, "redis_backend_use_ssl": url, "brokr_url": url})
    yield lambda: Settings(broker_url=[url])  # type: ignore[arg-type]  # as Celery's users may write it
    yield lambda: load_app(url)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(urls)
def test_an_app_hides_the_password_of_its_urls(url: str) -> None:
    for act in of_an_app(url):
        assert MARK not in told(act)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(urls.filter(lambda url: url.isprintable()))
def test_a_refused_environment_hides_the_password(url: str) -> None:
    for variable in ("BROKER_URL", "RESULT_BACKEND", "BROKR_URL", "BROKER_READ_URL", "CACHE_BACKEND", "BROKER_HOST"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(f"EKIDEN_{variable}", url)
            assert MARK not in told(lambda: Ekiden("shop").ignored_variables)
