"""What is said of a disk that takes no more, and what is written."""

import errno
import os
import shutil
import stat
from collections import namedtuple

import pytest

from phinetune.errors import RunError
from phinetune.machine import disk
from phinetune.machine.disk import check_room, naming_full_disk, replacing, write_text

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes the disk has."""

    def be(count):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - count, count))

    be(1000)
    return be


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("kind", ["system", "library"])
def test_a_full_disk_and_a_full_quota_are_named(tmp_path, free, number, kind):
    error = OSError(number, "no") if kind == "system" else ValueError(f"I/O error: No (os error {number})")
    what = "no space: 1,500 bytes are to be written and 1,000 are free, 500 too few; "
    with pytest.raises(RunError, match=what), naming_full_disk(tmp_path / "file", 1500):
        raise error


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_file_system_that_flushes_no_folders_is_said(tmp_path, monkeypatch, caplog, number):
    plain = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, "no")
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    disk._say_unflushed.cache_clear()
    if number == errno.EIO:
        with pytest.raises(OSError, match="no"):
            disk.flush(tmp_path)
        return
    for text in ("one", "two"):
        write_text(tmp_path / "file", text)
        assert (tmp_path / "file").read_text() == text
    assert caplog.text.count("can't flush folders") == 1


def test_other_faults_are_their_own(tmp_path, free):
    with pytest.raises(ValueError, match="os error 1224"), naming_full_disk(tmp_path / "file", 1500):
        raise ValueError("I/O error: no (os error 1224)")


def test_where_there_is_room_something_else_is_used_up(tmp_path, free):
    what = "no space: 900 bytes are to be written and 1,000 are free: a quota is used up, or the number of files"
    with pytest.raises(RunError, match=what) as error, replacing(tmp_path / "file", 900):
        raise OSError(errno.EDQUOT, "no")
    assert "too few" not in str(error.value)
    check_room(tmp_path, 1000)


def test_where_nobody_knew_how_much_is_written_no_number_is_made_up(tmp_path, free):
    free(0)
    with pytest.raises(RunError, match="no space: 0 bytes are free; "), naming_full_disk(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "no")


def test_half_a_surrogate_pair_is_spelt_out(tmp_path):
    write_text(tmp_path / "file", "half \ud83d of ñ")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "half \\ud83d of ñ"
