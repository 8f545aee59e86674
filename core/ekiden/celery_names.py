"""What programs import from Celery and kombu, or ask its objects for, and ekiden has not: what to do instead.

    MISSING      by module, or by ``MODULE:NAME``; ``celery:NAME`` holds for a name of any module
    ATTRIBUTES   by object (app, task, request, result, signature, control, settings), then by attribute

Modules and classes ask here from their ``__getattr__``, which Python calls for a name that is not there.
"""

from __future__ import annotations

_SCHEDULES = "ekiden has no schedules yet; a cron job or a systemd timer can send the call: `ekiden call`"
_WORKFLOWS = "ekiden has no workflows yet; link=, link_error= and signatures are there"
_ASKS_NO_WORKER = (
    "ekiden does not ask running workers yet; `ekiden queues` shows what they have in hand, app.control.revoke() ends "
    "a task"
)
_NO_OBJECTS = "queues need no declaration and no connection of yours: name them in task_routes and --queues"
_NO_PARTS = "the worker has no replaceable parts; signals and Task subclasses are there"
_NO_CURRENT_APP = "there is no current app: import yours; in a bound task it is self.app"
_STANDARD_LIBRARY = "the standard library has it: uuid.uuid4(), functools, time"
_NO_EVENTS = "ekiden sends no events yet; connect to ekiden.signals in the worker"
_NO_GREEN_THREADS = "ekiden has no pool of green threads; `async def` tasks run on an event loop"
_CONNECT = "ekiden.connect(URL) sends and receives plain messages"
_URL_CHOOSES = "the scheme of result_backend chooses it: see docs/writing-a-transport.md"
_NO_WARNINGS = "there is nothing of that kind to warn of; delete it"
_COMMAND = "the command is `ekiden`, and app.start([...]) runs it"
_NO_STAMPS = "calls have no stamps; headers= travel beside the arguments"
_ON_COMMIT = "send it after the commit: transaction.on_commit(lambda: task.delay(...))"
_VERSION = "ekiden.__version__ is its version"
_JSON_ONLY = "messages are JSON, and nothing else is accepted"
_NO_LIVE_CHANGES = "a worker's queues, limits and size do not change while it runs; start it anew with others"
_NO_MIGRATION = "messages cannot be moved from Celery's queues; let Celery's workers finish what is there"
_LOGGING = "use logging.getLogger(): a record that is written in a body carries the task's id and name"
_UNREADABLE = "a message that cannot be read is a MessageError, and goes to the dead letters"

MISSING = {
    "celery": "ekiden has nothing in its place",
    "celery._state": _NO_CURRENT_APP,
    "celery.app": "import the names that are used: from ekiden import Ekiden, Task, shared_task",
    "celery.app.amqp": _CONNECT,
    "celery.app.annotations": "the setting task_annotations takes mappings of task names to options",
    "celery.app.autoretry": "declare the task with autoretry_for=",
    "celery.app.backends": _URL_CHOOSES,
    "celery.app.builtins": "nothing runs by itself; expired results go by themselves",
    "celery.app.defaults": "ekiden.settings.Settings has each setting with its default",
    "celery.app.events": _NO_EVENTS,
    "celery.app.log": "configure logging in a receiver of ekiden.signals.setup_logging or after_setup_logger",
    "celery.app.registry": "app.tasks is a mapping of names to tasks",
    "celery.app.routes": "the setting task_routes takes mappings, patterns and functions",
    "celery.app.trace": "Task subclasses have handlers, and may override __call__",
    "celery.app.utils": "`ekiden doctor` prints the settings",
    "celery.apps": _COMMAND,
    "celery.backends": _URL_CHOOSES,
    "celery.beat": _SCHEDULES,
    "celery.bin": _COMMAND,
    "celery.bootsteps": _NO_PARTS,
    "celery.canvas": _WORKFLOWS,
    "celery.concurrency": _NO_PARTS,
    "celery.contrib": "ekiden has nothing in its place",
    "celery.contrib.abortable": "use revoke(terminate=True), or a soft_time_limit",
    "celery.contrib.django": _ON_COMMIT,
    "celery.contrib.migrate": _NO_MIGRATION,
    "celery.contrib.pytest": "ekiden's pytest plugin has a worker fixture: see docs/testing.md",
    "celery.contrib.rdb": "use pytest's debugger, with app.worker() in the test's process",
    "celery.contrib.sphinx": "tasks keep their functions' docstrings; autodoc needs no extension for them",
    "celery.contrib.testing": "use app.worker(): a real worker in the test's process, see docs/testing.md",
    "celery.events": "connect to ekiden.signals in the worker",
    "celery.exceptions:AlreadyRegistered": "two tasks of one name are a ConfigurationError where they are declared",
    "celery.exceptions:BackendGetMetaError": "catch ekiden.exceptions.BackendError",
    "celery.exceptions:BackendStoreError": "catch ekiden.exceptions.BackendError",
    "celery.exceptions:CeleryCommandException": _COMMAND,
    "celery.exceptions:ChordError": _WORKFLOWS,
    "celery.exceptions:IncompleteStream": _UNREADABLE,
    "celery.exceptions:InvalidTaskError": _UNREADABLE,
    "celery.exceptions:NotConfigured": "an app needs no configuration; catch ekiden.exceptions.ConfigurationError",
    "celery.exceptions:QueueNotFound": "queues come to be when first used",
    "celery.exceptions:SecurityError": _JSON_ONLY,
    "celery.exceptions:Terminated": "a task that was ended by revoke() is TaskRevoked for who waits for it",
    "celery.exceptions:WorkerShutdown": "stop a worker by SIGTERM",
    "celery.exceptions:WorkerTerminate": "stop a worker by SIGTERM; a second one ends it at once",
    "celery.exceptions:reraise": "write raise error.with_traceback(traceback)",
    **{
        f"celery.exceptions:{name}": _NO_WARNINGS
        for name in (
            "AlwaysEagerIgnored",
            "CDeprecationWarning",
            "CPendingDeprecationWarning",
            "CeleryWarning",
            "DuplicateNodenameWarning",
            "DuplicateTaskNameWarning",
            "FixupWarning",
            "SecurityWarning",
        )
    },
    "celery.five": "Python 3 has it",
    "celery.fixups": "Django needs no fixup: see docs/django.md",
    "celery.loaders": "apps are loaded by name: MODULE:APP",
    "celery.local": "there are no proxies: @app.task returns the task itself",
    "celery.platforms": "a service manager looks after process ids, users and limits",
    "celery.result:GroupResult": _WORKFLOWS,
    "celery.result:ResultBase": "the type is ekiden.AsyncResult",
    "celery.result:ResultSet": _WORKFLOWS,
    "celery.result:allow_join_result": "write result.get(allow_join=True)",
    "celery.result:assert_will_not_block": "get() inside a task raises unless allow_join=True",
    "celery.result:result_from_tuple": "keep the id: app.AsyncResult(id)",
    "celery.schedules": _SCHEDULES,
    "celery.security": "messages are JSON and run no code; who may write them is the broker's to say",
    "celery.signals:beat_embedded_init": _SCHEDULES,
    "celery.signals:beat_init": _SCHEDULES,
    "celery.signals:celeryd_after_setup": "connect to worker_init",
    "celery.signals:celeryd_init": "connect to worker_init",
    "celery.signals:heartbeat_sent": "write a liveness file: the setting worker_liveness_file",
    "celery.signals:import_modules": "connect to worker_init",
    "celery.signals:task_internal_error": "an error of the worker's own is logged; task_failure tells of tasks",
    "celery.signals:task_rejected": "connect to task_postrun; `ekiden dead list` shows what was rejected",
    "celery.signals:task_unknown": "a message of an unknown task goes to the dead letters: `ekiden dead list`",
    "celery.signals:user_preload_options": "the command takes no options of a program's own; use the environment",
    "celery.signals:worker_before_create_process": "connect to worker_process_init",
    **{
        f"celery.signals:{name}": _NO_GREEN_THREADS
        for name in (
            "eventlet_pool_apply",
            "eventlet_pool_postshutdown",
            "eventlet_pool_preshutdown",
            "eventlet_pool_started",
        )
    },
    "celery.states:IGNORED": "nothing is stored of a call that raises Ignore: its state stays as it was",
    "celery.states:RECEIVED": "connect to ekiden.signals.task_received; no state tells of it",
    "celery.states:REJECTED": "a rejected call is a FAILURE",
    "celery.states:precedence": "ekiden.states.may_follow() says which state may follow which",
    "celery.states:precedence_key": "ekiden.states.may_follow() says which state may follow which",
    "celery.states:state": "states are text; ekiden.states.may_follow() compares them",
    "celery.utils": _STANDARD_LIBRARY,
    **{
        f"celery.utils.log:{name}": _LOGGING
        for name in (
            "ColorFormatter",
            "LOG_LEVELS",
            "LoggingProxy",
            "base_logger",
            "get_multiprocessing_logger",
            "in_sighandler",
            "mlevel",
            "reset_multiprocessing_logger",
            "set_in_sighandler",
        )
    },
    "celery.utils.log": _LOGGING,
    "celery.utils.serialization": "an error travels as its class, arguments and text",
    "celery.worker": _NO_PARTS,
    "celery:abstract": "the types are ekiden.Task, ekiden.Signature and ekiden.AsyncResult",
    "celery:Celery": "it is called Ekiden: from ekiden import Ekiden as Celery",
    "celery:AppPickler": _JSON_ONLY,
    "celery:disable_trace": "Task subclasses have handlers, and may override __call__",
    "celery:enable_trace": "Task subclasses have handlers, and may override __call__",
    "celery:execute": "app.send_task(NAME) sends a call",
    "celery:local": "there are no proxies: @app.task returns the task itself",
    "celery:log": "configure logging in a receiver of ekiden.signals.setup_logging or after_setup_logger",
    "celery:pop_current_task": "self.request is the call that is being executed",
    "celery:push_current_task": "self.request is the call that is being executed",
    "celery:Context": "the type is ekiden.request.Request; self.request is it",
    "celery:Control": "app.control is it",
    "celery:Inspect": _ASKS_NO_WORKER,
    "celery:Proxy": "there are no proxies: @app.task returns the task itself",
    "celery:StampingVisitor": _NO_STAMPS,
    "celery:GroupStampingVisitor": _NO_STAMPS,
    "celery:app": "import the names that are used: from ekiden import Ekiden, Task, shared_task",
    "celery:app_or_default": "there is no current app: import yours",
    "celery:bugreport": "say `ekiden doctor`",
    "celery:chain": _WORKFLOWS,
    "celery:chord": _WORKFLOWS,
    "celery:chunks": "use enqueue_many()",
    "celery:crontab": _SCHEDULES,
    "celery:current_app": _NO_CURRENT_APP,
    "celery:current_task": "declare the task with bind=True; it is self, and the call is self.request",
    "celery:default_app": _NO_CURRENT_APP,
    "celery:flatten_reply": _ASKS_NO_WORKER,
    "celery:get_current_app": _NO_CURRENT_APP,
    "celery:get_current_task": "declare the task with bind=True; it is self, and the call is self.request",
    "celery:get_current_worker_task": "declare the task with bind=True; it is self, and the call is self.request",
    "celery:group": _WORKFLOWS,
    "celery:maybe_signature": "a signature is a signature already",
    "celery:messaging": _CONNECT,
    "celery:maybe_patch_concurrency": _NO_GREEN_THREADS,
    "celery:periodic_task": _SCHEDULES,
    "celery:registry": "app.tasks is a mapping of names to tasks",
    "celery:schedule": _SCHEDULES,
    "celery:set_default_app": "there is no default app: a shared task goes through the app that includes it",
    "celery:signature": "a task makes its own: task.s(...), or app.signature(NAME)",
    "celery:solar": _SCHEDULES,
    "celery:starmap": _WORKFLOWS,
    "celery:subtask": "task.s(...) makes a signature",
    "celery:task": "use @app.task, or @shared_task",
    "celery:uuid": "use str(uuid.uuid4()), or leave the id out",
    "celery:xmap": _WORKFLOWS,
    "celery:xstarmap": _WORKFLOWS,
    "celery:SERIES": _VERSION,
    "celery:VERSION": _VERSION,
    "celery:VERSION_BANNER": _VERSION,
    "celery:version_info": _VERSION,
    "celery:version_info_t": _VERSION,
    "django_celery_beat": _SCHEDULES,
    "django_celery_results": "results are kept at the broker, where it stores them; take it out of INSTALLED_APPS",
    "kombu": _NO_OBJECTS,
    "kombu.exceptions": "catch ekiden.exceptions.TransportError: BrokerUnavailable, or BrokerRefused",
    "kombu.serialization": _JSON_ONLY,
    "kombu.utils": "the standard library has it: json, uuid.uuid4(), functools, importlib",
}
"""By module, by ``MODULE:NAME``, or by ``celery:NAME`` for a name of any module of Celery's: what to do instead."""

ATTRIBUTES = {
    "app": {
        "Beat": _SCHEDULES,
        "GroupResult": _WORKFLOWS,
        "Pickler": _JSON_ONLY,
        "ResultSet": _WORKFLOWS,
        "WorkController": _COMMAND,
        "Worker": "app.worker() is one in this process, app.worker_main() becomes one",
        "add_defaults": "write app.conf.update({...})",
        "add_periodic_task": _SCHEDULES,
        "annotations": "they are app.conf.task_annotations",
        "autofinalize": "there is nothing to finalize",
        "bugreport": "say `ekiden doctor`",
        "clock": "there is no logical clock",
        "configured": "an app is configured when it is made",
        "create_task_cls": "give the app task_cls=, or the task base=",
        "current_task": "declare the task with bind=True; it is self, and the call is self.request",
        "current_worker_task": "declare the task with bind=True; it is self, and the call is self.request",
        "either": "read app.conf",
        "events": _NO_EVENTS,
        "finalize": "there is nothing to finalize; delete the line",
        "finalized": "there is nothing to finalize",
        "gen_task_name": "a task is called by its module and function, unless it is declared with name=",
        "loader": "apps are loaded by name: MODULE:APP",
        "log": "configure logging in a receiver of ekiden.signals.setup_logging or after_setup_logger",
        "namespace": "config_from_object(..., namespace=) uses it once",
        "now": "write datetime.now(UTC)",
        "oid": "a call has the id task_id",
        "on_after_configure": _SCHEDULES + "; for anything else connect to ekiden.signals.worker_init",
        "on_after_finalize": _SCHEDULES + "; for anything else connect to ekiden.signals.worker_init",
        "on_after_fork": "connect to ekiden.signals.worker_process_init; after a fork an app opens its own connections",
        "on_configure": "give the settings where the app is made",
        "on_init": "override __init__ of a subclass, or write it after the app is made",
        "prepare_config": "give the settings where the app is made",
        "select_queues": "say `ekiden worker --queues a,b`, or set worker_queues",
        "set_as_current": "there is no current app; app.set_default() has shared tasks sent through this one",
        "set_current": "there is no current app; app.set_default() has shared tasks sent through this one",
        "setup_security": "messages are JSON and run no code; who may write them is the broker's to say",
        "steps": _NO_PARTS,
        "strict_typing": "it is app.conf.task_typing",
        "subclass_with_self": "write a class with the attribute app",
        "thread_oid": "a call has the id task_id",
        "timezone": "times are UTC inside; app.conf.timezone is what was assigned",
        "type_checker": "arguments are checked where a call is sent: see the setting task_typing",
        "user_options": "the command takes no options of a program's own; use the environment",
        "uses_utc_timezone": "times are always UTC inside",
        **dict.fromkeys(
            (
                "amqp",
                "broker_connection",
                "connection",
                "connection_for_read",
                "connection_for_write",
                "connection_or_acquire",
                "default_connection",
                "default_producer",
                "pool",
                "producer_or_acquire",
                "producer_pool",
            ),
            _CONNECT,
        ),
        **dict.fromkeys(
            (
                "amqp_cls",
                "backend_cls",
                "builtin_fixups",
                "control_cls",
                "events_cls",
                "fixups",
                "loader_cls",
                "log_cls",
                "registry_cls",
            ),
            "an app has no replaceable parts; a transport or backend is a plugin: see docs/writing-a-transport.md",
        ),
        "config_from_cmdline": "settings come from the app, the environment (EKIDEN_*) or [tool.ekiden]",
        "use_fast_trace_task": "there is nothing to choose",
        "IS_WINDOWS": "sys.platform says it",
        "IS_macOS": "sys.platform says it",
        "SYSTEM": "platform.system() says it",
    },
    "task": {
        "Request": _NO_PARTS,
        "Strategy": _NO_PARTS,
        "abstract": "a class that is only used as base= declares no task",
        "acks_on_failure": "a failed call is settled, and kept in the dead letters",
        "acks_on_failure_or_timeout": "a failed call is settled, and kept in the dead letters",
        "acks_on_timeout": "a failed call is settled, and kept in the dead letters",
        "add_around": "override __call__ in a class, and declare with base=",
        "add_to_chord": _WORKFLOWS,
        "add_trail": "results always know their children",
        "annotate": "they are app.conf.task_annotations",
        "chunks": "use enqueue_many()",
        "compression": "messages are not compressed",
        "from_config": "task.options is what was declared, app.policy(task) what holds",
        "map": _WORKFLOWS,
        "on_bound": "override __init__ of the class",
        "on_replace": _WORKFLOWS,
        "pop_request": "there is no stack of requests; task.apply() runs a body with one of its own",
        "push_request": "there is no stack of requests; task.apply() runs a body with one of its own",
        "reject_on_worker_lost": "a message always comes back when its worker dies",
        "replace": _WORKFLOWS,
        "request_stack": "self.request is the call that is being executed",
        "resultrepr_maxsize": "log lines are cut by themselves",
        "retry_on_worker_lost": "a message always comes back when its worker dies",
        "send_event": _NO_EVENTS + "; self.update_state() tells who asks for the result",
        "send_events": _NO_EVENTS,
        "serializer": _JSON_ONLY,
        "shadow_name": "a task has one name",
        "signature_from_request": "write task.s(*request.args, **request.kwargs)",
        "starmap": _WORKFLOWS,
        "start_strategy": _NO_PARTS,
        "store_eager_result": "nothing is stored of task.apply(), which returns its result",
        "store_errors_even_if_ignored": "failed calls are kept in the dead letters: see task_dead_letter",
        "subtask": "task.s(...) or task.signature(...) makes one",
        "subtask_from_request": "write task.s(*request.args, **request.kwargs)",
        "trail": "results always know their children",
    },
    "request": {
        "as_execution_options": "request.headers, request.queue and request.priority say how it was sent",
        "callbacks": "what follows a call is in its message: request.call.on_success",
        "chain": _WORKFLOWS,
        "children": "they are of the result: AsyncResult(id).children",
        "chord": _WORKFLOWS,
        "clear": "a request does not change",
        "errbacks": "what follows a failure is in its message: request.call.on_error",
        "group": _WORKFLOWS,
        "group_index": _WORKFLOWS,
        "logfile": "standard error is where the worker logs",
        "loglevel": "logging.getLogger().level says it",
        "origin": "nothing says which process sent a call; give it a header",
        "properties": "request.headers, request.queue and request.priority say how it was sent",
        "replaced_task_nesting": _WORKFLOWS,
        "shadow": "a task has one name",
        "stamped_headers": _NO_STAMPS,
        "stamps": _NO_STAMPS,
        "taskset": _WORKFLOWS,
        "update": "a request does not change",
        "utc": "times are always UTC",
    },
    "result": {
        "args": "arguments are not stored with a result; request.args has them in the body",
        "as_list": "the id is result.id, those of its children result.children",
        "as_tuple": "keep the id: app.AsyncResult(id)",
        "build_graph": "result.children has the tasks that it sent; result.collect() goes through all",
        "exists": "a state of PENDING says that nothing is known",
        "get_leaf": _WORKFLOWS,
        "graph": "result.children has the tasks that it sent; result.collect() goes through all",
        "group_id": _WORKFLOWS,
        "iterdeps": "result.collect() goes through it and its children",
        "join": _WORKFLOWS,
        "kwargs": "arguments are not stored with a result; request.kwargs has them in the body",
        "results": _WORKFLOWS,
        "revoke_by_stamped_headers": _NO_STAMPS,
        "supports_native_join": _WORKFLOWS,
        "throw": "result.get() raises what the task raised",
    },
    "signature": {
        "AsyncResult": "write app.AsyncResult(id)",
        "apply": "write app.tasks[signature.task].apply(signature.args, signature.kwargs)",
        "copy": "a signature does not change, so it needs no copy; signature.clone() makes a changed one",
        "name": "signature.task is the name of its task",
        "app": "a signature is sent through the app of its task",
        "election": "ekiden elects nobody",
        "flatten_links": "signature.links and signature.error_links have them",
        "from_dict": "write app.signature(name, args, kwargs, **options)",
        "freeze": "give it an id: signature = signature.set(task_id=...)",
        "group_id": _WORKFLOWS,
        "parent_id": "ekiden sets it when the call is sent",
        "partial": "write signature.clone(args, kwargs)",
        "register_type": _WORKFLOWS,
        "replace": "write signature.clone(args, kwargs), or msgspec.structs.replace(signature, args=...)",
        "reprcall": "repr(signature) says it",
        "root_id": "ekiden sets it when the call is sent",
        "set_immutable": "write signature = signature.set(immutable=True)",
        "stamp": _NO_STAMPS,
        "stamp_links": _NO_STAMPS,
        "subtask_type": _WORKFLOWS,
        "type": "app.tasks[signature.task] is the task",
        **dict.fromkeys(
            (
                "TYPES",
                "append_to_list_option",
                "clear",
                "extend_list_option",
                "fromkeys",
                "get",
                "items",
                "keys",
                "pop",
                "popitem",
                "setdefault",
                "update",
                "values",
            ),
            "a signature is no dict and does not change: read its task, args, kwargs and options, and write "
            "signature = signature.set(...) or .clone(...)",
        ),
    },
    "control": {
        "discard_all": "say `ekiden purge`",
        "disable_events": _NO_EVENTS,
        "election": "ekiden elects nobody",
        "enable_events": _NO_EVENTS,
        "purge": "say `ekiden purge`",
        "rate_limit": "declare the task with rate_limit=; it holds for all workers together",
        "revoke_by_stamped_headers": _NO_STAMPS,
        "shutdown": "stop a worker by SIGTERM",
        "terminate": "write app.control.revoke(id, terminate=True)",
        "time_limit": "declare the task with time_limit=, or give it to the call",
        **dict.fromkeys(
            (
                "add_consumer",
                "autoscale",
                "cancel_consumer",
                "pool_grow",
                "pool_restart",
                "pool_shrink",
            ),
            _NO_LIVE_CHANGES,
        ),
        **dict.fromkeys(("Mailbox", "broadcast", "heartbeat", "inspect", "mailbox", "ping"), _ASKS_NO_WORKER),
    },
    "signal": {
        "has_listeners": "signal.receivers has them",
        "send_robust": "signal.send() calls every receiver, whichever of them fails",
        **dict.fromkeys(
            ("lock", "providing_args", "sender_receivers_cache", "use_caching"), "signal.fields has what it tells"
        ),
    },
    "backend": {
        "client": "a backend's connections are its own",
        "cleanup": "results go by themselves when they expire",
        "get_task_meta": "app.AsyncResult(id) has the state, the result, its times and its worker",
        "store_result": "self.update_state(task_id=..., state=..., meta=...) stores a state",
        **dict.fromkeys(
            ("get_result", "get_state", "get_status", "get_traceback", "wait_for", "wait_for_pending"),
            "app.AsyncResult(id) has the state, the result and the traceback",
        ),
        **dict.fromkeys(
            ("mark_as_done", "mark_as_failure", "mark_as_retry", "mark_as_revoked", "mark_as_started"),
            "the worker stores how a task ended; self.update_state() tells what comes before",
        ),
        "ensure_chords_allowed": _WORKFLOWS,
    },
    "settings": {
        "add_defaults": "write app.conf.update({...})",
        "humanize": "say `ekiden doctor`",
        "table": "say `ekiden doctor`",
        **dict.fromkeys(
            ("changes", "copy", "defaults", "items", "keys", "maps", "pop", "setdefault", "values", "without_defaults"),
            "they are attributes, such as app.conf.task_time_limit; dataclasses.fields(app.conf) names all",
        ),
    },
}
"""By object of Celery's, then by attribute: what to do instead."""

ARGUMENTS_OF_AN_APP = {
    "amqp": _CONNECT,
    "control": "an app has no replaceable parts",
    "events": "an app has no replaceable parts",
    "fixups": "Django needs no fixup: see docs/django.md",
    "loader": "apps are loaded by name: MODULE:APP",
    "log": "configure logging in a receiver of ekiden.signals.setup_logging or after_setup_logger",
    "tasks": "tasks are declared by @app.task, or included by app.include_tasks()",
}
"""Keyword arguments of ``Celery(...)``: what to do instead."""

_CELERYS_MODULE = {
    "ekiden": "celery",
    "ekiden.exceptions": "celery.exceptions",
    "ekiden.logs": "celery.utils.log",
    "ekiden.result": "celery.result",
    "ekiden.schedules": "celery.schedules",
    "ekiden.signals": "celery.signals",
    "ekiden.states": "celery.states",
}


def instead_of(module: str, name: str) -> str | None:
    """What to do about a name, or a whole module (``*``), of Celery's that is missing here; None if nobody knows it."""
    for key in (f"{module}:{name}", f"celery:{name}", f"{module}.{name}"):
        if key in MISSING:
            return MISSING[key]
    parts = module.split(".")
    found = (MISSING.get(".".join(parts[:length])) for length in range(len(parts), 0, -1))
    return next((sentence for sentence in found if sentence), None)


def missing_name(module: str, name: str) -> Exception:
    """The error for a name that a module of ours has not.

    For one of Celery's an ImportError: ``from ekiden import name`` would replace the words of an AttributeError.
    """
    celerys = _CELERYS_MODULE[module]
    sentence = MISSING.get(f"{celerys}:{name}") or MISSING.get(f"celery:{name}")
    if sentence is None and module == "ekiden.schedules" and not name.startswith("_"):
        sentence = _SCHEDULES
    if sentence is None:
        return AttributeError(f"module {module!r} has no attribute {name!r}")
    return ImportError(f"{module} has no {name!r}: {sentence}.")


def missing_attribute(kind: str, owner: object, name: str) -> AttributeError:
    """The error for an attribute that an object has not; ``kind`` is one of ``ATTRIBUTES``."""
    sentence = ATTRIBUTES[kind].get(name)
    if sentence is None:
        return AttributeError(f"{type(owner).__name__!r} object has no attribute {name!r}", name=name, obj=owner)
    article = "an" if kind == "app" else "a"
    # Without name= and obj= Python adds no "did you mean" of its own.
    return AttributeError(f"{article} {kind} has no {name!r}: {sentence}.")
