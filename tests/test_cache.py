"""Private folders, and files that are written whole."""

import stat
from pathlib import Path

import pytest

from lightning_hinm import cache


def test_the_switch_names_another_folder_or_turns_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SOME_SWITCH", raising=False)
    assert cache.folder("things", "SOME_SWITCH") == tmp_path / "lightning-hinm" / "things"
    monkeypatch.setenv("SOME_SWITCH", str(tmp_path / "other"))
    assert cache.folder("things", "SOME_SWITCH") == tmp_path / "other"
    monkeypatch.setenv("SOME_SWITCH", "OFF")
    assert cache.folder("things", "SOME_SWITCH") is None


def test_who_has_no_home_has_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert cache.folder("things", "SOME_SWITCH") is None


def test_only_the_user_may_read_what_is_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    cache.write(path, b"first")
    cache.write(path, b"second")
    assert path.read_bytes() == b"second"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("mode", "private"), [(0o600, True), (0o644, True), (0o620, False), (0o602, False)])
def test_what_others_may_write_is_not_private(mode: int, private: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    assert cache.is_private(path) == private
    tmp_path.chmod(mode | 0o100)
    assert cache.is_private(tmp_path) == private


def test_what_belongs_to_others_is_not_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr("os.getuid", lambda: owner + 1)
    assert cache.is_private(tmp_path) == (owner == 0), "what is root's may be used by all"


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    cache.write(path, b"first")

    def refuse(source: str, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no space left"):
        cache.write(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
