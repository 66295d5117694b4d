"""
Tokenizers: GPT-2's vocabulary, bytes, or byte-pair encoding trained here. Each is a tiktoken encoding.

    encoding = load_tokenizer("data/stdlib")            # or a checkpoint's folder, e.g. "out/vlm"
    encoding.encode_ordinary("def f(x):")               # ids, below encoding.n_vocab; the last is end-of-text
"""
import heapq
import json
import os
from collections import Counter, defaultdict

import numpy as np
import regex                    # comes with tiktoken, whose pattern syntax it has
import tiktoken
from tqdm import tqdm

from common import DataError, write_json

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
