"""Files that are there whole or not at all; a folder that one process at a time writes to; JSON that may be damaged.

A process can be killed, and a disk can be full, at any moment. A file is therefore written beside its place, flushed to
disk and renamed into its place. What a killed process leaves beside it, `sweep` removes.
"""
import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator

from core.errors import UserError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A neighbour of `path` to write to, which takes its place once all is on disk. It goes if that fails."""
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk does not say which file it had no room for
        raise


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """The whole file or nothing."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def append(path: str | os.PathLike, content: str) -> None:
    """All of `content` at the end of the file, or nothing of it."""
    rest = content.encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest):]
            os.fsync(file.fileno())
        except BaseException as error:
            file.truncate(size)
            if isinstance(error, OSError):
                error.filename = str(path)
            raise


def sweep(folder: pathlib.Path) -> None:
    """Remove the halves of files that killed processes left in `folder`, which is locked."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """`folder`, for this process alone. The lock is on the folder itself, so it leaves no file, and it goes with the
    process, however that ends. A fork of the process does not hold it."""
    held = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY)]

    def release():
        while held:
            os.close(held.pop())

    os.register_at_fork(after_in_child=release)
    try:
        fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        release()
        raise UserError(f"{folder} is in use: another process writes there") from None
    except OSError as error:  # some network file systems have no locks
        print(f"warning: {folder} cannot be locked ({error.strerror}): start no second process there", flush=True)
    try:
        yield
    finally:
        release()


def text_of(path: str | os.PathLike) -> str:
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: byte {error.start} is no UTF-8") from error


def read(path: str | os.PathLike, **kinds: type) -> dict:
    """The dictionary that a JSON file holds, with an entry of each of these names and types."""
    try:
        value = json.loads(text_of(path), parse_int=whole_number)
        json.dumps(value, ensure_ascii=False).encode()  # half a pair of code points can be neither printed nor written
    except RecursionError:
        raise UserError(f"{path} is damaged: it is nested too deeply") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no dictionary")
    for name, kind in kinds.items():
        if name not in value:
            raise UserError(f"{path} is damaged: it has no {name}")
        if not isinstance(value[name], kind) or isinstance(value[name], bool):
            raise UserError(f"{path} is damaged: {name} is {value[name]!r:.60}")
    return value


def whole_number(digits: str) -> int:
    """Python reads any number of digits, but can turn no more than 4300 into text, nor 400 into a float."""
    if len(digits) > 20:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)
