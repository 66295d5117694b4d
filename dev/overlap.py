"""
How much of the validation text also occurs in the training text? A model may remember it.

    python dev/overlap.py                                   # of the default corpus
    python dev/overlap.py --dataset mine --documents 50

A token of val counts as copied if it lies in a run of 13 tokens that also occurs in train. Prints the share
of copied tokens for the documents with the largest one, and for the whole split. Memory: about 30 bytes per
token.
"""
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # so that it runs as `python dev/overlap.py`

from common import DataError, Parser, one_line_errors               # noqa: E402
from data import DATA_DIR, load                                     # noqa: E402
from documents import STDLIB, document_is_val, stdlib_files         # noqa: E402
from tokenizer import load_tokenizer                                # noqa: E402

GRAM = 13               # tokens in a run

def overlap(train, val, eot):
    """For each document of val, which of its tokens lie in a run of GRAM tokens that also occurs in train.

    train, val: (n,) ids of all documents. Returns a list of (n,) bool, one per document, without end-of-text.
    """
    # Which runs of val occur in train. Different runs have the same number by chance once in 2**64
    known = np.sort(gram_hashes(train))
    hashes = gram_hashes(val)                                                       # (n - GRAM + 1,)
    found = np.searchsorted(known, hashes) < np.searchsorted(known, hashes, side="right")

    # Which tokens lie in them
    copied = np.zeros(len(val), dtype=bool)
    for offset in range(GRAM):
        copied[offset:offset + len(found)] |= found
    return split_documents(copied, val, eot)


def split_documents(values, ids, eot):
    """Cut values, (n,), one per token, into those of each document, without its end-of-text."""
    starts = np.flatnonzero(ids == eot) + 1
    documents = []
    for part, text in zip(np.split(values, starts), np.split(ids, starts)):
        if len(text):                                               # nothing follows the last end-of-text
            documents.append(part[text != eot])
    return documents


def gram_hashes(ids):
    """(n - GRAM + 1,) uint64, a hash of every run of GRAM tokens: a polynomial modulo 2**64."""
    ids = ids.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(max(0, len(ids) - GRAM + 1), dtype=np.uint64)
    for offset in range(GRAM):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[offset:offset + len(hashes)]
    return hashes


def print_overlap(name, data_dir, shown=15):
    """The documents of val with the most text that also stands in train, and the share of all of it."""
    folder = os.path.join(data_dir, name)
    meta, shards = load(name, data_dir)
    train = np.concatenate(shards["train"])
    val = np.concatenate(shards["val"])
    copied = overlap(train, val, meta["eot"])
    names = document_names(folder, meta, val)

    print(f"{folder}: tokens of val in runs of {GRAM} tokens that also occur in train\n")
    print("share   tokens  document")
    shares = np.array([part.mean() for part in copied])
    tokens = np.array([len(part) for part in copied])
    order = np.argsort(-shares, kind="stable")
    for i in order[:shown]:
        share = f"{shares[i]:.1%}"
        size = f"{tokens[i]:,}"
        print(share.rjust(5), size.rjust(8), "", names[i])

    total = np.concatenate(copied).mean()
    print(f"\nall {len(copied)} documents: {total:.1%} of the tokens")
    for limit in (0.5, 0.2):
        above = shares > limit
        documents = f"{above.sum()} ({above.mean():.1%})"
        share = tokens[above].sum() / tokens.sum()
        print(f"documents with more than {limit:.0%}: {documents}, with {share:.1%} of the tokens")


def document_names(folder, meta, val):
    """For each document of val, its path in the standard library, or else its first characters."""
    if meta["sources"] == [STDLIB]:
        files = [(path, text) for path, text in stdlib_files() if text]
        return [path for path, text in files if document_is_val(text, meta["val_fraction"])]
    encoding = load_tokenizer(folder)
    beginnings = [ids[:16].tolist() for ids in split_documents(val, val, meta["eot"])]
    return [repr(encoding.decode(ids)) for ids in beginnings]

# -----------------------------------------------------------------------------
# Command line

def build_parser():
    p = Parser(__doc__.split("\n\n")[0])
    p.add_argument("--dataset", default="stdlib", metavar="NAME", help="its folder in DATA_DIR")
    p.add_argument("--data_dir", default=DATA_DIR, help="folder of all datasets")
    p.add_argument("--documents", type=int, default=15, metavar="N",
                   help="how many documents to show, those with the largest share first")
    return p


def main(argv=None):
    args = build_parser().parse_args(argv)
    with one_line_errors(DataError, OSError):
        print_overlap(args.dataset, args.data_dir, args.documents)


if __name__ == "__main__":
    main()
