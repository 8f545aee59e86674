"""`ekiden port`: what it says of a project that uses Celery, and what it rewrites."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from ekiden.cli import ekiden
from ekiden.porting.names import MODULES, moved
from ekiden.porting.rewriting import rewritten_commands, rewritten_python

TASKS = """\
from celery import Celery, shared_task as shared, group  # the usual
from celery.exceptions import (
    Ignore,
    SoftTimeLimitExceeded as TooLate,
)
from celery.result import AsyncResult
from kombu import Queue
import os

app = Celery("shop", broker="redis://localhost", task_serializer="pickle")
app.conf.update(task_time_limit=30, worker_prefetch_multiplier=1, **{})
app.conf.update({"task_always_eager": True})
app.conf.task_acks_late = True
app.conf.task_time_limt = 3
app.conf.task_routes = make_routes()
app.conf.result_expires = compute()


@app.task(bind=True, max_retries=3, compression="gzip")
def add(self, x, y):
    return x + y


@shared(rate_limit="10/m")
async def mul(x, y):
    add.apply_async((1, 2), countdown=3, routing_key="q")
    app.control.inspect().active()
"""

SETTINGS = """\
DEBUG = True
CELERY_BROKER_URL = os.environ["X"]
CELERY_TASK_SERIALIZER = "json"
CELERYD_CONCURRENCY = 4
CELERY_RESULT_BACKEND = "django-db"
CELERY_PAGE_SIZE = 50
"""

PROCFILE = (
    "web: gunicorn shop.wsgi\nworker: celery -A shop worker -l INFO\nbeat: celery -A shop beat\n# celery -A x worker\n"
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project in the current directory."""
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "shop/tasks.py": TASKS,
        "shop/settings.py": SETTINGS,
        "shop/broken.py": "from celery import (\n",
        "shop/other.py": "import json\n",
        "Procfile": PROCFILE,
        "venv/lib/celery.py": "from celery import Celery\n",
        ".git/hook.py": "from celery import Celery\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(ekiden, ["port", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def test_each_thing_of_celerys_is_told_with_its_place_and_fate(project: Path) -> None:
    told = run(".", "--all").output

    for line in (
        "    1  becomes  from celery import Celery: from ekiden import Ekiden as Celery",
        "    1  becomes  from celery import shared_task: from ekiden import shared_task as shared",
        "    1  missing  from celery import group: ",
        "    2  becomes  from celery.exceptions import SoftTimeLimitExceeded: "
        "from ekiden.exceptions import SoftTimeLimitExceeded as TooLate",
        "    7  missing  from kombu import Queue: queues need no declaration",
        "   10  missing  the setting task_serializer: ekiden has no setting 'task_serializer': messages and",
        "   11  stays    the setting task_time_limit: means the same",
        "   11  stays    the setting worker_prefetch_multiplier: nothing needs to be done",
        "   12  missing  the setting task_always_eager: ",
        "   13  stays    the setting task_acks_late: is taken for task_acks",
        "   14  missing  the setting task_time_limt: ekiden has no setting 'task_time_limt'; did you mean",
        "   15  stays    the setting task_routes: ",
        "   16  stays    the setting result_expires: ",
        "   19  missing  compression= of add: ",
        "   26  missing  routing_key= of a call: the call: there is no call option 'routing_key': write queue=.",
        "   27  missing  app.control.inspect(): ",
        "    2  stays    the setting CELERY_BROKER_URL: ",
        "    3  stays    the setting CELERY_TASK_SERIALIZER: nothing needs to be done",
        "    4  stays    the setting CELERYD_CONCURRENCY: is taken for worker_processes",
        "    5  missing  the setting CELERY_RESULT_BACKEND: the setting result_backend: django-celery-results is",
        "    2  becomes  the command celery: worker: ekiden -A shop worker -l INFO",
        "    3  missing  celery beat: ",
        "    1  missing  the file: cannot be read as Python: ",
    ):
        assert line in told, line
    assert "CELERY_PAGE_SIZE" not in told
    assert "venv" not in told
    assert "hook" not in told


def test_what_stays_is_only_counted(project: Path) -> None:
    result = run("shop/settings.py")

    assert result.exit_code == 1
    assert "CELERY_BROKER_URL" not in result.output
    assert result.output.endswith("3 stays, 0 becomes, 1 missing.\n")


def test_a_project_with_nothing_missing_ends_well(project: Path) -> None:
    (project / "fine.py").write_text("from celery import Celery\n\napp = Celery('x')\n")

    assert run("fine.py").exit_code == 0


def test_findings_are_json_for_programs(project: Path) -> None:
    told = json.loads(run(".", "--json").stdout)

    assert told["counts"]["missing"] == sum(each["fate"] == "missing" for each in told["findings"])
    assert {"file", "line", "fate", "what", "text"} == set(told["findings"][0])


def test_imports_and_commands_are_rewritten_and_all_else_is_left(project: Path) -> None:
    told = run(".", "--write").output

    tasks = (project / "shop" / "tasks.py").read_text()
    assert tasks.startswith(
        "from ekiden import Ekiden as Celery, shared_task as shared  # the usual\n"
        "from celery import group\n"
        "from ekiden.exceptions import Ignore, SoftTimeLimitExceeded as TooLate\n"
        "from ekiden.result import AsyncResult\n"
        "from kombu import Queue\n"
    )
    assert tasks.endswith(TASKS[TASKS.index("import os\n") :])
    assert (project / "Procfile").read_text() == PROCFILE.replace("celery -A shop", "ekiden -A shop")
    assert (project / "shop" / "settings.py").read_text() == SETTINGS
    assert (project / ".git" / "hook.py").read_text() == "from celery import Celery\n"
    assert told.endswith("2 files rewritten.\n")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def f():\n    from celery import Celery\n", "def f():\n    from ekiden import Ekiden as Celery\n"),
        ("from celery import Celery\r\nx = 1\r\n", "from ekiden import Ekiden as Celery\r\nx = 1\r\n"),
        ("from celery import Celery; x = 1\n", "from celery import Celery; x = 1\n"),
        ("from .celery import app\n", "from .celery import app\n"),
        ("from celery import Celery as C", "from ekiden import Ekiden as C\n"),
        ("from celery import states\n", "from ekiden import states\n"),
        ("from celery import current_app, task\n", "from celery import current_app, task\n"),
        ("from celery.exceptions import NoSuchThing\n", "from celery.exceptions import NoSuchThing\n"),
        ("'from celery import Celery'\n", "'from celery import Celery'\n"),
    ],
)
def test_only_what_ekiden_has_is_rewritten(before: str, after: str) -> None:
    assert rewritten_python(before) == after
    ast.parse(after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("exec celery -A x worker\n", "exec ekiden -A x worker\n"),
        ("command: celery --app=x worker -B\n", "command: ekiden --app=x worker -B\n"),
        ("python -m celery worker\n", "python -m ekiden worker\n"),
        ("pip install celery\n", "pip install celery\n"),
        ("cd /srv/celery && ./run\n", "cd /srv/celery && ./run\n"),
    ],
)
def test_only_the_command_is_rewritten(before: str, after: str) -> None:
    assert rewritten_commands(before) == after


def test_each_module_that_is_named_has_one_of_its_names_here() -> None:
    there = {
        "celery": "Celery",
        "celery.exceptions": "Ignore",
        "celery.result": "AsyncResult",
        "celery.app.task": "Task",
    }

    assert all(moved(module, name) is not None for module, name in there.items())
    assert moved("celery", "task") is None
    assert set(there) <= set(MODULES)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("import celery\n@celery.shared_task\ndef f(): ...\n", "import ekiden as celery\n"),
        ("import celery as c  # it\nc.exceptions.Ignore\n", "import ekiden as c  # it\n"),
        ("if x:\n    import celery\ncelery.states.FAILURE\n", "if x:\n    import ekiden as celery\n"),
        ("import celery\napp = celery.Celery()\n", "import celery\n"),
        ("import celery\ncelery.chain()\n", "import celery\n"),
        ("import os, celery\ncelery.shared_task\n", "import os, celery\n"),
        ("import celery.exceptions\ncelery.exceptions.Ignore\n", "import celery.exceptions\n"),
    ],
)
def test_the_import_of_the_whole_package_is_rewritten_where_all_is_here(before: str, after: str) -> None:
    assert rewritten_python(before).startswith(after)
