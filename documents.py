"""
Where text comes from: files of documents, each an iterable of strings;
the split into training and validation.

    list(documents("a.jsonl.zst"))      # one document a line; also .jsonl, .jsonl.gz, .txt, .txt.gz, .txt.zst
    stdlib_files()                      # the running Python's own library: [(path, text), ...]

An enormous document must not be in memory at once, so it is read and cut in pieces. A document belongs to
train or val by a hash of its beginning: the split does not depend on order or on the number of cores.
"""
import codecs
import gzip
import hashlib
import json
import re
import sys
import sysconfig
import zlib
from pathlib import Path

from common import DataError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STDLIB = f"standard library of Python {sys.version.split()[0]}"
PIECE = 2**18           # characters; longer documents are encoded in pieces of at most this size
MAX_LINE = 2**25        # bytes; a longer line of a .jsonl file is skipped, so that memory stays bounded
BPE_SAMPLE = 2**24      # characters that a vocabulary is trained on

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
