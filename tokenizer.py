"""
Text -> token ids, by GPT-2's vocabulary, single bytes, or byte-pair encoding trained here.

Each of these tokenizers is a tiktoken.Encoding:

    encoding = load_tokenizer("data/stdlib")            # or a checkpoint's folder, e.g. "out/vlm"
    encode_text(encoding, "def f(x):")                  # ids below encoding.n_vocab, of which the last
                                                        # is end-of-text
"""
import heapq
import json
import os
import re
from collections import Counter, defaultdict

import numpy as np
import regex                    # comes with tiktoken, whose pattern syntax it has
import tiktoken
from tqdm import tqdm

from common import DataError, write_json

# Text is first cut into words, and a token never crosses words. The words are those of GPT-2:
# "I've  2 cats." -> "I" "'ve" " " " 2" " cats" "."
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
PIECE = 2**18                   # characters: a longer text is encoded in pieces of at most this size

# -----------------------------------------------------------------------------
# Byte-pair encoding

def train_bpe(words, n_tokens):
    """Byte-pair encoding (Sennrich et al. 2016; on bytes, as GPT-2).

    Start from the 256 bytes. Again and again, the most frequent pair of neighbouring tokens becomes a new
    token and is merged wherever it occurs. Of equally frequent pairs, the one with the smallest ids is first.

    words: {word as bytes: how often it occurs}. Returns a list of n_tokens bytes objects.

        train_bpe({b"abab": 2, b"abc": 1}, 259)

            abab abab abc       ab occurs 5 times, ba 2, bc 1       256 = ab
            [256][256] twice, [256]c                                257 = [256][256] = abab, 2 times
            [257] twice, [256]c                                     258 = [256]c = abc, 1 time

    The counts are updated only where a pair occurs. So a count in the heap may be out of date, which shows
    when it is popped.
    """
    tokens = [bytes([b]) for b in range(256)]
    ids_of_words = [(list(word), n) for word, n in words.items()]   # [(ids of a word, how often it occurs)]

    # Count every pair, and note which words have it
    counts = Counter()
    where = defaultdict(set)                                    # pair -> words that have or had it
    for i, (word, n) in enumerate(ids_of_words):
        for pair in zip(word, word[1:]):
            counts[pair] += n
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]           # the most frequent first
    heapq.heapify(heap)

    while len(tokens) < n_tokens:
        if not heap or heap[0][0] == 0:
            raise DataError(f"the text has pairs for bpe:{len(tokens) + 1} at most: use a smaller vocabulary")

        # The most frequent pair. If its count is out of date, put it back at its true place
        negative, pair = heapq.heappop(heap)
        if -negative != counts[pair]:
            heapq.heappush(heap, (-counts[pair], pair))
            continue

        # It becomes a token
        new = len(tokens)
        a, b = pair
        tokens.append(tokens[a] + tokens[b])
        created = set()
        for i in where.pop(pair):
            word, n = ids_of_words[i]
            for gone, came in merge(word, pair, new):
                counts[gone] -= n
                counts[came] += n
                where[came].add(i)
                created.add(came)
        counts[pair] = 0
        for came in created:
            heapq.heappush(heap, (-counts[came], came))
    return tokens


def merge(word, pair, new):
    """Replace each `pair` in a list of ids by the id `new`. Returns how the neighbouring pairs changed.

        word = [1, 2, 3, 1, 2];  merge(word, (1, 2), 4)
            ->  word is [4, 3, 4];  [((2, 3), (4, 3)), ((3, 1), (3, 4))]
    """
    a, b = pair
    changes = []
    k = 0
    while k < len(word) - 1:
        if word[k] == a and word[k + 1] == b:
            word[k:k + 2] = [new]
            if k > 0:
                changes.append(((word[k - 1], a), (word[k - 1], new)))
            if k + 1 < len(word):
                changes.append(((b, word[k + 1]), (new, word[k + 1])))
        k += 1
    return changes

# -----------------------------------------------------------------------------
# Text in pieces. The tokenizer needs much memory, or fails, where a text is very long

CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)

def cut(document):
    """Yield (text, whether it is the last) for the pieces of a document, at most PIECE characters each.

    document: an iterable of strings, cut in any way. A piece ends before a space or newline that follows
    another character. No word of PATTERN crosses such a place, so the tokens are those of the whole document.
    (A piece without such a place in its second half ends anywhere.)
    """
    rest = ""
    start = 0
    for text in document:
        rest = rest[start:] + text
        start = 0
        while len(rest) - start > PIECE:
            match = CUT.match(rest, start + PIECE // 2, start + PIECE)
            end = match.end() if match else start + PIECE
            yield rest[start:end], False
            start = end
    if rest:
        yield rest[start:], True


def encode_text(encoding, text):
    """The ids of a text of any length, (n,) uint32, without end-of-text.

    Text that looks like a special token, such as "<|endoftext|>", is text.
    """
    parts = [encoding.encode_to_numpy(piece, disallowed_special=()) for piece, _ in cut([text])]
    return np.concatenate([np.empty(0, dtype=np.uint32), *parts])

# -----------------------------------------------------------------------------
# Tokenizers and their files

def make_tokenizer(name, texts):
    """The tokenizer "gpt2", "bytes" or "bpe:N" as JSON, see `build_encoding`.

    bpe:N has N ids, end-of-text included. It is trained on texts, an iterable of strings (which the others
    do not read), on at most the first 256 bytes of each word.
    """
    if not name.startswith("bpe:"):
        return {"name": name}

    # Count the words
    found = Counter()
    for text in tqdm(texts, desc=f"training {name}", unit=" texts", leave=False, disable=None):
        found.update(regex.findall(PATTERN, text))
    words = Counter()
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
            raise DataError(f"cannot get GPT-2's vocabulary ({type(error).__name__}). It is downloaded "
                            "once. Without a network, --tokenizer bpe:4096 trains one here, or set "
                            "TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache") from None

    # The ids: the tokens in the order of their training, then end-of-text
    tokens = [token.encode("latin-1") for token in spec.get("tokens", map(chr, range(256)))]
    return tiktoken.Encoding(
        spec["name"],
        pat_str=spec.get("pattern", PATTERN),
        mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={"<|endoftext|>": len(tokens)},
        explicit_n_vocab=len(tokens) + 1)


def save_tokenizer(spec, folder):
    """Write folder/tokenizer.json. spec: what `make_tokenizer` returns."""
    write_json(os.path.join(folder, "tokenizer.json"), spec)


def load_tokenizer(folder, vocab_size=None):
    """The tiktoken.Encoding of a dataset's or a checkpoint's folder.

    vocab_size: how many tokens it must have, if it is known. Raises DataError.
    """
    # Read it
    path = os.path.join(folder, "tokenizer.json")
    try:
        with open(path, encoding="utf-8") as file:
            encoding = build_encoding(json.load(file))
    except DataError:
        raise
    except Exception as error:                              # also whatever tiktoken raises for a damaged one
        missing = isinstance(error, FileNotFoundError)
        state = "missing" if missing else f"damaged ({type(error).__name__})"
        raise DataError(f"{path} is {state}. Copy it again: a dataset and the checkpoints trained on it "
                        "have the same one") from None

    # Does it belong to the model?
    if vocab_size is not None and encoding.n_vocab != vocab_size:
        raise DataError(f"{path} is not the one of this training: it has {encoding.n_vocab} tokens, "
                        f"not {vocab_size}")
    return encoding


def token_bytes(encoding):
    """(n_vocab,) int64: how many bytes of text each id stands for. 0 for end-of-text."""
    sizes = np.zeros(encoding.n_vocab, dtype=np.int64)
    for i in range(encoding.n_vocab):
        if i != encoding.eot_token:
            sizes[i] = len(encoding.decode_single_token_bytes(i))
    return sizes
