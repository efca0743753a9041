"""A file is there whole or not at all, and pipes are written into."""

import os
import subprocess
import sys
import threading

import pytest

from recall.whole_files import written_whole


def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("before")

    def half():
        with written_whole(path) as file:
            file.write(b"half of what ca")
            raise RuntimeError("broke off")

    with pytest.raises(RuntimeError, match="broke off"):
        half()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_write_at_once_leave_one_whole_file(tmp_path):
    path = tmp_path / "corpus"
    code = (
        "import pathlib, sys\n"
        "from recall.whole_files import written_whole\n"
        "for _ in range(50):\n"
        "    with written_whole(pathlib.Path(sys.argv[1])) as file:\n"
        "        for _ in range(20):\n"
        "            file.write(sys.argv[2].encode() * 100)\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), letter]) for letter in "abc"
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    found = path.read_bytes()
    assert len(found) == 2000
    assert len(set(found)) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one_and_its_file_is_written(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("before")
    link.symlink_to(target)
    with written_whole(link) as file:
        file.write(b"after")
    assert link.is_symlink()
    assert target.read_text() == "after"


def test_a_pipe_is_written_into(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    with written_whole(pipe) as file:
        file.write(b"told")
    reader.join()
    assert found == [b"told"]
