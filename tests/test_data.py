"""
data.py against brute force: byte-pair encoding, documents, splits, shards, windows, and what it refuses.

    pytest tests/test_data.py               # CPU, no network; what needs ../shared is skipped without it
"""
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import data
import documents
import tokenizer as tokenization
from documents import zstd
from common import DataError

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
    with pytest.raises(DataError, match="tokenizer.json is missing or damaged") as error:
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
    _, splits = data.load("x", tmp_path, full=True)
    assert np.concatenate(splits["val"]).tolist() == ids and isinstance(splits["val"][0], np.memmap)


def test_bytes_do_not_depend_on_the_cores(tmp_path, monkeypatch, corpus):
    set_piece(monkeypatch, 100)
    for cores in (1, 7):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        prepare_small(corpus[0], tmp_path / str(cores))
    assert files_of(tmp_path / "1/x") == files_of(tmp_path / "7/x")


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
    sample = "".join(documents.vocabulary_text([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], 0.5))
    train = [text for text in texts if not documents.document_is_val(text, 0.5)]
    assert sample == "".join(train)[:1000] + "".join(train[::-1])[:1000]


@pytest.mark.parametrize("fraction, message", [(0.001, "no document fell into val: raise --val_fraction"),
                                               (0.999, "no document fell into train: lower --val_fraction")])
def test_empty_split(tmp_path, fraction, message):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    with pytest.raises(DataError, match=message):
        prepare_small([tmp_path / "a.jsonl"], tmp_path, tokenizer="bytes", val_fraction=fraction)
    assert not (tmp_path / "x/meta.json").exists()

# -----------------------------------------------------------------------------
# Interruptions and reruns

def test_stopped_at_any_rename(tmp_path, monkeypatch, corpus):
    """Stop instead of the k-th rename, for every k: complete files only, and a rerun makes the same bytes.

    A file is on the disk before it is renamed.
    """
    on_disk, fsync, replace = set(), os.fsync, os.replace

    def note(file):
        on_disk.add(os.fstat(file).st_ino)
        fsync(file)
    monkeypatch.setattr(os, "fsync", note)
    prepare_small(corpus[0], tmp_path / "undisturbed")
    whole = files_of(tmp_path / "undisturbed/x")
    assert len(whole) == 5                                      # two shards of train, one of val, two .json
    for k in range(len(whole)):
        folder, left = tmp_path / str(k), k
        with monkeypatch.context() as patch:
            def stop(old, new):
                nonlocal left
                assert os.stat(old).st_ino in on_disk
                on_disk.clear()
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                replace(old, new)
            patch.setattr(os, "replace", stop)
            with pytest.raises(KeyboardInterrupt):
                prepare_small(corpus[0], folder)
        there = files_of(folder / "x", but="*.tmp")
        assert len(there) == k and there.items() <= whole.items() and "meta.json" not in there
        with pytest.raises(DataError, match="there is no dataset"):
            data.load("x", folder)
        prepare_small(corpus[0], folder)
        assert files_of(folder / "x") == whole


def test_other_arguments_after_a_stop_leave_nothing_behind(tmp_path, monkeypatch, corpus):
    with monkeypatch.context() as patch:
        patch.setattr(data, "write_json", lambda path, value: None)     # as if stopped just before meta.json
        prepare_small(corpus[0], tmp_path / "a", shard_tokens=500)
    for folder in ("a", "b"):
        prepare_small(corpus[0], tmp_path / folder)
    assert files_of(tmp_path / "a/x") == files_of(tmp_path / "b/x")


@pytest.mark.parametrize("shards_there", [1, 3])
def test_killed(tmp_path, shards_there):
    """kill -9 of the real script while it writes shards."""
    rng = random.Random(0)
    write_jsonl(tmp_path / "a.jsonl", [text_of(rng, 3000) for _ in range(300)])
    command = [sys.executable, ROOT / "data.py", "--dataset", "x", "--files", tmp_path / "a.jsonl",
               "--tokenizer", "bytes", "--val_fraction", "0.1", "--shard_tokens", "50000", "--data_dir"]
    folder = tmp_path / "killed/x"
    process = subprocess.Popen([*command, tmp_path / "killed"], stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(folder.glob("train_*.npy"))) < shards_there:
        time.sleep(0.0005)
    process.kill()
    process.wait()
    assert all(len(np.load(path)) == 50000 for path in folder.glob("train_*.npy"))
    for name in ("killed", "undisturbed"):
        subprocess.run([*command, tmp_path / name], check=True, stdout=subprocess.DEVNULL)
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
                         ("--shard_tokens 5000", "shard_tokens"), (f"--files {corpus[0][0]}", "sources")]:
        assert f"with a different {what}: add --overwrite" in error_of(capsys, *flags, *change.split())
        assert files_of(folder) == first
    data.main([*flags, "--shard_tokens", "5000", "--overwrite"])
    assert len(files_of(folder)) > len(first)
    data.main([*flags, "--overwrite"])
    assert files_of(folder) == first

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
    assert list(documents.pieces([str(tmp_path / "a.jsonl")], 0.5, report.append)) and len(report) == 10
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
    ("--dataset x --files a.txt --shards 1", "pile needs --shards, and no other"),
    ("--files a.txt", "--files need another --dataset name than stdlib"),
    ("--dataset x --files a.txt --tokenizer bpe:256", "at least 257"),
    ("--dataset x --files a.txt --tokenizer bpe:", "the tokenizer is"),
    ("--dataset x --files a.txt --tokenizer gpt4", "the tokenizer is"),
    ("--dataset x --files a.txt --val_fraction 0", "val_fraction is between"),
    ("--dataset x --files a.txt --val_fraction nan", "val_fraction is between"),
    ("--dataset x --files a.txt --shard_tokens 0", "shard_tokens is at least"),
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


def test_load_names_the_command(tmp_path):
    with pytest.raises(DataError, match="python data.py --dataset nowhere"):
        data.load("nowhere", tmp_path)


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

# -----------------------------------------------------------------------------
# The real corpora

@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data.prepare("stdlib", data_dir=folder)
    return folder


def test_stdlib(stdlib):
    files = documents.stdlib_files()
    names = [name for name, _ in files]
    assert names == sorted(names) and "argparse.py" in names and "pydoc_data/topics.py" in names
    assert not any("test" in name.split("/") or "site-packages" in name for name in names)
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
    """One document of 250 MB, with characters that take 4 bytes in memory: its string alone would be 1 GB."""
    with zstd.open(tmp_path / "a.txt.zst", "wb") as file:
        for _ in range(250):
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


def test_two_processes_at_once_make_one_dataset(tmp_path):
    """The second waits for the first, then finds the dataset there."""
    write_jsonl(tmp_path / "a.jsonl", [f"number {i} " * 2000 for i in range(200)])
    command = [sys.executable, ROOT / "data.py", "--dataset", "x", "--files", tmp_path / "a.jsonl",
               "--tokenizer", "bytes", "--data_dir", tmp_path]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = ["already exists" in process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and sorted(found) == [False, True]
    data.load("x", str(tmp_path), full=True)
