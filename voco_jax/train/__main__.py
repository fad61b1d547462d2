"""voco train --config=FILE [--config.KEY=VALUE …]

Trains a model into the directory config.workdir, for example --config=configs/easyvqa.py. The same command again goes
on from the newest checkpoint. Several processes are all given the same command, and --coordinator, --num_processes and
--process_id, or find these in their environment (docs/launching.md).
"""

import shlex
import sys
import threading

import jax
from ml_collections import ConfigDict

from voco_jax import interrupts
from voco_jax.command_line import parse_arguments
from voco_jax.config import sources_to_score
from voco_jax.errors import UserError, one_line_errors
from voco_jax.parallel import distributed
from voco_jax.parallel.watchdog import watch
from voco_jax.train.loop import train


@one_line_errors
def main() -> None:
    config, args = parse_arguments(sys.argv, distributed.add_arguments, __doc__)
    distributed.start(args.coordinator, args.num_processes, args.process_id, args.initialization_timeout)
    with watch():
        run = train(config)
    if jax.process_index() == 0:
        print("\n".join([f"trained: {run}", *(f"  {line}" for line in next_commands(str(run), config.data))]))


def next_commands(run: str, data: ConfigDict) -> list[str]:
    """What can be done with a run that is complete."""
    run = shlex.quote(run)
    video = {keys.kind for keys in data.train.values()} == {"video_qa"}
    about = "--video FILE" if video else "--image FILE" if data.images_per_pack else ""
    lines = [f"ask it: voco ask --run {run} {about}".rstrip() + ' "QUESTION"']
    if sources_to_score(data):
        lines.insert(0, f"score it on its test set: voco evaluate --run {run}")
    return lines


def _farewell_hangs() -> bool:
    """Whether Python's end would wait for threads of Orbax: after a failed save, ten minutes and in vain."""
    return any(type(thread).__module__.startswith("orbax") for thread in threading.enumerate() if not thread.daemon)


def command() -> None:
    """`main`, then an end of the process that other threads cannot crash."""
    try:
        main()
    except SystemExit as error:
        # A process that is alone can skip jax's tidying up, in which running threads of C++ may crash
        alone = not jax.distributed.is_initialized()
        if error.code and (alone or error.code == UserError.status and _farewell_hangs()):
            interrupts.end(int(error.code))
        raise


if __name__ == "__main__":
    command()
