"""
The texts that perplexity is measured on, in a checkpoint's vocabulary: WikiText-2, a validation split or a
file. Their documents, and windows of them.

    text = texts.from_file("book.txt", encoding)
    windows = texts.cut_windows(text, T=128, limit=500, eot=encoding.eot_token)     # ids (500, 129)
    document, unit = texts.clusters(windows.document)                   # (500, 128), "documents"
    n_bytes, n_words = texts.token_sizes(windows.ids, encoding)         # (500, 128), (500, 128)
"""
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
import tokenizer
from common import DataError, check_dataset, download_into, fetch, file_sha256, unzip
from documents import read_text


class Text(NamedTuple):
    """A text in a checkpoint's vocabulary."""
    name: str                           # wikitext-2, val, or FILE-DIGEST
    sha256: str                         # of the text, or of the dataset's meta.json
    streams: list                       # arrays of token ids
    starts: list                        # for each stream, where a new document begins: sorted places


class Windows(NamedTuple):
    """n windows of T tokens, each after the one token before it."""
    ids: np.ndarray                     # (n, 1 + T) int64
    document: np.ndarray                # (n, T) the number of the document that a token belongs to

# -----------------------------------------------------------------------------
# The texts

def from_file(path, encoding, name=None):
    """The Text of a UTF-8 file. Raises ValueError or OSError, one line."""
    text = read_text(path)
    sha256 = file_sha256(path)
    ids = tokenizer.encode_text(encoding, text).astype(np.int64)
    starts = article_starts(text, ids, encoding)
    name = name or f"{Path(path).stem}-{sha256[:8]}"
    return Text(name, sha256, [ids], [starts])


def validation_split(folder, checkpoint, encoding):
    """The Text of the validation split of the dataset in `folder`. End-of-text parts its documents.

    Raises DataError if it is not the dataset that the checkpoint, a folder, was trained on.
    """
    _, splits = data.load(folder.name, str(folder.parent))
    check_dataset(folder, checkpoint)               # else val may hold what the model was trained on
    starts = [np.flatnonzero(ids == encoding.eot_token) + 1 for ids in splits["val"]]
    return Text("val", file_sha256(folder / "meta.json"), splits["val"], starts)


WIKITEXT_URL = "https://wikitext.smerity.com/wikitext-2-raw-v1.zip"
WIKITEXT_SHA256 = "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"
WIKITEXT_TEST_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"   # wiki.test.raw


def wikitext(folder, encoding):
    """The Text of WikiText-2's raw test split. Downloaded to `folder` if it is missing. Raises DataError."""
    path = Path(folder, "wiki.test.raw")
    if not path.exists():
        archive = Path(folder, "wikitext-2-raw-v1.zip")
        with download_into(folder, "without a network: --val, or --text FILE"):
            if not path.exists():                           # another process may have been faster
                fetch(WIKITEXT_URL, str(archive), sha256=WIKITEXT_SHA256)
                unzip(archive, {"wikitext-2-raw/wiki.test.raw": path})
                archive.unlink()
    if file_sha256(path) != WIKITEXT_TEST_SHA256:
        raise DataError(f"{path} is not the official file: remove it (rm {shlex.quote(str(path))}), "
                        f"or use it as it is (--text {shlex.quote(str(path))})")
    return from_file(path, encoding, name="wikitext-2")


# The title of a WikiText article: with an empty line before and after it. Sections have " = = "
TITLE = re.compile(r"(?:\A|^ ?\n)( = [^=\n]+ = )\n ?\n", re.MULTILINE)


def article_starts(text, ids, encoding):
    """Places in ids where an article of WikiText begins, see TITLE. Other texts have none: an empty array."""
    # Bytes before each article
    titles = [match.start(1) for match in TITLE.finditer(text)]
    parts = [text[start:end] for start, end in zip([0, *titles], titles)]
    places = np.cumsum([len(part.encode()) for part in parts])

    # Bytes before each token
    sizes = tokenizer.token_bytes(encoding)[ids]
    return np.searchsorted(np.cumsum(sizes) - sizes, places)

# -----------------------------------------------------------------------------
# Windows, and what is in them

def cut_windows(text, T, limit, eot):
    """Windows of T tokens, each after the one token before it (`eot` at the start of a stream).

    They do not overlap or cross from one stream into the next. A stream's last tokens, fewer than T, are
    not used. If there are more than `limit` windows (0: no limit), that many are taken, evenly spread. Raises
    ValueError if there are none.
    """
    # Where they begin: (stream number, place)
    places = []
    for number, stream in enumerate(text.streams):
        places += [(number, start) for start in range(0, len(stream) - T + 1, T)]
    if not places:
        raise ValueError(f"the text has {sum(map(len, text.streams))} tokens, less than one window of {T} "
                         "(block_size)")
    n = min(len(places), limit or len(places))
    middles = (2 * np.arange(n) + 1) * len(places) // (2 * n)       # of n equal parts
    chosen = [places[i] for i in middles]

    # A document may go on in the next stream: its number is that of the starts before it, in all streams
    earlier = np.cumsum([0, *map(len, text.starts)])
    ids = np.empty((n, 1 + T), dtype=np.int64)
    document = np.empty((n, T), dtype=np.int64)
    for i, (number, start) in enumerate(chosen):
        stream = text.streams[number]
        ids[i, 0] = stream[start - 1] if start else eot
        ids[i, 1:] = stream[start:start + T]
        place = np.arange(start, start + T)
        begun = np.searchsorted(text.starts[number], place, side="right")       # (T,)
        document[i] = earlier[number] + begun
    return Windows(ids, document)


def clusters(document):
    """Which tokens are independent of which: (n, T), each token's cluster, from 0, and what a cluster is.

    document: see `Windows`. Clusters are "documents". If there is only one, they are "windows", the rows.
    """
    found, number = np.unique(document, return_inverse=True)
    if len(found) > 1:
        return number.reshape(document.shape), "documents"
    return np.indices(document.shape)[0], "windows"


def token_sizes(ids, encoding):
    """Bytes and words of the original text in each token, (n, T) and (n, T). ids: (n, 1 + T).

    Words are parted by white space and counted in the token they start in. End-of-text parts words and has
    no bytes.
    """
    text = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    text[encoding.eot_token] = b" "
    words = np.array([len(t.split()) for t in text])                # (n_vocab,)
    begins_in_word = np.array([not t[:1].isspace() for t in text])
    ends_in_word = np.array([not t[-1:].isspace() for t in text])

    token = ids[:, 1:]
    before = ids[:, :-1]
    continued = begins_in_word[token] & ends_in_word[before]        # its first word started earlier
    return tokenizer.token_bytes(encoding)[token], words[token] - continued
