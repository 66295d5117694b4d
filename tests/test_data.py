"""
data.py against brute force: byte-pair encoding, documents, splits, shards, windows, and what it refuses.

    pytest tests/test_data.py               # CPU, no network; what needs ../shared is skipped without it
"""
import gzip
import hashlib
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import common
import data
import documents
import tokenizer as tokenization
from documents import zstd
from common import DataError
from dev import overlap

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared is not there")


def text_of(rng, n):
    """n random characters, with every kind of white space and width of UTF-8, and text that looks special."""
    alphabet = [*"aaab bc  \n\n\t.'1\x00\x1c\x85\xa0\u2003é中𝄞", "e\u0301", "'ll", "<|endoftext|>"]
    return "".join(rng.choice(alphabet) for _ in range(n))[:n]


def write_jsonl(path, texts):
    """With the compression that the name asks for."""
    content = "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in texts).encode()
    compress = {".gz": gzip.compress, ".zst": zstd.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(content))


def files_of(folder, but=" "):
    """{name: bytes} of a dataset."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if not path.match(but)}


def ids_of(folder, split):
    """All ids of a split, read without data.py."""
    return np.concatenate([np.load(path) for path in sorted(Path(folder).glob(f"{split}_*.npy"))]).tolist()


def set_piece(monkeypatch, piece):
    """Documents are cut, and groups of them encoded, in pieces of this many characters."""
    for module in (tokenization, documents, data):
        monkeypatch.setattr(module, "PIECE", piece)


@pytest.fixture
def corpus(tmp_path):
    """Sixty documents in files of every kind: (paths, texts in order)."""
    rng = random.Random(1)
    texts = [text_of(rng, rng.randrange(1, 400)) for _ in range(60)]
    names = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.txt", "e.txt.gz", "f.txt.zst"]
    for i, name in enumerate(names[:3]):
        write_jsonl(tmp_path / name, texts[19 * i:19 * i + 19])
    for name, compress, text in zip(names[3:], [bytes, gzip.compress, zstd.compress], texts[57:]):
        (tmp_path / name).write_bytes(compress(text.encode()))
    return [str(tmp_path / name) for name in names], texts


def prepare_small(files, data_dir, **changes):
    """The dataset x; returns its meta.json."""
    options = dict(tokenizer="bpe:280", val_fraction=0.3, shard_tokens=4000)
    return data.prepare("x", files=files, data_dir=data_dir, **{**options, **changes})


def error_of(capsys, *flags):
    """What the script prints when it refuses: asserts one line on stderr and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        data.main(list(map(str, flags)))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("error: ") == 1
    assert err.splitlines()[-1].startswith("error: ")
    return err

# -----------------------------------------------------------------------------
# Byte-pair encoding and tokenizers

def naive_bpe(words, n_tokens):
    """The definition: all pairs are counted anew for every token; of equals, the smallest ids."""
    tokens = [bytes([b]) for b in range(256)]
    words = [(list(word), n) for word, n in words.items()]
    while len(tokens) < n_tokens:
        counts = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                counts[pair] += n
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i:i + 2] = [len(tokens) - 1]
                i += 1
    return tokens, {bytes().join(tokens[i] for i in word): word for word, _ in words}


def random_words(rng):
    return {bytes(rng.choices(b"abc", [5, 2, 1], k=rng.randrange(1, 12))): rng.randrange(1, 4)
            for _ in range(60)}


@pytest.mark.parametrize("seed", range(20))
def test_bpe_is_the_naive_one(seed):
    """Few letters and small counts: runs like aaaa, and ties in nearly every step."""
    words = random_words(random.Random(seed))
    assert tokenization.train_bpe(words, 330) == naive_bpe(words, 330)[0]


def test_tiktoken_applies_the_merges_of_the_training():
    words = random_words(random.Random(0))
    tokens, encoded = naive_bpe(words, 330)
    spec = {"name": "x", "tokens": [token.decode("latin-1") for token in tokens]}
    encoding = tokenization.build_encoding(spec)
    assert {word: encoding.encode_ordinary(word.decode()) for word in words} == encoded


def test_bpe_says_when_the_text_is_too_small():
    """abab has the pairs ab, then abab: 258 tokens."""
    assert tokenization.train_bpe({b"abab": 1}, 258)[256:] == [b"ab", b"abab"]
    with pytest.raises(DataError, match="bpe:259 at most"):
        tokenization.train_bpe({b"abab": 1}, 259)


@pytest.mark.parametrize("name", ["bytes", "bpe:257", "bpe:300"])
def test_tokenizer_round_trip(tmp_path, name):
    rng = random.Random(0)
    texts = [text_of(rng, 300) for _ in range(50)] + ["", "\ufeff", "".join(map(chr, range(0x3000)))]
    tokenization.save_tokenizer(tokenization.make_tokenizer(name, texts[:40]), tmp_path)
    encoding = tokenization.load_tokenizer(tmp_path)
    n_vocab = 257 if name == "bytes" else int(name[4:])
    assert (encoding.n_vocab, encoding.eot_token) == (n_vocab, n_vocab - 1)
    sizes = tokenization.token_bytes(encoding)
    assert sizes.shape == (n_vocab,) and sizes[-1] == 0 and sizes[:256].tolist() == [1] * 256
    for text in texts:
        ids = encoding.encode_ordinary(text)
        assert encoding.decode(ids) == text and sizes[ids].sum() == len(text.encode())
        assert max(ids, default=0) < n_vocab - 1
        if name in ("bytes", "bpe:257"):
            assert ids == list(text.encode())


def test_words_are_those_of_gpt2():
    """The training counts the words into which tiktoken will cut: no token is learnt across them."""
    texts = ["ab ab ab\n\nab 12ab"]                             # ab| ab| ab|\n|\n|ab| 12|ab
    assert tokenization.make_tokenizer("bpe:261", texts)["tokens"][256:] == ["ab", " ab", " 1", " 12"]
    with pytest.raises(DataError, match="bpe:261 at most"):
        tokenization.make_tokenizer("bpe:262", texts)


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"name": "x", "tokens": ["a", "a"]}',
                                     '{"name": "x", "tokens": ["中"]}'])
def test_damaged_tokenizer(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="tokenizer.json is (missing|damaged .*). Copy it again") as error:
        tokenization.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_gpt2_that_cannot_be_downloaded(tmp_path, capsys, monkeypatch):
    import requests

    def refuse(name):
        raise requests.exceptions.ConnectionError("no network\nat all")
    monkeypatch.setattr(tokenization.tiktoken, "get_encoding", refuse)
    (tmp_path / "a.txt").write_text("some text")
    error = error_of(capsys, "--dataset", "x", "--files", tmp_path / "a.txt", "--data_dir", tmp_path)
    assert "TIKTOKEN_CACHE_DIR" in error and error.count("\n") == 1

# -----------------------------------------------------------------------------
# Documents -> pieces

@pytest.mark.parametrize("name", ["bytes", "bpe:300", pytest.param("gpt2", marks=needs_shared)])
def test_pieces_have_the_tokens_of_the_document(monkeypatch, name):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    rng = random.Random(0)
    texts = [text_of(rng, 2000) for _ in range(30)]
    texts += ["".join(rng.choices(".\x1ca ", [5, 5, 1, 1], k=2000)) for _ in range(5)]     # a Python space
    encoding = tokenization.build_encoding(tokenization.make_tokenizer(name, texts))
    for piece in (400, 500, 1000):
        set_piece(monkeypatch, piece)
        for text in texts:
            cut = list(tokenization.cut([text]))
            assert [last for _, last in cut] == [False] * (len(cut) - 1) + [True]
            assert "".join(part for part, _ in cut) == text
            assert max(len(part) for part, _ in cut) <= piece
            ids = sum((encoding.encode_ordinary(part) for part, _ in cut), [])
            assert ids == encoding.encode_ordinary(text)
            at = sorted(rng.choices(range(2001), k=40))
            arriving = [text[i:j] for i, j in zip([0] + at, at + [2000])]
            assert list(tokenization.cut(arriving)) == cut         # however it arrives


def test_pieces_of_a_text_without_spaces(monkeypatch):
    set_piece(monkeypatch, 100)
    for text in ["a" * 1001, " " * 1001, "\n" * 1001, "a b" + "c" * 1000]:
        parts = [part for part, _ in tokenization.cut([text])]
        assert "".join(parts) == text and max(map(len, parts)) <= 100
    assert list(tokenization.cut([])) == list(tokenization.cut(["", ""])) == []


def test_split_is_a_function_of_the_document():
    texts = [f"document {i}" for i in range(20000)]
    val = {text for text in texts if documents.document_is_val(text, 0.1)}
    assert abs(len(val) - 2000) < 5 * (20000 * 0.1 * 0.9) ** 0.5                # five standard deviations
    assert {text for text in texts if documents.document_is_val(text, 0.05)} < val
    assert sorted(val)[:3] == ["document 10005", "document 10007", "document 1001"]     # by b2sum -l 64

# -----------------------------------------------------------------------------
# Shards

@pytest.mark.parametrize("tokenizer, shard_tokens", [("bytes", 1000), ("bpe:300", 777), ("bytes", 10**8)])
def test_shards_hold_every_document(tmp_path, monkeypatch, corpus, tokenizer, shard_tokens):
    """Against a list of all tokens, for files of every kind. PIECE is small: a document is many pieces."""
    set_piece(monkeypatch, 100)
    files, texts = corpus
    meta = prepare_small(files, tmp_path, tokenizer=tokenizer, shard_tokens=shard_tokens)
    encoding = tokenization.load_tokenizer(tmp_path / "x")
    assert meta == json.loads((tmp_path / "x" / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"], meta["dtype"]) == (
        tokenizer, encoding.n_vocab, encoding.eot_token, "uint16")
    assert meta["sources"] == files
    for split in ("train", "val"):
        own = [text for text in texts if documents.document_is_val(text, 0.3) == (split == "val")]
        ids = sum((encoding.encode_ordinary(text) + [encoding.eot_token] for text in own), [])
        assert ids_of(tmp_path / "x", split) == ids
        total = meta["splits"][split]
        assert (total["tokens"], total["documents"]) == (len(ids), len(own))
        assert total["bytes"] == sum(len(text.encode()) for text in own)
        assert total["bytes"] == tokenization.token_bytes(encoding)[ids].sum()
        assert [shard["tokens"] for shard in total["shards"]] == [
            min(shard_tokens, len(ids) - i) for i in range(0, len(ids), shard_tokens)]
        for i, shard in enumerate(total["shards"]):
            assert shard["file"] == f"{split}_{i:04d}.npy"
            content = (tmp_path / "x" / shard["file"]).read_bytes()
            assert shard["sha256"] == hashlib.sha256(content).hexdigest()
    counts = np.bincount(ids_of(tmp_path / "x", "train"), minlength=meta["vocab_size"])
    assert np.array_equal(np.load(tmp_path / "x/unigram.npy"), counts)
    want = [math.log((n + 1) / (counts.sum() + len(counts))) for n in counts.tolist()]
    assert np.allclose(data.load_unigram(tmp_path / "x"), want, rtol=1e-12, atol=0)
    assert np.exp(data.load_unigram(tmp_path / "x")).sum() == pytest.approx(1)
    _, splits = data.load("x", tmp_path, full=True)
    assert np.concatenate(splits["val"]).tolist() == ids and isinstance(splits["val"][0], np.memmap)


def test_bytes_do_not_depend_on_the_cores(tmp_path, monkeypatch, corpus):
    set_piece(monkeypatch, 100)
    for cores in (1, 7):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        prepare_small(corpus[0], tmp_path / str(cores))
    assert files_of(tmp_path / "1/x") == files_of(tmp_path / "7/x")


@pytest.mark.parametrize("sizes", [[1] * 25, [9, 1, 9, 1], [10, 10], [11], [0, 35, 0, 5, 0]])
def test_every_shard_but_the_last_is_full(tmp_path, sizes):
    """However the ids arrive, also where a part ends just at, before or after the border."""
    ids = np.arange(sum(sizes), dtype=np.uint32) % 256
    writer = data.ShardWriter(str(tmp_path), "train", 257, shard_tokens=10)
    for part in np.split(ids, np.cumsum(sizes)[:-1]):
        writer.write(part)
    writer.close()
    lengths = [min(10, len(ids) - start) for start in range(0, len(ids), 10)]
    assert [shard["tokens"] for shard in writer.shards] == lengths
    assert ids_of(tmp_path, "train") == ids.tolist()
    assert writer.counts.tolist() == np.bincount(ids, minlength=257).tolist()


def test_ids_are_counted_once():
    """Also where one part of the counting ends and the next begins."""
    ids = np.random.default_rng(0).integers(0, 300, 2**21 + 5).astype(np.uint16)
    assert data.count_ids(ids, 301).tolist() == np.bincount(ids, minlength=301).tolist()


@pytest.mark.parametrize("n_vocab, dtype", [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_dtype_holds_the_vocabulary(tmp_path, monkeypatch, n_vocab, dtype):
    tokens = [chr(i) for i in range(256)] + [chr(i) + chr(j) for i in range(256) for j in range(256)]
    monkeypatch.setattr(data, "make_tokenizer", lambda *_: {"name": "x", "tokens": tokens[:n_vocab - 1]})
    write_jsonl(tmp_path / "a.jsonl", [f"number {i}" for i in range(100)])
    meta = prepare_small([tmp_path / "a.jsonl"], tmp_path)
    assert meta["dtype"] == dtype and meta["eot"] == n_vocab - 1
    assert np.load(tmp_path / "x/train_0000.npy").dtype == dtype
    assert max(ids_of(tmp_path / "x", "val")) == n_vocab - 1


def test_bpe_is_trained_on_the_training_split_of_every_source(tmp_path, monkeypatch):
    """Equal shares: the first file, though it is large, leaves half of the sample to the second."""
    monkeypatch.setattr(documents, "BPE_SAMPLE", 2000)
    set_piece(monkeypatch, 10)
    texts = [" ".join(str(i * j) for j in range(20)) for i in range(200)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_jsonl(tmp_path / "b.jsonl", texts[::-1])
    half = documents.SplitRule(0.5)
    sample = "".join(documents.vocabulary_text([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], half))
    train = [text for text in texts if not documents.document_is_val(text, 0.5)]
    assert sample == "".join(train)[:1000] + "".join(train[::-1])[:1000]


def splits_of(folder, texts, val_fraction, **options):
    """{split: sorted texts} of a dataset of these documents, made of bytes."""
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", texts)
    prepare_small([folder / "a.jsonl"], folder, tokenizer="bytes", val_fraction=val_fraction, **options)
    found = {}
    for split in ("train", "val"):
        parts = bytes(i if i < 256 else 0 for i in ids_of(folder / "x", split)).split(b"\0")[:-1]
        found[split] = sorted(part.decode() for part in parts)
    return found


def test_few_documents_are_dealt(tmp_path):
    """Where the hash gives one side nothing, the document with the lowest (highest) hash changes sides:
    at any fraction both get some, whatever the order. Otherwise the hash alone decides, as it always did."""
    texts = sorted((f"document {i}" for i in range(9)), key=documents.document_hash)
    ranks = [documents.document_hash(text) / 2**64 for text in texts]
    for i, fraction in enumerate([ranks[0] / 2, 0.0001, 0.3, 0.5, 0.9999, (1 + ranks[-1]) / 2]):
        by_hash = sum(rank < fraction for rank in ranks)
        n_val = min(max(by_hash, 1), 8)
        found = splits_of(tmp_path / str(i), texts, fraction)
        assert found == {"val": sorted(texts[:n_val]), "train": sorted(texts[n_val:])}
        assert found == splits_of(tmp_path / f"{i} in reverse", texts[::-1], fraction)


def test_two_documents_always_work(tmp_path):
    for i in range(30):
        found = splits_of(tmp_path / str(i), [f"the first {i}", f"the second {i}"], 0.01)
        assert len(found["train"]) == len(found["val"]) == 1


@pytest.mark.parametrize("val_fraction", [0.001, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("piece", [50, 1000, 10**6])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.zst", "a.jsonl"])
def test_one_document_is_cut(tmp_path, monkeypatch, name, piece, val_fraction):
    """The end is for validation, from the line end before that place if it is near; nothing is lost."""
    set_piece(monkeypatch, piece)
    text = "".join(f"line {i} é\n" for i in range(900))
    if name == "a.jsonl":
        write_jsonl(tmp_path / name, [text])
    else:
        (tmp_path / name).write_bytes({".zst": zstd.compress}.get(Path(name).suffix, bytes)(text.encode()))
    meta = prepare_small([tmp_path / name], tmp_path, tokenizer="bytes", val_fraction=val_fraction)
    train, val = [bytes(ids_of(tmp_path / "x", split)[:-1]).decode() for split in ("train", "val")]
    assert train + val == text and {split["documents"] for split in meta["splits"].values()} == {1}
    assert abs(len(val) - val_fraction * len(text)) <= max(11, 0.1 * piece)
    assert len(val) >= val_fraction * len(text) - 1
    if piece > 50 and 0.01 <= val_fraction < 0.99:
        assert train.endswith("\n")


@pytest.mark.parametrize("train_characters", range(1, 40))
def test_both_parts_of_a_document_end(monkeypatch, train_characters):
    """Wherever the cut is, also just between two pieces: each part has one last piece, and nothing is lost."""
    set_piece(monkeypatch, 10)
    text = "x" * 40
    parts = list(documents.two_parts([text], train_characters))
    train = [(part, last) for side, part, last in parts if side == "train"]
    val = [(part, last) for side, part, last in parts if side == "val"]
    assert "".join(part for part, _ in train) == text[:train_characters]
    assert "".join(part for part, _ in val) == text[train_characters:]
    for part in (train, val):
        assert [last for _, last in part] == [False] * (len(part) - 1) + [True]


@pytest.mark.parametrize("text", ["ab", "a b", "x" * 999, "\n" * 7])
@pytest.mark.parametrize("val_fraction", [1e-6, 0.5, 1 - 1e-6])
def test_one_short_document_is_cut(tmp_path, text, val_fraction):
    found = splits_of(tmp_path / "a", [text], val_fraction)
    assert found["train"][0] and found["val"][0] and found["train"][0] + found["val"][0] == text


@pytest.mark.parametrize("texts, message", [(["a"], "the only document has one character"),
                                            (["same"] * 3, "all 3 documents begin alike")])
def test_documents_that_cannot_be_split(tmp_path, texts, message):
    with pytest.raises(DataError, match=message):
        splits_of(tmp_path / "a", texts, 0.5)
    assert not (tmp_path / "a/x").exists()


def test_split_is_that_of_the_hash_where_it_has_documents_on_both_sides(tmp_path):
    texts = [f"document {i}" for i in range(200)]
    found = splits_of(tmp_path / "a", texts, 0.03)
    assert found["val"] == sorted(text for text in texts if documents.document_is_val(text, 0.03)) != []


def test_max_tokens_of_files(tmp_path, corpus):
    """A prefix of the documents, exact; beyond the end it is all of them."""
    whole = prepare_small(corpus[0], tmp_path / "all", tokenizer="bytes")
    total = sum(split["tokens"] for split in whole["splits"].values())
    for N in (total // 3, total + 10):
        meta = prepare_small(corpus[0], tmp_path / str(N), tokenizer="bytes", max_tokens=N)
        assert sum(split["tokens"] for split in meta["splits"].values()) == min(N, total)
        for split in ("train", "val"):
            ids = ids_of(tmp_path / str(N) / "x", split)
            assert ids == ids_of(tmp_path / "all/x", split)[:len(ids)]
    with pytest.raises(DataError, match="(train|val) has no document.*max_tokens"):
        prepare_small(corpus[0], tmp_path / "few", tokenizer="bytes", max_tokens=2)

@pytest.mark.parametrize("N", range(1, 13))
def test_first_tokens(N):
    """Every border: tokens and bytes are those of the first N, and the document that is cut counts as one."""
    encoding = tokenization.build_encoding({"name": "bytes"})
    parts = [("train", [1, 2], False), ("train", [3, 256], True), ("val", [4, 256], True),
             ("train", [5, 6, 7, 256], True)]
    stream = [(side, np.array(ids, dtype=np.uint32), sum(i < 256 for i in ids), last)
              for side, ids, last in parts]
    found = list(data.first_tokens(iter(stream), N, encoding))
    want = [(side, i) for side, ids, _ in parts for i in ids][:N]
    assert [(side, i) for side, ids, *_ in found for i in ids.tolist()] == want
    assert sum(size for *_, size, _ in found) == sum(i < 256 for _, i in want)
    whole, cut = sum(i == 256 for _, i in want), want[-1][1] != 256
    assert sum(last for *_, last in found) == whole + cut and all(len(ids) for _, ids, *_ in found)

# -----------------------------------------------------------------------------
# Interruptions and reruns

def stop_at_rename(monkeypatch, k):
    """KeyboardInterrupt instead of the k-th os.replace from now on. A file is on the disk before its first."""
    on_disk, left, fsync, replace = set(), k, os.fsync, os.replace

    def note(file):
        on_disk.add(os.fstat(file).st_ino)
        fsync(file)

    def stop(old, new):
        nonlocal left
        assert os.stat(old).st_ino in on_disk
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        replace(old, new)
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", stop)


@pytest.mark.parametrize("old", [False, True])
def test_stopped_at_any_rename(tmp_path, monkeypatch, corpus, old):
    """Stop instead of the k-th rename, for every k, with and without an old dataset of other arguments.

    Until the new one is complete, the old one is there and works, and nothing of the new one is left. From
    then on, the same command again makes the bytes of an undisturbed run.
    """
    prepare_small(corpus[0], tmp_path / "undisturbed")
    whole = files_of(tmp_path / "undisturbed/x")
    assert len(whole) == 6                      # two shards of train, one of val, unigram.npy, two .json
    for k in range(2 * len(whole)):             # each is renamed in the folder `new`, then moved
        folder = tmp_path / str(k)
        if old:
            prepare_small(corpus[0], folder, tokenizer="bytes", shard_tokens=900)
            before = files_of(folder / "x")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at_rename(patch, k)
            prepare_small(corpus[0], folder, overwrite=old)
        if k < len(whole):
            if old:
                assert files_of(folder / "x") == before
                data.load("x", folder, full=True)
            else:
                assert list(folder.iterdir()) == []
        else:
            there = files_of(folder / "x", but=".new") | files_of(folder / "x/.new")
            assert "meta.json" in files_of(folder / "x/.new") and there.items() <= whole.items() | (
                before.items() if old else set())
            with pytest.raises(DataError, match="there is no dataset"):
                data.load("x", folder)
        prepare_small(corpus[0], folder, overwrite=old and k < len(whole))
        assert files_of(folder / "x") == whole
        assert [path.name for path in folder.iterdir()] == ["x"]


@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, capsys, old):
    """A limit on the size of this process's files. An old dataset stays."""
    resource = pytest.importorskip("resource")
    write_jsonl(tmp_path / "a.jsonl", [f"number {i} " * 100 for i in range(100)])
    flags = ["--dataset", "x", "--files", str(tmp_path / "a.jsonl"), "--data_dir", str(tmp_path / "data"),
             "--tokenizer", "bytes", "--val_fraction", "0.5", "--overwrite"]
    if old:
        data.main(flags)
        capsys.readouterr()
        before = files_of(tmp_path / "data/x")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        error = error_of(capsys, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error == (f"error: {tmp_path}/data/x: File too large. "
                     "Nothing incomplete is kept, only downloads\n")
    if old:
        assert files_of(tmp_path / "data/x") == before
        data.load("x", tmp_path / "data", full=True)
    else:
        assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("content", [b'{"text": "good"}\n{"text": "better"}\n' + bytes([0x1f, 0x8b]) * 40, b"x"])
def test_a_failed_overwrite_leaves_the_old_dataset(tmp_path, corpus, content):
    prepare_small(corpus[0], tmp_path)
    before = files_of(tmp_path / "x")
    (tmp_path / "bad.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match="bad.jsonl.gz"):
        prepare_small([*corpus[0], str(tmp_path / "bad.jsonl.gz")], tmp_path, overwrite=True)
    assert files_of(tmp_path / "x") == before
    data.load("x", tmp_path, full=True)


def test_failed_writes_leave_no_temporary_file(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError):
        common.write_atomically(tmp_path / "a", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_other_arguments_after_a_stop_leave_nothing_behind(tmp_path, monkeypatch, corpus):
    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "rmtree", lambda *_, **__: None)     # as if killed before meta.json
        stop_at_rename(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            prepare_small(corpus[0], tmp_path / "a", shard_tokens=2000)
    assert len(files_of(tmp_path / "a/x/.new")) == 5
    for folder in ("a", "b"):
        prepare_small(corpus[0], tmp_path / folder)
    assert files_of(tmp_path / "a/x") == files_of(tmp_path / "b/x")


def test_killed_at_any_rename(tmp_path, monkeypatch, corpus):
    """Nothing is tidied up, as after kill -9: the last file makes it a dataset, with all the others there."""
    prepare_small(corpus[0], tmp_path / "undisturbed")
    whole = files_of(tmp_path / "undisturbed/x")
    for k in range(2 * len(whole)):
        folder = tmp_path / str(k)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(data.shutil, "rmtree", lambda *_, **__: None)
            stop_at_rename(patch, k)
            prepare_small(corpus[0], folder)
        assert not (folder / "x/meta.json").exists()
        assert (folder / "x/.new/meta.json").exists() == (k >= len(whole))
        prepare_small(corpus[0], folder)
        assert files_of(folder / "x") == whole


def test_files_that_are_not_of_a_dataset_stay(tmp_path):
    """Also the text itself, when it is in the dataset's folder."""
    folder = tmp_path / "x"
    (folder / "new").mkdir(parents=True)
    write_jsonl(folder / "new/a.jsonl", ["one text " * 50, "another text " * 50])
    mine = ["train_labels.npy", "train_2024_labels.npy", "notes.tmp"]
    for name in mine:
        (folder / name).write_text("mine")
    prepare_small([folder / "new/a.jsonl"], tmp_path, tokenizer="bytes")
    assert (folder / "new/a.jsonl").exists()
    assert [(folder / name).read_text() for name in mine] == ["mine"] * 3
    data.load("x", str(tmp_path), full=True)


def test_killed(tmp_path):
    """kill -9 of the real script while it writes shards."""
    rng = random.Random(0)
    write_jsonl(tmp_path / "a.jsonl", [text_of(rng, 3000) for _ in range(300)])
    flags = ["--dataset", "x", "--files", str(tmp_path / "a.jsonl"), "--tokenizer", "bytes",
             "--val_fraction", "0.1", "--shard_tokens", "50000", "--data_dir"]
    folder = tmp_path / "killed/x"
    process = subprocess.Popen([sys.executable, ROOT / "data.py", *flags, tmp_path / "killed"],
                               stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(folder.glob(".new/train_*.npy"))) < 2:
        time.sleep(0.0005)
    process.kill()
    process.wait()
    assert all(len(np.load(path)) == 50000 for path in folder.glob(".new/train_*.npy"))
    assert files_of(folder, but=".new") == {}
    for name in ("killed", "undisturbed"):
        data.main([*flags, str(tmp_path / name)])
    assert files_of(folder) == files_of(tmp_path / "undisturbed/x") and len(files_of(folder)) > 10


def test_rerun(tmp_path, capsys, corpus):
    flags = ["--dataset", "x", "--tokenizer", "bytes", "--val_fraction", "0.3", "--data_dir", str(tmp_path),
             "--files", *corpus[0]]
    data.main(flags)
    first, folder = files_of(tmp_path / "x"), tmp_path / "x"
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    data.main(flags)
    assert "already exists" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for change, what in [("--tokenizer bpe:257", "tokenizer"), ("--val_fraction 0.4", "val_fraction"),
                         ("--shard_tokens 5000", "shard_tokens"), ("--max_tokens 9999", "max_tokens"),
                         (f"--files {corpus[0][0]}", "sources")]:
        assert f"differs in {what}: add --overwrite" in error_of(capsys, *flags, *change.split())
        assert files_of(folder) == first
    data.main([*flags, "--shard_tokens", "5000", "--overwrite"])
    assert len(files_of(folder)) > len(first)
    data.main([*flags, "--overwrite"])
    assert files_of(folder) == first

@pytest.mark.parametrize("same_size", [True, False])
def test_a_source_that_changed_is_noticed(tmp_path, capsys, same_size):
    path = tmp_path / "it's.jsonl"
    write_jsonl(path, [f"number {i}" for i in range(100)])
    flags = ["--dataset", "x", "--files", str(path), "--tokenizer", "bytes", "--data_dir", str(tmp_path)]
    data.main(flags)
    meta = json.loads((tmp_path / "x/meta.json").read_text())
    assert meta["contents"] == [{"bytes": path.stat().st_size,
                                 "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}]
    path.write_bytes(path.read_bytes().replace(b"number 7", b"number 8" if same_size else b"another"))
    capsys.readouterr()
    assert f"{path} has changed since: add --overwrite" in error_of(capsys, *flags)
    data.main([*flags, "--overwrite"])
    data.main(flags)


def test_an_old_default_corpus_is_noticed(tmp_path, corpus):
    """Its source was called the same but for `without encodings`."""
    prepare_small(corpus[0], tmp_path, tokenizer="bpe:280", val_fraction=0.1)
    meta = json.loads((tmp_path / "x/meta.json").read_text())
    meta.update(name="stdlib", sources=[documents.STDLIB.removesuffix(" without encodings")],
                tokenizer="bpe:2048", shard_tokens=data.SHARD_TOKENS)
    (tmp_path / "x/meta.json").write_text(json.dumps(meta))
    (tmp_path / "x").rename(tmp_path / "stdlib")
    with pytest.raises(DataError, match="already exists and differs in sources"):
        data.prepare("stdlib", data_dir=tmp_path)

# -----------------------------------------------------------------------------
# Malformed input

def test_bad_lines_are_named_counted_and_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(documents, "MAX_LINE", 1000)
    good = [{"text": f"number {i} é"} for i in range(30)]
    bad = [(b'{"text": "cut', "broken JSON"), (b'["text"]', "no field"), (b'{"txt": "a"}', "no field"),
           (b'7', "no field"), (b'{"text": null}', "no field"), (b'{"text": "\xe9"}', "invalid UTF-8"),
           (b'{"text": "\\ud800"}', "invalid UTF-8"), (b'[' * 999 + b']', "longer"),
           (b'{"text": "' + b'a' * 3000 + b'"}', "longer"), (b'[' * 900, "broken JSON")]
    lines = [json.dumps(line).encode() for line in good]
    for i, (line, _) in enumerate(bad):
        lines.insert(3 * i + 2, line)
    lines.insert(1, b"  ")                                      # an empty line is no error
    lines[0] = b"\xef\xbb\xbf" + lines[0]                       # nor is a byte order mark
    (tmp_path / "a.jsonl").write_bytes(b"\r\n".join(lines))
    meta = prepare_small([tmp_path / "a.jsonl"], tmp_path)
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 6 and err[-1] == "skipped 10 lines or files in all"
    for i, (line, (_, reason)) in enumerate(zip(err[:5], bad)):
        assert line.startswith(f"skipped {tmp_path}/a.jsonl:{3 * i + 4}: {reason}")
    report = []
    half = documents.SplitRule(0.5)
    assert list(documents.pieces([str(tmp_path / "a.jsonl")], half, report.append)) and len(report) == 10
    assert all(reason in str(error) and "\n" not in str(error) for error, (_, reason) in zip(report, bad))
    assert meta["skipped"] == 10 and sum(split["documents"] for split in meta["splits"].values()) == 30


def test_deep_json_is_a_bad_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"[" * 200_000 + b"\n" + b'{"text": "good"}\n')
    bad, good = documents.documents(str(tmp_path / "a.jsonl"))
    assert "a.jsonl:1: broken JSON" in str(bad) and good == ["good"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_file_with_a_bad_byte_is_left_out(tmp_path, monkeypatch, suffix):
    """Whole, also when the byte is far behind the first piece."""
    set_piece(monkeypatch, 100)
    path = tmp_path / f"a.txt{suffix}"
    compress = {".gz": gzip.compress, ".zst": zstd.compress}.get(suffix, bytes)
    path.write_bytes(compress("é\n".encode() * 990 + b"ab\xe9cd\n" + "é\n".encode() * 999))
    (error,) = documents.documents(str(path))
    assert isinstance(error, DataError) and str(error).startswith(f"{path}:991: invalid UTF-8")
    path.write_bytes(compress("é\n".encode() * 999 + "é".encode()[:1]))         # ends within a character
    (error,) = documents.documents(str(path))
    assert str(error).startswith(f"{path}:1000: invalid UTF-8")


FRENCH = "Un été à la mer, déjà vu.\r\nÇa va?\n" * 9


@pytest.mark.parametrize("encoding, mark", [("utf-8", b""), ("utf-8", b"\xef\xbb\xbf"), ("utf-16", b""),
                                            ("utf-16-be", b"\xfe\xff"), ("utf-32", b"")])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("piece", [7, 2**18])
def test_byte_order_marks_are_read(tmp_path, monkeypatch, encoding, mark, suffix, piece):
    set_piece(monkeypatch, piece)
    path = tmp_path / f"a.txt{suffix}"
    compress = {".gz": gzip.compress, ".zst": zstd.compress}.get(suffix, bytes)
    path.write_bytes(compress(mark + FRENCH.encode(encoding)))
    assert documents.read_text(path) == "".join(*documents.documents(str(path))) == FRENCH


@pytest.mark.parametrize("content, message", [
    (FRENCH.encode("latin-1"), r":1: invalid UTF-8: byte 0xe9 \('é' in Latin-1 or Windows-1252, "
                               r"which this probably is\): cat"),
    ("plain\nplain caf\xe9".encode("latin-1") + b" and more", r":2: invalid UTF-8: byte 0xe9"),
    ("plain\n".encode("utf-16-le") * 9, "looks like UTF-16-LE without a byte order mark: cat"),
    ("plain\n".encode("utf-16-be") * 9, "looks like UTF-16-BE without a byte order mark: cat"),
    (FRENCH.encode("utf-16") + b"x", ":19: invalid UTF-16-LE: truncated data"),
    ("é\né".encode() + b"\xe9t", ":2: invalid UTF-8: "),                        # damaged, not Latin-1
    ("“Un été”\n".encode("windows-1252") * 9, r":1: .* byte 0x93 \('“' in Latin-1 or Windows-1252"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), "is not a text file: it holds zero"),
    (bytes(1000), "is not a text file: it is full of zero bytes"),
])
def test_other_encodings_are_named(tmp_path, capsys, content, message):
    path = tmp_path / "it's mine.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        documents.read_text(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    flags = ["--dataset", "x", "--files", path, "--data_dir", tmp_path, "--tokenizer", "bytes"]
    assert str(error.value) in error_of(capsys, *flags)         # the only file: so nothing can be made
    if "| iconv" in str(error.value):                           # the advice works when typed in
        command = str(error.value).partition(": cat ")[2].replace("utf8.txt", "b.txt")
        subprocess.run(f"cat {command}", shell=True, check=True, cwd=tmp_path)
        text = documents.read_text(tmp_path / "b.txt")
        assert text.startswith(("Un été", "“Un été”", "plain"))


def test_jsonl_in_other_encodings(tmp_path):
    line = json.dumps({"text": "un été"}, ensure_ascii=False) + "\n"
    (tmp_path / "a.jsonl").write_bytes(line.encode("utf-16"))
    with pytest.raises(DataError, match="a.jsonl is UTF-16, and .jsonl must be UTF-8"):
        list(documents.documents(str(tmp_path / "a.jsonl")))
    (tmp_path / "a.jsonl").write_bytes(line.encode("latin-1") + line.encode())
    bad, good = documents.documents(str(tmp_path / "a.jsonl"))
    assert "a.jsonl:1: invalid UTF-8: byte 0xe9 ('é' in Latin-1 or" in str(bad) and good == ["un été"]


@pytest.mark.parametrize("name", ["bytes", "bpe:300", pytest.param("gpt2", marks=needs_shared)])
def test_encode_text_of_any_length(monkeypatch, name):
    """tiktoken fails on a million spaces; in pieces it does not. Text that looks special is text."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    sample = "hello world, this is the text. " * 3 + text_of(random.Random(0), 2000)
    encoding = tokenization.build_encoding(tokenization.make_tokenizer(name, [sample]))
    for text in ["", "a", sample, "<|endoftext|>", " " * 2**20, "\n" * 2**20, "a" * 2**20, "é." * 2**19]:
        ids = tokenization.encode_text(encoding, text)
        assert ids.dtype == np.uint32 and encoding.decode(ids.tolist()) == text
        if len(text) < 10**4:
            assert ids.tolist() == encoding.encode_ordinary(text)
    set_piece(monkeypatch, 300)
    assert tokenization.encode_text(encoding, sample).tolist() == encoding.encode_ordinary(sample)


def refusals():
    """name, content, message"""
    text = b'{"text": "' + random.Random(0).randbytes(3000).hex().encode() + b'"}\n'
    packed = zstd.compress(text, options={zstd.CompressionParameter.checksum_flag: 1})
    zipped = gzip.compress(text)
    ends_early = "the archive is damaged or ends early"
    yield from [("a.jsonl", b"", "is empty"), ("a.txt", b"", "is empty"), ("a.jsonl.zst", b"", "is empty"),
                ("a.txt", b"\xef\xbb\xbf", "no text"), ("a.txt.gz", gzip.compress(b""), "no text"),
                ("a.jsonl.gz", gzip.compress(b""), "no documents"), ("a.jsonl", b"\n \n", "no documents"),
                ("a.jsonl", b'{"content": "x"}\n' * 9, 'a.jsonl:9: no field "text"'),
                ("a.csv", b"x", "a.csv is not .jsonl or .txt"), ("a.jsonl.xz", b"x", "is not .jsonl or .txt"),
                ("a.txt", None, "a.txt does not exist")]
    for n in (1, 4, 5, 9, 10, 11, 100, -9, -8, -4, -1):
        yield "a.jsonl.zst", packed[:n], ends_early
        yield "a.jsonl.gz", zipped[:n], ends_early
        yield "a.txt.zst", packed[:n], ends_early
    for whole, name in [(packed, "a.jsonl.zst"), (zipped, "a.jsonl.gz")]:
        yield name, whole[:200] + bytes(100) + whole[300:], ends_early
        yield name, b"this is no archive", ends_early


@pytest.mark.parametrize("name, content, message", list(refusals()))
def test_files_that_are_refused(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    write_jsonl(tmp_path / "good.jsonl", [f"number {i}" for i in range(100)])
    error = error_of(capsys, "--dataset", "x", "--files", tmp_path / "good.jsonl", tmp_path / name,
                     "--tokenizer", "bytes", "--val_fraction", "0.5", "--data_dir", tmp_path)
    assert message in error and name in error and error.splitlines()[-1].count("error") == 1
    assert not (tmp_path / "x/meta.json").exists()


@pytest.mark.parametrize("flags, message", [
    ("--dataset x", "--dataset x needs --files"),
    ("--dataset pile", "--dataset pile needs --shards"),
    ("--dataset x --files a.txt --shards 1", "--shards is for --dataset pile only"),
    ("--files a.txt", "--dataset stdlib takes no --files"),
    ("--dataset x --files a.txt --tokenizer bpe:256", "at least 257"),
    ("--dataset x --files a.txt --tokenizer bpe:", "tokenizer must be"),
    ("--dataset x --files a.txt --tokenizer gpt4", "tokenizer must be"),
    ("--dataset x --files a.txt --val_fraction 0", "val_fraction must be between"),
    ("--dataset x --files a.txt --val_fraction nan", "val_fraction must be between"),
    ("--dataset x --files a.txt --shard_tokens 0", "shard_tokens must be at least"),
    ("--dataset x --files a.txt --tokenizer bpe:5000", "pairs for bpe:"),
    ("--dataset x --check", "there is no dataset"),
])
def test_bad_flags(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text")
    assert message in error_of(capsys, *flags.split())


def test_window_of_128_MiB(tmp_path):
    options = {zstd.CompressionParameter.window_log: 27}
    with zstd.open(tmp_path / "a.jsonl.zst", "wb", options=options) as file:
        file.write(b'{"text": "far"}\n')
    assert zstd.get_frame_info((tmp_path / "a.jsonl.zst").read_bytes()).decompressed_size is None
    with zstd.open(tmp_path / "a.jsonl.zst", "ab", options=options) as file:    # a second frame
        file.write(b'{"text": "farther"}\n')
    assert list(documents.documents(str(tmp_path / "a.jsonl.zst"))) == [["far"], ["farther"]]

# -----------------------------------------------------------------------------
# Loading and windows

@pytest.fixture
def dataset(tmp_path, corpus):
    prepare_small(corpus[0], tmp_path)
    return tmp_path / "x"


def break_shard(path, how):
    ids = np.load(path)
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "header":
        path.write_bytes(path.read_bytes()[:50])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("this is no shard")
    elif how == "pickle":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    elif how == "shorter":
        np.save(path, ids[:-1])
    elif how == "dtype":
        np.save(path, ids.astype(np.uint32))
    elif how == "2-D":
        np.save(path, ids[None])
    elif how == "id":
        ids[len(ids) // 2] = 280
        np.save(path, ids)


@pytest.mark.parametrize("how", ["missing", "truncated", "header", "empty", "text", "pickle", "shorter",
                                 "dtype", "2-D", "id"])
@pytest.mark.parametrize("shard", ["train_0001.npy", "val_0000.npy"])
def test_load_refuses(dataset, capsys, shard, how):
    break_shard(dataset / shard, how)
    with pytest.raises(DataError, match=shard) as error:
        data.load("x", dataset.parent)
    assert "\n" not in str(error.value)
    assert shard in error_of(capsys, "--dataset", "x", "--data_dir", dataset.parent, "--check")


@pytest.mark.parametrize("content", ["", "[]", "{}", "7", '{"dtype": "uint16"}',
                                     '{"dtype": "u", "vocab_size": 1, "splits": {}}'])
def test_load_refuses_meta(dataset, content):
    (dataset / "meta.json").write_text(content)
    with pytest.raises(DataError, match="meta.json is damaged"):
        data.load("x", dataset.parent)


def test_a_dataset_needs_its_tokenizer_and_counts(dataset, capsys):
    """What is missing is noticed by everyone, what does not belong to the shards by --check."""
    flags = ["--dataset", "x", "--data_dir", str(dataset.parent), "--check"]
    tokenizer, counts = (dataset / "tokenizer.json").read_bytes(), np.load(dataset / "unigram.npy")
    (dataset / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="tokenizer.json is damaged: it is missing. Make it again: python"):
        data.load("x", dataset.parent)
    tokenization.save_tokenizer({"name": "bytes"}, dataset)
    data.load("x", dataset.parent)
    assert "tokenizer.json is damaged: it does not have 280 tokens" in error_of(capsys, *flags)
    (dataset / "tokenizer.json").write_bytes(tokenizer)
    data.main(flags)
    capsys.readouterr()
    np.save(dataset / "unigram.npy", np.roll(counts, 1))
    assert "unigram.npy is damaged: it does not count train" in error_of(capsys, *flags)
    (dataset / "unigram.npy").unlink()
    with pytest.raises(DataError, match="unigram.npy is damaged: it is missing. Make it again: python"):
        data.load("x", dataset.parent)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "x/"])
def test_a_name_is_no_path(tmp_path, name):
    """Not `there is no dataset, make it`, as it could not be made."""
    with pytest.raises(DataError, match="is not the name of a folder"):
        data.load(name, tmp_path)
    with pytest.raises(DataError, match="is not the name of a folder"):
        data.prepare(name, ["a.txt"], data_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    """One line that names the place: where a file stands for the folder, and in a read-only folder."""
    write_jsonl(tmp_path / "a.jsonl", [f"number {i}" for i in range(100)])
    (tmp_path / "x").write_text("no folder")
    flags = ["--dataset", "x", "--files", tmp_path / "a.jsonl", "--tokenizer", "bytes", "--data_dir", tmp_path]
    assert error_of(capsys, *flags).startswith(f"error: {tmp_path}/x: File exists. ")
    assert (tmp_path / "x").read_text() == "no folder"

    def refuse(path, *args, **options):
        raise OSError(30, "Read-only file system", str(path))
    monkeypatch.setattr("builtins.open", refuse)
    error = error_of(capsys, *flags)
    assert error.startswith(f"error: {tmp_path}/x.lock: Read-only file system. ")


def test_hints_work_when_typed_in(tmp_path, capsys, monkeypatch):
    """The command in every message, run by a shell as it stands, makes the dataset that was asked for."""
    folder = tmp_path / "my sets; rm"
    folder.mkdir()
    write_jsonl(folder / "it's a file.jsonl", [f"number {i}" for i in range(100)])

    def typed_in(error):
        command = str(error.value).rpartition(": python ")[2]
        assert command and "\n" not in command
        return subprocess.run(f"{sys.executable} {command}", shell=True, cwd=ROOT, text=True,
                              capture_output=True)

    # A default dataset that is missing. (Its making is tested elsewhere, here the command as such)
    with pytest.raises(DataError, match="there is no dataset .*existing ones: none") as error:
        data.load("stdlib", folder)
    assert str(error.value).endswith(f"python data.py --dataset stdlib --data_dir '{folder}'")
    monkeypatch.chdir(folder)
    for same in ("data", folder / "data"):                  # the default, as train.py gives it
        with pytest.raises(DataError) as error:
            data.load("stdlib", same)
        assert str(error.value).endswith("python data.py --dataset stdlib")
    monkeypatch.undo()

    # The Pile, in a size that one would want
    with pytest.raises(DataError) as error:
        data.load("pile", folder)
    args = data.build_parser().parse_args(shlex.split(str(error.value).partition("python data.py ")[2]))
    assert (args.dataset, args.shards, args.data_dir) == ("pile", [0], str(folder)) and args.max_tokens

    # One's own: the file has to be named
    flags = ["--dataset", "x", "--files", str(folder / "it's a file.jsonl"), "--data_dir", str(folder),
             "--tokenizer", "bpe:259", "--shard_tokens", "200", "--val_fraction", "0.2"]
    data.main(flags)
    capsys.readouterr()
    before = files_of(folder / "x")
    with pytest.raises(DataError, match="existing ones: x") as error:
        data.load("nope", folder)
    assert "--dataset nope --files FILE.txt --data_dir" in str(error.value)
    command = shlex.split(str(error.value).partition("python data.py ")[2])
    assert "FILE.txt does not exist" in error_of(capsys, *command)

    # A damaged one: the same again
    (folder / "x/train_0001.npy").write_bytes(b"")
    with pytest.raises(DataError, match="is damaged") as error:
        data.load("x", folder)
    assert typed_in(error).returncode == 0 and files_of(folder / "x") == before


def test_load_reads_little(dataset, monkeypatch):
    """200 shards at the start of every process: 64 thousand ids of each, the rest with --check."""
    assert data.SCAN * 4 * 200 < 60e6
    monkeypatch.setattr(data, "SCAN", 100)
    ids = np.load(dataset / "train_0000.npy")
    ids[101] = 280
    np.save(dataset / "train_0000.npy", ids)
    data.load("x", dataset.parent)
    ids[99] = 280
    np.save(dataset / "train_0000.npy", ids)
    with pytest.raises(DataError, match="beyond the vocabulary"):
        data.load("x", dataset.parent)


@pytest.mark.parametrize("content", [b"", b"no array", np.array([1.5])])
def test_load_unigram_refuses(tmp_path, content):
    with pytest.raises(DataError, match="unigram.npy does not exist"):
        data.load_unigram(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "unigram.npy").write_bytes(content)
    else:
        np.save(tmp_path / "unigram.npy", content)
    with pytest.raises(DataError, match="unigram.npy is damaged"):
        data.load_unigram(tmp_path)


def test_check(dataset, capsys, monkeypatch):
    flags = ["--dataset", "x", "--data_dir", str(dataset.parent), "--check"]
    data.main(flags)
    assert "is intact" in capsys.readouterr().out
    ids = np.load(dataset / "train_0001.npy")
    other = ids.copy()
    other[5] = (other[5] + 1) % 279
    np.save(dataset / "train_0001.npy", other)
    data.load("x", dataset.parent)                              # cannot be seen without reading it all
    assert "train_0001.npy is damaged: its sha256" in error_of(capsys, *flags)
    ids[1300] = 280
    np.save(dataset / "train_0001.npy", ids)
    monkeypatch.setattr(data, "SCAN", 1000)
    monkeypatch.setattr(data, "CHUNK", 1000)
    data.load("x", dataset.parent)
    assert "beyond the vocabulary of 280" in error_of(capsys, *flags)


def test_windows_are_all_windows():
    """Window number i of the list of all, for every i; a window never goes from one shard into the next."""
    rng = np.random.default_rng(0)
    for lengths in [[10], [3, 10, 1, 2, 7], [4, 4], [2, 9, 2]]:
        shards = [rng.integers(0, 60000, n).astype(np.uint16) for n in lengths]
        for span in (1, 3, 4):
            every = [shard[i:i + span] for shard in shards for i in range(len(shard) - span + 1)]
            W = len(every)
            assert data.check_window(shards, span).sum() == W
            for offset in (0.01, 0.5, 0.99):
                x = data.windows(shards, span, (np.arange(W) + offset) / W)
                assert x.dtype == np.int64 and x.shape == (W, span) and np.array_equal(x, every)
            assert np.array_equal(data.windows(shards, span, np.array([np.nextafter(1, 0)])), every[-1:])


def test_windows_are_uniform():
    """Chi-square over 60 windows, within five standard deviations (df 59, variance 2 df)."""
    shards = [np.arange(0, 23), np.arange(100, 145)]
    first = data.windows(shards, 5, np.random.default_rng(0).random(60_000))[:, 0]
    counts = np.unique(first, return_counts=True)[1]
    assert len(counts) == 60 and abs(((counts - 1000) ** 2 / 1000).sum() - 59) < 5 * (2 * 59) ** 0.5


def test_corpus_shorter_than_a_window():
    shards = [np.arange(5), np.arange(7)]
    assert data.windows(shards, 7, np.array([0.5])).tolist() == [list(range(7))]
    for refuses in (data.check_window, lambda shards, span: data.windows(shards, span, np.array([0.5]))):
        with pytest.raises(DataError, match=r"7 tokens in its longest shard.* shorter than a window of 8"):
            refuses(shards, 8)

@pytest.mark.parametrize("split", ["train", "val"])
def test_message_names_the_split_that_is_too_short(split):
    with pytest.raises(DataError, match=rf"{split} \(5 tokens in its longest shard\) is shorter"):
        data.check_window([np.arange(5)], 8, split)

# -----------------------------------------------------------------------------
# Overlap of the splits

def naive_overlap(train, val, eot):
    """The definition, with tuples."""
    n = overlap.GRAM
    known = {tuple(train[i:i + n]) for i in range(len(train) - n + 1)}
    copied = [False] * len(val)
    for i in range(len(val) - n + 1):
        if tuple(val[i:i + n]) in known:
            copied[i:i + n] = [True] * n
    found, document = [], []
    for token, flag in zip(val, copied):
        if token == eot:
            found.append(document)
            document = []
        else:
            document.append(flag)
    return found + [document] * (val[-1] != eot)


@pytest.mark.parametrize("last", [199, 198])
def test_overlap_is_the_naive_one(last):
    rng = np.random.default_rng(0)
    eot = 5
    train, val = rng.integers(0, 5, 500), rng.integers(0, 5, 200)
    val[20:50] = train[100:130]
    val[80:93] = train[-13:]                                    # just one run
    val[100:112] = train[20:32]                                 # one token too few
    val[[99, 112]] = (train[[19, 32]] + 1) % 5
    val[150:180] = train[:30]
    val[[35, 75, last]] = eot                                   # the last document: complete, or cut
    found = overlap.overlap(train.astype(np.uint16), val.astype(np.uint16), eot)
    want = naive_overlap(train.tolist(), val.tolist(), eot)
    assert [part.tolist() for part in found] == want
    assert [sum(part) for part in want][:3] == [15, 14, 43]


def test_overlap_names_the_copies(tmp_path, capsys):
    rng = random.Random(0)
    texts = [" ".join(str(rng.randrange(10**6)) for _ in range(60)) for _ in range(40)]
    train = [text for text in texts if not documents.document_is_val(text, 0.3)]
    copies = [text for text in (f"copy {i} of {train[0]}" for i in range(99))
              if documents.document_is_val(text, 0.3)][:1]
    write_jsonl(tmp_path / "a.jsonl", texts + copies)
    prepare_small([tmp_path / "a.jsonl"], tmp_path, tokenizer="bytes")
    capsys.readouterr()
    overlap.main(["--dataset", "x", "--data_dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert re.search(r"share +tokens +document\n9\d\.\d% +\d+  'copy \d", out)
    assert re.search(r"documents with more than 50%: 1 \(", out)

# -----------------------------------------------------------------------------
# The real corpora

@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data.prepare("stdlib", data_dir=folder)
    return folder


@pytest.mark.slow
def test_stdlib(stdlib):
    files = documents.stdlib_files()
    names = [name for name, _ in files]
    assert names == sorted(names) and "argparse.py" in names and "pydoc_data/topics.py" in names
    left_out = {"test", "site-packages", "encodings"}
    assert not any(left_out & set(name.split("/")) for name in names)
    meta, splits = data.load("stdlib", stdlib, full=True)
    encoding = tokenization.load_tokenizer(stdlib / "stdlib")
    assert (meta["tokenizer"], meta["vocab_size"], encoding.n_vocab) == ("bpe:2048", 2048, 2048)
    assert 5e6 < sum(split["bytes"] for split in meta["splits"].values()) < 30e6
    for split in ("train", "val"):
        ids = np.concatenate(splits[split])
        parts = np.split(ids, np.flatnonzero(ids == meta["eot"]) + 1)[:-1]      # each with its end-of-text
        own = [text for _, text in files if text and documents.document_is_val(text, 0.1) == (split == "val")]
        assert [encoding.decode(part[:-1]) for part in parts] == own
        assert meta["splits"][split]["tokens"] < meta["splits"][split]["bytes"] / 2.5


@pytest.mark.slow
def test_another_stdlib_is_noticed(stdlib, monkeypatch):
    """A library with the same version and other text: a patched one, or that of another installation."""
    data.prepare("stdlib", data_dir=stdlib)
    other = [*data.stdlib_files()[:-1], ("zipp.py", "pass\n")]
    monkeypatch.setattr(data, "stdlib_files", lambda: other)
    with pytest.raises(DataError, match="already exists, and standard library .* has changed since"):
        data.prepare("stdlib", data_dir=stdlib)


@pytest.mark.slow
def test_stdlib_has_no_twins_across_the_split(stdlib, capsys):
    """Without encodings 7 % of the tokens of val are in runs of 13 that also occur in train (English text:
    7 % too), with encodings it was 20 %."""
    overlap.print_overlap("stdlib", stdlib)
    out = capsys.readouterr().out
    share = float(re.search(r"all \d+ documents: ([\d.]+)% of the tokens", out)[1])
    copied = float(re.search(r"more than 50%: .* with ([\d.]+)% of the tokens", out)[1])
    assert share < 12 and copied < 3

    # Each line has the document's own name
    encoding, texts = tokenization.load_tokenizer(stdlib / "stdlib"), dict(documents.stdlib_files())
    lines = re.findall(r"^ *[\d.]+% +([\d,]+)  (\S+\.py)$", out, flags=re.M)
    assert len(lines) == 15
    for tokens, name in lines:
        assert int(tokens.replace(",", "")) == len(tokenization.encode_text(encoding, texts[name]))


@needs_shared
def test_minipile(tmp_path, monkeypatch):
    """Against encode_ordinary and the numbers of its README: 604 documents, 814,424 GPT-2 tokens."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    path = str(SHARED / "minipile/val.jsonl.zst")
    meta = data.prepare("mini", files=[path], val_fraction=0.2, data_dir=tmp_path)
    totals = meta["splits"].values()
    assert sum(t["documents"] for t in totals) == 604 and sum(t["tokens"] for t in totals) == 814_424 + 604
    encoding = tokenization.load_tokenizer(tmp_path / "mini")
    with zstd.open(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    val = [encoding.encode_ordinary(text) + [50256] for text in texts if documents.document_is_val(text, 0.2)]
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == ("gpt2", 50257, "uint16")
    assert ids_of(tmp_path / "mini", "val") == sum(val, [])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(),
                    reason="the peak memory of a process is read from /proc")
def test_memory_is_bounded(tmp_path):
    """One document of 150 MB, with characters that take 4 bytes in memory: its string alone would be 600 MB."""
    with zstd.open(tmp_path / "a.txt.zst", "wb") as file:
        for _ in range(150):
            file.write(("the cat 𝄞 sat on the mat\n" * 40_000)[:1_000_000 - 12_000].encode())
    write_jsonl(tmp_path / "b.jsonl", [f"number {i}" for i in range(100)])
    code = ("import re, sys, data; data.main(sys.argv[1:]); "       # ru_maxrss would count the parent's too
            "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024)")
    flags = ["--dataset", "x", "--data_dir", tmp_path, "--tokenizer", "bpe:300", "--val_fraction", "0.5",
             "--files", tmp_path / "a.txt.zst", tmp_path / "b.jsonl"]
    out = subprocess.check_output([sys.executable, "-c", code, *flags], cwd=ROOT, text=True)
    assert int(out.split()[-1]) < 500                           # MiB


def test_every_flag_has_help():
    assert all(action.help for action in data.build_parser()._actions)
    subprocess.run([sys.executable, "data.py", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_two_processes_at_once_make_one_dataset(tmp_path):
    """The second waits for the first, then finds the dataset there."""
    write_jsonl(tmp_path / "a.jsonl", [f"number {i} " * 2000 for i in range(200)])
    command = [sys.executable, ROOT / "data.py", "--dataset", "x", "--files", tmp_path / "a.jsonl",
               "--tokenizer", "bytes", "--data_dir", tmp_path]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = ["already exists" in process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and sorted(found) == [False, True]
    data.load("x", str(tmp_path), full=True)


@pytest.mark.parametrize("tokens, n", [(2048, 1), (3 * 2048, 3), (3 * 2048 + 2047, 3), (10 * 2048, 10)])
def test_few_tokens_come_from_everywhere(tokens, n):
    shards = [np.arange(4 * 2048 + 100), np.arange(50_000, 50_000 + 6 * 2048)]
    pieces = data.few(shards, tokens)
    assert [len(piece) for piece in pieces] == [2048] * n
    starts = [int(piece[0]) for piece in pieces]
    assert len(set(starts)) == n and starts == sorted(starts)
    assert all((np.diff(piece) == 1).all() for piece in pieces)                     # one stretch of one shard
    numbers = [start // 2048 if start < 50_000 else 4 + (start - 50_000) // 2048 for start in starts]
    assert np.abs(np.array(numbers) - np.arange(n) * 10 / n).max() < 1              # evenly spread


def test_a_group_for_a_thread_is_as_large_as_a_piece():
    """data.py has a length of its own for `few`: it must not take the name of the tokenizer's."""
    assert data.PIECE == tokenization.PIECE > data.STRETCH


def test_few_tokens_of_too_few():
    for tokens in (1, 2047, 4 * 2048):
        with pytest.raises(data.DataError, match="train_tokens must be between 2048 and 6144"):
            data.few([np.arange(3 * 2048 + 5)], tokens)
