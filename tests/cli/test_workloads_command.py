"""`plywise workloads`: the list of workloads, and the sources of their data."""

import hashlib
import http.server
import threading
from functools import partial

from plywise.arena.workloads import WORKLOADS
from plywise.data import store


def test_every_workload_is_listed(plywise):
    done = plywise("workloads")
    assert done.code == 0
    assert all(name in done.out for name in WORKLOADS)


def test_fetching_from_a_mirror(tmp_path, monkeypatch, plywise):
    served = tmp_path / "served"
    served.mkdir()
    (served / "file.bin").write_bytes(b"some data")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=served)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/file.bin"
        digest = hashlib.sha256(b"some data").hexdigest()
        monkeypatch.setitem(store.SETS, "tiny", (store.Remote("tiny/file.bin", digest, (url,)),))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        done = plywise("workloads", "fetch", "tiny")
        assert done.code == 0
        server.shutdown()
    path = tmp_path / "cache" / "plywise" / "tiny" / "file.bin"
    assert done.out.strip() == str(path)
    assert path.read_bytes() == b"some data"


def test_fetching_what_there_is_not(plywise):
    done = plywise("workloads", "fetch", "mnits")
    assert done.code == 1
    assert "mnits" in done.err
