"""The cloud's notice that a machine is taken away, by the protocol of Google's metadata server."""

import http.server
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading

import pytest

from tests.helpers import tiny
from voco_jax.train.preemption import Preempted, Preemption


class Metadata(http.server.BaseHTTPRequestHandler):
    """Answers at once at first, and then when `event` is set, as the real one does with wait_for_change."""

    event, notice, first = threading.Event(), {}, True

    def do_GET(self):
        assert self.headers["Metadata-Flavor"] == "Google" and "recursive=true" in self.path
        if not Metadata.first:
            Metadata.event.wait(300)
        content = {"preempted": "FALSE", "maintenanceEvent": "NONE"} | ({} if Metadata.first else Metadata.notice)
        Metadata.first = False
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("ETag", "a1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.multiprocess
@pytest.mark.parametrize("notice", [{"preempted": "TRUE"}, {"maintenanceEvent": "TERMINATE_ON_HOST_MAINTENANCE"}])
def test_a_notice_saves_the_run(tmp_path, notice):
    Metadata.event.clear()
    Metadata.first, Metadata.notice = True, notice
    server = http.server.ThreadingHTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    run = tmp_path / "run"
    arguments = tiny.arguments(run, train__steps=10**5, train__checkpoint_every=10**5, train__log_every=1)
    process = subprocess.Popen(
        [sys.executable, "-m", "voco_jax.train", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, cwd=tiny.CONFIG_FILE.parents[1],
        env=dict(os.environ, GCE_METADATA_HOST=f"localhost:{server.server_port}"),
    )  # fmt: skip
    try:
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
            assert process.poll() is None
        Metadata.event.set()
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        server.shutdown()
    assert process.returncode == 75, output
    step = int(output.split("preempted, saved at step ")[1].split()[0])
    assert (Path(run) / "checkpoints" / str(step)).is_dir()


def test_the_handler_is_taken_back():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        preemption.begin()
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached(2)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(Preempted) as stop, Preemption():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 75
