"""Atomic writing: a folder or a file appears under its name complete, or not at all.

A folder is written as a hidden one beside the final one (`.NAME.partial-XXXXXXXX/content`), which is then
renamed. An old folder of that name is exchanged for the new one in a single system call where Linux offers
it. A killed run leaves at most its hidden folder, which the next run removes; a lock keeps runs from removing
each other's. A file is written beside the final one, too, and then renamed; what a killed run leaves of it is
removed by the next that comes a day later.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import FailureError, InputError, one_line


try:
    import fcntl
except ImportError:  # Windows has no such locks; leftovers stay there
    fcntl = None

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # linux/fs.h
# A killed run's file is removed after so long; a living one does not rest so long between two writes.
STALE_SECONDS = 24 * 3600
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def check_name(path: Path) -> None:
    """Check that a path is text, which safetensors and JSON need.

    Raises:
        InputError: its name, or that of a folder above it, is no UTF-8.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"the path {path} is not UTF-8, and no other can be read; rename it, or choose another"
        ) from None


def check_output(final: Path, overwrite: bool, is_replaceable: Callable[[Path], bool]) -> Path:
    """Resolve the path of the final folder, if it may be written.

    Args:
        is_replaceable: whether what is there may be replaced; it may say why not with `InputError`.

    Raises:
        InputError: something is there that may not be replaced; nothing was touched.
    """
    check_name(final)
    if final.is_symlink() and not final.exists():
        raise InputError(f"{final} is a link to nothing; remove it or choose another folder")
    final = final.resolve()
    there = next(path for path in final.parents if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):  # here, before hours of work
        raise InputError(f"{final} cannot be written: {there} is no folder that this user may write to")
    if not final.exists():
        return final
    if not final.is_dir():
        raise InputError(f"{final} is a file; choose another output folder")
    if not any(final.iterdir()):
        return final
    if not is_replaceable(final):
        raise InputError(f"{final} is not empty and is not an exported repo; choose another output folder")
    if not overwrite:
        raise InputError(
            f"{final} is not empty; choose another output folder, or replace the repo there with --overwrite"
        )
    return final


def check_room(
    place: Path, num_bytes: int, remedy: str = "choose another folder", what: str | None = None
) -> None:
    """Check that the file system of a folder that may not be there yet has room for what will be written.

    Args:
        remedy: what to do besides making room; `what`: that which takes it, with its verb.

    Raises:
        FailureError: it has not; nothing was touched.
    """
    folder = next(path for path in (place.absolute(), *place.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise FailureError(
            f"{what or f'{place} takes'} {num_bytes / 1e6:,.1f} MB, and the disk has room for {free / 1e6:,.1f} MB; make room in {folder}, "
            f"or {remedy}"
        )


@contextlib.contextmanager
def staged_folder(final: Path, overwrite: bool, is_replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty folder to write to; it becomes `final` when the block ends without an exception.

    Args:
        final: the folder to make. It may be missing or empty, or with `overwrite` hold what `is_replaceable`
            accepts.

    Raises:
        InputError: `final` may not be written, or the block could not read a file.
        FailureError: the disk is full, or the file system refuses. The old folder is then as it was.
    """
    final = check_output(final, overwrite, is_replaceable)
    try:
        made = _make_parents(final.parent)
        remove_leftovers(final)
        work, lock = _make_work_folder(final)
    except OSError as error:
        raise FailureError(f"cannot write beside {final}: {error.strerror or error}") from error
    try:
        content = work / "content"
        content.mkdir()
        try:
            yield content
        except OSError as error:
            if _is_of_writing(error, work):
                raise
            raise _not_of_writing(error, final) from error
        _sync(content)
        # the wait may have been long: what may be replaced is looked at again
        check_output(final, overwrite, is_replaceable)
        _publish(content, final, aside=work / "replaced")
        made = []
    except OSError as error:
        raise FailureError(
            f"cannot write {final}: {_reason(error)}; nothing was left there that was not there before"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()


@contextlib.contextmanager
def staged_file(final: Path, work: Path | None = None, *, keep: bool = True) -> Iterator[Path]:
    """Yield a path to write a file to, which replaces `final` when the block ends without an exception.

    Args:
        work: that path, on the same file system; one of this process's own beside `final`, if left out.
        keep: False removes what was written instead.
    """
    if work is None:
        work = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        _remove_stale_files(final)
    try:
        yield work
        if keep:
            _sync_path(work)
            os.replace(work, final)
    finally:
        work.unlink(missing_ok=True)


def write_atomically(final: Path, text: str) -> None:
    """Write a text file, so that no reader ever sees half of it."""
    with staged_file(final) as work:
        work.write_text(text, encoding="utf-8")


def _is_of_writing(error: OSError, work: Path) -> bool:
    """Whether what failed was to write below `work`, and not to read something else or to reach a server.

    The system names the file when it cannot be opened, moved or removed, and none when writing to it fails.
    """
    if error.errno is None or isinstance(error, ConnectionError | TimeoutError):
        return False  # a library's own
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return error.errno in NO_ROOM or not names or any(work in Path(name).parents for name in names)


def _not_of_writing(error: OSError, final: Path) -> InputError | FailureError:
    if error.errno is not None and isinstance(error.filename, str | bytes):
        return InputError(
            f"{os.fsdecode(error.filename)} cannot be read: {error.strerror}; {final} was not written"
        )
    return FailureError(f"{one_line(error, 500)}; {final} was not written")


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "no space left on the disk"
    return error.strerror or str(error)


def _make_parents(folder: Path) -> list[Path]:
    """Create the folders above the final one, and return those that were missing, the outermost first."""
    missing = [path for path in [folder, *folder.parents] if not path.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _make_work_folder(final: Path) -> tuple[Path, int | None]:
    """Make a hidden folder and the handle that locks it (None where the system has no such locks)."""
    while True:
        work = final.parent / f".{final.name}.partial-{secrets.token_hex(4)}"
        work.mkdir()
        if fcntl is None:
            return work, None
        # another run may take the folder for a leftover before it is locked; then try again
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            handle = _lock(work, required=False)
            if work.exists():
                return work, handle
            os.close(handle)


def _lock(folder: Path, required: bool) -> int:
    """Open a handle on a folder, locked; with `required=False` unlocked on file systems without locks.

    Raises:
        BlockingIOError: another run holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if required or isinstance(error, BlockingIOError):
            os.close(handle)
            raise
    return handle


def remove_leftovers(final: Path) -> None:
    """Remove hidden folders that killed runs left for this output, unless a run still holds them.

    A run killed in the middle of the slow way of replacing (see `_publish`) has moved the old folder aside:
    if nothing is under the final name, it goes back there.
    """
    for work in sorted(final.parent.glob(f".{_escape(final.name)}.partial-" + "[0-9a-f]" * 8)):
        if fcntl is None or work.is_symlink() or not work.is_dir():
            continue
        try:
            lock = _lock(work, required=True)
        except OSError:
            continue
        try:
            if (work / "replaced").is_dir() and not final.exists():
                os.rename(work / "replaced", final)
            shutil.rmtree(work, ignore_errors=True)
        finally:
            os.close(lock)


def _remove_stale_files(final: Path) -> None:
    for work in final.parent.glob(f".{_escape(final.name)}.[0-9]*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - work.lstat().st_mtime > STALE_SECONDS:
                work.unlink()


def _escape(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _sync(folder: Path) -> None:
    """Have everything in the folder on the disk, and not only in memory, when this returns."""
    for directory, _, files in os.walk(folder, topdown=False):
        paths = [os.path.join(directory, name) for name in files]
        for path in [*(path for path in paths if not os.path.islink(path)), directory]:
            _sync_path(path)


def _sync_path(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(content: Path, final: Path, aside: Path) -> None:
    """Give the finished folder its final name."""
    if not final.exists() or not any(final.iterdir()):
        os.rename(content, final)  # replaces an empty folder, too
    elif not exchange(content, final):
        os.rename(final, aside)
        try:
            os.rename(content, final)
        except OSError:
            os.rename(aside, final)
            raise
    _sync_path(final.parent)


def exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False, with nothing changed, where the file system has no such call.

    The call is Linux's renameat2 with RENAME_EXCHANGE (https://man7.org/linux/man-pages/man2/rename.2.html).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))
