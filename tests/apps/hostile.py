"""Bodies that return, raise and ask what no record, message or pipe can hold, and an innocent one."""

import asyncio
import dataclasses
import enum
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ekiden import Ekiden, Reject, Task
from ekiden.errors import Retry

app = Ekiden("hostile", broker="memory://hostile")

SURROGATE = "caf\udce9"
LARGE = 6_000_000
"""Bytes: more than a result may have."""


class Text(str):
    """A ``str`` that does what it likes when it is asked for anything."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __len__(self) -> int:
        raise RuntimeError("no length")

    __repr__ = __str__


class Number(int):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Shy:
    """Cannot be shown, compared, or asked whether it is true."""

    def __str__(self) -> str:
        raise SystemExit("no text")

    def __repr__(self) -> str:
        raise KeyboardInterrupt

    def __bool__(self) -> bool:
        raise RuntimeError("no answer")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no answer")

    __hash__ = None  # type: ignore[assignment]


class ShyError(Exception):
    def __str__(self) -> str:
        raise SystemExit("no text")

    def __repr__(self) -> str:
        raise GeneratorExit


class NumberError(Exception):
    """Its text and repr are none."""

    def __str__(self) -> str:
        number: Any = 5
        return number  # type: ignore[no-any-return]

    __repr__ = __str__


class ArglessError(Exception):
    """Its ``args`` cannot be had."""

    @property
    def args(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no args")


class CauselessError(Exception):
    """Where it comes from cannot be had."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith(("__c", "__t", "__n")):
            raise RuntimeError("no cause")
        return super().__getattribute__(name)


class Nameless(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in {"__qualname__", "__module__", "__name__"}:
            raise RuntimeError("no name")
        return super().__getattribute__(name)


class NamelessError(Exception, metaclass=Nameless):
    pass


class ModulelessError(Exception):
    __module__ = 5  # type: ignore[assignment]


class SecretiveError(ExceptionGroup):
    """Its members cannot be had, nor what it was made with."""

    @property
    def exceptions(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no members")

    def __reduce__(self) -> Any:
        raise RuntimeError("not to be copied")


class LoudError(Exception):
    """Text without end."""

    def __str__(self) -> str:
        return SURROGATE * 100_000

    __repr__ = __str__


class DefiantRetry(Retry):
    """A Retry without what a Retry has."""

    def __init__(self) -> None:
        Exception.__init__(self)


class Endless(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise RuntimeError("no item")

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("no items")

    def __len__(self) -> int:
        return 1


@dataclasses.dataclass
class Point:
    x: Any


class Colour(enum.Enum):
    RED = SURROGATE


def itself() -> list[Any]:
    """A list that contains itself."""
    found: list[Any] = []
    found.append(found)
    return found


def nested(depth: int = 100_000) -> list[Any]:
    """Lists in lists."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def chain_of_causes(length: int = 3000) -> Exception:
    """An exception with a cause that has a cause that has a cause."""
    error = ValueError("the first")
    for number in range(length):
        following = ValueError(number)
        following.__cause__ = error
        error = following
    return error


def circle_of_causes() -> Exception:
    """An exception that is the cause of its cause."""
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    first.__context__ = first
    return first


def deep_group(depth: int = 300) -> Exception:
    """Groups in groups."""
    error: Exception = ValueError("inmost")
    for _ in range(depth):
        error = ExceptionGroup(SURROGATE, [error])
    return error


def noted_error(*notes: Any) -> Exception:
    """An exception with notes that are none."""
    error = ValueError("noted")
    error.__notes__ = list(notes)
    return error


def deep(number: int) -> int:
    """Call oneself for ever."""
    return deep(number + 1)


RETURNED: dict[str, Callable[[], Any]] = {
    "surrogate": lambda: SURROGATE,
    "surrogates within": lambda: {"a": [SURROGATE]},
    "surrogate key": lambda: {SURROGATE: 1},
    "surrogate member": lambda: Colour.RED,
    "object": object,
    "shy": Shy,
    "nan": lambda: float("nan"),
    "infinity within": lambda: {"x": [float("inf")]},
    "nan in a dataclass": lambda: Point(float("nan")),
    "odd keys": lambda: {(1, 2): 3, None: 4},
    "itself": itself,
    "nested": nested,
    "long number": lambda: 10**5000,
    "endless mapping": Endless,
    "generator": lambda: (number for number in range(3)),
    "function": lambda: deep,
    "class": lambda: Shy,
    "exception": ShyError,
    "large": lambda: "x" * LARGE,
}
"""What cannot be a result."""

RAISED: dict[str, Callable[[], BaseException]] = {
    "surrogate text": lambda: ValueError(SURROGATE),
    "surrogate key": lambda: KeyError(SURROGATE),
    "surrogates in arguments": lambda: OSError(2, SURROGATE, SURROGATE),
    "text of a kind": lambda: ValueError(Text("x")),
    "number of a kind": lambda: ValueError(Number(5)),
    "shy argument": lambda: ValueError(Shy()),
    "shy error": ShyError,
    "number for text": NumberError,
    "no args": lambda: ArglessError("x"),
    "no cause": lambda: CauselessError("x"),
    "no name": lambda: NamelessError("x"),
    "no module": lambda: ModulelessError("x"),
    "loud": LoudError,
    "large": lambda: ValueError("x" * LARGE),
    "many arguments": lambda: ValueError(*range(20_000)),
    "arguments that JSON has not": lambda: ValueError(object(), float("nan"), {1: {2: 3}}, {None: 1}, b"\xff"),
    "itself": lambda: ValueError(itself()),
    "nested": lambda: ValueError(nested()),
    "long number": lambda: ValueError(10**5000),
    "chain": chain_of_causes,
    "circle": circle_of_causes,
    "notes": lambda: noted_error(SURROGATE, 5, Shy()),
    "group": lambda: ExceptionGroup(SURROGATE, [ValueError(SURROGATE), ExceptionGroup("in", [ShyError()])]),
    "large group": lambda: ExceptionGroup("many", [ValueError(number) for number in range(10_000)]),
    "secretive group": lambda: SecretiveError("x", [ValueError()]),
    "deep group": deep_group,
    "base group": lambda: BaseExceptionGroup("worse", [KeyboardInterrupt(), SystemExit(1)]),
    "undecodable": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, SURROGATE),
    "syntax": lambda: SyntaxError("bad", (SURROGATE, 5, 5, SURROGATE * 100)),
    "stop iteration": lambda: StopIteration(SURROGATE),
    "stop async iteration": StopAsyncIteration,
    "generator exit": lambda: GeneratorExit(SURROGATE),
    "keyboard interrupt": lambda: KeyboardInterrupt(Shy()),
    "system exit": lambda: SystemExit(Shy()),
    "cancelled": lambda: asyncio.CancelledError(SURROGATE),
    "reject, surrogate": lambda: Reject(SURROGATE),
    "reject, shy": lambda: Reject(Shy(), False),
    "reject, large": lambda: Reject("x" * LARGE),
    "reject, shy answer": lambda: Reject("x", Shy()),  # type: ignore[arg-type]
    "retry, no exception": lambda: Retry(exc="wrong"),  # type: ignore[arg-type]
    "retry, no time": lambda: Retry(when="soon"),  # type: ignore[arg-type]
    "retry, shy time": lambda: Retry(when=Shy()),  # type: ignore[arg-type]
    "retry, surrogate argument": lambda: Retry(args=(SURROGATE,)),
    "retry, shy argument": lambda: Retry(args=(Shy(),)),
    "retry, no arguments": lambda: Retry(args=5),  # type: ignore[arg-type]
    "retry, odd keywords": lambda: Retry(kwargs={5: SURROGATE}),  # type: ignore[dict-item]
    "retry, nested": lambda: Retry(args=(nested(),)),
    "retry, defiant": DefiantRetry,
}
"""What cannot be kept as it is, or not at all."""

TOLD: dict[str, tuple[Any, Any]] = {
    "surrogate meta": ("PROGRESS", SURROGATE),
    "shy meta": ("PROGRESS", Shy()),
    "nested meta": ("PROGRESS", nested()),
    "large meta": ("PROGRESS", "x" * LARGE),
    "surrogate state": (SURROGATE, None),
    "state of no text": (5, None),
    "shy state": (Shy(), None),
    "empty state": ("", None),
    "state of several lines": ("A\nB", None),
    "long state": ("X" * 100_000, None),
}
"""Progress that cannot be told: (state, meta)."""


class Rude(Task[..., Any]):
    """Handlers that fail in what they raise."""

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        if args[:1] == ["handler"]:
            error = RAISED[args[1]]()
            raise error


def body(self: Any, does: str, what: str = "") -> Any:
    """What every hostile task does."""
    match does:
        case "return":
            return RETURNED[what]()
        case "raise":
            error = RAISED[what]()
            raise error
        case "tell":
            state, meta = TOLD[what]
            self.update_state(state=state, meta=meta)
    return "returned"


hostile_thread = app.task(name="hostile.thread", bind=True, base=Rude)(body)
hostile_process = app.task(name="hostile.process", bind=True, base=Rude, pool="process")(body)


@app.task(name="hostile.loop", bind=True, base=Rude)
async def hostile_loop(self: Any, does: str, what: str = "") -> Any:
    return body(self, does, what)


RUNS: list[int] = []
"""Which innocent bodies ran, in this process."""


@app.task(name="innocent")
def innocent(number: int) -> int:
    RUNS.append(number)
    return number


GARBAGE: dict[str, bytes] = {
    "a byte": b"x",
    "what looks like a length": b"\0\0\0\5hello",
    "text": b"hello\n" * 1000,
    "half a head": b"ekdn",
    "a frame that is no JSON": b"ekdn\0\0\0\5hello",
    "a frame of another kind": b"ekdn\0\0\0\2{}",
    "a frame that is not done": b'ekdn\0\0\0\x0f{"type":"Done"}',
    "a huge frame": b"ekdn\xff\xff\xff\xff",
    "a nested frame": b"ekdn\0\1\0\0" + b"[" * 65536,
    "an outcome that there is not": b"ekdn\0\0\0\x28" + b'{"type":"Done","outcome":{"type":"None"}}',
}
"""What a body can write into the pipe of its process."""


@app.task(name="spoil", pool="process")
def spoil(what: str) -> None:
    """Write garbage to every pipe of this process."""
    for descriptor in range(3, 64):
        try:
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                os.write(descriptor, GARBAGE[what])
        except OSError:
            continue  # closed, or its reading end


@app.task(name="spoil.later", pool="process")
def spoil_later(seconds: float) -> int:
    """Return, and write garbage to every pipe afterwards."""
    threading.Timer(seconds, spoil.run, ("text",)).start()
    return os.getpid()


@app.task(name="in.process", pool="process")
def in_process(number: int) -> int:
    return number
