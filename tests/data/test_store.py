"""Where files are looked for, and fetching them from servers that are slow, wrong or gone."""

import hashlib
import http.server
import threading
import time

import numpy as np
import pytest

from plywise.data import store
from plywise.data.store import Remote, cache_decoded, fetch, find_file, list_folders
from plywise.errors import PlywiseError

CONTENT = b"a data set" * 1000
HASH = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        body = {"/wrong": b"<html>a login page</html>", "/cut": CONTENT[:-1]}.get(self.path, CONTENT)
        if self.path == "/gone":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)) if self.path != "/wrong" else str(len(body)))
        self.end_headers()
        if self.path != "/slow":
            self.wfile.write(body)
            return
        try:
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass  # the client has given up

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    handler = type("OwnHandler", (Handler,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        running.url = f"http://127.0.0.1:{running.server_address[1]}"
        running.asked = handler.asked
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "plywise"


def offer(monkeypatch, *urls, file="tiny/file.bin"):
    monkeypatch.setitem(store.SETS, "tiny", (Remote(file, HASH, urls),))


def test_a_good_mirror(server, cache, monkeypatch):
    offer(monkeypatch, f"{server.url}/good", f"{server.url}/never")
    assert fetch("tiny") == [cache / "tiny" / "file.bin"]
    assert (cache / "tiny" / "file.bin").read_bytes() == CONTENT
    assert fetch("tiny") == [cache / "tiny" / "file.bin"]
    assert server.asked == ["/good"], "what is there and whole is not fetched again"
    assert find_file("tiny/file.bin") == cache / "tiny" / "file.bin"


@pytest.mark.parametrize("bad", ["wrong", "cut", "gone"])
def test_a_bad_first_mirror(server, cache, monkeypatch, bad):
    offer(monkeypatch, f"{server.url}/{bad}", f"{server.url}/good")
    (path,) = fetch("tiny")
    assert path.read_bytes() == CONTENT
    assert server.asked == [f"/{bad}", "/good"]
    assert [found.name for found in path.parent.iterdir()] == ["file.bin"], "nothing half done is left"


def test_a_damaged_file_is_fetched_again(server, cache, monkeypatch):
    offer(monkeypatch, f"{server.url}/good")
    (path,) = fetch("tiny")
    path.write_bytes(CONTENT[:100])
    fetch("tiny")
    assert path.read_bytes() == CONTENT


def test_a_slow_mirror_is_given_up(server, cache, monkeypatch):
    offer(monkeypatch, f"{server.url}/slow", f"{server.url}/good")
    (path,) = fetch("tiny", deadline=0.5)
    assert path.read_bytes() == CONTENT
    assert server.asked == ["/slow", "/good"]


def test_each_failure_is_told(server, cache, monkeypatch):
    urls = [f"{server.url}/wrong", f"{server.url}/gone", f"{server.url}/slow", "http://127.0.0.1:9/"]
    offer(monkeypatch, *urls)
    with pytest.raises(PlywiseError) as raised:
        fetch("tiny", deadline=0.3)
    said = str(raised.value)
    wrong = hashlib.sha256(b"<html>a login page</html>").hexdigest()
    assert f"{urls[0]}: its SHA-256 is {wrong}, not {HASH}" in said
    assert f"{urls[1]}: HTTP Error 404" in said
    assert f"{urls[2]}: it was not done after 0.3 s" in said
    assert f"{urls[3]}: Connection refused" in said
    assert str(cache / "tiny" / "file.bin") in said
    assert not list((cache / "tiny").iterdir())


def test_an_unknown_set():
    with pytest.raises(PlywiseError, match="Did you mean fashion_mnist"):
        fetch("fashion-mnist")


def test_known_sets_are_complete():
    for remotes in store.SETS.values():
        for remote in remotes:
            assert len(bytes.fromhex(remote.sha256)) == 32
            assert remote.mirrors
            assert all(url.startswith("http") for url in remote.mirrors)
    files = [remote.file for remotes in store.SETS.values() for remote in remotes]
    assert len(set(files)) == len(files)


def test_the_named_folder_comes_first(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PLYWISE_DATA", str(tmp_path / "mine"))
    assert list_folders() == [tmp_path / "mine", cache]
    assert find_file("a", "b") is None
    for folder, name in ((cache, "a"), (tmp_path / "mine", "b")):
        folder.mkdir()
        (folder / name).touch()
    assert find_file("a", "b") == tmp_path / "mine" / "b"
    assert find_file("a") == cache / "a"
    monkeypatch.delenv("PLYWISE_DATA")
    assert tmp_path / "mine" not in list_folders()


def test_decoded_arrays_are_made_once(cache):
    made = []

    def decode():
        made.append(1)
        return {"x": np.arange(6, dtype=np.uint8).reshape(2, 3), "y": np.zeros(2, np.uint8)}

    first, second = cache_decoded("key", decode), cache_decoded("key", decode)
    assert len(made) == 1
    assert second.keys() == first.keys() == {"x", "y"}
    assert np.array_equal(second["x"], first["x"])
    cache_decoded("another", decode)
    assert len(made) == 2
    del second
    (cache / "decoded" / "key" / "x.npy").write_bytes(b"damaged")
    assert cache_decoded("key", decode)["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert len(made) == 3
    assert cache_decoded("key", decode)["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert len(made) == 3


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "plywise").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert cache_decoded("key", lambda: {"x": np.ones(1, np.uint8)})["x"].tolist() == [1]
