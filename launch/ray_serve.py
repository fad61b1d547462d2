"""`voco serve` as an application of Ray Serve, which starts and stops replicas by how much is asked (docs/serving.md):

    RUN=gs://my-bucket/runs/voco_7b STORE=gs://my-bucket/memories serve run --working-dir . launch.ray_serve:app

Replicas share the memories in STORE. Further variables: GPUS, of each replica (default 1; 0: the CPU answers);
REPLICAS, at most (default 4); VOCO_API_KEYS, which clients must have, one a line.
"""

import os
import sys

from fastapi import FastAPI
from ray import serve

ROWS = 16  # requests that a replica answers at once
GIVEN = {name: os.environ.get(name, "") for name in ("RUN", "STORE", "VOCO_API_KEYS")}
if not (GIVEN["RUN"] and GIVEN["STORE"]):
    sys.exit("ray_serve.py: error: RUN and STORE: expected a run directory, and a directory or bucket for memories")


def server() -> FastAPI:
    """Called in each replica."""
    import voco_jax
    from voco_jax.serve.build import Options, make_server

    keys = tuple(GIVEN["VOCO_API_KEYS"].split())
    return make_server(voco_jax.load(GIVEN["RUN"]), Options(keys=keys, store=GIVEN["STORE"], rows=ROWS))


app = serve.deployment(
    serve.ingress(server)(),
    name="voco",
    ray_actor_options={"num_gpus": float(os.environ.get("GPUS", 1)), "runtime_env": {"env_vars": GIVEN}},
    autoscaling_config={
        "min_replicas": 1, "max_replicas": int(os.environ.get("REPLICAS", 4)), "target_ongoing_requests": ROWS,
    },
    max_ongoing_requests=16 * ROWS,  # beyond which the replica itself would say that it is busy
    graceful_shutdown_timeout_s=60,
).bind()  # fmt: skip
