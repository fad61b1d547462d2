"""`python -m voco_jax.train --config=configs/easyvqa.py [--config.optim.learning_rate=… …]`

With several processes, see `voco_jax/parallel/distributed.py`.
"""

import sys
import threading

import jax

from voco_jax import interrupts
from voco_jax.config import parse_flags
from voco_jax.errors import UserError, one_line_errors
from voco_jax.parallel import distributed
from voco_jax.parallel.watch import watch
from voco_jax.train.loop import train


@one_line_errors
def main() -> None:
    config, flags = parse_flags(sys.argv, distributed.define_flags)
    distributed.start(flags.coordinator, flags.num_processes, flags.process_id, flags.initialization_timeout)
    with watch():
        run = train(config)
    if jax.process_index() == 0:
        print(f"trained: {run} (evaluate it: python -m voco_jax.evaluate --run {run})")


def _farewell_hangs() -> bool:
    """Whether Python would wait for threads of Orbax: after a failed save ten minutes, for what will not come."""
    return any(type(thread).__module__.startswith("orbax") for thread in threading.enumerate() if not thread.daemon)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as error:
        # Alone, nobody misses jax's farewell, which threads of C++ that still run would crash
        alone = not jax.distributed.is_initialized()
        if error.code and (alone or error.code == UserError.status and _farewell_hangs()):
            interrupts.end(error.code)
        raise
