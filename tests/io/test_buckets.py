"""Runs in a bucket, by the real clients, against a server on this machine that speaks their protocol."""

import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.bucket_server import bucket_server
from tests.train.test_training import params
from voco_jax.checkpoint.run import load_run
from voco_jax.errors import TryAgain, UserError
from voco_jax.io.paths import as_path
from voco_jax.train.loop import train


def test_a_machine_that_is_not_online(monkeypatch):
    """One line and the status to try again, at once."""

    def unknown(host, port):
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("STORAGE_EMULATOR_HOST", "https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    message = r"^gs://bucket/run: storage.googleapis.com is not found \(Name or service not known\); is this machine on"
    with pytest.raises(TryAgain, match=message):
        as_path("gs://bucket/run")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://localhost:1")
    assert str(as_path("gs://bucket/run")) == "gs://bucket/run"


CHANGES = dict(train__steps=4, train__checkpoint_every=2, train__log_every=1)


@pytest.fixture(scope="module")
def server():
    with bucket_server() as server:
        yield server


def config(workdir, **changes):
    config = tiny.config("", **CHANGES | changes)
    config.workdir = str(workdir)
    return config


@pytest.mark.slow
def test_a_run_in_a_bucket(server, tmp_path):
    """Stopped and gone on with, to the parameters of one in a directory; asked from there; begun from there."""
    address = "gs://bucket/somewhere/run"
    assert str(train(config(address))) == address
    names = {name.removeprefix("somewhere/run/").split("/")[0] for name in server.objects}
    assert names == {"checkpoints", "config.json", "goodput.json", "metrics.jsonl", "tensorboard", "tokenizer"}
    assert {name.split("/")[3] for name in server.objects if "/checkpoints/" in name} == {"2", "4"}
    lines = server.objects["somewhere/run/metrics.jsonl"][0].decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]

    for name in [name for name in server.objects if "/checkpoints/4/" in name]:  # as if it had been killed at step 3
        del server.objects[name]
    train(config(address))
    again = server.objects["somewhere/run/metrics.jsonl"][0].decode().splitlines()
    assert [json.loads(line)["loss"] for line in again] == [json.loads(line)["loss"] for line in lines]
    local = train(config(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, params(address), params(local))
    assert load_run(address).step == 4
    for part in "params", "run", "commit_success":
        server.forbidden = f"somewhere/run/checkpoints/4/{part}"  # no reason to take an older one
        try:
            with pytest.raises(UserError, match="^gs://bucket/somewhere/run/checkpoints(/4: the checkpoint cannot|: )"):
                load_run(address)
        finally:
            server.forbidden = False
    begun = train(config(tmp_path / "next", init_from=address, train__steps=1, optim__warmup_steps=0))
    assert load_run(begun).step == 1


def test_a_bucket_without_permission(server, tmp_path):
    server.forbidden = True
    try:
        with pytest.raises(UserError, match="^gs://bucket/other/run: Forbidden: ") as error:
            train(config("gs://bucket/other/run"))
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="^gs://bucket/other/run/config.json: .*Forbidden: "):
            load_run("gs://bucket/other/run")
    finally:
        server.forbidden = False


@pytest.mark.multiprocess
def test_a_permission_that_is_withdrawn(server):
    """In the middle of a training: one line, at once, though Orbax would wait for its directories for minutes."""
    arguments = tiny.arguments("gs://bucket/third/run", **CHANGES)
    server.forbidden = "third/run/checkpoints/4/params"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "voco_jax.train", *arguments],
            capture_output=True, text=True, timeout=180, cwd=tiny.CONFIG_FILE.parents[1],
        )  # fmt: skip
    finally:
        server.forbidden = False
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: gs://bucket/third/run/checkpoints/4: the checkpoint cannot be written: ")
    assert "Forbidden" in error or "does not have storage.objects.list access" in error
    assert "Traceback" not in done.stderr
    assert any(name.startswith("third/run/checkpoints/2/") for name in server.objects)


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs://", "http://bucket/run"])
def test_what_is_no_bucket(address):
    with pytest.raises(UserError, match="neither a local path nor gs://BUCKET/PATH"):
        as_path(address)
