"""
What every script needs and no concept of the paper: files, devices, checkpoints, results. Skip it at first
reading.

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
import json
import os
import re
import sys
import zipfile
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


@contextlib.contextmanager
def one_line_errors(*kinds):
    """Errors of these kinds (default: ValueError, OSError) end the program with one line on stderr and
    exit code 2. Any other error is a mistake of ours and keeps its traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output, such as `head`, has seen enough. Python flushes stdout once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except kinds or (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def show_any_character():
    """Let the screen show "?" instead of failing where it has no such character (pipes on Windows)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def output_may_close():
    """For a print inside of a long run: if nobody reads it any more (`| head`, a closed terminal), it is
    dropped, and the run goes on."""
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


def has_matplotlib():
    """Whether matplotlib, which only --plot needs, can be imported."""
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
    """Call write(file) on a temporary binary file, flush it to disk, rename it to `path`.

    If that fails, `path` is what it was and nothing is left behind.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            close_on_disk(file)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def write_json(path, value):
    write_atomically(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


@contextlib.contextmanager
def hold(folder):
    """Make `folder` and let nobody else hold it meanwhile: a second process gets a DataError.

    A killed process leaves no lock. Where the file system has no locks (Windows, some network drives) there
    is none.
    """
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "a") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is working in {folder}: wait for it, or name another --out_dir"
                            ) from None
        except OSError:                     # a file system without locks
            pass
        yield


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
    """Dense bfloat16 FLOP/s by the data sheet, or None for a card that is not in PEAK_FLOPS: no utilisation
    is better than a wrong one.
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

    Raises ValueError for a device that does not exist.
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
        raise ValueError(f"device {device!r} is not available: {reason}") from None
    return device


def pick_dtype(dtype="auto", device="cpu"):
    """The dtype of the activations: "auto" is bfloat16 where the hardware multiplies it natively, else
    float32.
    """
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
    them back to the kernel, which zeroes it when it is asked for again: 15 to 30 % of a step (dev/LOG.md).
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
    """Write out_dir/config.json: the model's sizes, and what else the caller wants to be known (JSON values)."""
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


def read_config(out_dir):
    """config.json of a checkpoint folder, a dict. Raises DataError, one line."""
    try:
        with open(os.path.join(out_dir, "config.json")) as file:
            config = json.load(file)
        config["model"]
    except FileNotFoundError as error:
        raise DataError(f"{out_dir} holds no checkpoint: {error.filename} is missing "
                        "(train one: python train.py --objective vlm)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out_dir} holds no readable checkpoint: config.json: "
                        f"{type(error).__name__}: {error}") from None
    return config


def read_checkpoint(out_dir, device="cpu"):
    """The raw contents of a checkpoint folder: (state, config.json as a dict). Raises DataError, one line.

    Only tensors and plain containers are accepted: a file that would run code when unpickled is refused.
    """
    config = read_config(out_dir)
    try:
        state = torch.load(os.path.join(out_dir, "ckpt.pt"), map_location=device, weights_only=True)
        state["model"], state["step"]
    except FileNotFoundError as error:
        raise DataError(f"{out_dir} holds no checkpoint: {error.filename} is missing "
                        "(train one: python train.py --objective vlm)") from None
    except Exception as error:                                  # torch.load raises many kinds
        reason = str(error).split("\n")[0]
        raise DataError(f"{out_dir} holds no readable checkpoint: "
                        f"{type(error).__name__}: {reason}") from None
    return state, config


def load_checkpoint(out_dir, device="cpu"):
    """(model in eval mode, config.json as a dict with "step" and the "weights" digest added).

    Raises DataError, one line, if it is no checkpoint.
    """
    state, config = read_checkpoint(out_dir, device)
    try:
        model = Transformer(Config(**config["model"])).to(device)
        model.load_state_dict(state["model"])
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{out_dir}: ckpt.pt and config.json do not fit: {reason}") from None
    return model.eval(), {**config, "step": state["step"], "weights": weights_digest(state["model"])}

# -----------------------------------------------------------------------------
# Results: a number belongs to the weights it was measured on, and the weights to the code that made them

# What training depends on: editing one of these files changes what a run learns
SOURCES = ["objectives.py", "model.py", "train.py", "flags.py", "data.py", "documents.py", "tokenizer.py",
           "common.py"]


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


def as_json(value):
    """JSON with one key per line, but a list of numbers or strings in a single line."""
    text = json.dumps(value, indent=1)

    # Newlines stand between values only: inside a JSON string they are written as \\n
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\n *", " ", found[0]), text)


def write_result(path, report):
    """Write a JSON result; returns whether it was written.

    Where that is impossible (a folder one may only read, a full disk), one line on stderr says so and the
    program continues: the numbers are on the screen.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(as_json(report).encode()))
        return True
    except OSError as error:
        print(f"not saved: {path}: {error.strerror or error} (--results DIR writes elsewhere)",
              file=sys.stderr)
        return False


def read_result(path, weights):
    """The JSON result at a path if it was measured on the weights with this digest, else None."""
    try:
        report = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(report, dict) and report.get("weights") == weights
    return report if same else None
