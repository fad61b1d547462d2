"""`python -m voco_jax.train --config=configs/easyvqa.py [--config.optim.learning_rate=… …]`"""

import sys

from voco_jax.config import parse_command_line
from voco_jax.errors import one_line_errors
from voco_jax.train.loop import train


@one_line_errors
def main() -> None:
    run = train(parse_command_line(sys.argv))
    print(f"trained: {run} (evaluate it: python -m voco_jax.evaluate --run {run})")


if __name__ == "__main__":
    main()
