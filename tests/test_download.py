"""
common.fetch and the Pile's preparation against a local HTTP server. CPU, no network.

    pytest tests/test_download.py
"""
import hashlib
import http.server
import json
import os
import random
import socket
import threading
import time

import numpy as np
import pytest

import data
import common
import documents
from documents import zstd
from common import DataError

CONTENT = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """The first part of the path says how the server behaves, the rest names a file in server.files.

    server.version: of the files, part of their ETags. server.sent: bytes of content that were sent.
    """

    def do_GET(self):
        _, how, name = self.path.split("/", 2)
        content, start = self.server.files[name], 0
        etag = f'"{name} {self.server.version}"'
        self.server.log.append((self.path, self.headers["Range"], self.headers["User-Agent"]))
        if how.isdigit():
            return self.send_error(int(how))
        same = self.headers["If-Range"] in (None, etag) or how == "noifrange"
        if how not in ("norange", "nolength") and self.headers["Range"] and same:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        if how == "chunked":                                                    # no length, and then it breaks
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            return self.wfile.write(b"5\r\nhello\r\n")
        if how not in ("noetag", "nolength"):
            self.send_header("ETag", etag)
        if how != "nolength":
            self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        stop = 1_700_000 if how == "broken" and not start else len(content)     # only the first time
        try:
            for at in range(start, stop, 2**16):
                self.wfile.write(content[at:min(at + 2**16, stop)])
                self.server.sent += min(2**16, stop - at)
                time.sleep(0.002 if how == "slow" else 0)
        except OSError:                                                         # they have read enough
            pass

    def log_message(self, *args):
        pass


def leave_part(folder, content, etag='"file 1"', size=len(CONTENT)):
    """As a download of `file` that broke off leaves it."""
    (folder / "file.part").write_bytes(content)
    (folder / "file.part.json").write_text(json.dumps({"etag": etag, "size": size}))


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.log, server.sent, server.version = {"file": CONTENT, "empty": b""}, [], 0, 1
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("how", ["good", "norange", "nolength"])
def test_download(server, tmp_path, how):
    path = tmp_path / "file"
    common.fetch(f"{server.url}/{how}/file", path, sha256=SHA256)
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]
    assert server.log[0][1] is None and "Python" not in server.log[0][2]    # WikiText's host refuses Python
    common.fetch(f"{server.url}/{how}/file", path)                                # it is there: no request
    assert len(server.log) == 1


def test_a_download_is_on_the_disk_before_it_has_its_name(server, tmp_path, monkeypatch):
    on_disk, fsync, replace = set(), os.fsync, os.replace

    def note(file):
        on_disk.add(os.fstat(file).st_ino)
        fsync(file)

    def check(old, new):
        assert os.stat(old).st_ino in on_disk
        replace(old, new)
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    common.fetch(f"{server.url}/good/file", tmp_path / "file")


@pytest.mark.parametrize("how, resumes", [("good", True), ("norange", False), ("nolength", False)])
def test_resumes(server, tmp_path, how, resumes):
    """The beginning is marked: it is kept if the server can resume, and replaced if it sends everything."""
    leave_part(tmp_path, b"mark" + CONTENT[4:1_000_001])
    common.fetch(f"{server.url}/{how}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == (b"mark" if resumes else CONTENT[:4]) + CONTENT[4:]
    assert [log[1] for log in server.log] == ["bytes=1000001-"] + [None] * (not resumes)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("how", ["good", "noifrange", "noetag"])
def test_part_of_another_file_is_not_resumed(server, tmp_path, how):
    """By its ETag, also if the server ignores If-Range, or without one by its size."""
    with pytest.raises(DataError, match="stopped at 1700000 of 3000000 bytes"):
        common.fetch(f"{server.url}/broken/file", tmp_path / "file")
    if how == "noetag":
        leave_part(tmp_path, CONTENT[:1_700_000], etag=None)
    changed = random.Random(1).randbytes(len(CONTENT) - (how == "noetag"))
    server.files["file"], server.version = changed, 2
    common.fetch(f"{server.url}/{how}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == changed and list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_part_of_which_nothing_is_known_is_not_resumed(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"part of what?")
    common.fetch(f"{server.url}/good/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT and [log[1] for log in server.log] == [None]


def test_one_of_many_downloads(server, tmp_path):
    """Many want the same file: one downloads it, the others wait and find it."""
    errors = []

    def work():
        try:
            common.fetch(f"{server.url}/slow/file", tmp_path / "file", sha256=SHA256)
        except Exception as error:
            errors.append(error)
    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors and len(server.log) == 1
    assert (tmp_path / "file").read_bytes() == CONTENT and list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_who_waited_for_a_lock_holds_one(tmp_path):
    """The first removes the lock file at its end: who waited for it must not hold a file that is gone."""
    seen = []

    def wait():
        with common.lock(tmp_path / "file.lock"):
            seen.append((tmp_path / "file.lock").exists())
    with common.lock(tmp_path / "file.lock"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.2)
        assert not seen
    waiting.join()
    assert seen == [True] and list(tmp_path.iterdir()) == []


def test_broken_line(server, tmp_path):
    path, url = tmp_path / "file", f"{server.url}/broken/file"
    with pytest.raises(DataError, match="stopped at 1700000 of 3000000 bytes"):
        common.fetch(url, path)
    assert not path.exists() and (tmp_path / "file.part").read_bytes() == CONTENT[:1_700_000]
    common.fetch(url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT and [log[1] for log in server.log] == [None, "bytes=1700000-"]


def test_broken_line_without_a_length(server, tmp_path):
    with pytest.raises(DataError, match="chunked/file: stopped at 0 bytes .*resume"):
        common.fetch(f"{server.url}/chunked/file", tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_part_that_is_too_long_is_fetched_again(server, tmp_path):
    leave_part(tmp_path, bytes(len(CONTENT) + 9))
    common.fetch(f"{server.url}/good/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT and len(server.log) == 2


def test_part_that_is_complete_needs_no_request(server, tmp_path):
    leave_part(tmp_path, CONTENT)
    common.fetch(f"{server.url}/good/file", tmp_path / "file", sha256=SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT and not server.log


def test_another_file(server, tmp_path):
    with pytest.raises(DataError, match="not the expected file"):
        common.fetch(f"{server.url}/good/file", tmp_path / "file", sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_empty_file(server, tmp_path):
    common.fetch(f"{server.url}/good/empty", tmp_path / "file", sha256=hashlib.sha256().hexdigest())
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("how, message", [("403", "HTTP 403 Forbidden"), ("404", "HTTP 404 Not Found"),
                                          ("500", "HTTP 500")])
def test_http_errors(server, tmp_path, how, message):
    leave_part(tmp_path, CONTENT[:99])
    with pytest.raises(DataError, match=f"/{how}/file: {message}") as error:
        common.fetch(f"{server.url}/{how}/file", tmp_path / "file")
    assert "\n" not in str(error.value) and (tmp_path / "file.part").read_bytes() == CONTENT[:99]


def test_no_server(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x"
    for url, message in [(url, "refused"), ("nonsense", "unknown url"), ("http://127.0.0.1:x/", "port")]:
        with pytest.raises(DataError, match=message) as error:
            common.fetch(url, tmp_path / "file")
        assert url in str(error.value) and "\n" not in str(error.value)

# -----------------------------------------------------------------------------
# The Pile

@pytest.fixture
def pile(server):
    """Two parts; the first is large enough for the line to break."""
    for number, n in [(0, 2000), (7, 300)]:
        rng = random.Random(number)
        texts = [{"text": rng.randbytes(1000).hex(), "meta": {"pile_set_name": "Hex"}} for _ in range(n)]
        content = "".join(json.dumps(text) + "\n" for text in texts).encode()
        server.files[f"{number:02d}.jsonl.zst"] = zstd.compress(content, level=1)
    assert len(server.files["00.jsonl.zst"]) > 1_900_000
    return server


def prepare_pile(server, how, folder, **options):
    return data.prepare("pile", shards=[0, 7], tokenizer="bytes", val_fraction=0.1, data_dir=folder,
                        base_url=f"{server.url}/{how}", **options)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "meta.json"}


def test_pile(pile, tmp_path):
    meta = prepare_pile(pile, "good", tmp_path)
    assert [log[0] for log in pile.log] == ["/good/00.jsonl.zst", "/good/07.jsonl.zst"]
    assert meta["sources"] == [f"{pile.url}/good/00.jsonl.zst", f"{pile.url}/good/07.jsonl.zst"]
    assert sum(split["documents"] for split in meta["splits"].values()) == 2300
    prepare_pile(pile, "good", tmp_path)                                        # is there
    prepare_pile(pile, "good", tmp_path, overwrite=True)                        # does not download again
    prepare_pile(pile, "good", tmp_path, overwrite=True, max_tokens=100_000)    # nor is it streamed
    assert len(pile.log) == 2


def test_pile_over_a_broken_line(pile, tmp_path):
    with pytest.raises(DataError, match="stopped at 1700000 of"):
        prepare_pile(pile, "broken", tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a/pile").iterdir()) == [
        "00.jsonl.zst.part", "00.jsonl.zst.part.json"]
    prepare_pile(pile, "broken", tmp_path / "a")
    prepare_pile(pile, "good", tmp_path / "b")
    assert files_of(tmp_path / "a/pile") == files_of(tmp_path / "b/pile")
    assert [log[1] for log in pile.log] == [None, "bytes=1700000-", None, None, None]


@pytest.fixture(scope="module")
def large_shard():
    """30 MB of zstd: what the kernel buffers of a connection is little beside it."""
    rng = random.Random(3)
    with_names = ({"text": f"{i} " + rng.randbytes(5000).hex()} for i in range(6000))
    return zstd.compress("".join(json.dumps(text) + "\n" for text in with_names).encode(), level=1)


def prepare_tokens(server, how, folder, max_tokens, **options):
    return data.prepare("pile", shards=[0], tokenizer="bytes", val_fraction=0.05, data_dir=folder,
                        max_tokens=max_tokens, base_url=f"{server.url}/{how}", **options)


def ids_of(folder):
    _, splits = data.load("pile", folder, full=True)
    return {side: np.concatenate(shards).tolist() for side, shards in splits.items()}


def test_max_tokens_stops_the_download(server, tmp_path, large_shard):
    """Exactly N tokens, those of the first documents; the same bytes again; little more is sent than needed."""
    server.files["00.jsonl.zst"] = large_shard
    N = 1_234_567
    meta = prepare_tokens(server, "slow", tmp_path / "a", N)
    time.sleep(0.2)                                             # until the server sees that we hung up
    assert server.sent < len(large_shard) / 2
    assert sum(total["tokens"] for total in meta["splits"].values()) == N
    on_disk = [path.stat().st_size for path in (tmp_path / "a/pile").glob("*.zst*")]
    assert len(on_disk) == 2 and sum(on_disk) < 4_000_000

    # The documents in order, with end-of-text 256 after each, the last one cut
    want, left = {"train": [], "val": []}, N
    for line in zstd.decompress(large_shard[:]).splitlines():
        text = json.loads(line)["text"]
        side = "val" if documents.document_is_val(text, 0.05) else "train"
        ids = [*text.encode(), 256][:left]
        want[side] += ids
        left -= len(ids)
        if not left:
            break
    assert ids_of(tmp_path / "a") == want
    assert meta["splits"]["train"]["bytes"] == sum(i != 256 for i in want["train"])
    assert meta["splits"]["val"]["bytes"] == sum(i != 256 for i in want["val"])

    prepare_tokens(server, "slow", tmp_path / "b", N)
    assert files_of(tmp_path / "b/pile") == files_of(tmp_path / "a/pile")
    requests = len(server.log)
    prepare_tokens(server, "slow", tmp_path / "b", N, overwrite=True)           # what was read is still there
    assert len(server.log) == requests
    assert files_of(tmp_path / "b/pile") == files_of(tmp_path / "a/pile")


def test_max_tokens_over_a_broken_line(server, tmp_path, large_shard):
    server.files["00.jsonl.zst"] = large_shard
    with pytest.raises(DataError, match="stopped at 1700000 of .* Run the same command again"):
        prepare_tokens(server, "broken", tmp_path / "a", 3_000_000)
    assert not (tmp_path / "a/pile/meta.json").exists()
    prepare_tokens(server, "broken", tmp_path / "a", 3_000_000)
    prepare_tokens(server, "good", tmp_path / "b", 3_000_000)
    assert ids_of(tmp_path / "a") == ids_of(tmp_path / "b")
    assert [log[1] for log in server.log] == [None, "bytes=1700000-", None]


def test_max_tokens_of_a_shard_that_changed_meanwhile(server, tmp_path, large_shard):
    """The beginning that we have does not fit what follows: say so, and start again the next time."""
    server.files["00.jsonl.zst"] = large_shard
    with pytest.raises(DataError, match="stopped at 1700000"):
        prepare_tokens(server, "broken", tmp_path, 3_000_000)
    server.version = 2
    with pytest.raises(DataError, match="has changed or cannot be resumed"):
        prepare_tokens(server, "good", tmp_path, 3_000_000)
    meta = prepare_tokens(server, "good", tmp_path, 3_000_000)
    assert sum(total["tokens"] for total in meta["splits"].values()) == 3_000_000


def test_max_tokens_beyond_the_end(pile, tmp_path):
    """All there is; a second time without a request."""
    meta = prepare_tokens(pile, "good", tmp_path, 10**9)
    assert sum(total["documents"] for total in meta["splits"].values()) == 2000
    first = files_of(tmp_path / "pile")
    prepare_tokens(pile, "good", tmp_path, 10**9, overwrite=True)
    assert files_of(tmp_path / "pile") == first and len(pile.log) == 1


def test_pile_that_is_not_there(pile, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        data.main(["--dataset", "pile", "--shards", "0", "--base_url", f"{pile.url}/404", "--data_dir",
                   str(tmp_path)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err == f"error: {pile.url}/404/00.jsonl.zst: HTTP 404 Not Found\n"
