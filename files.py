"""
Files that are either whole or not there: atomic writes, downloads, zip archives; and one line for bad input.

    fetch("https://example.org/a.zip", "a.zip", sha256="...")       # a broken download is resumed
    unzip("a.zip", {"folder/train.tsv": "data/train.tsv"})
    write_atomically("config.json", lambda file: file.write(b"{}"))
"""
import contextlib
import hashlib
import http.client
import json
import os
import sys
import zipfile
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

try:
    import fcntl
except ImportError:                         # Windows
    fcntl = None


class DataError(ValueError):
    """Bad input; the message is one line for the user."""


@contextlib.contextmanager
def one_line_errors(*kinds):
    """Errors of these kinds (default: ValueError, OSError) end the program:
    one line on stderr, exit code 2.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:                 # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except kinds or (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def has_matplotlib():
    """Whether matplotlib, which only --plot needs, is there and can be imported."""
    try:
        import matplotlib                                                   # noqa: F401
    except ImportError:
        return False
    return True

# -----------------------------------------------------------------------------
# Writing: a file gets its name when it is complete and on the disk

def close_on_disk(file):
    file.flush()
    os.fsync(file.fileno())
    file.close()


def write_atomically(path, write):
    """Call write(file) on a temporary binary file, flush it to disk, rename it to `path`."""
    with open(f"{path}.tmp", "wb") as file:
        write(file)
        close_on_disk(file)
    os.replace(file.name, path)


def write_json(path, value):
    write_atomically(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


@contextlib.contextmanager
def locked(folder):
    """Make `folder`, and let one process at a time work in it; the others wait. A killed one leaves no lock.

    Where the system or the file system has no locks (Windows, some network drives), there is none.
    """
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}.lock", "a") as file:
        with contextlib.suppress(OSError, AttributeError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

# -----------------------------------------------------------------------------
# Reading

def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def unzip(archive, members):
    """Write members {name in the zip: path} whole, nothing else. Raises DataError if one cannot be read.

    An archive that holds any path that leads out of its folder is refused.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            for name in zipped.namelist():
                if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
                    raise DataError(f"{archive} is refused: a path in it leads out of its folder: {name!r}")
            for name, path in members.items():
                content = zipped.read(name)
                write_atomically(path, lambda file: file.write(content))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DataError(f"{archive} is damaged or not the official one ({error}): "
                        "remove it and try again") from None


def fetch(url, path, sha256=None, size=None):
    """Download url to path, unless it is there. A broken download leaves path.part; a rerun goes on there.

    Raises DataError, also if fewer bytes arrive than the server said, or not `size` bytes with this `sha256`.
    """
    if os.path.exists(path):
        return
    part, total = f"{path}.part", size
    have = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {"User-Agent": "Mozilla/5.0", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        with urlopen(Request(url, headers=headers), timeout=60) as response:
            have = have if response.status == 206 else 0    # another answer is the whole file
            if response.headers["Content-Length"]:
                total = have + int(response.headers["Content-Length"])
            with open(part, "ab" if have else "wb") as file, tqdm(
                    desc=os.path.basename(path), initial=have, total=total, unit="B", unit_scale=True,
                    disable=None) as bar:
                while chunk := response.read(2**20):
                    file.write(chunk)
                    bar.update(len(chunk))
                close_on_disk(file)
    except HTTPError as error:
        if error.code == 416:                               # there is nothing after the part: start anew
            os.remove(part)
            return fetch(url, path, sha256, size)
        raise DataError(f"{url}: HTTP {error.code} {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(f"{url}: {getattr(error, 'reason', error)}") from None
    got = os.path.getsize(part)
    if total is not None and got < total:
        raise DataError(f"{url}: broke off at {got} of {total} bytes; the same command again goes on there")
    if size not in (None, got) or sha256 not in (None, file_sha256(part)):
        os.remove(part)
        raise DataError(f"{url}: not the expected file, its size or sha256 is another; it was removed")
    os.replace(part, path)
