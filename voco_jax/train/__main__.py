"""`python -m voco_jax.train --config=configs/easyvqa.py [--config.optim.learning_rate=… …]`

With several processes, see `voco_jax/parallel/distributed.py`.
"""

import sys

import jax

from voco_jax.config import parse_flags
from voco_jax.errors import one_line_errors
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


if __name__ == "__main__":
    main()
