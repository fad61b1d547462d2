"""What the loop does beside stepping: actions, which are told before and after every step and decide if it is time."""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass
class StepDone:
    """A step that has been dispatched: reading one of its arrays waits for its end.

    last: no step follows; the run is complete, or `preempted`. evaluation: what an evaluation of these parameters
    gave, where there was one; it is kept with their checkpoint.
    """

    step: int
    metrics: dict[str, jax.Array]
    params: Any = None
    opt_state: Any = None
    last: bool = False
    preempted: bool = False
    evaluation: dict[str, float | None] | None = None


class Action:
    """Does nothing; each kind overrides what it needs. An error in it ends the training."""

    def before_step(self, step: int) -> None:
        """The step is about to be dispatched."""

    def after_step(self, done: StepDone) -> None:
        """The step has been dispatched, and may still run."""
