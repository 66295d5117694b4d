"""
Documents -> tokens -> memory-mapped shards -> windows.

    python data.py                                          # this Python's standard library, no download
    python data.py --dataset pile --shards 0 1              # downloads two of the Pile's 30 parts
    python data.py --dataset mine --files a.jsonl b.jsonl.gz c.jsonl.zst d.txt --tokenizer bpe:4096
    python data.py --dataset mine --check                   # sha256 of every shard, every token id

A dataset is a folder data/NAME: train_0000.npy, ..., val_0000.npy, ... (token ids, end-of-text after each
document), tokenizer.json, and meta.json (sources, counts, sha256), which comes last: without it there is
no dataset. A file gets its name when it is complete. After a crash the same command starts anew and makes
the same bytes, on any number of cores (downloads go on where they broke off).
"""
import argparse
import json
import os
import re
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from documents import PIECE, STDLIB, pieces, sample
from common import (DataError, close_on_disk, fetch, file_sha256, locked, one_line_errors, write_atomically,
                    write_json)
from tokenizer import build_encoding, make_tokenizer, save_tokenizer

DATA_DIR = "data"
PILE_URL = "https://huggingface.co/datasets/monology/pile-uncopyrighted/resolve/main/train"
VAL_FRACTION = {"stdlib": 0.1, "pile": 0.005}   # of the documents; any other dataset: 0.01
SHARD_TOKENS = 100_000_000
SCAN = 2**24            # tokens at the start of each shard whose ids are checked whenever it is loaded

# -----------------------------------------------------------------------------
# Shards

def encode(stream, encoding):
    """Encode (split, text, last) on all cores: yield (split, ids uint32, bytes of text, last), in this order.

    Threads, as tiktoken works outside of Python's lock. Text that looks like a special token is text.
    """
    def work(group):
        out = []
        for split, text, last in group:
            ids = encoding.encode_to_numpy(text, disallowed_special=())
            ids = np.append(ids, np.uint32(encoding.eot_token)) if last else ids
            out.append((split, ids, len(text.encode()), last))
        return out

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(threads) as pool:
        running, group, size = deque(), [], 0
        for piece in stream:
            group.append(piece)
            size += len(piece[1])
            if size >= PIECE:                               # a thread gets many small documents at once
                running.append(pool.submit(work, group))
                group, size = [], 0
            if len(running) > 2 * threads:                  # bounds the memory
                yield from running.popleft().result()
        for future in [*running, pool.submit(work, group)]:
            yield from future.result()


class ShardWriter:
    """Appends ids to folder/SPLIT_0000.npy, SPLIT_0001.npy, ..., shard_tokens in each.

    shards: [{"file", "tokens", "sha256"}, ...] of those that are complete. Call close() at the end.
    """
    def __init__(self, folder, split, dtype, shard_tokens):
        self.prefix, self.dtype = os.path.join(folder, split), np.dtype(dtype)
        self.shard_tokens, self.shards, self.file = shard_tokens, [], None

    def write(self, ids):
        while len(ids):
            if self.file is None:
                self.file, self.tokens = open(f"{self.prefix}.tmp", "wb"), 0
                self.write_header()
            now, ids = np.split(ids, [self.shard_tokens - self.tokens])
            self.file.write(now.astype(self.dtype).tobytes())
            self.tokens += len(now)
            if self.tokens == self.shard_tokens:
                self.close()

    def write_header(self):
        """Written again at the end: numpy pads it, so its length does not depend on the number of tokens."""
        self.file.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.tokens,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def close(self):
        if self.file:
            self.write_header()
            close_on_disk(self.file)
            path = f"{self.prefix}_{len(self.shards):04d}.npy"
            self.shards.append({"file": os.path.basename(path), "tokens": self.tokens,
                                "sha256": file_sha256(self.file.name)})
            os.replace(self.file.name, path)
            self.file = None


def prepare(name, files=None, shards=None, tokenizer=None, val_fraction=None, shard_tokens=SHARD_TOKENS,
            data_dir=DATA_DIR, base_url=PILE_URL, overwrite=False):
    """Make the dataset data_dir/name, unless it is there, and return its meta.json. Raises DataError.

    name: "stdlib"; "pile" with `shards`, a list of numbers; or any other with `files`, a list of paths.
    tokenizer: "gpt2", "bytes" or "bpe:N"; by default bpe:2048 for stdlib, else gpt2.
    """
    folder = os.path.join(data_dir, name)
    files = [str(path) for path in files or []]
    urls = [f"{base_url}/{shard:02d}.jsonl.zst" for shard in shards or []]
    wanted = {"name": name, "sources": files or urls or [STDLIB],
              "tokenizer": tokenizer or ("bpe:2048" if name == "stdlib" else "gpt2"),
              "val_fraction": VAL_FRACTION.get(name, 0.01) if val_fraction is None else val_fraction,
              "shard_tokens": shard_tokens}
    check_arguments(wanted, files, urls)
    with locked(folder):
        if os.path.exists(os.path.join(folder, "meta.json")) and not overwrite:
            meta, _ = load(name, data_dir)
            changed = ", ".join(key for key in wanted if meta.get(key) != wanted[key])
            if changed:
                raise DataError(f"{folder} is there already, with other {changed}: "
                                "add --overwrite to replace it")
            print(f"{folder} is there already")
            return meta
        for old in ["meta.json", "train_*.npy", "val_*.npy"]:
            for path in Path(folder).glob(old):
                path.unlink()
        downloads = [os.path.join(folder, os.path.basename(url)) for url in urls]
        for url, path in zip(urls, downloads):
            fetch(url, path)
        meta = write_dataset(folder, downloads or wanted["sources"], wanted)
    for split, total in meta["splits"].items():
        counts = ", ".join(f"{total[key]:,} {key}" for key in ("documents", "bytes", "tokens"))
        print(f"{folder}: {split}: {counts}")
    return meta


def check_arguments(wanted, files, urls):
    """Raises DataError, before any work is done, if the arguments of `prepare` make no sense."""
    name, bpe = wanted["name"], re.fullmatch(r"gpt2|bytes|bpe:(\d{1,6})", wanted["tokenizer"])
    own = name not in ("stdlib", "pile")
    for wrong, message in [
        (bool(urls) != (name == "pile"), "--dataset pile needs --shards, and no other has any"),
        (own and not files, f"--dataset {name} needs --files"),
        (files and not own, f"--files need another --dataset name than {name}"),
        (not bpe or int(bpe[1] or 257) < 257, "the tokenizer is gpt2, bytes or bpe:N with N of at least 257"),
        (not 0 < wanted["val_fraction"] < 1, "val_fraction is between 0 and 1"),
        (wanted["shard_tokens"] < 1, "shard_tokens is at least 1"),
    ]:
        if wrong:
            raise DataError(message)
    for path in files:
        if not re.search(r"\.(jsonl|txt)(\.gz|\.zst)?$", path):
            raise DataError(f"{path} is not .jsonl or .txt, nor one of them with .gz or .zst after it")
        if not os.path.isfile(path):
            raise DataError(f"{path} is not there")
        if os.path.getsize(path) == 0:
            raise DataError(f"{path} is empty")


def write_dataset(folder, sources, wanted):
    """Tokenize the sources; returns meta.json, which is `wanted` and what is known at the end."""
    spec = make_tokenizer(wanted["tokenizer"], sample(sources, wanted["val_fraction"]))
    encoding = build_encoding(spec)
    save_tokenizer(spec, folder)
    dtype = "uint16" if encoding.n_vocab <= 2**16 else "uint32"
    splits = ("train", "val")
    writers = {split: ShardWriter(folder, split, dtype, wanted["shard_tokens"]) for split in splits}
    totals = {split: Counter(tokens=0, bytes=0, documents=0) for split in splits}
    unigram = np.zeros(encoding.n_vocab, dtype=np.int64)
    skipped = 0

    def report(error):
        nonlocal skipped
        skipped += 1
        if skipped <= 5:
            tqdm.write(f"skipped {error}", file=sys.stderr)

    with tqdm(desc="tokenizing", unit="B", unit_scale=True, disable=None) as bar:
        for split, ids, size, last in encode(pieces(sources, wanted["val_fraction"], report), encoding):
            writers[split].write(ids)
            if split == "train":
                unigram += np.bincount(ids, minlength=len(unigram))
            totals[split].update(tokens=len(ids), bytes=size, documents=int(last))
            bar.update(size)
    if skipped:
        print(f"skipped {skipped} lines or files in all", file=sys.stderr)
    for split, change in [("train", "lower"), ("val", "raise")]:
        writers[split].close()
        if not totals[split]["documents"]:
            raise DataError(f"no document fell into {split}: {change} --val_fraction, which is "
                            f"{wanted['val_fraction']}, or add documents")
    meta = {**wanted, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token, "dtype": dtype,
            "skipped": skipped,
            "splits": {split: {**totals[split], "shards": writers[split].shards} for split in splits}}
    write_atomically(os.path.join(folder, "unigram.npy"), lambda file: np.save(file, unigram))
    write_json(os.path.join(folder, "meta.json"), meta)
    return meta

# -----------------------------------------------------------------------------
# Windows

def load(name, data_dir=DATA_DIR, full=False):
    """A dataset as (meta.json, {"train": [ids of each shard, memory-mapped], "val": [...]}).

    Raises DataError for a dataset or shard that is missing, cut short or not the one in meta.json, and for an
    id beyond the vocabulary in the first SCAN tokens of a shard. full: in any token, and for a wrong sha256.
    """
    folder = os.path.join(data_dir, name)
    try:
        with open(os.path.join(folder, "meta.json")) as file:
            meta = json.load(file)
        dtype, vocab_size = np.dtype(meta["dtype"]), meta["vocab_size"]
        listed = [(split, os.path.join(folder, shard["file"]), shard["tokens"], shard["sha256"])
                  for split in ("train", "val") for shard in meta["splits"][split]["shards"]]
    except FileNotFoundError:
        raise DataError(f"there is no dataset {folder}: python data.py --dataset {name} makes it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}/meta.json is damaged, {error!r}: make it again (--overwrite)") from None
    splits = {"train": [], "val": []}
    for split, path, tokens, sha256 in listed:
        try:
            ids = np.lib.format.open_memmap(path, mode="r")
            if ids.dtype != dtype or ids.shape != (tokens,):
                raise ValueError(f"it holds {ids.dtype} {ids.shape}, not {dtype} ({tokens},)")
            if max(ids[i:i + SCAN].max() for i in range(0, tokens if full else 1, SCAN)) >= vocab_size:
                raise ValueError(f"it holds an id beyond the vocabulary of {vocab_size}")
            if full and file_sha256(path) != sha256:
                raise ValueError("its sha256 is another")
        except (OSError, ValueError, EOFError) as error:
            reason = "it is missing" if isinstance(error, FileNotFoundError) else error
            raise DataError(f"{path} is not as it was made: {reason}; make it again (--overwrite)") from None
        splits[split].append(ids)
    return meta, splits


def load_unigram(folder):
    """How often each token occurs in the training split: (V,) float64 log-probabilities, nats.

    folder: of a dataset or a checkpoint. Every count is raised by one, so that none is -inf. Raises DataError.
    """
    path = os.path.join(folder, "unigram.npy")
    try:
        counts = np.load(path) + 1.0
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is missing or damaged ({error}): prepare the dataset again (--overwrite)"
                        ) from None
    return np.log(counts / counts.sum())


def check_window(shards, span):
    """(shards,) how many windows of `span` tokens begin in each shard. Raises DataError if there are none."""
    starts = np.array([max(0, len(ids) - span + 1) for ids in shards])
    if not starts.any():
        longest = max(map(len, shards), default=0)
        raise DataError(f"the corpus ({longest} tokens in its longest shard) is shorter than a window of "
                        f"{span} tokens: take more text or a smaller block_size")
    return starts


def windows(shards, span, u):
    """Windows of consecutive tokens: shards, a list of (n,) ids; u (B,) float64 in [0, 1) -> (B, span) int64.

    Of all W windows that lie within one shard, row i is number floor(u[i] * W): uniform if u is.
    """
    starts = check_window(shards, span)
    ends = starts.cumsum()                                                          # W = ends[-1]
    number = (u * ends[-1]).astype(np.int64)                                        # (B,)
    shard = np.searchsorted(ends, number, side="right")                             # (B,)
    first = number - (ends - starts)[shard]                                         # (B,) place in the shard
    return np.stack([shards[s][i:i + span] for s, i in zip(shard, first)]).astype(np.int64)

# -----------------------------------------------------------------------------
# Command line

def build_parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--dataset", default="stdlib", metavar="NAME",
                   help="stdlib (default), pile, or a name of your own for --files; made in DATA_DIR/NAME")
    p.add_argument("--files", nargs="+", metavar="FILE",
                   help=".jsonl (a document a line, in field text), .txt (one document), also with .gz, .zst")
    p.add_argument("--shards", nargs="+", type=int, metavar="N", help="pile: parts to download, of 0 to 29")
    p.add_argument("--base_url", default=PILE_URL, help="pile: where the parts are (default: %(default)s)")
    p.add_argument("--tokenizer", help="gpt2 (default), bytes, or bpe:N, trained here; stdlib: bpe:2048")
    p.add_argument("--val_fraction", type=float, metavar="F",
                   help="of the documents, for validation (default: 0.01; stdlib 0.1, pile 0.005)")
    p.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, metavar="N",
                   help="tokens in a .npy file (default: %(default)s)")
    p.add_argument("--data_dir", default=DATA_DIR, help="folder of all datasets (default: %(default)s)")
    p.add_argument("--overwrite", action="store_true", help="replace the dataset if it is there")
    p.add_argument("--check", action="store_true", help="make nothing, verify every sha256 and token id")
    return p


def main(argv=None):
    args = vars(build_parser().parse_args(argv))
    name, only_check = args.pop("dataset"), args.pop("check")
    with one_line_errors(DataError, OSError):
        if only_check:
            load(name, args["data_dir"], full=True)
            print(f"{os.path.join(args['data_dir'], name)} is as it was made")
        else:
            prepare(name, **args)


if __name__ == "__main__":
    main()
