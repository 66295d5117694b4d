"""
Text -> documents -> tokens -> memory-mapped shards -> windows. numpy only: nothing here needs torch.

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
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

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
PIECE = 2**18           # characters; longer documents are encoded in pieces of at most this size
MAX_LINE = 2**25        # bytes; a longer line of a .jsonl file is skipped, so that memory stays bounded
BPE_SAMPLE = 2**24      # characters that a vocabulary is trained on
SCAN = 2**24            # tokens at the start of each shard whose ids are checked whenever it is loaded


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
    """Yield the documents of STDLIB or of a .jsonl or .txt file (also with .gz or .zst after it).

    What cannot be used, a line or a whole .txt file, is yielded as a DataError that names file and line.
    Raises DataError for an archive that is damaged or ends early, and for a file that holds no document.
    """
    if source == STDLIB:
        yield from ([text] for _, text in stdlib_files())
        return
    try:
        yield from text_document(source) if re.search(r"\.txt(\.\w+)?$", source) else json_documents(source)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
        raise DataError(f"{source}: the archive is damaged or ends early: {error}") from None


def open_binary(path):
    """A file object that reads the decompressed bytes."""
    if path.endswith(".zst"):
        return zstd.open(path, options={zstd.DecompressionParameter.window_log_max: 27})  # 128 MiB
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def json_documents(path):
    """One document a line, in the field "text"."""
    good, problem = 0, "no lines"
    with open_binary(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), start=1):
            if line.isspace():
                continue
            try:
                text = json_text(line)
                good += 1
                yield [text]
            except DataError as error:
                problem = f"{path}:{number}: {error}"
                yield DataError(problem)
            while len(line) == MAX_LINE and not line.endswith(b"\n"):   # the rest of a line that is too long
                line = file.readline(MAX_LINE)
    if not good:
        raise DataError(f"{path} holds no documents ({problem})")


def json_text(line):
    """The text in one line of a .jsonl file. Raises DataError."""
    if len(line) == MAX_LINE:
        raise DataError(f"longer than {MAX_LINE} bytes")
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
    line, size = 1, 0
    try:
        for text in decoded(path):
            line, size = line + text.count("\n"), size + len(text)
    except UnicodeDecodeError as error:
        line += error.object[:error.start].count(b"\n")
        yield DataError(f"{path}:{line}: invalid UTF-8: {error.reason}")
        return
    if not size:
        raise DataError(f"{path} holds no text")
    yield decoded(path)


def decoded(path):
    """The text of a file in strings of about PIECE characters. Raises UnicodeDecodeError."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with open_binary(path) as file:
        while chunk := file.read(PIECE):
            yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)

def cut(document):
    """Yield (text, whether it is the last) for the pieces of a document, at most PIECE characters each.

    A piece ends before a space or newline that follows another character: no word of PATTERN crosses such a
    place, so the tokens are those of the whole document. (Without one in its second half it ends anywhere.)
    """
    rest, start = "", 0
    for text in document:
        rest, start = rest[start:] + text, 0
        while len(rest) - start > PIECE:
            match = CUT.match(rest, start + PIECE // 2, start + PIECE)
            end = match.end() if match else start + PIECE
            yield rest[start:end], False
            start = end
    if rest:
        yield rest[start:], True


def document_is_val(text, val_fraction):
    """Whether a document is for validation: by a hash of its beginning, so its order does not matter."""
    digest = hashlib.blake2b(text[:PIECE // 2].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2**64


def pieces(sources, val_fraction, report):
    """Yield (split, text, whether it is the document's last piece); report(DataError) what cannot be used."""
    for source in sources:
        for document in documents(source):
            if isinstance(document, DataError):
                report(document)
                continue
            split = None
            for text, last in cut(document):
                split = split or ("val" if document_is_val(text, val_fraction) else "train")
                yield split, text, last


def sample(sources, val_fraction):
    """Yield text of the training split: BPE_SAMPLE characters, equal shares from the start of each source."""
    for source in sources:
        left = max(1, BPE_SAMPLE // len(sources))
        for split, text, _ in pieces([source], val_fraction, report=lambda error: None):
            if split == "train":
                yield text[:left]
                left -= len(text)
            if left <= 0:
                break

# -----------------------------------------------------------------------------
# Tokenizers: tiktoken encodings whose last id is end-of-text.

# Tokens never cross words, which are those of GPT-2.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def train_bpe(words, n_tokens):
    """Byte-pair encoding (Sennrich et al. 2016; on bytes, as GPT-2): a list of n_tokens bytes objects.

    words: {word as bytes: how often it occurs}. Start from the 256 bytes; again and again, the most frequent
    pair of neighbouring tokens becomes a new token (of equals, the pair with the smallest ids). Counts are
    updated where the pair occurs; a heap entry may be out of date, which shows when it is popped.
    """
    tokens = [bytes([b]) for b in range(256)]
    words = [(list(word), n) for word, n in words.items()]
    counts, where = Counter(), defaultdict(set)             # of a pair: frequency, words that hold or held it
    for i, (word, n) in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += n
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    while len(tokens) < n_tokens:
        if not heap or heap[0][0] == 0:
            raise DataError(f"the text has pairs for bpe:{len(tokens) + 1} at most: use a smaller vocabulary")
        n, pair = heapq.heappop(heap)
        if -n != counts[pair]:                              # other merges took some: back, at its true place
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


def make_tokenizer(name, texts):
    """The tokenizer "gpt2", "bytes" or "bpe:N" as JSON, see `build_encoding`.

    bpe:N has N ids, end-of-text included, and is trained on texts, an iterable of strings (which the others
    leave alone), on at most the first 256 bytes of each word.
    """
    if not name.startswith("bpe:"):
        return {"name": name}
    found, words = Counter(), Counter()
    for text in tqdm(texts, desc=f"training {name}", unit=" texts", leave=False, disable=None):
        found.update(regex.findall(PATTERN, text))
    for word, n in found.items():
        words[word.encode()[:256]] += n
    tokens = train_bpe(words, n_tokens=int(name[4:]) - 1)
    return {"name": name, "pattern": PATTERN, "tokens": [token.decode("latin-1") for token in tokens]}


def build_encoding(spec):
    """The tiktoken.Encoding of {"name": "gpt2" or "bytes"}, or {"name", "pattern", "tokens" in latin-1}."""
    if spec["name"] == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:                          # whatever requests raises
            raise DataError(f"cannot get GPT-2's vocabulary ({type(error).__name__}). It is downloaded once; "
                            "offline, set TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache") from None
    tokens = [token.encode("latin-1") for token in spec.get("tokens", map(chr, range(256)))]
    return tiktoken.Encoding(spec["name"], pat_str=spec.get("pattern", PATTERN),
                             mergeable_ranks={token: i for i, token in enumerate(tokens)},
                             special_tokens={"<|endoftext|>": len(tokens)}, explicit_n_vocab=len(tokens) + 1)


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
    except Exception as error:                              # also whatever tiktoken raises for a damaged one
        raise DataError(f"{path} is missing or damaged: {error!r}") from None


def token_bytes(encoding):
    """(n_vocab,) int64, how many bytes of text each id stands for; 0 for end-of-text."""
    return np.array([0 if i == encoding.eot_token else len(encoding.decode_single_token_bytes(i))
                     for i in range(encoding.n_vocab)])

# -----------------------------------------------------------------------------
# Shards

def encode(pieces, encoding):
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
        for piece in pieces:
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


def close_on_disk(file):
    file.flush()
    os.fsync(file.fileno())
    file.close()


def write_json(path, value):
    with open(f"{path}.tmp", "w") as file:
        json.dump(value, file, indent=1)
        close_on_disk(file)
    os.replace(file.name, path)


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


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
    if os.path.exists(os.path.join(folder, "meta.json")) and not overwrite:
        meta, _ = load(name, data_dir)
        changed = ", ".join(key for key in wanted if meta.get(key) != wanted[key])
        if changed:
            raise DataError(f"{folder} is there already, with other {changed}: add --overwrite to replace it")
        print(f"{folder} is there already")
        return meta
    os.makedirs(folder, exist_ok=True)
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
        if not os.path.isfile(path) or not os.path.getsize(path):
            raise DataError(f"{path} is empty" if os.path.isfile(path) else f"{path} is not there")


def write_dataset(folder, sources, wanted):
    """Tokenize the sources; returns meta.json, which is `wanted` and what is known at the end."""
    spec = make_tokenizer(wanted["tokenizer"], sample(sources, wanted["val_fraction"]))
    encoding = build_encoding(spec)
    save_tokenizer(spec, folder)
    dtype = "uint16" if encoding.n_vocab <= 2**16 else "uint32"
    splits = ("train", "val")
    writers = {split: ShardWriter(folder, split, dtype, wanted["shard_tokens"]) for split in splits}
    totals = {split: Counter(tokens=0, bytes=0, documents=0) for split in splits}
    skipped = 0

    def report(error):
        nonlocal skipped
        skipped += 1
        if skipped <= 5:
            tqdm.write(f"skipped {error}", file=sys.stderr)

    with tqdm(desc="tokenizing", unit="B", unit_scale=True, disable=None) as bar:
        for split, ids, size, last in encode(pieces(sources, wanted["val_fraction"], report), encoding):
            writers[split].write(ids)
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
# Download

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
    try:
        if only_check:
            load(name, args["data_dir"], full=True)
            print(f"{os.path.join(args['data_dir'], name)} is as it was made")
        else:
            prepare(name, **args)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
