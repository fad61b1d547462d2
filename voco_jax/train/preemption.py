"""Machines that are taken away: SIGTERM, or a cloud's notice of it, leads to one last checkpoint of all processes."""

from collections.abc import Callable
import contextlib
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request

import jax
from jax.experimental import multihost_utils

from voco_jax import interrupts
from voco_jax.errors import TryAgain


class Preempted(SystemExit):
    """The run has been stopped on somebody's request, and everything is saved: the same command goes on (status 75)."""

    known_to_all = True

    def __init__(self):
        super().__init__(TryAgain.status)


class Preemption:
    """Listens for SIGTERM from `with` to its end. Before `begin` there is nothing to save: the process just ends, by
    Ctrl-C too.

    Of several processes, it is enough that one is told: jax's preemption service, which has SIGTERM there, lets all
    stop after one and the same step.
    """

    def __init__(self):
        self._told, self._saving_is_worth_it = False, False
        self._several = jax.process_count() > 1
        self._before, self._begun = None, contextlib.ExitStack()

    def __enter__(self):
        if not self._several and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        if (host := _metadata_host()) is not None:
            tell = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
            threading.Thread(target=_listen, args=(host, tell), daemon=True, name="preemption").start()
        return self

    def __exit__(self, *_):
        self._begun.close()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def begin(self) -> None:
        """From here on a step is worth saving."""
        self._saving_is_worth_it = True
        self._begun.enter_context(interrupts.at_once(False, signal.SIGINT, signal.SIGTERM))
        if self._told:
            raise Preempted

    def reached(self, step: int) -> bool:
        """Whether to save after this step and end; all processes ask after every step, and get the same answer."""
        return multihost_utils.reached_preemption_sync_point(step) if self._several else self._told

    def _on_signal(self, *signal_and_frame) -> None:
        self._told = True
        interrupts.on_signal(*signal_and_frame)
        if not self._saving_is_worth_it:
            print(interrupts.NOTHING_TO_SAVE, file=sys.stderr, flush=True)
            raise Preempted


def _metadata_host() -> str | None:
    """Where Google's machines ask about themselves; None elsewhere."""
    if host := os.environ.get("GCE_METADATA_HOST"):  # as Google's own clients have it
        return host
    return "metadata.google.internal" if jax.default_backend() == "tpu" else None


def _listen(host: str, tell: Callable[[], None]) -> None:
    """Wait for the notice that this machine is taken away: preempted (spot), or terminated for maintenance."""
    etag, failures = "0", 0
    while True:
        url = f"http://{host}/computeMetadata/v1/instance/?recursive=true&wait_for_change=true&timeout_sec=60"
        request = urllib.request.Request(f"{url}&last_etag={etag}", headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=90) as response:
                etag, instance = response.headers.get("ETag", "0"), json.load(response)
        except (OSError, ValueError, urllib.error.URLError) as error:
            failures += 1
            if failures == 3:
                print(f"preemption: {host} tells nothing ({error}); SIGTERM is heeded", file=sys.stderr, flush=True)
            time.sleep(min(2.0**failures, 60))
            continue
        failures = 0
        if instance.get("preempted") == "TRUE" or str(instance.get("maintenanceEvent", "")).startswith("TERMINATE"):
            tell()
            return
