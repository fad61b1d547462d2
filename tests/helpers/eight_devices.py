"""Checks that need eight simulated devices: run one after the other in a process of their own, which has them."""

from collections.abc import Callable, Mapping, Sequence
import json
import os
import subprocess
import sys
import time
import traceback


def run_checks(checks: Mapping[str, Callable[[], None]], names: Sequence[str]) -> None:
    """All of them, or some by name; the last line is the traceback of each that failed, as JSON."""
    failures = {}
    for name in names or checks:
        try:
            checks[name]()
        except Exception:
            failures[name] = traceback.format_exc()
        print(f"{time.process_time():.1f} s: {name}", file=sys.stderr)
    print(json.dumps(failures))


def failures_of(module: str, *names: str) -> dict[str, str]:
    """Tracebacks by name of a test module's checks, or of some of them, which it runs as a program."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    # Of a program for several CPU devices that is loaded, not compiled, collectives may wait for one another for ever
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    done = subprocess.run([sys.executable, "-m", module, *names], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
