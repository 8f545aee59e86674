"""Records: small values that are compared and set, and found by how their keys begin."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from ekiden.message import new_id
from ekiden.results import Backend, Record
from ekiden.testing.conformance.fixtures import DAY, BackendFixtures, eventually

ODD_KEYS = [
    *["a b", "a/b", "a%b", "a_b", "a*b", "a?b", "a[b]", "a'b\"c", "größe-世界", "a:b:c", "A", "a\\b", "k" * 300],
    *["a}b", "{a}b", "a\nb"],
]


class Records(BackendFixtures):
    """What is written is read, and of many who write at once one wins."""

    def test_a_record_is_read_as_it_was_written(self, backend: Backend, other: Backend) -> None:
        key = new_id()

        version = backend.write(key, bytes(range(256)))

        assert version == 1
        assert other.read([key, new_id()]) == [Record(key, bytes(range(256)), 1), None]

    def test_the_version_rises_with_every_write(self, backend: Backend) -> None:
        key = new_id()

        versions = [backend.write(key, b"%d" % number) for number in range(3)]

        assert versions == [1, 2, 3]
        assert backend.read([key]) == [Record(key, b"2", 3)]

    def test_a_record_is_written_only_at_the_expected_version(self, backend: Backend, other: Backend) -> None:
        key = new_id()

        assert backend.write(key, b"x", expected_version=1) is None
        assert backend.read([key]) == [None]
        assert backend.write(key, b"first", expected_version=0) == 1
        assert other.write(key, b"second", expected_version=0) is None
        assert other.write(key, b"second", expected_version=1) == 2
        assert backend.write(key, b"third", expected_version=1) is None
        assert backend.read([key]) == [Record(key, b"second", 2)]

    def test_a_record_is_deleted(self, backend: Backend) -> None:
        key = new_id()
        backend.write(key, b"x")

        assert backend.write(key, None, expected_version=2) is None
        assert backend.write(key, None, expected_version=1) == 0
        assert backend.read([key]) == [None]
        assert backend.write(key, None) == 0
        assert backend.write(key, b"new", expected_version=0) == 1

    def test_a_record_expires(self, backend: Backend) -> None:
        key = new_id()
        backend.write(key, b"brief", expires=0.4)
        assert backend.read([key]) == [Record(key, b"brief", 1)]

        eventually(lambda: backend.read([key]) == [None], what="the record is gone")

        assert backend.scan(key) == []
        assert backend.write(key, b"new", expected_version=0) == 1

    def test_a_later_write_moves_the_expiry(self, backend: Backend) -> None:
        key, brief = new_id(), new_id()
        backend.write(key, b"brief", expires=0.3)
        backend.write(brief, b"brief", expires=0.6)
        backend.write(key, b"lasting", expires=DAY)

        eventually(lambda: backend.read([brief]) == [None], what="the other record is gone")

        assert backend.read([key]) == [Record(key, b"lasting", 2)]

    @pytest.mark.parametrize("key", ODD_KEYS)
    def test_every_key_is_told_apart(self, backend: Backend, key: str) -> None:
        prefix = new_id()
        backend.write(prefix + key, b"mine")
        backend.write(f"{prefix}{key[:-1]}!", b"the neighbour's")

        assert backend.read([prefix + key]) == [Record(prefix + key, b"mine", 1)]

    def test_scan_returns_what_begins_with_a_prefix_sorted(self, backend: Backend, other: Backend) -> None:
        prefix = f"{new_id()}:"
        for key in ["b", "a", "c/1", "c/2", *ODD_KEYS]:
            backend.write(prefix + key, key.encode())
        backend.write(f"{prefix[:-1]};", b"just behind")

        found = other.scan(prefix)

        assert [record.key for record in found] == sorted(prefix + key for key in {"b", "a", "c/1", "c/2", *ODD_KEYS})
        assert [record.value for record in found] == [record.key.removeprefix(prefix).encode() for record in found]
        assert [record.key for record in other.scan(f"{prefix}c/")] == [f"{prefix}c/1", f"{prefix}c/2"]

    @pytest.mark.slow
    def test_scan_finds_thousands(self, backend: Backend) -> None:
        prefix = new_id()
        keys = [f"{prefix}{number:04}" for number in range(2000)]
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda key: backend.write(key, key.encode()), keys))

        assert [(record.key, record.value) for record in backend.scan(prefix)] == [(key, key.encode()) for key in keys]
        assert [record.key for record in backend.read(keys) if record is not None] == keys

    def test_scan_passes_over_what_has_ended_or_was_deleted(self, backend: Backend) -> None:
        prefix = new_id()
        for number in range(60):
            backend.write(f"{prefix}{number:02}", b"", expires=0.3 if number % 3 == 0 else DAY)
        for number in range(1, 60, 3):
            backend.write(f"{prefix}{number:02}", None)

        eventually(lambda: backend.read([f"{prefix}57"]) == [None], what="the brief ones are gone")

        left = [f"{prefix}{number:02}" for number in range(2, 60, 3)]
        assert [record.key for record in backend.scan(prefix)] == left

    @pytest.mark.parametrize("odd", ["%", "_", "*", "?", "[a]", "\\", "'", "世", "\U0010ffff"])
    def test_a_prefix_is_no_pattern(self, backend: Backend, odd: str) -> None:
        prefix = new_id()
        backend.write(f"{prefix}{odd}-yes", b"")
        backend.write(f"{prefix}a-no", b"")

        assert [record.key for record in backend.scan(prefix + odd)] == [f"{prefix}{odd}-yes"]

    def test_of_many_who_write_at_one_version_one_wins(self, backend: Backend, other: Backend) -> None:
        key = new_id()
        backend.write(key, b"0")

        def increment(number: int) -> None:
            asked = backend if number % 2 else other
            for _ in range(10):
                eventually(lambda: self.increment_once(asked, key), what="an increment got through", within=30)

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(increment, range(6)))

        assert backend.read([key]) == [Record(key, b"60", 61)]

    def increment_once(self, backend: Backend, key: str) -> bool:
        """Read, add one, write; False when somebody else was faster."""
        (record,) = backend.read([key])
        assert record is not None
        return backend.write(key, b"%d" % (int(record.value) + 1), expected_version=record.version) is not None
