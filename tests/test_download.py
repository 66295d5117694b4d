"""
common.fetch and the Pile's preparation against a local HTTP server. CPU, no network.

    pytest tests/test_download.py
"""
import hashlib
import http.server
import json
import random
import socket
import threading

import pytest

import data
import common
from documents import zstd
from common import DataError

CONTENT = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """The first part of the path says how the server behaves, the rest names a file in server.files."""

    def do_GET(self):
        _, how, name = self.path.split("/", 2)
        content, start = self.server.files[name], 0
        self.server.log.append((self.path, self.headers["Range"], self.headers["User-Agent"]))
        if how.isdigit():
            return self.send_error(int(how))
        if how not in ("norange", "nolength") and self.headers["Range"]:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        if how != "nolength":
            self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        stop = 1_700_000 if how == "broken" and not start else len(content)     # only the first time
        self.wfile.write(content[start:stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.log = {"file": CONTENT, "empty": b""}, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("how", ["good", "norange", "nolength"])
def test_download(server, tmp_path, how):
    path = tmp_path / "file"
    common.fetch(f"{server.url}/{how}/file", path, sha256=SHA256, size=len(CONTENT))
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]
    assert server.log[0][1] is None and "Python" not in server.log[0][2]    # WikiText's host refuses Python
    common.fetch(f"{server.url}/{how}/file", path)                                # it is there: no request
    assert len(server.log) == 1


@pytest.mark.parametrize("how, goes_on", [("good", True), ("norange", False), ("nolength", False)])
def test_goes_on_where_it_broke_off(server, tmp_path, how, goes_on):
    """The beginning is marked: it is kept if the server can go on, and replaced if it sends everything."""
    (tmp_path / "file.part").write_bytes(b"mark" + CONTENT[4:1_000_001])
    common.fetch(f"{server.url}/{how}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == (b"mark" if goes_on else CONTENT[:4]) + CONTENT[4:]
    assert [log[1] for log in server.log] == ["bytes=1000001-"]


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_broken_line(server, tmp_path, size):
    path, url = tmp_path / "file", f"{server.url}/broken/file"
    with pytest.raises(DataError, match="broke off at 1700000 of 3000000 bytes|IncompleteRead"):
        common.fetch(url, path, size=size)
    assert not path.exists() and (tmp_path / "file.part").read_bytes() == CONTENT[:1_700_000]
    common.fetch(url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT and [log[1] for log in server.log] == [None, "bytes=1700000-"]


def test_broken_line_is_seen_without_a_length_if_the_size_is_known(server, tmp_path):
    with pytest.raises(DataError, match="broke off at 3000000 of 3000001 bytes"):
        common.fetch(f"{server.url}/nolength/file", tmp_path / "file", size=3_000_001)


@pytest.mark.parametrize("extra", [0, 9])
def test_part_that_is_complete_or_too_long_is_fetched_anew(server, tmp_path, extra):
    (tmp_path / "file.part").write_bytes(bytes(len(CONTENT) + extra))
    common.fetch(f"{server.url}/good/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT and len(server.log) == 2


@pytest.mark.parametrize("expected", [dict(sha256="0" * 64), dict(size=len(CONTENT) - 1)])
def test_another_file(server, tmp_path, expected):
    with pytest.raises(DataError, match="not the expected file"):
        common.fetch(f"{server.url}/good/file", tmp_path / "file", **expected)
    assert list(tmp_path.iterdir()) == []


def test_empty_file(server, tmp_path):
    common.fetch(f"{server.url}/good/empty", tmp_path / "file", sha256=hashlib.sha256().hexdigest())
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("how, message", [("403", "HTTP 403 Forbidden"), ("404", "HTTP 404 Not Found"),
                                          ("500", "HTTP 500")])
def test_http_errors(server, tmp_path, how, message):
    (tmp_path / "file.part").write_bytes(CONTENT[:99])
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
    assert len(pile.log) == 2


def test_pile_over_a_broken_line(pile, tmp_path):
    with pytest.raises(DataError, match="broke off|IncompleteRead"):
        prepare_pile(pile, "broken", tmp_path / "a")
    assert list((tmp_path / "a/pile").iterdir()) == [tmp_path / "a/pile/00.jsonl.zst.part"]
    prepare_pile(pile, "broken", tmp_path / "a")
    prepare_pile(pile, "good", tmp_path / "b")
    assert files_of(tmp_path / "a/pile") == files_of(tmp_path / "b/pile")
    assert [log[1] for log in pile.log] == [None, "bytes=1700000-", None, None, None]


def test_pile_that_is_not_there(pile, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        data.main(["--dataset", "pile", "--shards", "0", "--base_url", f"{pile.url}/404", "--data_dir",
                   str(tmp_path)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err == f"error: {pile.url}/404/00.jsonl.zst: HTTP 404 Not Found\n"
