"""
Documents -> tokens -> memory-mapped shards -> windows.

    python data.py                                          # this Python's standard library, no download
    python data.py --dataset mine --files book.txt          # your own text
    python data.py --dataset mine --files a.jsonl b.jsonl.gz c.jsonl.zst d.txt --tokenizer bpe:4096
    python data.py --dataset pile --shards 0 --max_tokens 100000000     # downloads 110 MB of the Pile
    python data.py --dataset pile --shards 0 1              # two of its 30 shards, each 11.1 GB, 9.8e9 tokens
    python data.py --dataset mine --check                   # verify every byte of it

A dataset is a folder data/NAME: train_0000.npy, ..., val_0000.npy, ... (token ids, end-of-text after each
document), tokenizer.json, unigram.npy (how often each id occurs in train) and meta.json (sources, counts,
sha256). It is made in data/NAME/.new and moved into place when complete, so that an old dataset stays until
the new one works. After a crash, run the same command again: it produces the same bytes, on any number of
cores, and downloads resume.
"""
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from documents import STDLIB, Remote, SplitRule, choose_split, pieces, stdlib_files, vocabulary_text
from common import (DataError, Parser, fetch, file_sha256, locked, one_line_errors, write_atomically,
                    write_json)
from tokenizer import (PIECE, build_encoding, load_tokenizer, make_tokenizer, save_tokenizer,
                       token_bytes)

DATA_DIR = "data"
PILE_URL = "https://huggingface.co/datasets/monology/pile-uncopyrighted/resolve/main/train"
VAL_FRACTION = {"stdlib": 0.1, "pile": 0.005}   # of the documents; any other dataset: 0.01
SHARD_TOKENS = 100_000_000
SPLITS = ("train", "val")

# -----------------------------------------------------------------------------
# Documents -> shards

def prepare(name, files=None, shards=None, tokenizer=None, val_fraction=None, shard_tokens=SHARD_TOKENS,
            max_tokens=None, data_dir=DATA_DIR, base_url=PILE_URL, overwrite=False):
    """Make the dataset data_dir/name, unless it exists, and return its meta.json. Raises DataError.

    name: "stdlib"; "pile" with `shards`, a list of numbers; or any other with `files`, a list of paths.
    tokenizer: "gpt2", "bytes" or "bpe:N"; by default bpe:2048 for stdlib, else gpt2.
    max_tokens: stop after that many tokens, of both splits together. Of the Pile, only as much is downloaded.
    """
    # What is wanted, as it will stand in meta.json
    files = [str(path) for path in files or []]
    urls = [f"{base_url}/{shard:02d}.jsonl.zst" for shard in shards or []]
    if tokenizer is None:
        tokenizer = "bpe:2048" if name == "stdlib" else "gpt2"
    if val_fraction is None:
        val_fraction = VAL_FRACTION.get(name, 0.01)
    wanted = {"name": name, "sources": files or urls or [STDLIB], "tokenizer": tokenizer,
              "val_fraction": val_fraction, "shard_tokens": shard_tokens, "max_tokens": max_tokens}
    check_arguments(wanted, files, urls)

    folder = os.path.join(data_dir, name)
    with one_reason(folder), locked(folder):
        finish_replacing(folder)
        if os.path.exists(os.path.join(folder, "meta.json")) and not overwrite:
            meta = check_existing(wanted, data_dir)
            print(f"{folder} already exists")
            return meta
        meta = make(folder, wanted, urls)
    for split, total in meta["splits"].items():
        print(f"{folder}: {split}: {total['documents']:,} documents, {total['bytes']:,} bytes, "
              f"{total['tokens']:,} tokens")
    return meta


def write_dataset(folder, sources, wanted):
    """Tokenize the sources into `folder`. Returns meta.json: `wanted` and what is known at the end."""
    contents = [content_of(source) for source in sources]

    # Which documents are for validation. A stream is not read for this: it is long enough for the plain rule
    split = SplitRule(wanted["val_fraction"])
    if not any(isinstance(source, Remote) for source in sources):
        split = choose_split(sources, wanted["val_fraction"])

    # The tokenizer
    spec = make_tokenizer(wanted["tokenizer"], vocabulary_text(sources, split))
    encoding = build_encoding(spec)
    save_tokenizer(spec, folder)

    # The shards
    writers = {side: ShardWriter(folder, side, encoding.n_vocab, wanted["shard_tokens"]) for side in SPLITS}
    totals = {side: Counter(tokens=0, bytes=0, documents=0) for side in SPLITS}
    skipped = 0

    def report(error):
        nonlocal skipped
        skipped += 1
        if skipped <= 5:
            tqdm.write(f"skipped {error}", file=sys.stderr)

    stream = encode(pieces(sources, split, report), encoding)
    stream = first_tokens(stream, wanted["max_tokens"], encoding)
    with (contextlib.closing(stream),
          tqdm(desc="tokenizing", unit="B", unit_scale=True, disable=None) as bar):
        for side, ids, size, last in stream:
            writers[side].write(ids)
            totals[side].update(tokens=len(ids), bytes=size, documents=int(last))
            bar.update(size)
    if skipped:
        print(f"skipped {skipped} lines or files in all", file=sys.stderr)
    for side in SPLITS:
        writers[side].close()
        if totals[side]["tokens"] == 0:
            raise DataError(f"{side} has no document: more documents, a larger --max_tokens or another "
                            f"--val_fraction, which is {wanted['val_fraction']}, may help")

    # The counts of each id, and meta.json last
    save_array(os.path.join(folder, "unigram.npy"), writers["train"].counts)
    splits = {side: {**totals[side], "shards": writers[side].shards} for side in SPLITS}
    meta = {**wanted, "contents": contents, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token,
            "dtype": writers["train"].dtype.name, "skipped": skipped, "splits": splits}
    write_json(os.path.join(folder, "meta.json"), meta)
    return meta


def encode(stream, encoding):
    """Encode (side, text, last) on all cores: yield (side, ids uint32, bytes of text, last), in this order.

    Threads, as tiktoken works outside of Python's lock. Text that looks like a special token is text.
    """
    def work(group):
        out = []
        for side, text, last in group:
            ids = encoding.encode_to_numpy(text, disallowed_special=())
            if last:
                ids = np.append(ids, np.uint32(encoding.eot_token))
            out.append((side, ids, len(text.encode()), last))
        return out

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        running = deque()
        group = []
        size = 0
        for piece in stream:
            # A thread gets many small documents at once
            _, text, _ = piece
            group.append(piece)
            size += len(text)
            if size >= PIECE:
                running.append(pool.submit(work, group))
                group = []
                size = 0

            # Results in order, and not too many waiting: this bounds the memory
            if len(running) > 2 * cores:
                yield from running.popleft().result()
        for future in [*running, pool.submit(work, group)]:
            yield from future.result()


def first_tokens(stream, max_tokens, encoding):
    """The first max_tokens tokens (None: all) of what `encode` yields. The last document may be cut."""
    left = math.inf if max_tokens is None else max_tokens
    for side, ids, size, last in stream:
        if len(ids) >= left:
            ids = ids[:left]
            yield side, ids, int(token_bytes(encoding)[ids].sum()), True
            break
        yield side, ids, size, last
        left -= len(ids)


class ShardWriter:
    """Appends ids to folder/SPLIT_0000.npy, SPLIT_0001.npy, ..., shard_tokens in each. close() ends it.

    shards: [{"file", "tokens", "sha256"}, ...] of those that are complete.
    counts: (V,) int64, how often each id occurs in them.
    """
    def __init__(self, folder, split, n_vocab, shard_tokens):
        self.prefix = os.path.join(folder, split)
        self.dtype = np.dtype("uint16" if n_vocab <= 2**16 else "uint32")
        self.ids = np.empty(shard_tokens, dtype=self.dtype)     # the system gives memory only as it is filled
        self.filled = 0
        self.shards = []
        self.counts = np.zeros(n_vocab, dtype=np.int64)

    def write(self, ids):
        while len(ids) > 0:
            now = ids[:len(self.ids) - self.filled]
            self.ids[self.filled:self.filled + len(now)] = now
            self.filled += len(now)
            ids = ids[len(now):]
            if self.filled == len(self.ids):
                self.close()

    def close(self):
        if self.filled == 0:
            return
        path = f"{self.prefix}_{len(self.shards):04d}.npy"
        ids = self.ids[:self.filled]
        save_array(path, ids)
        self.shards.append({"file": os.path.basename(path), "tokens": self.filled,
                            "sha256": file_sha256(path)})
        self.counts += count_ids(ids, len(self.counts))
        self.filled = 0


def count_ids(ids, n_vocab):
    """(n_vocab,) int64, how often each id occurs. In small parts, as bincount converts them to int64."""
    counts = np.zeros(n_vocab, dtype=np.int64)
    for start in range(0, len(ids), 2**20):
        counts += np.bincount(ids[start:start + 2**20], minlength=n_vocab)
    return counts


def save_array(path, array):
    """np.save, atomic, and with an error that says why it failed (np.save's own does not)."""
    def write(file):
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.data)
    write_atomically(path, write)

# -----------------------------------------------------------------------------
# Shards -> windows

def load(name, data_dir=DATA_DIR, full=False):
    """A dataset as (meta.json, {"train": [ids of each shard, memory-mapped], "val": [...]}).

    Raises DataError for a dataset or shard that is missing, cut short or not the one in meta.json, and for an
    id beyond the vocabulary at the start of a shard. full: also for such an id anywhere in a shard, for a
    wrong sha256, and for a tokenizer or counts that do not belong to the shards.
    """
    check_name(name)
    folder = os.path.join(data_dir, name)
    meta, dtype, listed = read_meta(name, data_dir)
    vocab_size = meta["vocab_size"]

    # The shards
    splits = {"train": [], "val": []}
    for shard in listed:
        path = os.path.join(folder, shard.file)
        try:
            ids = open_shard(path, shard, dtype, vocab_size, full)
        except (OSError, ValueError, EOFError) as error:
            reason = "it is missing" if isinstance(error, FileNotFoundError) else error
            raise damaged(path, reason, name, data_dir, meta) from None
        splits[shard.split].append(ids)

    # What belongs to them
    for file in ("tokenizer.json", "unigram.npy"):
        path = os.path.join(folder, file)
        if not os.path.exists(path):
            raise damaged(path, "it is missing", name, data_dir, meta)
    if full:
        path = os.path.join(folder, "tokenizer.json")
        if load_tokenizer(folder).n_vocab != vocab_size:
            raise damaged(path, f"it does not have {vocab_size} tokens", name, data_dir, meta)
        counts = sum(count_ids(ids, vocab_size) for ids in splits["train"])
        if not np.array_equal(load_counts(folder), counts):
            path = os.path.join(folder, "unigram.npy")
            raise damaged(path, "it does not count train", name, data_dir, meta)
    return meta, splits


class Shard(NamedTuple):
    """What meta.json says about a shard."""
    split: str                      # "train" or "val"
    file: str
    tokens: int
    sha256: str


def read_meta(name, data_dir):
    """(meta.json of a dataset, the dtype of its ids, a Shard for each of its shards). Raises DataError."""
    path = os.path.join(data_dir, name, "meta.json")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)

        # What is needed of it
        dtype = np.dtype(meta["dtype"])
        if not isinstance(meta["vocab_size"], int):
            raise ValueError(f"vocab_size is {meta['vocab_size']!r}")
        shards = []
        for split in SPLITS:
            for shard in meta["splits"][split]["shards"]:
                shards.append(Shard(split, os.fspath(shard["file"]), shard["tokens"], shard["sha256"]))
    except FileNotFoundError:
        found = ", ".join(sorted(other.parent.name for other in Path(data_dir).glob("*/meta.json")))
        raise DataError(f"there is no dataset {os.path.dirname(path)} (existing ones: {found or 'none'}). "
                        f"It is made by: {how_to_make(name, data_dir)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, repr(error), name, data_dir) from None
    return meta, dtype, shards


def open_shard(path, shard, dtype, vocab_size, full):
    """The ids of a shard, (n,), memory-mapped.

    Raises OSError, EOFError or ValueError if the file is not what meta.json says.
    """
    ids = np.lib.format.open_memmap(path, mode="r")
    if ids.dtype != dtype or ids.shape != (shard.tokens,):
        raise ValueError(f"it holds {ids.dtype} {ids.shape}, not {dtype} ({shard.tokens},)")
    if largest_id(ids, full) >= vocab_size:
        raise ValueError(f"it holds an id beyond the vocabulary of {vocab_size}")
    if full and file_sha256(path) != shard.sha256:
        raise ValueError("its sha256 does not match meta.json")
    return ids


SCAN = 2**16            # tokens at the start of each shard whose ids are checked whenever it is loaded
CHUNK = 2**24           # tokens at a time when all are checked

def largest_id(ids, full):
    """The largest id of a shard, (n,), or (not full) of its beginning."""
    if not full:
        return ids[:SCAN].max()
    return max(ids[start:start + CHUNK].max() for start in range(0, len(ids), CHUNK))


def load_unigram(folder):
    """(V,) float64: log P of each text id, in nats, by how often it occurs in train (add-one smoothing).

    What one can say of a token without any context.

    folder: of a dataset or a checkpoint. Raises DataError if unigram.npy is missing or damaged.
    """
    counts = load_counts(folder)
    return np.log(counts + 1) - np.log(counts.sum() + len(counts))


def load_counts(folder):
    """unigram.npy of a folder, (V,) int64. Raises DataError."""
    path = os.path.join(folder, "unigram.npy")
    try:
        counts = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: copy it from the folder of the dataset") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if counts.ndim != 1 or counts.dtype != np.int64 or len(counts) == 0 or counts.min() < 0:
        raise DataError(f"{path} is damaged: it holds {counts.dtype} {counts.shape}, not counts of ids")
    return counts


def check_window(shards, span, split="text"):
    """(shards,) int: how many windows of `span` tokens begin in each shard. Raises DataError if none does.

    split: the name of these shards, for the message.
    """
    starts = np.array([max(0, len(ids) - span + 1) for ids in shards])
    if not starts.any():
        longest = max(map(len, shards), default=0)
        flag = ", a larger --val_fraction" if split == "val" else ""
        raise DataError(f"{split} ({longest} tokens in its longest shard) is shorter than a window of "
                        f"{span} tokens: take more text{flag} or a smaller block_size")
    return starts


def windows(shards, span, u):
    """Windows of consecutive tokens: shards, a list of (n,) ids; u (B,) float64 in [0, 1) -> (B, span) int64.

    Of all W windows that lie within one shard, row i is number floor(u[i] * W): uniform if u is.
    With shards [5, 6, 7] and [8, 9] and span 2 there are W = 3 windows:

        u = [0.0, 0.5, 0.9]  ->  [[5, 6], [6, 7], [8, 9]]
    """
    starts = check_window(shards, span)
    ends = starts.cumsum()                                                          # W = ends[-1]
    number = (u * ends[-1]).astype(np.int64)                                        # (B,)
    shard = np.searchsorted(ends, number, side="right")                             # (B,)
    first = number - (ends - starts)[shard]                                         # (B,) place in the shard
    rows = [shards[s][i:i + span] for s, i in zip(shard, first)]
    return np.stack(rows).astype(np.int64)                                          # (B, span)


STRETCH = 2048          # tokens

def few(shards, tokens):
    """At most `tokens` tokens of a split, as a list of (STRETCH,) ids, evenly spread over the text.

    The stretches for few tokens need not be among those for more. Raises DataError if the split has too few.
    """
    stretches = []
    for ids in shards:
        starts = range(0, len(ids) - STRETCH + 1, STRETCH)
        stretches += [ids[start:start + STRETCH] for start in starts]
    n = tokens // STRETCH
    if not 1 <= n <= len(stretches):
        most = STRETCH * len(stretches)
        raise DataError(f"train_tokens must be between {STRETCH} and {most}, not {tokens}")
    return [stretches[i * len(stretches) // n] for i in range(n)]

# -----------------------------------------------------------------------------
# The old dataset stays until the new one is complete

def make(folder, wanted, urls):
    """Make the dataset in folder/.new, then move it to `folder`. Returns meta.json."""
    new = os.path.join(folder, ".new")
    shutil.rmtree(new, ignore_errors=True)                  # of a run that was killed
    try:
        # The sources: files that are here, or what is needed of the Pile's shards
        sources = wanted["sources"]
        if urls:
            sources = []
            for url in urls:
                path = os.path.join(folder, os.path.basename(url))
                streamed = wanted["max_tokens"] is not None and not os.path.exists(path)
                if not streamed:
                    fetch(url, path)
                sources.append(Remote(url, path) if streamed else path)
        os.makedirs(new, exist_ok=True)
        meta = write_dataset(new, sources, wanted)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(folder)                                # if it is empty
        raise
    finish_replacing(folder)
    return meta


def finish_replacing(folder):
    """If folder/.new holds a complete dataset, put it in place of the old one.

    When it is stopped in between, there is no meta.json in `folder`, and the next call does the rest.
    """
    new = Path(folder, ".new")
    if not Path(new, "meta.json").exists():
        return
    with open(new / "meta.json", encoding="utf-8") as file:
        meta = json.load(file)
    shards = {shard["file"] for split in SPLITS for shard in meta["splits"][split]["shards"]}

    # Remove the old one, meta.json first
    Path(folder, "meta.json").unlink(missing_ok=True)
    for path in Path(folder).iterdir():
        is_shard = re.fullmatch(r"(train|val)_\d{4,}\.npy", path.name)
        if is_shard and path.name not in shards:
            path.unlink()

    # Put the new one in its place, meta.json last
    names = sorted(path.name for path in new.iterdir() if path.name != "meta.json")
    for name in [*names, "meta.json"]:
        os.replace(new / name, Path(folder, name))
    new.rmdir()


@contextlib.contextmanager
def one_reason(folder):
    """Turns an OSError, such as a full disk, into a DataError that names the file or the folder."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror or error}. "
                        "Nothing incomplete is kept, only downloads") from None

# -----------------------------------------------------------------------------
# Checks, and the command that helps where one fails

def check_arguments(wanted, files, urls):
    """Raises DataError, before any work is done, if the arguments of `prepare` make no sense."""
    name = wanted["name"]
    check_name(name)
    if name == "pile" and not urls:
        raise DataError("--dataset pile needs --shards, such as --shards 0")
    if name != "pile" and urls:
        raise DataError("--shards is for --dataset pile only")
    if name in ("stdlib", "pile"):
        if files:
            raise DataError(f"--dataset {name} takes no --files: give your dataset another name")
    elif not files:
        raise DataError(f"--dataset {name} needs --files")

    tokenizer = wanted["tokenizer"]
    bpe = re.fullmatch(r"bpe:(\d{1,6})", tokenizer)
    large_enough = bpe is not None and int(bpe[1]) >= 257
    if tokenizer not in ("gpt2", "bytes") and not large_enough:
        raise DataError(f"tokenizer must be gpt2, bytes or bpe:N with N of at least 257, not {tokenizer}")
    if not 0 < wanted["val_fraction"] < 1:
        raise DataError(f"val_fraction must be between 0 and 1, not {wanted['val_fraction']}")
    if not 1 <= wanted["shard_tokens"] <= 10**9:
        raise DataError("shard_tokens must be at least 1 and at most 1,000,000,000")
    if wanted["max_tokens"] is not None and wanted["max_tokens"] < 2:
        raise DataError("max_tokens must be at least 2")

    for path in files:
        if not re.search(r"\.(jsonl|txt)(\.gz|\.zst)?$", path):
            raise DataError(f"{path} is not .jsonl or .txt, nor one of them with .gz or .zst after it")
        if not os.path.isfile(path):
            raise DataError(f"{path} does not exist")
        if os.path.getsize(path) == 0:
            raise DataError(f"{path} is empty")


def check_name(name):
    """Raises DataError if it cannot be a dataset's: the name of a folder in data_dir, no path."""
    if name in ("", ".", "..") or os.path.basename(name) != name:
        raise DataError(f"--dataset {name!r} is not the name of a folder: --data_dir says where it is")


def check_existing(wanted, data_dir):
    """meta.json of the dataset that exists. Raises DataError if it is not what is wanted."""
    folder = os.path.join(data_dir, wanted["name"])
    meta, _ = load(wanted["name"], data_dir)
    changed = [key for key in wanted if meta.get(key) != wanted[key]]
    if "contents" not in meta:
        changed.append("contents")
    if changed:
        raise DataError(f"{folder} already exists and differs in {', '.join(changed)}: "
                        "add --overwrite to replace it")

    # Are the files still what they were? What was downloaded may have been removed
    for source, content in zip(wanted["sources"], meta["contents"]):
        if (source == STDLIB or os.path.exists(source)) and content_of(source) != content:
            raise DataError(f"{folder} already exists, and {source} has changed since: "
                            "add --overwrite to make it again")
    return meta


def content_of(source):
    """{"bytes", "sha256"} of a source, to notice when it has changed. None for one that is streamed."""
    if isinstance(source, Remote):
        return None
    if source != STDLIB:
        return {"bytes": os.path.getsize(source), "sha256": file_sha256(source)}
    size = 0
    digest = hashlib.sha256()
    for path, text in stdlib_files():
        size += len(text.encode())
        digest.update(f"{path}\0{text}\0".encode())
    return {"bytes": size, "sha256": digest.hexdigest()}


def data_dir_of_run(train, data_dir=None):
    """The folder of the datasets that a run used. train: the flags of its training, in config.json.

    That is data_dir where it is given, or the recorded one. A run that was copied to another machine may
    record one that does not exist here: then it is DATA_DIR.
    """
    recorded = train.get("data_dir", DATA_DIR)
    exists = os.path.isdir(os.path.join(recorded, train["dataset"]))
    return data_dir or (recorded if exists else DATA_DIR)


def damaged(path, reason, name, data_dir, meta=None):
    """The DataError for a file of a dataset. meta: its meta.json where that is known."""
    return DataError(f"{path} is damaged: {reason}. Make it again: "
                     f"{how_to_make(name, data_dir, meta, overwrite=True)}")


def how_to_make(name, data_dir, meta=None, overwrite=False):
    """The command that makes a dataset, to be typed in. meta: its meta.json where that is known."""
    words = ["python", "data.py", "--dataset", name]

    # The same text as before, or a proposal
    if meta is None:
        if name == "pile":
            words += ["--shards", "0", "--max_tokens", str(SHARD_TOKENS)]
        elif name != "stdlib":
            words += ["--files", "FILE.txt"]
    elif name == "pile":
        words += ["--base_url", os.path.dirname(meta["sources"][0]), "--shards"]
        for url in meta["sources"]:
            words += [os.path.basename(url).removesuffix(".jsonl.zst")]
    elif name != "stdlib":
        words += ["--files", *meta["sources"]]

    # The same settings
    if meta is not None:
        for flag in ("tokenizer", "val_fraction", "shard_tokens", "max_tokens"):
            if meta.get(flag) is not None:
                words += [f"--{flag}", str(meta[flag])]
    if os.path.abspath(data_dir) != os.path.abspath(DATA_DIR):
        words += ["--data_dir", str(data_dir)]
    if overwrite:
        words += ["--overwrite"]
    return shlex.join(words)

# -----------------------------------------------------------------------------
# Command line

def build_parser():
    p = Parser(__doc__.split("\n\n")[0])
    p.add_argument("--dataset", default="stdlib", metavar="NAME",
                   help="stdlib, pile, or a name of your own for --files; it is made in DATA_DIR/NAME")
    p.add_argument("--files", nargs="+", metavar="FILE",
                   help=".jsonl (one document per line, in field text), .txt (one document), "
                        "also with .gz, .zst")
    p.add_argument("--shards", nargs="+", type=int, metavar="N",
                   help="pile: shards to download, of 0 to 29; each is 11.1 GB and 9.8e9 tokens")
    p.add_argument("--max_tokens", type=int, metavar="N",
                   help="stop after N tokens; the download of a shard stops too (about 1.1 bytes per token)")
    p.add_argument("--base_url", default=PILE_URL, help="pile: where the shards are")
    p.add_argument("--tokenizer",
                   help="gpt2, bytes, or bpe:N, trained here (default: gpt2; stdlib: bpe:2048)")
    p.add_argument("--val_fraction", type=float, metavar="F",
                   help="share of the documents for validation (default: 0.01; stdlib 0.1, pile 0.005); "
                        "a single document is cut")
    p.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, metavar="N",
                   help="tokens per .npy file")
    p.add_argument("--data_dir", default=DATA_DIR, help="folder of all datasets")
    p.add_argument("--overwrite", action="store_true",
                   help="replace the dataset if it exists, once the new one is complete")
    p.add_argument("--check", action="store_true",
                   help="make nothing, verify every sha256, token id and count of the dataset")
    return p


def main(argv=None):
    args = vars(build_parser().parse_args(argv))
    name = args.pop("dataset")
    only_check = args.pop("check")
    with one_line_errors(DataError, OSError):
        if only_check:
            load(name, args["data_dir"], full=True)
            print(f"{os.path.join(args['data_dir'], name)} is intact")
        else:
            prepare(name, **args)


if __name__ == "__main__":
    main()
