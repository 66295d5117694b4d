"""
What every script needs besides the paper: files, devices, checkpoints, results. Skip it at first reading.

    write_atomically("config.json", lambda file: file.write(b"{}"))
    fetch("https://example.org/a.zip", "a.zip", sha256="...")       # resumes a broken download
    unzip("a.zip", {"folder/train.tsv": "data/train.tsv"})
    model, config = load_checkpoint("out/vlm")
"""
import argparse
import contextlib
import ctypes
import hashlib
import http.client
import io
import json
import os
import re
import shlex
import sys
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from tqdm import tqdm

from model import Config, Transformer

try:
    import fcntl
except ImportError:                         # Windows
    fcntl = None

# -----------------------------------------------------------------------------
# Command lines

class DataError(ValueError):
    """Bad input; the message is one line for the user."""


class DeviceError(DataError):
    """A device that does not exist."""


@contextlib.contextmanager
def one_line_errors(*kinds):
    """For the main function of a script: a user's mistake is one line on stderr and exit code 2.

    kinds: the errors that are a user's mistake, by default ValueError and OSError. NotImplementedError, the
    body of an exercise, is always one. Any other error is a mistake of ours and keeps its traceback. Ctrl-C
    is one line too, and exit code 130.
    """
    show_any_character()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output, such as `head`, has seen enough. Python flushes stdout once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (NotImplementedError, *(kinds or (ValueError, OSError))) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def show_any_character():
    """Let the screen show "?" instead of failing where it has no such character (pipes on Windows)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def output_may_close():
    """For a print inside of a long run: the run goes on if nobody reads it any more.

    That is so after `| head` or in a closed terminal. What is printed is then dropped.
    """
    try:
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.write("\n")          # stderr has no buffer whose flush would fail
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds "(default: X)" to the help of a flag, unless X is None, empty, or the flag is a switch."""
    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default == "":
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A command line. A wrong flag is one line on stderr and exit code 2."""
    def __init__(self, description, **how):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False, **how)

    def error(self, message):
        # A list of all flags helps where a name is unknown or missing, not where a value is wrong
        about_names = ("unrecognized arguments", "the following arguments are required")
        hint = " (--help lists all flags)" if message.startswith(about_names) else ""
        self.exit(2, f"error: {message}{hint}\n")


def command_line(script, argv):
    """The command that runs now, as it would be typed in. argv: its words, None: those of the process."""
    words = sys.argv[1:] if argv is None else argv
    return shlex.join(["python", script, *words])


def align(rows):
    """Rows of equally many strings as one text: the first column to the left, the others to the right.

        [["", "ar"], ["loss", "3.1"]]  ->  "       ar\\nloss  3.1"
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def check_exists(flag, path):
    """Raises ValueError if the file or folder of a flag does not exist (None: the flag is not given)."""
    if path and not os.path.exists(path):
        raise ValueError(f"{flag} {path} does not exist")


def check_plot(path):
    """Raises ValueError, before any work, if a figure cannot be drawn to `path` (None: none is wanted)."""
    if path is None:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError(f"{path}: figures need matplotlib: pip install matplotlib") from None

    path = Path(path)
    if path.suffix[1:] not in FigureCanvasBase.filetypes:
        raise ValueError(f"{path}: a figure's name ends in .png, .svg or .pdf")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path}: cannot write to the folder {path.parent}")


def save_figure(figure, path):
    """A matplotlib figure as a .png, .svg or .pdf file."""
    write_atomically(path, lambda file: figure.savefig(file, format=Path(path).suffix[1:], dpi=150))

# -----------------------------------------------------------------------------
# Writing: a file gets its final name when it is complete and on the disk

def write_atomically(path, write):
    """Call write(file) on a temporary binary file, flush it to disk, rename it to `path`.

    If anything fails, a full disk for instance, the temporary file is removed and what was at `path` stays.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def write_json(path, value):
    """Write a value as JSON, see `write_atomically`."""
    write_atomically(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


@contextlib.contextmanager
def hold(folder):
    """Make `folder` and hold it: a second process that wants to hold it meanwhile gets a DataError."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be made: {error.strerror}") from None
    busy = f"another process is working in {folder}: wait for it, or name another --out_dir"
    with lock(os.path.join(folder, ".lock"), busy):
        yield


@contextlib.contextmanager
def locked(folder):
    """Make `folder`, and let one process at a time work in it. The others wait."""
    os.makedirs(Path(folder).absolute().parent, exist_ok=True)
    with lock(f"{folder}.lock"):
        os.makedirs(folder, exist_ok=True)
        yield


@contextlib.contextmanager
def download_into(folder, otherwise):
    """As `locked`, for a download to the folder. If it fails, the DataError also says `otherwise`.

    otherwise: what does without the download, for a machine that has no network.
    """
    existed = os.path.exists(folder)
    try:
        with locked(folder):
            yield
    except DataError as error:
        with contextlib.suppress(OSError):                  # not empty: what has arrived stays
            if not existed:
                os.rmdir(folder)
        raise DataError(f"{error} ({otherwise})") from None


@contextlib.contextmanager
def lock(path, busy=None):
    """Hold the lock file at `path`. While another process holds it, wait, or raise DataError(busy).

    The file is removed at the end, and a killed process leaves no lock. Where the system or the file system
    has no locks (Windows, some network drives), nothing is locked.
    """
    while True:
        file = open(path, "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            file.close()
            raise DataError(busy) from None
        except (OSError, AttributeError):                   # no locks here
            pass

        # The process that held it has removed the file that we locked: lock the new one
        if fcntl is None or is_at(file, path):
            break
        file.close()
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.remove(path)


def is_at(file, path):
    """Whether an open file is the one that `path` now names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False

# -----------------------------------------------------------------------------
# Reading

def file_sha256(path):
    """sha256 of a file's contents, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def unzip(archive, members):
    """Unpack members, {name in the zip: path}, and nothing else. Raises DataError if one cannot be read."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            for name, path in members.items():
                content = zipped.read(name)
                write_atomically(path, lambda file: file.write(content))
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as error:
        raise DataError(f"{archive} is damaged or not the official one ({error}): "
                        "remove it and try again") from None


def fetch(url, path, sha256=None):
    """Download url to path, unless it exists. After a broken connection, the same call resumes.

    Of several processes that want the same file, one downloads it and the others wait.
    sha256: what the file must have, if it is known. Raises DataError.
    """
    if os.path.exists(path):
        return
    with lock(f"{path}.lock"):
        if os.path.exists(path):                            # the process that we waited for made it
            return

        # Download to path.part
        download = Download(url, path)
        download.connect()
        with contextlib.closing(download), tqdm(
                desc=os.path.basename(path), initial=download.have, total=download.size, unit="B",
                unit_scale=True, disable=None) as bar:
            while arrived := download.more():
                bar.update(arrived)

        # Check it, then give it its name
        if sha256 is not None and file_sha256(download.part) != sha256:
            download.forget()
            raise DataError(f"{url}: not the expected file, its sha256 does not match. It was removed")
        with open(download.part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(download.part, path)
        download.forget()


class Download:
    """The beginning of a file on the web, in path.part. `more` appends the next bytes to it.

    path.part.json holds what the server said of the file, its ETag and size. So a download is resumed only if
    it is still the same file. Otherwise it starts again, or, with restart=False, raises DataError.

    have: bytes in path.part. size: bytes of the whole file, None while unknown.
    """
    def __init__(self, url, path, restart=True):
        self.url = url
        self.restart = restart
        self.response = None
        self.part = f"{path}.part"
        self.note = f"{path}.part.json"

        # What an earlier download left: without both files there is nothing to resume
        try:
            note = json.loads(Path(self.note).read_text(encoding="utf-8"))
            self.known = {"etag": note["etag"], "size": note["size"]}
            self.size = note["size"]
            self.have = os.path.getsize(self.part)
        except (OSError, ValueError, KeyError, TypeError):
            self.forget()

    def forget(self):
        """Remove what has arrived."""
        self.known = {}
        self.size = None
        self.have = 0
        for path in (self.part, self.note):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)

    def is_complete(self):
        return self.size is not None and self.have == self.size

    def connect(self):
        """Ask the server for the bytes after those that we have."""
        if self.is_complete():
            return
        headers = {"User-Agent": "Mozilla/5.0"}             # WikiText's host refuses Python's own
        if self.have:
            headers["Range"] = f"bytes={self.have}-"
            if self.known["etag"] and not self.known["etag"].startswith("W/"):
                headers["If-Range"] = self.known["etag"]    # another file is then sent whole
        try:
            self.response = urlopen(Request(self.url, headers=headers), timeout=60)
        except HTTPError as error:
            if error.code == 416 and self.have:             # the file is now shorter than our part
                return self.connect_again()
            raise DataError(f"{self.url}: HTTP {error.code} {error.reason}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise DataError(f"{self.url}: {getattr(error, 'reason', error)}") from None

        # Is it the file that our part is the beginning of?
        told = self.told()
        if self.have and (self.response.status != 206 or told != self.known or not any(told.values())):
            return self.connect_again()
        self.known = told
        self.size = told["size"]
        write_json(self.note, told)
        open(self.part, "ab").close()                       # also a file of 0 bytes is a file

    def connect_again(self):
        """From the first byte."""
        self.close()
        self.forget()
        if not self.restart:
            raise DataError(f"{self.url} has changed or cannot be resumed, so its beginning was removed: "
                            "run the same command again")
        self.connect()

    def told(self):
        """{"etag", "size"} of the whole file as the server's answer gives them, None where it does not."""
        headers = self.response.headers
        size = headers["Content-Length"]
        if self.response.status == 206:                     # Content-Range: bytes 100-199/200
            size = (headers["Content-Range"] or "").rpartition("/")[2]
        return {"etag": headers["ETag"], "size": int(size) if size and size.isdigit() else None}

    def more(self):
        """Append up to 1 MiB to path.part. Returns the number of bytes, 0 at the end of the file.

        Raises DataError if the connection breaks.
        """
        # Read
        if self.response is None:
            self.connect()
        if self.is_complete():
            return 0
        try:
            chunk = self.response.read(2**20)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self.stopped(error) from None
        if not chunk and self.size is not None:             # the server hung up
            raise self.stopped()

        # Append
        with open(self.part, "ab") as file:
            file.write(chunk)
        self.have += len(chunk)
        return len(chunk)

    def stopped(self, error=None):
        whole = "" if self.size is None else f" of {self.size}"
        reason = f" ({getattr(error, 'reason', error)})" if error else ""
        return DataError(f"{self.url}: stopped at {self.have}{whole} bytes{reason}. "
                         "Run the same command again to resume")

    def close(self):
        if self.response is not None:
            self.response.close()


class WebFile(io.RawIOBase):
    """A file on the web, read from its beginning: only what is read is downloaded, and kept in path.part.

        with WebFile("https://example.org/a.txt", "data/a.txt") as file:
            file.read(100)
    """
    def __init__(self, url, path):
        self.download = Download(url, path, restart=False)
        self.file = open(self.download.part, "a+b")
        self.file.seek(0)

    def readable(self):
        return True

    def readinto(self, buffer):
        count = self.file.readinto(buffer)
        if count == 0 and self.download.more():
            count = self.file.readinto(buffer)
        return count

    def close(self):
        self.file.close()
        self.download.close()
        super().close()

# -----------------------------------------------------------------------------
# Devices

# Dense bfloat16 FLOP/s by the data sheets, {the name that the driver reports: peak}. Names are matched as a
# whole: a laptop's RTX 4090, a slice of an A100 (MIG) or an H100 NVL is a different card
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 80GB HBM3": 989e12,
    "H100 PCIe": 756e12,
    "A100-SXM4-40GB": 312e12,
    "A100-SXM4-80GB": 312e12,
    "A100-PCIE-40GB": 312e12,
    "A100 80GB PCIe": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "GeForce RTX 4090": 165e12,
    "GeForce RTX 3090": 71e12,
}


def peak_flops(device):
    """Dense bfloat16 FLOP/s by the data sheet, or None for a card that is not in PEAK_FLOPS.

    No utilisation is better than a wrong one.
    """
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return PEAK_FLOPS.get(name.removeprefix("NVIDIA "))         # older drivers leave out the prefix


def add_device_flags(parser, dtype="auto"):
    """Give an argparse parser the flags --device and --dtype, for pick_device and pick_dtype below."""
    parser.add_argument("--device", default="auto",
                        help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default=dtype,
                        help="of the activations; auto is bfloat16 where the hardware has it: faster, "
                             "less exact")


def pick_device(device="auto"):
    """The device to use: "auto" takes a GPU if there is one, and every process of torchrun its own.

    Raises DeviceError.
    """
    if device == "auto":
        device = "cpu"
        if torch.backends.mps.is_available():
            device = "mps"
        if torch.cuda.is_available():
            device = "cuda"

    # Before anything is put on the first GPU
    if device.startswith("cuda") and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"device {device!r} is not available: {reason}") from None
    return device


def pick_dtype(dtype="auto", device="cpu"):
    """The dtype of the activations. "auto" is bfloat16 where the hardware multiplies it, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    native = False
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            is_supported = getattr(torch.cpu, name, None)       # not in every version of torch
            native = native or bool(is_supported and is_supported())
    return torch.bfloat16 if native else torch.float32


def reuse_memory():
    """Let this process keep freed memory for its next step (Linux with glibc; elsewhere nothing happens).

    For training on a CPU, where every step asks for the same large buffers. By default glibc gives each of
    them back to the kernel, which zeroes it when it is asked for again: 15 to 30 % of a step (see dev/).
    An evaluation gains nothing and would need up to 1.5 times the memory.

    To be called at the start of a script: it holds for the whole process.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-4, 0)                                          # M_MMAP_MAX: no buffer of its own mapping
        mallopt(-1, -1)                                         # M_TRIM_THRESHOLD: give nothing back

# -----------------------------------------------------------------------------
# Checkpoints: out_dir/ckpt.pt holds tensors only, out_dir/config.json says in plain text what they are

def save_config(out_dir, config, **rest):
    """Write out_dir/config.json: the model's sizes, and what else the caller wants known (JSON values)."""
    write_json(os.path.join(out_dir, "config.json"), {"model": asdict(config), **rest})


def save_checkpoint(out_dir, model, optimizers, step, tokens=0):
    """Write out_dir/ckpt.pt: {"model": state dict, "optimizer": [state dicts], "step", "tokens": int}.

    Raises OSError if the disk is full. What was saved before is then kept.
    """
    state = {"model": model.state_dict(), "optimizer": [o.state_dict() for o in optimizers],
             "step": step, "tokens": tokens}
    path = os.path.join(out_dir, "ckpt.pt")
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except RuntimeError as error:           # what torch.save makes of a full disk
        raise OSError(f"{path} cannot be written ({str(error).splitlines()[0]}): is the disk full? "
                      "What was saved before is kept") from None


@contextlib.contextmanager
def open_in_checkpoint(out_dir, name):
    """A file of a checkpoint folder, opened in bytes. An error while it is read becomes a DataError."""
    path = os.path.join(out_dir, name)
    if os.path.isfile(out_dir):
        raise DataError(f"{out_dir} is a file: give the folder that train.py wrote, such as out/vlm")
    if not os.path.exists(path):
        missing = f"{path} is missing" if os.path.isdir(out_dir) else "the folder does not exist"
        raise DataError(f"{out_dir} holds no checkpoint: {missing} (train one: python train.py)")
    try:
        with open(path, "rb") as file:
            yield file
    except Exception as error:                                  # torch.load raises many kinds
        reason = (str(error) or repr(error)).split("\n")[0]
        raise DataError(f"{path} cannot be read: {reason}. If it is damaged, copy it again, or train "
                        "again with --overwrite") from None


def read_config(out_dir):
    """config.json of a checkpoint folder, a dict. Raises DataError, one line."""
    with open_in_checkpoint(out_dir, "config.json") as file:
        config = json.load(file)
        if not isinstance(config, dict) or "model" not in config:
            raise ValueError("it says nothing of a model")
    return config


def dataset_digests(folder):
    """{"meta", "tokenizer": sha256 of that .json file} of a dataset: its description and its vocabulary.

    train.py stores it in config.json as "dataset".
    """
    return {name: file_sha256(os.path.join(folder, f"{name}.json")) for name in ("meta", "tokenizer")}


def check_dataset(folder, checkpoint):
    """Raises DataError if a dataset is not, byte for byte, the one that a checkpoint was trained on."""
    if dataset_digests(folder) != read_config(checkpoint).get("dataset"):
        raise DataError(f"{folder} is not the dataset that {checkpoint} was trained on: "
                        "it was prepared again, or --data_dir names another folder")


def read_checkpoint(out_dir, device="cpu"):
    """The raw contents of a checkpoint folder: (state, config.json as a dict). Raises DataError, one line.

    Only tensors and plain containers are accepted: a file that would run code when unpickled is refused.
    """
    config = read_config(out_dir)
    with open_in_checkpoint(out_dir, "ckpt.pt") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no checkpoint, or only a part of one")
        file.seek(0)
        state = torch.load(file, map_location=device, weights_only=True)
        if "model" not in state or "step" not in state:
            raise ValueError("it holds no model")
    return state, config


def load_checkpoint(out_dir, device="cpu", dtype="float32"):
    """(model in eval mode, config.json as a dict with "step" and the "weights" digest added).

    dtype: of the activations, see `pick_dtype`. Raises DataError, one line, if it is no checkpoint.
    """
    state, config = read_checkpoint(out_dir, device)
    try:
        model = Transformer(Config(**config["model"])).to(device)
        model.load_state_dict(state["model"])
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{out_dir}: ckpt.pt does not match config.json, copy both again from one run: "
                        f"{reason}") from None
    model.dtype = pick_dtype(dtype, device)
    return model.eval(), {**config, "step": state["step"], "weights": weights_digest(state["model"])}

# -----------------------------------------------------------------------------
# Results: a number belongs to the weights it was measured on, and the weights to the code that made them

# What training depends on: editing one of these files changes what a run learns
SOURCES = ["objectives.py", "model.py", "train.py", "run.py", "flags.py", "data.py", "documents.py",
           "tokenizer.py", "common.py"]


def source_digests(names=SOURCES):
    """{file name: sha256} of our files as they are now. train.py stores it in config.json as "sources"."""
    here = Path(__file__).parent
    return {name: file_sha256(here / name) for name in names if (here / name).exists()}


def weights_digest(state_dict):
    """sha256 of a model's weights, over names, shapes and values: the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def result_path(checkpoint, name, results=None):
    """Where a result of a checkpoint goes: its own folder, or RESULTS/CHECKPOINT'S NAME (--results)."""
    if results is None:
        return Path(checkpoint, name)
    return Path(results, Path(checkpoint).resolve().name, name)


def check_different(checkpoints, results=None):
    """Raises DataError if a checkpoint is given twice, or two would share a file below RESULTS."""
    folders = [Path(checkpoint).resolve() for checkpoint in checkpoints]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise DataError(f"--checkpoint has {checkpoints[i]} twice: leave one out")
    names = {folder.name for folder in folders}
    if results is not None and len(names) < len(folders):
        raise DataError("two checkpoints have folders of the same name: --results needs one call for "
                        "each, with another DIR")


def as_json(value):
    """JSON with one key per line, but a list of numbers or strings in a single line."""
    text = json.dumps(value, indent=1)

    # Newlines stand between values only: inside a JSON string they are written as \n
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\n *", " ", found[0]), text)


def write_result(path, report):
    """Write a JSON result; returns whether it was written.

    Where that is impossible (a folder one may only read, a full disk), one line on stderr says so. The
    program then continues, shows the numbers, and ends with exit code 2.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(as_json(report).encode()))
        return True
    except OSError as error:
        print(f"error: not saved: {path}: {error.strerror or error} (--results DIR writes elsewhere)",
              file=sys.stderr)
        return False


def read_result(path, weights):
    """The JSON result at a path if it was measured on the weights with this digest, else None."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(report, dict) and report.get("weights") == weights
    return report if same else None
