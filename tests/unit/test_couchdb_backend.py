"""What the CouchDB backend promises beyond the conformance kit: one feed, no polling, little kept, a cluster's word."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from ekiden.errors import BackendError
from ekiden.message import new_id
from ekiden.results import BeginOutcome, Begun, Joined, Record, Start, StoredResult
from ekiden.states import RETRY
from ekiden.testing.conformance.fixtures import let_it_wait
from ekiden.testing.conformance.pace import assert_quick
from ekiden.urls import parse_url
from ekiden_couchdb import CouchDBBackend, joins, quorum
from ekiden_couchdb.client import BulkOutcome, Client
from ekiden_couchdb.store_documents import LARGE_BYTES, escaped, task_document

from tests.servers.couchdb import CouchDBClient
from tests.servers.couchdb_cluster import NOT_HEARD_OF, CouchDBCluster, playing
from tests.servers.couchdb_http import ADMIN
from tests.working import PATIENCE, eventually

pytestmark = pytest.mark.slow  # each asks a server that takes its time

DAY = 86400.0


@pytest.fixture
def client(couchdb_url: str) -> Iterator[CouchDBClient]:
    """For looking at the server."""
    with CouchDBClient(couchdb_url) as client:
        yield client


@pytest.fixture
def prefix(couchdb_place: str) -> str:
    return parse_url(couchdb_place).path


@pytest.fixture
def url(couchdb_place: str) -> str:
    return f"{couchdb_place}{'&' if '?' in couchdb_place else '?'}timeout=5"


@pytest.fixture
def store(url: str) -> Iterator[CouchDBBackend]:
    with CouchDBBackend(parse_url(url)) as store:
        yield store


@pytest.fixture
def waiter(url: str) -> Iterator[CouchDBBackend]:
    """The same store in another process, as it were."""
    with CouchDBBackend(parse_url(url)) as store:
        yield store


@pytest.fixture
def cluster() -> Iterator[CouchDBCluster]:
    with playing() as cluster:
        yield cluster


@pytest.fixture
def clustered(cluster: CouchDBCluster) -> Iterator[CouchDBBackend]:
    with CouchDBBackend(parse_url(cluster.url("p", options="?timeout=2"))) as store:
        yield store


@pytest.fixture
def other(cluster: CouchDBCluster) -> Iterator[CouchDBBackend]:
    """Another process's."""
    with CouchDBBackend(parse_url(cluster.url("p", options="?timeout=2"))) as store:
        yield store


def success(task_id: str | None = None, *, body: bytes = b"1", expires: float | None = DAY) -> StoredResult:
    return StoredResult(task_id or new_id(), "SUCCESS", 0, body, expires)


def in_thread(call: Callable[[], list[StoredResult]]) -> tuple[threading.Thread, list[StoredResult]]:
    """Call it in a thread; the list is filled with what it returns."""
    found: list[StoredResult] = []
    thread = threading.Thread(target=lambda: found.extend(call()))
    thread.start()
    return thread, found


def in_thread_for(waiter: CouchDBBackend, result: StoredResult) -> tuple[threading.Thread, list[StoredResult]]:
    """Wait for it in a thread."""
    return in_thread(lambda: waiter.wait([result.task_id], PATIENCE))


def documents(client: CouchDBClient, database: str) -> int:
    status, said = client.request("GET", f"/{database}")
    assert status == 200, said
    count: int = said["doc_count"]
    return count


# What is kept, and under which ids.


@pytest.mark.parametrize("name", ["a/b", "_design/x", "a=2fb", "größe", "~", "", "a b\n", "A", "a"])
def test_a_name_in_an_id_is_told_from_all_others_and_needs_no_quoting(name: str) -> None:
    others = ["a", "A", "a/b", "a=2fb", "a=3d2fb", "~", "=7e", "", "größe", "_design/x", "a b\n"]

    assert [other for other in others if escaped(other) == escaped(name)] == [name]
    assert escaped(name + "-x") == escaped(name) + "-x"
    assert all(character.isascii() and (character.isalnum() or character in "=.-") for character in escaped(name))


@pytest.mark.parametrize("size", [LARGE_BYTES - 1, LARGE_BYTES, LARGE_BYTES + 1, 7 * 1024 * 1024])
def test_a_body_that_is_too_large_for_a_document_is_kept_beside_it(store: CouchDBBackend, size: int) -> None:
    task_id, key = new_id(), new_id()
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)

    store.put([StoredResult(task_id, RETRY, 0, body, DAY)])
    assert store.begin([Start(task_id, 1, "message", DAY)]) == [Begun(BeginOutcome.GO)]
    store.write(key, body)

    found = store.get([task_id, task_id])
    assert [one is not None and one.body == body for one in found] == [True, True]
    assert store.read([key]) == [Record(key, body, 1)]
    assert store.scan(key) == [Record(key, body, 1)]


# Waiting.


@pytest.mark.slow
def test_who_waits_asks_once_and_not_again(
    store: CouchDBBackend, waiter: CouchDBBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = success()
    asked: list[str] = []
    ask = waiter._client.ask

    def counted(method: str, path: str, *rest: object, **named: object) -> object:
        asked.append(f"{method} {path}")
        return ask(method, path, *rest, **named)  # type: ignore[arg-type]  # whatever the client takes

    thread, found = in_thread(lambda: waiter.wait([result.task_id], PATIENCE))
    let_it_wait(0.5)
    monkeypatch.setattr(waiter._client, "ask", counted)
    let_it_wait(1.0)
    quiet = len(asked)
    store.put([result])
    thread.join(PATIENCE)

    assert [one.task_id for one in found] == [result.task_id]
    assert quiet == 0
    assert len(asked) == 1


def test_many_who_wait_share_one_feed(store: CouchDBBackend, waiter: CouchDBBackend) -> None:
    results = [success() for _ in range(10)]
    threads = [in_thread_for(waiter, result)[0] for result in results]
    eventually(lambda: len(feeds()) == 1, what="a feed began")

    store.put(results)

    for thread in threads:
        thread.join(PATIENCE)
    assert len(feeds()) == 1


def feeds() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ekiden-couchdb-results"]


def test_when_nobody_has_waited_for_a_while_the_feed_ends(
    waiter: CouchDBBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ekiden_couchdb.waits.LINGER_SECONDS", 0.1)
    assert waiter.wait([new_id()], 0.05) == []

    eventually(lambda: not feeds(), what="the feed ended")

    assert waiter.wait([new_id()], 0.05) == []


def test_a_result_that_was_told_between_two_waits_of_others_is_found(
    store: CouchDBBackend, waiter: CouchDBBackend
) -> None:
    """What somebody has been told of and not looked at yet is new to the next one who comes."""
    results = [success() for _ in range(50)]
    for result in results:
        assert waiter.wait([result.task_id], 0.005) == []
        threads = [in_thread_for(waiter, result) for _ in range(2)]
        store.put([result])
        threads.append(in_thread_for(waiter, result))
        began = time.monotonic()
        for thread, found in threads:
            thread.join(PATIENCE)
            assert [one.task_id for one in found] == [result.task_id]
        assert_quick(time.monotonic() - began, 2.0)


# Expiry.


def test_what_has_expired_is_deleted(store: CouchDBBackend, client: CouchDBClient, prefix: str) -> None:
    store.put([success(expires=0.01) for _ in range(20)])
    kept = success()
    store.put([kept, success(expires=None)])
    store.begin([Start(new_id(), 0, "message", 0.01)])
    store.write("brief", b"1", expires=0.01)
    store.write("lasting", b"1")
    store.join("join", "a", b"1", size=3, expires=0.01)
    store.join("join", "b", b"1", size=3, expires=0.01)
    let_it_wait()

    store._tidying.step()

    assert store.get([kept.task_id])[0] is not None
    assert documents(client, f"{prefix}-results") == 2 + 1  # and the index
    assert documents(client, f"{prefix}-records") == 1 + 1
    assert store.join("join", "c", b"1", size=3, expires=DAY) == Joined(1, complete=False)


def test_a_note_keeps_an_expired_result_from_being_deleted_and_the_other_way_round(
    store: CouchDBBackend, client: CouchDBClient, prefix: str
) -> None:
    noted, stored = new_id(), new_id()
    store.begin([Start(noted, 1, "a", DAY), Start(stored, 0, "a", 0.01)])
    store.put([StoredResult(noted, RETRY, 0, b"", 0.01), success(stored)])
    let_it_wait()

    store._tidying.step()

    assert store.begin([Start(noted, 1, "b", DAY)]) == [Begun(BeginOutcome.SECOND_COPY)]
    assert [one and one.state for one in store.get([noted, stored])] == ["STARTED", "SUCCESS"]
    assert documents(client, f"{prefix}-results") == 2 + 1


def test_one_process_at_a_time_tidies(
    store: CouchDBBackend, waiter: CouchDBBackend, client: CouchDBClient, prefix: str
) -> None:
    store.put([success()])
    store._tidying.step()
    store.put([success(expires=0.01)])
    let_it_wait()

    waiter._tidying.step()
    before = documents(client, f"{prefix}-results")
    store._tidying.step()

    assert before == 2 + 1
    assert documents(client, f"{prefix}-results") == 1 + 1


def test_tidying_begins_by_itself_and_ends_with_close(
    store: CouchDBBackend, client: CouchDBClient, prefix: str
) -> None:
    store.put([success(expires=0.01)])
    let_it_wait()
    store._tidying._next_at = 0.0

    store.put([success()])

    eventually(lambda: documents(client, f"{prefix}-results") == 1 + 1, what="it was deleted")


# A cluster.


def test_what_too_few_copies_have_taken_is_written_until_a_quorum_has_it(
    clustered: CouchDBBackend, other: CouchDBBackend, cluster: CouchDBCluster
) -> None:
    clustered.put([success()])
    result = success(body=b"kept")
    cluster.divert("results", {0})

    assert clustered.put([result]) == [True]

    cluster.read_from = 2
    cluster.down = {0}
    assert [one and one.body for one in other.get([result.task_id])] == [b"kept"]


@pytest.mark.slow
def test_while_too_many_nodes_are_away_nothing_is_called_stored(
    clustered: CouchDBBackend, cluster: CouchDBCluster
) -> None:
    result = success()
    clustered.put([success()])
    cluster.down = {1, 2}

    with pytest.raises(BackendError, match="quorum"):
        clustered.put([result])

    cluster.down = set()
    clustered.put([result])
    assert clustered.get([result.task_id])[0] is not None


def test_of_two_who_write_a_record_at_one_version_who_was_only_accepted_has_lost(
    clustered: CouchDBBackend, other: CouchDBBackend, cluster: CouchDBCluster
) -> None:
    clustered.write("lock", b"nobody")
    document = clustered._records.read(["r:lock"])["r:lock"]
    cluster.divert("records", {0, 1})
    assert other.write("lock", b"other", expected_version=1) == 2
    cluster.divert("records", {2})
    # What it has read is older than what the other has written, and the third copy has not heard of that yet.
    reads = iter([{"r:lock": document}])
    read = clustered._records._read_some
    clustered._records._read_some = lambda ids, deadline: next(reads, None) or read(ids, deadline)  # type: ignore[method-assign]

    assert clustered.write("lock", b"me", expected_version=1) is None

    cluster.replicate()
    assert [record and record.value for record in clustered.read(["lock"])] == [b"other"]
    assert [record and record.value for record in other.read(["lock"])] == [b"other"]
    assert [leaf.deleted for leaf in cluster.leaves("records")["r:lock"]].count(False) == 1


@pytest.fixture
def rivals(clustered: CouchDBBackend, cluster: CouchDBCluster) -> list[str]:
    """Two others have written over what was there, each reaching one copy."""
    assert clustered.join("join", "a", b"1", size=3, expires=DAY).arrived == 1
    head = clustered._joins._heads["j:join"]
    revisions: list[str] = []
    for copy in (1, 2):
        cluster.divert("records", {copy})
        (accepted,) = clustered._client.bulk("p-records", [{**head, "members": ["a", f"rival {copy}"]}])
        assert accepted.outcome is BulkOutcome.ACCEPTED
        revisions.append(accepted.rev)
    return revisions


def test_when_nobody_has_won_and_all_take_theirs_back_what_was_there_is_there_again(
    clustered: CouchDBBackend, cluster: CouchDBCluster, rivals: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    take_back = quorum.take_back

    def take_all_back(client: Client, database: str, document_id: str, revision: str, deadline: float) -> None:
        for each in (revision, *rivals):
            take_back(client, database, document_id, each, deadline)

    monkeypatch.setattr(quorum, "take_back", take_all_back)
    cluster.divert("records", {0})

    joined = clustered.join("join", "b", b"2", size=3, expires=DAY)

    cluster.replicate()
    assert joined.arrived == 2
    assert clustered._records.read(["j:join"])["j:join"]["members"] == ["a", "b"]


def test_who_has_died_before_he_took_his_back_stands_in_nobodys_way(
    clustered: CouchDBBackend, cluster: CouchDBCluster, rivals: list[str]
) -> None:
    cluster.divert("records", {0})

    joined = clustered.join("join", "b", b"2", size=5, expires=DAY)

    cluster.replicate()
    members = clustered._records.read(["j:join"])["j:join"]["members"]
    assert len(rivals) == 2
    assert joined.arrived == len(members)
    assert {"a", "b"} <= set(members)


def test_who_is_left_of_three_is_kept(clustered: CouchDBBackend, cluster: CouchDBCluster, rivals: list[str]) -> None:
    for revision in rivals:
        quorum.take_back(clustered._client, "p-records", "j:join", revision, time.monotonic() + 2)
    cluster.divert("records", {0})

    joined = clustered.join("join", "b", b"2", size=3, expires=DAY)

    cluster.replicate()
    assert joined.arrived == 2
    assert clustered._records.read(["j:join"])["j:join"]["members"] == ["a", "b"]


@pytest.mark.parametrize("number", range(8))
def test_a_join_counts_the_branches_that_two_nodes_have_made_of_it(
    clustered: CouchDBBackend, other: CouchDBBackend, cluster: CouchDBCluster, number: int
) -> None:
    """One arrival was taken by two copies and another by the third, and that one shows: somebody goes on from it."""
    join_id = f"join-{number}"  # its revisions decide which branch shows
    assert clustered.join(join_id, "a", b"1", size=4, expires=DAY).arrived == 1
    head = clustered._joins._heads[f"j:{join_id}"]
    cluster.divert("records", {0, 1})
    assert clustered.join(join_id, "b", b"2", size=4, expires=DAY).arrived == 2
    cluster.divert("records", {2})
    mark = {"_id": f"m:{join_id}:c", "born": head["born"], "member": "c", "body": "Mw=="}
    answers = clustered._client.bulk("p-records", [{**head, "members": ["a", "c"]}, mark])
    assert [answer.outcome for answer in answers] == [BulkOutcome.ACCEPTED] * 2
    cluster.replicate("records")  # before that process has found out that it lost

    last = other.join(join_id, "d", b"4", size=4, expires=DAY)

    assert (last.arrived, last.complete) == (4, True)
    assert last.outcomes == {"a": b"1", "b": b"2", "c": b"3", "d": b"4"}
    cluster.replicate("records")
    assert [leaf.deleted for leaf in cluster.leaves("records")[f"j:{join_id}"]].count(False) == 1
    assert clustered.join(join_id, "a", b"1", size=4, expires=DAY) == last


def test_two_nodes_that_begin_a_join_begin_one(
    clustered: CouchDBBackend, other: CouchDBBackend, cluster: CouchDBCluster
) -> None:
    clustered.write("there", b"1")
    cluster.divert("records", {0, 1})
    assert clustered.join("join", "a", b"1", size=3, expires=DAY).arrived == 1
    cluster.divert("records", {2})
    begun = [
        {"_id": "j:join", "born": "another", "members": ["b"]},
        {"_id": "m:join:b", "born": "another", "member": "b", "body": "Mg=="},
    ]
    assert [answer.outcome for answer in clustered._client.bulk("p-records", begun)] == [BulkOutcome.ACCEPTED] * 2
    cluster.replicate("records")

    last = other.join("join", "c", b"3", size=3, expires=DAY)

    assert last.outcomes == {"a": b"1", "b": b"2", "c": b"3"}


def test_a_member_that_died_before_it_brought_anything_arrives_again(
    clustered: CouchDBBackend, cluster: CouchDBCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joins, "PATIENCE_SECONDS", 0.2)
    clustered.join("join", "a", b"1", size=3, expires=DAY)
    head = clustered._joins._heads["j:join"]
    clustered._client.bulk("p-records", [{**head, "members": ["a", "died"]}])

    assert clustered.join("join", "b", b"2", size=3, expires=DAY) == Joined(2, complete=False)
    last = clustered.join("join", "died", b"3", size=3, expires=DAY)

    assert last.outcomes == {"a": b"1", "b": b"2", "died": b"3"}


OPERATIONS: dict[str, Callable[[CouchDBBackend], object]] = {
    "put": lambda store: store.put([success("t")]) == [True],
    "begin": lambda store: store.begin([Start("t", 0, "message", DAY)]) == [Begun(BeginOutcome.GO)],
    "write": lambda store: store.write("k", b"1") == 1,
    "write if missing": lambda store: store.write("k", b"1", expected_version=0) == 1,
    "join": lambda store: store.join("j", "a", b"1", size=2, expires=DAY) == Joined(1, complete=False),
}


@pytest.mark.parametrize("carried_out", [False, True], ids=["not carried out", "carried out"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_a_node_has_not_heard_of_yet_is_tried_again(
    clustered: CouchDBBackend, cluster: CouchDBCluster, name: str, carried_out: bool
) -> None:
    """CouchDB answers the first writes to a database that it has just made with 500 now and then."""
    cluster.fail("POST", "p-re.*/_bulk_docs", 500, body=NOT_HEARD_OF, times=3, carried_out=carried_out)

    assert OPERATIONS[name](clustered)


# What the doctor says.


def test_the_doctor_tells_what_grows_for_ever(cluster: CouchDBCluster) -> None:
    cluster.users.update({"worker": ("secret", ()), "admin": ("secret", (ADMIN,))})
    with CouchDBBackend(parse_url(cluster.url("p", user="admin", options="?n=3"))) as root:
        root.put([success()])
        root.write("a", b"1")
        for database in ("p-results", "p-records"):
            root._client.ask("PUT", f"/{database}/_security", {"members": {"names": ["worker"]}})
    cluster.purges_permitted = False

    with CouchDBBackend(parse_url(cluster.url("p", user="worker", options="?n=3"))) as store:
        told = store.warnings()

    for database in ("p-results", "p-records"):
        assert len([sentence for sentence in told if database in sentence and "never deleted" in sentence]) == 1
        assert len([sentence for sentence in told if database in sentence and "tombstone" in sentence]) == 1
    assert all(sentence.endswith(".") and "CouchDB at" in sentence for sentence in told)
    cluster.purges_permitted = True
    with CouchDBBackend(parse_url(cluster.url("p", user="admin", options="?n=3"))) as root:
        assert root.warnings() == []  # and the index is there from now on


def test_the_doctor_tells_what_only_speaks_like_couchdb(
    store: CouchDBBackend, client: CouchDBClient, cluster: CouchDBCluster, clustered: CouchDBBackend
) -> None:
    _, said = client.request("GET", "/")

    told = [sentence for sentence in store.warnings() if "not CouchDB" in sentence]

    assert (told == []) is ("couchdb" in said)
    cluster.fail("GET", "^/$", 200, body={"express-pouchdb": "Welcome!", "version": "4.2.0"}, times=100)
    assert [sentence for sentence in clustered.warnings() if "it is express-pouchdb, not CouchDB" in sentence]


def test_a_healthy_cluster_needs_nothing_but_a_missing_node_is_told(
    cluster: CouchDBCluster,
) -> None:
    cluster.users["admin"] = ("secret", (ADMIN,))
    with CouchDBBackend(parse_url(cluster.url("p", user="admin", options="?n=3"))) as store:
        assert store.warnings() == []

        cluster.down = {2}

        (told,) = store.warnings()
        assert "1 of 3 nodes" in told


def test_who_may_not_make_databases_is_told_which_are_missing(cluster: CouchDBCluster) -> None:
    cluster.users.update({"worker": ("secret", ()), "admin": ("secret", (ADMIN,))})

    with (
        CouchDBBackend(parse_url(cluster.url("p", user="worker"))) as store,
        pytest.raises(BackendError, match=r"no database 'p-results'.*administrator.*_security") as refused,
    ):
        store.put([success()])

    assert "secret" not in str(refused.value)


def test_what_is_stored_of_a_task_has_an_id_that_needs_no_quoting() -> None:
    assert task_document("a/b c") == "t:a=2fb=20c"
