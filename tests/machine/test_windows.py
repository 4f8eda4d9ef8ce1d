"""Windows' forms, on any system: kernel32 is played by its documentation. Nothing here has been run on Windows."""

import ctypes
import mmap
import os
import re
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i2l.engines.cpu import readahead
from i2l.engines.errors import EnginesMissing
from i2l.export import build_folder
from i2l.machine import files, wording
from i2l.machine.errors import OutputInUse, OutputUnwritable
from i2l.machine.filenames import windows_problem
from i2l.machine.platforms import mapping, windows
from i2l.machine.wording import command_path

posix = pytest.mark.skipif(os.name == "nt", reason="of POSIX paths and shells")


class Kernel32:
    """What the functions are documented to do with what they are given; it writes down the addresses."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.unlocked: list[tuple[int, int]] = []
        self.prefetched: list[tuple[int, int]] = []

    def GetCurrentProcess(self) -> int:  # noqa: N802
        return -1

    def GlobalMemoryStatusEx(self, pointer: Any) -> int:  # noqa: N802
        status = pointer._obj
        assert status.dwLength == ctypes.sizeof(status) == 64  # what Windows compares it with
        status.ullTotalPhys, status.ullAvailPhys = 32 << 30, 20 << 30
        return int(not self.fails)

    def K32GetProcessMemoryInfo(self, process: int, pointer: Any, size: int) -> int:  # noqa: N802
        counters = pointer._obj
        assert (process, size) == (-1, 72)
        counters.PeakWorkingSetSize, counters.WorkingSetSize = 5 << 30, 1 << 30
        return int(not self.fails)

    def VirtualUnlock(self, address: int, nbytes: int) -> int:  # noqa: N802
        self.unlocked.append((address, nbytes))
        return 0  # as for all pages that were never locked

    def PrefetchVirtualMemory(self, process: int, count: int, pointer: Any, flags: int) -> int:  # noqa: N802
        assert (process, count, flags) == (-1, 1, 0)
        self.prefetched.append((pointer._obj.VirtualAddress, pointer._obj.NumberOfBytes))
        return int(not self.fails)


@pytest.fixture
def kernel32(monkeypatch: pytest.MonkeyPatch) -> Kernel32:
    played = Kernel32()
    monkeypatch.setattr(windows, "kernel32", lambda: played)
    monkeypatch.setattr(windows, "last_error", lambda: windows.ERROR_NOT_LOCKED)
    return played


def test_memory_is_asked_of_kernel32(kernel32: Kernel32) -> None:
    assert windows.memory_bytes() == (32 << 30, 20 << 30)
    assert windows.peak_working_set_bytes() == 5 << 30
    kernel32.fails = True
    assert windows.memory_bytes() is None
    assert windows.peak_working_set_bytes() == 0


def test_giving_back_succeeds_where_unlocking_says_not_locked(
    kernel32: Kernel32, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert windows.drop_from_working_set(4096, 100)
    assert kernel32.unlocked == [(4096, 100)]
    monkeypatch.setattr(windows, "last_error", lambda: 487)  # invalid address
    assert not windows.drop_from_working_set(4096, 100)


def test_regions_of_a_map_are_addresses(kernel32: Kernel32, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The map can be closed afterwards: asking for its address keeps nothing of it."""
    monkeypatch.setattr(mapping, "WINDOWS", True)
    path = tmp_path / "pack"
    path.write_bytes(b"abcdefgh" * 1024)
    mapped = mapping.open_mapped(path)
    mapping.read_ahead(mapped, 8, 16)
    mapping.give_back(mapped, 24, 32)
    ((begin, nbytes),), ((dropped, size),) = kernel32.prefetched, kernel32.unlocked
    assert (nbytes, size, dropped - begin) == (16, 32, 16)
    assert ctypes.string_at(begin, 8) == b"abcdefgh"
    mapped.close()


def test_reading_ahead_is_the_threads(kernel32: Kernel32, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may wait for the disk, and touches nothing."""
    for module in (mapping, readahead):
        monkeypatch.setattr(module, "WINDOWS", True)
        monkeypatch.setattr(module, "POPULATE_READ", None)
    path = tmp_path / "pack"
    path.write_bytes(bytes(1 << 16))
    mapped = mapping.open_mapped(path)
    with ThreadPoolExecutor(1) as thread:
        reader = readahead.ReadAhead(path, mapped, thread)
        for _ in range(2):
            reader.begin(mmap.PAGESIZE, 4096)
        reader.wait(mmap.PAGESIZE)
        reader.close()
    assert [nbytes for _, nbytes in kernel32.prefetched] == [4096]
    assert kernel32.unlocked == []
    mapped.close()


@posix
def test_elsewhere_there_is_no_kernel32() -> None:
    with pytest.raises(OSError, match="no kernel32"):
        windows.kernel32()


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(windows.IN_USE))
def test_replacing_what_a_program_has_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"old")

    def replace(*_: object) -> None:
        error = PermissionError(13, "Permission denied", str(path))
        error.winerror = code  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OutputInUse, match="close that program, such as ComfyUI"), files.atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]
    assert path.read_bytes() == b"old"


class Held:
    """``shutil.rmtree`` on Windows where a pack is mapped: all but it and the folders around it goes."""

    def __init__(self, pack: Path, code: int) -> None:
        self.pack, self.code = pack, code

    def __call__(self, folder: Path, *, ignore_errors: bool = False) -> None:
        for path in folder.rglob("*"):
            if path.is_file() and path != self.pack:
                path.unlink()
        if not ignore_errors:
            error = PermissionError(13, "Permission denied", str(self.pack))
            error.winerror = self.code  # type: ignore[attr-defined]
            raise error


@pytest.mark.parametrize("code", sorted(windows.IN_USE))
def test_an_old_build_that_a_program_has_open_stays_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    pack = tmp_path / "build-0123abcd" / "dinov3" / "weights.safetensors"
    graph = pack.parents[1] / "graphs" / "a.onnx"
    for path in (pack, graph):
        path.parent.mkdir(parents=True)
        path.touch()
    with monkeypatch.context() as held:
        held.setattr(shutil, "rmtree", Held(pack, code))
        build_folder.remove_dead(tmp_path, keep=())
    assert re.search(
        r"build-0123abcd stays until the next build: .*weights\.safetensors is open in .*close", caplog.text
    )
    assert (pack.exists(), graph.exists()) == (True, False)
    caplog.clear()
    build_folder.remove_dead(tmp_path, keep=())
    assert (caplog.text, [*tmp_path.iterdir()]) == ("", [])


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("photo.safetensors", ""),
        ("a b.c.safetensors", ""),
        ("console.safetensors", ""),
        ("com10.safetensors", ""),
        ("vue/style".rpartition("/")[2], ""),
        ("a:b.safetensors", "':'"),
        ("what?.safetensors", "'?'"),
        ("a<b>|*.x", "'*' '<' '>' '|'"),
        ("line\nbreak", r"'\n'"),
        ("name.", "dot or the space"),
        ("name ", "dot or the space"),
        ("nul", "device"),
        ("CON.safetensors", "device"),
        ("com1.plot.png", "device"),
        ("Lpt\u00b2.txt", "device"),
        ("aux .txt", "device"),
    ],
)
def test_names_that_windows_does_not_keep(name: str, problem: str) -> None:
    found = windows_problem(name)
    assert problem in found if problem else not found


@posix
def test_such_a_name_is_refused_on_windows_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.require_writable(tmp_path / "a:b.safetensors")
    monkeypatch.setattr(files, "os", Nt())
    with pytest.raises(OutputUnwritable, match="Windows has no ':' in names"):
        files.require_writable(tmp_path / "a:b.safetensors")


class Nt:
    """The module ``os`` with Windows' name: changing the real one's would change what ``Path`` makes."""

    name = "nt"

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


# --- commands to copy --------------------------------------------------------------------------------------------


@posix
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_sh_reads_the_path_that_was_meant(text: str) -> None:
    path = Path(text)
    assert shlex.split(command_path(path)) == [str(path)]


@posix
@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/a/b.safetensors", "/a/b.safetensors"),
        ("/home/me/My Models", '"/home/me/My Models"'),
        ("~me", '"~me"'),
        ("/a/$b", "'/a/$b'"),
        ("/a/(b)", '"/a/(b)"'),
    ],
)
def test_paths_in_commands(path: str, wanted: str) -> None:
    assert command_path(Path(path)) == wanted


def test_paths_in_commands_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wording, "os", Nt())
    assert command_path(Path(r"C:\Users\me\My $Models")) == r'"C:\Users\me\My $Models"'


@posix
def test_errors_name_whole_paths_in_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``~`` is for reading: pip and cmd.exe do not know it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    text = str(EnginesMissing(tmp_path / "my engines"))
    assert text.startswith("~/my engines has no manifest.json")
    assert text.endswith(f'--engines "{tmp_path}/my engines"')
