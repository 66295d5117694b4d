"""
Where text comes from: documents, each an iterable of strings, and their split into train and val.

    list(documents("a.jsonl.zst"))      # one document per line. Also .jsonl, .txt, each also with .gz or .zst
    stdlib_files()                      # the running Python's own library: [(path, text), ...]
    read_text("a.txt")                  # a whole file as one string

A very large document should not be in memory at once, so it is read and cut in pieces. A document belongs to
train or val by a hash of its beginning: the split does not depend on the order or on the number of cores.
"""
import codecs
import contextlib
import functools
import gzip
import hashlib
import json
import math
import re
import shlex
import sys
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

from common import DataError, WebFile
from tokenizer import PIECE, cut

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STDLIB = f"standard library of Python {sys.version.split()[0]} without encodings"
MAX_LINE = 2**25        # bytes; a longer line of a .jsonl file is skipped, so that memory stays bounded
BPE_SAMPLE = 2**24      # characters that a vocabulary is trained on


class Remote(NamedTuple):
    """A source on the web. What has been read of it is kept in path.part."""
    url: str
    path: str

    def __str__(self):
        return self.url

# -----------------------------------------------------------------------------
# Documents of a source: STDLIB, the path of a file, or a Remote

# Parts of the library that are left out: tests; what is not its own; and `encodings`, character maps that
# are nearly the same in many files, so that validation would find its text in training.
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}

@functools.cache                        # it is read for the split, the vocabulary and the shards
def stdlib_files():
    """The running Python's own library: a sorted list of (path in the library, text)."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if NOT_STDLIB.isdisjoint(relative.parts):
            files.append((relative.as_posix(), path.read_text("utf-8", "replace")))
    if not files:
        raise DataError(f"there are no Python sources in {root}: bring your own text with --files")
    return sorted(files)


def documents(source):
    """Yield the documents of a source: each an iterable of strings.

    What cannot be used, a line or a whole .txt file, is yielded as a DataError that names file and line.
    Raises DataError for an archive that is damaged or ends early, and for a file that holds no document.
    """
    if source == STDLIB:
        for _, text in stdlib_files():
            yield [text]
        return
    is_text = re.search(r"\.txt(\.\w+)?$", str(source))
    with archive_errors(source):
        yield from text_document(source) if is_text else json_documents(source)


@contextlib.contextmanager
def open_binary(source):
    """A file object that reads the decompressed bytes."""
    name = str(source)
    with WebFile(*source) if isinstance(source, Remote) else open(source, "rb") as raw:
        if name.endswith(".zst"):
            options = {zstd.DecompressionParameter.window_log_max: 27}          # 128 MiB
            with zstd.open(raw, options=options) as file:
                yield file
        elif name.endswith(".gz"):
            with gzip.open(raw) as file:
                yield file
        else:
            yield raw


@contextlib.contextmanager
def archive_errors(source):
    """Turns what gzip and zstd raise into a DataError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
        raise DataError(f"{source}: the archive is damaged or ends early: {error}") from None


def json_documents(source):
    """One document per line, in the field "text"."""
    good = 0
    problem = "no lines"
    with open_binary(source) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), start=1):
            if number == 1 and text_encoding(line) not in ("utf-8", "utf-8-sig"):
                raise DataError(f"{source} is {text_encoding(line).upper()}, and .jsonl must be UTF-8: "
                                f"{conversion(text_encoding(line), source)}")
            if line.isspace():
                continue
            try:
                text = json_text(line)
                good += 1
                yield [text]
            except DataError as error:
                problem = f"{source}:{number}: {error}"
                yield DataError(problem)

            # Skip the rest of a line that is too long
            while len(line) == MAX_LINE and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE)
    if not good:
        raise DataError(f"{source} holds no documents ({problem})")


def json_text(line):
    """The text in one line of a .jsonl file. Raises DataError."""
    if len(line) == MAX_LINE:
        raise DataError(f"longer than {MAX_LINE} bytes")
    try:
        text = json.loads(line.decode("utf-8-sig"))["text"]
        text.encode()                                       # fails if it holds half of a surrogate pair
        return text
    except UnicodeDecodeError as error:
        raise DataError(wrong_byte(error, ascii_before=True)) from None
    except UnicodeError as error:
        raise DataError(f"invalid UTF-8: {error.reason}") from None
    except (KeyError, TypeError, AttributeError):
        raise DataError('no field "text" with a string') from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"broken JSON: {getattr(error, 'msg', error)}") from None


def text_document(source):
    """The file is one document. It is read twice: a file with a bad byte anywhere is not used at all."""
    size = 0
    try:
        for text in decoded(source):
            size += len(text)
    except DataError as error:
        yield error
        return
    if not size:
        raise DataError(f"{source} holds no text")
    yield decoded(source)

# -----------------------------------------------------------------------------
# Bytes -> text

def read_text(path):
    """The text of a file (also .gz, .zst) as one string. Line ends stay as they are.

    Raises DataError, one line, for text that is not UTF-8 and has no byte order mark of another encoding.
    """
    with archive_errors(path):
        return "".join(decoded(path))


def decoded(source):
    """Yield the text of a file in strings of about PIECE characters. Raises DataError."""
    with open_binary(source) as file:
        chunk = file.read(PIECE)
        encoding = text_encoding(chunk)
        if encoding in ("utf-16-le", "utf-16-be"):
            raise DataError(f"{source} looks like {encoding.upper()} without a byte order mark: "
                            f"{conversion(encoding, source)}")
        if encoding == "utf-8" and chunk.count(0) > len(chunk) / 4:
            raise DataError(f"{source} is not a text file: it is full of zero bytes")

        # Decode chunk by chunk. At the end an empty one, to see that no character is incomplete
        decoder = codecs.getincrementaldecoder(encoding)()
        line = 1
        ascii_only = True
        final = False
        while not final:
            final = not chunk
            try:
                text = decoder.decode(chunk, final)
            except UnicodeDecodeError as error:
                before = error.object[:error.start]
                line += before.count(b"\n")
                reason = wrong_byte(error, ascii_only)
                if looks_like_latin1(error, ascii_only):
                    reason += f": {conversion('windows-1252', source)}"
                raise DataError(f"{source}:{line}: {reason}") from None
            line += text.count("\n")
            ascii_only = ascii_only and text.isascii()
            yield text
            chunk = file.read(PIECE)


def text_encoding(beginning):
    """The encoding of a text, judged by its first bytes.

    By its byte order mark. Without one by its zero bytes: in UTF-16 every other byte of English text is zero.
    Else it is UTF-8.
    """
    marks = [(codecs.BOM_UTF8, "utf-8-sig"),
             (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),      # before those of UTF-16
             (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")]
    for mark, encoding in marks:
        if beginning.startswith(mark):
            return encoding

    # No mark: where are the zero bytes?
    beginning = beginning[:4096]
    even = beginning[::2].count(0)
    odd = beginning[1::2].count(0)
    quarter = len(beginning) / 4
    if odd > quarter > even:
        return "utf-16-le"
    if even > quarter > odd:
        return "utf-16-be"
    return "utf-8"


def wrong_byte(error, ascii_before):
    """What is wrong at the UnicodeDecodeError. ascii_before: whether the text decoded before is all ASCII."""
    if error.encoding == "utf-8" and b"\0" in error.object:
        return "this is not a text file: it holds zero bytes"
    if looks_like_latin1(error, ascii_before):
        byte = error.object[error.start:error.start + 1]
        character = byte.decode("windows-1252", "replace")
        return (f"invalid UTF-8: byte 0x{byte.hex()} ({character!r} in Latin-1 or Windows-1252, "
                "which this probably is)")
    return f"invalid {error.encoding.upper()}: {error.reason}"


def looks_like_latin1(error, ascii_before):
    """Whether the text is probably Latin-1 (or its superset Windows-1252), not damaged UTF-8.

    In Latin-1 the first character beyond ASCII is already invalid as UTF-8.
    """
    is_first = ascii_before and error.object[:error.start].isascii()
    is_text = error.encoding == "utf-8" and b"\0" not in error.object
    return is_first and is_text and error.reason != "unexpected end of data"


def conversion(encoding, source):
    """The command that makes UTF-8 of a file."""
    unpack = {".gz": "gzip -dc", ".zst": "zstd -dc"}.get(Path(str(source)).suffix, "cat")
    name = {"utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE"}.get(encoding, encoding.upper())
    return f"{unpack} {shlex.quote(str(source))} | iconv -f {name} -t UTF-8 > utf8.txt"

# -----------------------------------------------------------------------------
# Train or val

def document_hash(text):
    """A number from 0 to 2**64 - 1 from the beginning of a document."""
    digest = hashlib.blake2b(text[:PIECE // 2].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def document_is_val(text, val_fraction):
    """Whether a document is for validation: by a hash of its beginning, so its order does not matter."""
    return document_hash(text) < val_fraction * 2**64


class SplitRule(NamedTuple):
    """How documents are split, see `choose_split`."""
    val_fraction: float
    train_characters: int = None        # of a single document: that many are train, the rest is val


def choose_split(sources, val_fraction):
    """The SplitRule by which both splits get text. It depends on the documents, not on their order.

    Usually a document is val if its hash is below val_fraction (of the hashes there are). If all documents
    fall on one side, the fraction is moved just so far that one of them changes sides. A single document is
    cut: its last val_fraction is val.

    Only reads until it has seen a document on each side.
    """
    limit = val_fraction * 2**64
    lowest = math.inf
    highest = -1
    problem = None
    for source in sources:
        for document in documents(source):
            if isinstance(document, DataError):
                problem = problem or document
                continue
            text = next((text for text, _ in cut(document)), "")
            if text:
                number = document_hash(text)
                lowest = min(lowest, number)
                highest = max(highest, number)
                if lowest < limit <= highest:
                    return SplitRule(val_fraction)

    # All documents are on one side
    if highest < 0:
        raise problem or DataError("there is no text in the files")
    if lowest == highest:
        return cut_in_two(sources, val_fraction)
    if lowest >= limit:
        return SplitRule(math.nextafter(lowest / 2**64, 1))     # just above the lowest: it alone is val
    return SplitRule(math.nextafter(highest / 2**64, 0))        # just below the highest: it alone is train


def cut_in_two(sources, val_fraction):
    """The SplitRule of a single document."""
    sizes = []
    for source in sources:
        for document in documents(source):
            if not isinstance(document, DataError):
                sizes.append(sum(map(len, document)))
    sizes = [size for size in sizes if size > 0]
    if len(sizes) > 1:
        raise DataError(f"all {len(sizes)} documents begin alike: they cannot be told apart for the split "
                        "into train and val")

    # At least one character for each split
    size = sizes[0]
    if size < 2:
        raise DataError("the only document has one character: too short for a split into train and val")
    val_characters = min(max(1, round(size * val_fraction)), size - 1)
    return SplitRule(val_fraction, size - val_characters)


def pieces(sources, split, report):
    """Yield (train or val, text, whether it is the document's last piece).

    split: a SplitRule. report(DataError) is called for what cannot be used.
    """
    for source in sources:
        for document in documents(source):
            if isinstance(document, DataError):
                report(document)
            elif split.train_characters is not None:
                yield from two_parts(document, split.train_characters)
            else:
                yield from one_side(document, split.val_fraction)


def one_side(document, val_fraction):
    """The pieces of a document, all of them on the side that its beginning decides."""
    side = None
    for text, last in cut(document):
        if side is None:
            side = "val" if document_is_val(text, val_fraction) else "train"
        yield side, text, last


def two_parts(document, train_characters):
    """The pieces of a document of which the first train_characters are train and the rest is val.

    If a line ends shortly before that place, the cut is there.
    """
    left = train_characters
    for text, last in cut(document):
        if left > len(text):
            yield "train", text, False
            left -= len(text)
        elif left > 0:
            line_end = text.rfind("\n", left * 9 // 10, left) + 1       # 0: no line ends there
            end = line_end if line_end > 0 else left
            yield "train", text[:end], True
            if end < len(text):
                yield "val", text[end:], last
            left = 0
        else:
            yield "val", text, last


def vocabulary_text(sources, split):
    """Yield text of the training split to train a tokenizer on.

    BPE_SAMPLE characters, in equal shares from the start of each source.
    """
    for source in sources:
        left = max(1, BPE_SAMPLE // len(sources))
        for side, text, _ in pieces([source], split, report=lambda error: None):
            if side == "train":
                yield text[:left]
                left -= len(text)
            if left <= 0:
                break
