"""
Text -> documents -> tokens -> memory-mapped shards -> windows. (numpy only: nothing here needs torch.)

    python data.py                                          # this Python's standard library, no download
    python data.py --dataset pile --shards 0 1              # downloads two of the Pile's 30 parts
    python data.py --dataset mine --files a.jsonl b.jsonl.gz c.jsonl.zst d.txt --tokenizer bpe:4096
    python data.py --dataset mine --check                   # sha256 of every shard, every token id

A dataset is a folder data/NAME: train_0000.npy, ..., val_0000.npy, ... (token ids, each document followed by
end-of-text), tokenizer.json, and meta.json (sources, counts, sha256), which comes last: without it there is no
dataset. A file gets its name when it is complete. The bytes depend on the input alone, not on the number of cores:
after a crash the same command starts anew and makes the same files (downloads go on where they broke off).
"""
import argparse
import codecs
import gzip
import hashlib
import heapq
import http.client
import json
import os
import re
import sys
import sysconfig
import urllib.request
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DATA_DIR = "data"
STDLIB = f"standard library of Python {sys.version.split()[0]}"
PILE_URL = "https://huggingface.co/datasets/monology/pile-uncopyrighted/resolve/main/train"
VAL_FRACTION = {"stdlib": 0.1, "pile": 0.005}   # of the documents; any other dataset: 0.01
SHARD_TOKENS = 100_000_000
PIECE = 2 ** 18         # characters; longer documents are encoded in pieces of at most this size
MAX_LINE = 2 ** 25      # bytes; a longer line of a .jsonl file is skipped, so that memory stays bounded
BPE_SAMPLE = 2 ** 24    # characters that a vocabulary is trained on
SCAN = 2 ** 24          # tokens at the start of each shard whose ids are checked whenever it is loaded


class DataError(ValueError):
    """Bad input; the message is one line for the user."""

# -----------------------------------------------------------------------------
# Documents. Each is an iterable of strings, as an enormous one must not be in memory at once.

def stdlib_files():
    """The running Python's own library without its tests: a sorted list of (path in the library, text)."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = [path for path in root.rglob("*.py") if skip.isdisjoint(path.relative_to(root).parts)]
    if not paths:
        raise DataError(f"there are no Python sources in {root}: bring your own text with --files")
    return sorted((path.relative_to(root).as_posix(), path.read_text("utf-8", "replace")) for path in paths)


def documents(source):
    """Yield the documents of STDLIB or of a .jsonl or .txt file (maybe with .gz or .zst after it).

    What cannot be used, a line or a whole .txt file, is yielded as a DataError that names file and line. Raises
    DataError for an archive that is damaged or ends early, and for a file without documents.
    """
    if source == STDLIB:
        yield from ([text] for _, text in stdlib_files())
        return
    try:
        yield from json_documents(source) if ".jsonl" in source else text_document(source)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
        raise DataError(f"{source}: the archive is damaged or ends early: {error}") from None


def open_binary(path):
    """A file object that reads the decompressed bytes."""
    if path.endswith(".zst"):
        return zstd.open(path, options={zstd.DecompressionParameter.window_log_max: 27})    # windows of 128 MiB
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def json_documents(path):
    """One document a line, in the field "text"."""
    good, problem = 0, "it has no lines"
    with open_binary(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), start=1):
            try:
                if len(line) == MAX_LINE:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE)
                    raise DataError(f"longer than {MAX_LINE} bytes")
                text = json_text(line)
            except DataError as error:
                problem = f"{path}:{number}: {error}"
                yield DataError(problem)
            else:
                good += 1
                yield [text]
    if not good:
        raise DataError(f"{path} holds no documents ({problem})")


def json_text(line):
    """The text in one line of a .jsonl file. Raises DataError."""
    try:
        text = json.loads(line.decode("utf-8-sig"))["text"]
        text.encode()                                       # fails if it holds half of a surrogate pair
        return text
    except UnicodeError as error:
        raise DataError(f"invalid UTF-8: {error.reason}") from None
    except (KeyError, TypeError, AttributeError):
        raise DataError('no field "text" with a string') from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"broken JSON: {getattr(error, 'msg', error)}") from None


def text_document(path):
    """The file is one document. It is read twice, so that one with a bad byte at its end is not begun."""
    line = 1
    try:
        for text in decoded(path):
            line += text.count("\n")
    except UnicodeDecodeError as error:
        line += error.object[:error.start].count(b"\n")
        yield DataError(f"{path}:{line}: invalid UTF-8: {error.reason}")
    else:
        yield decoded(path)


def decoded(path):
    """The text of a file in strings of about PIECE characters. Raises UnicodeDecodeError."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with open_binary(path) as file:
        while chunk := file.read(PIECE):
            yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def cut(document):
    """Yield (text, whether it is the last) for the pieces of a document, at most PIECE characters each.

    A piece ends where a space or newline follows another character: no token of GPT-2's pattern crosses such a
    place, so the tokens are those of the whole document. Where half a piece has no such place, it ends anywhere.
    """
    rest, start = "", 0
    for text in document:
        rest, start = rest[start:] + text, 0
        while len(rest) - start > PIECE:
            match = re.compile(r".*\S(?=[ \n])", re.DOTALL).match(rest, start + PIECE // 2, start + PIECE)
            end = match.end() if match else start + PIECE
            yield rest[start:end], False
            start = end
    yield rest[start:], True


def document_is_val(text, val_fraction):
    """Whether a document is for validation, by a hash of its beginning: order and neighbours do not matter."""
    digest = hashlib.blake2b(text[:PIECE // 2].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2 ** 64


def pieces(sources, val_fraction, report):
    """Yield (split, text, whether it is the document's last piece); report(DataError) what cannot be used."""
    for source in sources:
        for document in documents(source):
            if isinstance(document, DataError):
                report(document)
                continue
            split = None
            for text, last in cut(document):
                if split is None:
                    split = "val" if document_is_val(text, val_fraction) else "train"
                yield split, text, last

# -----------------------------------------------------------------------------
# Tokenizers: tiktoken encodings whose last id is end-of-text.

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"     # GPT-2's words


def train_bpe(words, n_tokens):
    """Byte-pair encoding (Sennrich et al. 2016, on bytes as in GPT-2): a list of n_tokens tokens, bytes objects.

    words: {word, a bytes object: how often it occurs}. Start from the 256 bytes; again and again, the most
    frequent pair of neighbouring tokens becomes a new token (of equally frequent ones, the pair with the smallest
    ids). Counts are updated where the pair occurs; a heap entry may be out of date, which is seen when it is popped.
    """
    tokens = [bytes([b]) for b in range(256)]
    words = [(list(word), n) for word, n in words.items()]
    counts, where = Counter(), defaultdict(set)             # of each pair: frequency, indices of words that had it
    for i, (word, n) in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += n
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    while len(tokens) < n_tokens:
        if not heap:
            raise DataError(f"the text has pairs for bpe:{len(tokens) + 1} at most: use a smaller vocabulary")
        n, pair = heapq.heappop(heap)
        if -n != counts[pair]:                              # other merges took some: back, at its true place
            if counts[pair]:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        a, b, new, created = *pair, len(tokens), set()
        tokens.append(tokens[a] + tokens[b])
        for i in where.pop(pair):
            word, n = words[i]
            k = 0
            while k < len(word) - 1:
                if word[k] == a and word[k + 1] == b:
                    word[k:k + 2] = [new]
                    left = [((word[k - 1], a), (word[k - 1], new))] if k > 0 else []
                    right = [((b, word[k + 1]), (new, word[k + 1]))] if k + 1 < len(word) else []
                    for gone, came in left + right:
                        counts[gone] -= n
                        counts[came] += n
                        where[came].add(i)
                        created.add(came)
                k += 1
        counts[pair] = 0
        for came in created:
            heapq.heappush(heap, (-counts[came], came))
    return tokens


def make_tokenizer(name, sources, val_fraction):
    """The tokenizer "gpt2", "bytes" or "bpe:N" as JSON, see `build_encoding`; bpe:N, N ids in all, is trained.

    It learns from documents of the training split at the beginning of each source, an equal share of BPE_SAMPLE
    each. A word counts with its first 256 bytes at most.
    """
    if not name.startswith("bpe:"):
        return {"name": name}
    found, words = Counter(), Counter()
    for source in tqdm(sources, desc=f"training {name}", leave=False, disable=None):
        left = max(1, BPE_SAMPLE // len(sources))
        for split, text, _ in pieces([source], val_fraction, report=lambda error: None):
            if split == "train":
                found.update(regex.findall(PATTERN, text[:left]))
                left -= len(text)
                if left <= 0:
                    break
    for word, n in found.items():
        words[word.encode()[:256]] += n
    tokens = train_bpe(words, n_tokens=int(name[4:]) - 1)
    return {"name": name, "pattern": PATTERN, "tokens": [token.decode("latin-1") for token in tokens]}


def build_encoding(spec):
    """The tiktoken.Encoding of {"name": "gpt2" or "bytes"} or {"name", "pattern", "tokens": bytes as latin-1}."""
    if spec["name"] == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:                          # of requests, or a damaged file in tiktoken's cache
            raise DataError(f"cannot get GPT-2's vocabulary ({type(error).__name__}): tiktoken downloads it once; "
                            "offline, set TIKTOKEN_CACHE_DIR to a copy of its cache") from None
    tokens = [token.encode("latin-1") for token in spec.get("tokens", map(chr, range(256)))]
    return tiktoken.Encoding(spec["name"], pat_str=spec.get("pattern", PATTERN), explicit_n_vocab=len(tokens) + 1,
                             mergeable_ranks={token: i for i, token in enumerate(tokens)},
                             special_tokens={"<|endoftext|>": len(tokens)})


def save_tokenizer(spec, folder):
    """Write folder/tokenizer.json. spec: "gpt2", "bytes", or what `make_tokenizer` returns."""
    write_json(os.path.join(folder, "tokenizer.json"), {"name": spec} if isinstance(spec, str) else spec)


def load_tokenizer(folder):
    """The tiktoken.Encoding of a dataset's or a checkpoint's folder. Raises DataError."""
    path = os.path.join(folder, "tokenizer.json")
    try:
        with open(path) as file:
            return build_encoding(json.load(file))
    except DataError:
        raise
    except Exception as error:                              # also what tiktoken raises for a damaged one
        raise DataError(f"{path} is missing or damaged: {error!r}") from None


def token_bytes(encoding):
    """(n_vocab,) int64, how many bytes of text each id stands for; 0 for end-of-text."""
    return np.array([0 if i == encoding.eot_token else len(encoding.decode_single_token_bytes(i))
                     for i in range(encoding.n_vocab)])

# -----------------------------------------------------------------------------
# Shards

def encode(pieces, encoding):
    """Encode (split, text, last) on all cores: yield (split, ids uint32, bytes of text, last) in the same order.

    Threads, as tiktoken works outside of Python's lock. Text that looks like a special token is text.
    """
    def work(group):
        out = []
        for split, text, last in group:
            ids = encoding.encode_to_numpy(text, disallowed_special=())
            out.append((split, np.append(ids, np.uint32(encoding.eot_token)) if last else ids, len(text.encode()), last))
        return out

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(threads) as pool:
        running, group, size = deque(), [], 0
        for piece in pieces:
            group.append(piece)
            size += len(piece[1])
            if size >= PIECE:                               # a thread gets many small documents at once
                running.append(pool.submit(work, group))
                group, size = [], 0
            if len(running) > 2 * threads:
                yield from running.popleft().result()
        for future in [*running, pool.submit(work, group)]:
            yield from future.result()


class ShardWriter:
    """Appends ids to folder/SPLIT_0000.npy, SPLIT_0001.npy, ... of shard_tokens each; `shards` lists the complete ones."""

    def __init__(self, folder, split, dtype, shard_tokens):
        self.prefix, self.dtype, self.shard_tokens = os.path.join(folder, split), np.dtype(dtype), shard_tokens
        self.file, self.shards = None, []                   # [{"file", "tokens", "sha256"}, ...]

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
        """numpy pads it to the same length whatever the number of tokens, so it can be written again at the end."""
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.tokens,)}
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, header)

    def close(self):
        """Complete the open shard, if there is one."""
        if self.file:
            self.write_header()
            flush_and_close(self.file)
            path = f"{self.prefix}_{len(self.shards):04d}.npy"
            digest = file_sha256(self.file.name)
            os.replace(self.file.name, path)
            self.shards.append({"file": os.path.basename(path), "tokens": self.tokens, "sha256": digest})
            self.file = None
