"""sqlite:// URLs: which file, which options, and what is refused before anything is opened."""

from pathlib import Path

import pytest
from ekiden.errors import ConfigurationError
from ekiden.sqlite import SQLiteBackend, SQLiteTransport
from ekiden.sqlite.location import file_system_in, is_network_file_system, options_in, path_in
from ekiden.urls import parse_url


def test_three_slashes_are_relative_and_four_are_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert path_in(parse_url("sqlite:///tasks.db")) == str(tmp_path / "tasks.db")
    assert path_in(parse_url(f"sqlite:///{tmp_path}/a%20b.db")) == str(tmp_path / "a b.db")


def test_a_link_is_the_file_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "real.db")

    assert path_in(parse_url(f"sqlite:///{tmp_path}/link.db")) == str(tmp_path / "real.db")


@pytest.mark.parametrize("kind", [SQLiteTransport, SQLiteBackend])
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite://", "memory://"),
        ("sqlite:///", "memory://"),
        ("sqlite:///:memory:", "memory://"),
        ("sqlite://tasks.db", "three slashes"),
        ("sqlite://user@/tasks.db", "three slashes"),
        ("sqlite+fast:///tasks.db", "three slashes"),
        ("sqlite:////", "is a directory"),
        ("sqlite:////no/such/directory/tasks.db", "make it first"),
        ("sqlite:///a%00b.db", "zero bytes"),
        ("sqlite:///tasks.db?synchronous=off", "synchronous"),
        ("sqlite:///tasks.db?busy_timeout=soon", "busy_timeout"),
        ("sqlite:///tasks.db?busy_timeout=-1", "busy_timeout"),
        ("sqlite:///tasks.db?busy_timeout=nan", "busy_timeout"),
        ("sqlite:///tasks.db?wake=loudly", "wake"),
        ("sqlite:///tasks.db?sync=full", "'sync'"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(
    kind: type[SQLiteTransport] | type[SQLiteBackend], url: str, said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said) as refusal:
        kind(parse_url(url))

    assert str(refusal.value).startswith(url)
    assert "\n" not in str(refusal.value)


def test_options_are_read() -> None:
    options = options_in(parse_url("sqlite:///x.db?synchronous=full&busy_timeout=0.5&wake=poll&max_message_bytes=10"))

    assert (options.synchronous, options.busy_timeout, options.wake, options.max_message_bytes) == (
        "full",
        0.5,
        "poll",
        10,
    )


def test_nothing_is_made_before_it_is_needed(tmp_path: Path) -> None:
    SQLiteTransport(parse_url(f"sqlite:///{tmp_path}/tasks.db")).close()

    assert list(tmp_path.iterdir()) == []


MOUNTS = (
    r"""
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw
23 22 0:20 / /proc rw - proc proc rw
30 22 0:40 / /net rw,relatime shared:7 master:2 - nfs4 server:/export rw,vers=4.2
31 30 254:2 / /net/local rw - xfs /dev/sdb rw
32 22 254:1 /srv/data /home/bound rw - ext4 /dev/root rw
33 22 0:41 /deep /home/from\040nfs rw - nfs server:/export rw
34 22 0:42 / /a\134b\011c rw - cifs //server/share rw
35 22 0:43 / /mnt rw - ext4 /dev/sdc rw
36 35 0:44 / /mnt rw - fuse.sshfs me@host: rw
37 22 254:3 / /hidden/inside rw - ext4 /dev/sdd rw
38 22 0:45 / /hidden rw - 9p host rw
39 22 0:46 / /caf"""
    "\u00e9"
    r""" rw - CEPH mon:/ rw
a line that says nothing
"""
)


@pytest.mark.parametrize(
    ("directory", "kind"),
    [
        ("/", "ext4"),
        ("/home/me", "ext4"),
        ("/network", "ext4"),
        ("/net", "nfs4"),
        ("/net/a/b", "nfs4"),
        ("/net/local/a", "xfs"),
        ("/net/locality", "nfs4"),
        ("/home/bound/x", "ext4"),
        ("/home/from nfs/x", "nfs"),
        ("/a\\b\tc", "cifs"),
        ("/mnt/x", "fuse.sshfs"),
        ("/hidden/x", "9p"),
        ("/hidden/inside/x", "9p"),
        ("/caf\u00e9/x", "ceph"),
    ],
)
def test_the_file_system_of_a_directory_is_read_from_the_table_of_mounts(directory: str, kind: str) -> None:
    assert file_system_in(MOUNTS, directory) == kind


def test_a_mount_below_one_that_was_mounted_later_is_not_there() -> None:
    mounts = "22 1 0:1 / / rw - ext4 x rw\n37 22 0:2 / /a/b rw - ext4 y rw\n38 22 0:3 / /a rw - nfs z rw\n"

    assert file_system_in(mounts, "/a/b/c") == "nfs"


@pytest.mark.parametrize("mounts", ["", "22 22 0:1 / / rw - ext4", "22 1 0:1 / /other rw - nfs x rw", "1 2 3"])
def test_a_table_of_mounts_that_tells_nothing_ends_nothing(mounts: str) -> None:
    assert file_system_in(mounts, "/a") in {"", "ext4"}


@pytest.mark.parametrize(
    "kind",
    [
        "nfs",
        "nfs3",
        "nfs4",
        "cifs",
        "smb",
        "smb2",
        "smb3",
        "smbfs",
        "9p",
        "afs",
        "auristorfs",
        "ceph",
        "fuse.ceph",
        "fuse.sshfs",
        "fuse.glusterfs",
        "glusterfs",
        "lustre",
        "lustre_lite",
        "beegfs",
        "gpfs",
        "ocfs2",
        "gfs2",
        "virtiofs",
        "vboxsf",
        "vmhgfs",
        "drvfs",
        "davfs",
        "fuse",
        "fuse.s3fs",
        "fuse.rclone",
        "orangefs",
        "coda",
        "ncpfs",
        "juicefs",
        "fuse.juicefs",
        "fuse.mergerfs",
    ],
)
def test_a_network_file_system_is_known_by_its_name(kind: str) -> None:
    assert is_network_file_system(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "ext2",
        "ext3",
        "ext4",
        "xfs",
        "btrfs",
        "zfs",
        "tmpfs",
        "overlay",
        "f2fs",
        "vfat",
        "apfs",
        "fuse.fuse-overlayfs",
        "fuseblk",
        "bcachefs",
    ],
)
def test_a_local_file_system_is_not_taken_for_another(kind: str) -> None:
    assert not is_network_file_system(kind)
