"""Which databases hold messages, and what becomes of what was deleted in them.

Deleted documents leave tombstones, for ever. Where the server permits it they are purged (``purging``), and one
database is enough. Where it does not, new messages go to a new database now and then, and old ones are dropped
(``rotation``). Where neither is permitted nothing is done, and ``warnings`` says so.

One process tidies at a time: the one that stands in the catalogue (``catalogue``) as the tidier.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from http import HTTPStatus

import msgspec
from ekiden.locks import call_holding
from ekiden.loggers import safe_logger

from ekiden_couchdb.catalogue import MESSAGES, Catalogue, CatalogueStore, Generation, Stage
from ekiden_couchdb.client import Client
from ekiden_couchdb.errors import is_not_permitted, refusal_in
from ekiden_couchdb.moving import Mover
from ekiden_couchdb.purging import Purger, may_purge
from ekiden_couchdb.rotation import Limits, Rotation, create_database, create_generation, existing_generations

logger = safe_logger(__name__)

LIMITS = Limits()

_TIDIER_SECONDS = 60.0
_PERMISSIONS_KEPT_SECONDS = 600.0
_BUSY_PAUSE_SECONDS = 0.1
_WORKING_SECONDS = 0.1
_MANY_DELETED = 500
_AFTER_AN_ERROR_SECONDS = 60.0
_LONGEST_LEASE_SECONDS = 7 * 86400.0
"""What a catalogue says that is longer is not believed: for so long no purge waits."""
_SEALED_WITHIN_SECONDS = 300.0


class Remedy(Enum):
    """What this server lets us do about tombstones."""

    PURGE = "purge"
    ROTATE = "rotate"
    NONE = "none"


class Generations:
    """The databases of messages, for any number of threads.

    ``_lock`` guards what is remembered of the catalogue; ``_tidying`` is held by the thread that tidies.
    """

    def __init__(self, client: Client, limits: Limits | None = None) -> None:
        self._client = client
        self._limits = limits or LIMITS
        self._store = CatalogueStore(client)
        self._rotation = Rotation(client, self._store, self._limits)
        self._identity = os.urandom(8).hex()
        self._closed = False
        self.forget()

    def forget(self) -> None:
        """In a forked child: make new locks, and be somebody else for the other processes."""
        self._identity = os.urandom(8).hex()
        self._lock = threading.Lock()
        self._tidying = threading.RLock()
        self._known: Catalogue | None = None
        self._known_at = self._begun_at = 0.0
        self._purgers: dict[str, Purger] = {}
        self._movers: dict[str, Mover] = {}
        self._remedy: Remedy | None = None
        self._remedy_at = 0.0
        self._deleted = 0
        self._longest_lease = 0.0
        self._tidy_at = time.monotonic() + random.uniform(0, self._limits.tidied_every)
        self._has_tidied = False

    def current(self) -> str:
        """The database for new messages. Creates the first one where it is missing and this user may.

        A publisher that is told 403 or 404 there calls ``refresh`` and asks again. Raises what the client raises.
        """
        return self._catalogue().current(self._now()).name

    def readable(self) -> tuple[str, ...]:
        """All databases that may hold messages, oldest first."""
        return self._catalogue().readable()

    def refresh(self) -> None:
        """Look into the catalogue again: a database was not there, or did not take a document."""
        self._load()

    def replace_missing(self) -> None:
        """Begin another generation where the one for new messages is named in the catalogue and not there.

        Somebody has deleted it, with all that was in it. Raises what the client raises.
        """
        catalogue = self._load()
        name = catalogue.current(self._now()).name
        if (
            not catalogue.rev
            or self._client.ask("GET", f"/{name}", accept={HTTPStatus.NOT_FOUND}).status == HTTPStatus.OK
        ):
            return
        logger.error("the database %s is gone, and with it the messages that it held; another takes its place", name)
        created = create_generation(self._client, like=None)
        changed = catalogue.without(name).with_generation(Generation(created, opens=0))
        if self._store.save(changed) is None:
            self._client.ask("DELETE", f"/{created}", accept={HTTPStatus.NOT_FOUND}, harmless=True)

    def deleted(self, database: str, leaves: Mapping[str, Sequence[str]]) -> None:
        """Documents were deleted; ``tidy`` is wanted soon when they are many. Never blocks."""
        del database  # which leaves there are is read from the database itself, when they are purged
        with self._lock:
            self._deleted += len(leaves)
            if self._deleted >= _MANY_DELETED and self._remedy is Remedy.PURGE:
                self._tidy_at = min(self._tidy_at, time.monotonic() + _BUSY_PAUSE_SECONDS)

    def leases(self, seconds: float) -> None:
        """A consumer gives leases of so many seconds: tombstones stay for twice as long in a cluster."""
        with self._lock:
            self._longest_lease = max(self._longest_lease, seconds)

    def tidy(self) -> None:
        """Do some of what is to be done about tombstones; call it often, it knows when.

        Takes a fraction of a second where the server answers. Raises nothing: nothing is lost by what it could not do,
        and the next round begins where this one ended.
        """
        if time.monotonic() >= self._tidy_at and not self._closed:
            call_holding(self._tidying, self._tidy_some)

    def _tidy_some(self) -> None:
        more = False
        pause = self._limits.tidied_every * random.uniform(0.8, 1.2)
        try:
            with self._client.one_deadline():
                more = self._tidy()
        except (self._client.errors.unavailable, self._client.errors.refused):
            pass  # it is busy, or refuses
        except Exception:
            # Whoever receives calls this, and must not end because of it.
            logger.exception("the databases of messages could not be tidied")
            pause = max(pause, _AFTER_AN_ERROR_SECONDS)
        self._tidy_at = time.monotonic() + (min(_BUSY_PAUSE_SECONDS, pause) if more else pause)

    def warnings(self) -> list[str]:
        """What an administrator should change, one sentence each. Raises ``unavailable`` when it cannot be told."""
        catalogue = self._store.load() or self._prepared()
        if catalogue is None:
            return []  # nothing is there yet
        now = self._now()
        current = catalogue.current(now)
        if self._ask_remedy(current.name) is Remedy.NONE:
            return [
                f"{self._client.place} lets this user neither purge nor create databases, so {current.name!r} keeps a "
                "trace of every message that was ever in it: let one worker be a server administrator, or delete the "
                "database and create it anew now and then, when it is empty and nobody uses it."
            ]
        overdue = now - current.opens > 1000 * (self._limits.announced + _SEALED_WITHIN_SECONDS)
        older = [each for each in catalogue.generations if each.opens < current.opens]
        return [
            f"{self._client.place} takes new documents into {each.name!r} although a validation function forbids that, "
            "so it is kept with all its traces of messages: see that validate_doc_update functions are run there."
            for each in older
            if overdue and each.stage == Stage.OPEN
        ]

    def close(self) -> None:
        """Tidy no more. May be called again."""
        self._closed = True

    # Looking.

    def _now(self) -> int:
        return int(self._client.server_time() * 1000)

    def _catalogue(self) -> Catalogue:
        with self._lock:
            known, age = self._known, time.monotonic() - self._known_at
        if known is not None and age < self._limits.known_after:
            return known
        return self._load()

    def _load(self) -> Catalogue:
        read_at = time.monotonic()
        catalogue = self._store.load()
        if catalogue is None:
            with self._lock:
                known = self._known
            # Without a catalogue that may be stored there is one database, and nobody rotates.
            is_settled = known is not None and not known.rev and read_at - self._begun_at < _PERMISSIONS_KEPT_SECONDS
            catalogue = known if known is not None and is_settled else self._begin()
        return self._remember(catalogue, read_at)

    def _remember(self, catalogue: Catalogue, read_at: float) -> Catalogue:
        with self._lock:
            if read_at >= self._known_at:
                self._known, self._known_at = catalogue, read_at
        return catalogue

    def _begin(self) -> Catalogue:
        """The first catalogue, of the databases that are there, or of a new one."""
        self._begun_at = time.monotonic()
        plain = self._client.database(MESSAGES)
        names = existing_generations(self._client)
        if names is None:
            names = [] if self._prepared() is None else [plain]
        created = None
        if not names:
            try:
                created = create_generation(self._client, like=None)
            except self._client.errors.refused as error:
                if not _is_forbidden(error):
                    raise
                self._client.ensure_database(plain)  # raises, and says what an administrator has to do
            names = [created or plain]
        catalogue = Catalogue(tuple(Generation(name, opens=number) for number, name in enumerate(names)))
        try:
            create_database(self._client, self._store.database, like=names[-1])
        except self._client.errors.refused as error:
            if not _is_forbidden(error):
                raise
            return self._store.load() or catalogue  # nobody rotates here, or somebody else has made it
        return self._agreed(catalogue, created)

    def _prepared(self) -> Catalogue | None:
        """The one database that an administrator has made for those who may make none; None where it is missing."""
        plain = self._client.database(MESSAGES)
        answer = self._client.ask("GET", f"/{plain}", accept={HTTPStatus.NOT_FOUND, HTTPStatus.FORBIDDEN})
        return None if answer.status == HTTPStatus.NOT_FOUND else Catalogue((Generation(plain, opens=0),))

    def _agreed(self, catalogue: Catalogue, created: str | None) -> Catalogue:
        """The catalogue that is stored: this one, or that of whoever was quicker."""
        for _ in range(3):
            stored = self._store.save(catalogue)
            if stored is not None:
                return stored
            found = self._store.load()
            if found is not None:
                if created is not None and created not in found.names():
                    self._client.ask("DELETE", f"/{created}", accept={HTTPStatus.NOT_FOUND}, harmless=True)
                return found
        raise self._client.errors.unavailable(
            f"{self._client.place}: too few nodes of the cluster could store in {self._store.database!r}."
        )

    # Tidying.

    def _tidy(self) -> bool:
        """One round. Whether there is more to do at once."""
        read_at = time.monotonic()
        catalogue = self._store.load()
        if catalogue is None:
            return False
        self._remember(catalogue, read_at)
        now = self._now()
        if catalogue.tidier != self._identity and now < catalogue.tidier_until <= now + 2000 * _TIDIER_SECONDS:
            return False  # somebody else does it
        if not self._has_work(catalogue):
            return False
        remedy = self._remedy_now(catalogue.current(now).name)
        if remedy is Remedy.NONE:
            return False
        elected = self._elected(catalogue, now)
        if elected is None:
            return False
        self._has_tidied = True
        with self._lock:
            self._deleted = 0
        return self._tidy_as_elected(elected, remedy, now)

    def _has_work(self, catalogue: Catalogue) -> bool:
        """Whether there is anything to tidy, as far as this process knows. What others left is looked for once."""
        return (
            not self._has_tidied
            or self._deleted > 0
            or len(catalogue.generations) > 1
            or self._longest_lease > catalogue.longest_lease
            or any(purger.is_waiting for purger in self._purgers.values())
        )

    def _tidy_as_elected(self, catalogue: Catalogue, remedy: Remedy, now: int) -> bool:
        catalogue = self._rotation.advance(catalogue, now)
        more = self._move(catalogue, now)
        if remedy is Remedy.PURGE:
            more = self._purge(catalogue) or more
        elif catalogue.current(now) == catalogue.generations[-1] and self._rotation.is_full(catalogue):
            catalogue = self._rotation.begin_next(self._rotation.adopt(catalogue), now)
        self._remember(catalogue, time.monotonic())
        return more

    def _elected(self, catalogue: Catalogue, now: int) -> Catalogue | None:
        """The catalogue with us as the tidier for some time; None where somebody else was quicker."""
        until = now + round(_TIDIER_SECONDS * 1000)
        lease = max(catalogue.longest_lease, self._longest_lease)
        is_ours = catalogue.tidier == self._identity and catalogue.tidier_until - now > _TIDIER_SECONDS * 500
        if is_ours and lease == catalogue.longest_lease:
            return catalogue
        changed = msgspec.structs.replace(catalogue, tidier=self._identity, tidier_until=until, longest_lease=lease)
        return self._store.save(changed)

    def _move(self, catalogue: Catalogue, now: int) -> bool:
        """Move what is left in old databases. Whether there is more."""
        target = catalogue.current(now).name
        names = self._rotation.overdue(catalogue, now)
        self._movers = {name: self._movers.get(name) or Mover(self._client, name) for name in names}
        unfinished = [name for name, mover in self._movers.items() if mover.step(target)]
        return bool(unfinished)

    def _purge(self, catalogue: Catalogue) -> bool:
        """Purge in each database that takes messages. Whether there is more."""
        deadline = time.monotonic() + _WORKING_SECONDS
        lease = min(catalogue.longest_lease, _LONGEST_LEASE_SECONDS)
        delay = max(self._limits.evidence, 2 * lease) if self._client.is_cluster() else 0.0
        names = [each.name for each in catalogue.generations if each.stage == Stage.OPEN]
        self._purgers = {name: self._purgers.get(name) or Purger(self._client, name) for name in names}
        unfinished = [name for name, purger in self._purgers.items() if purger.step(delay=delay, deadline=deadline)]
        return bool(unfinished)

    def _remedy_now(self, database: str) -> Remedy:
        """What is permitted, asked now and then."""
        if self._remedy is None or time.monotonic() - self._remedy_at > _PERMISSIONS_KEPT_SECONDS:
            self._remedy, self._remedy_at = self._ask_remedy(database), time.monotonic()
        return self._remedy

    def _ask_remedy(self, database: str) -> Remedy:
        if may_purge(self._client, database):
            return Remedy.PURGE
        session = self._client.ask("GET", "/_session", accept=range(400, 500)).body
        who = session.get("userCtx", {}) if isinstance(session, dict) else {}
        return Remedy.ROTATE if "_admin" in who.get("roles", ()) else Remedy.NONE


def _is_forbidden(error: BaseException) -> bool:
    refusal = refusal_in(error)
    return refusal is not None and is_not_permitted(refusal)
