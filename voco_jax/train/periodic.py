"""Evaluations and checkpoints, as actions of the loop: what interrupts the steps now and then."""

from collections.abc import Callable
from typing import Any

from voco_jax.checkpoint.checkpointer import Checkpointer, all_finite
from voco_jax.checkpoint.workdir import Workdir
from voco_jax.errors import UserError
from voco_jax.train.actions import Action, StepDone
from voco_jax.train.evaluation import Evaluator
from voco_jax.train.goodput import Goodput
from voco_jax.train.metrics import MetricsLog


class Evaluate(Action):
    """Every `every` steps and at the end. Not when the run is preempted: it might take longer than there is."""

    def __init__(
        self, evaluator: Evaluator, every: int, metrics_log: MetricsLog, goodput: Goodput, teacher_params: Any = None
    ):
        self._evaluator, self._every, self._metrics_log, self._goodput = evaluator, every, metrics_log, goodput
        self._teacher_params = teacher_params

    def after_step(self, done: StepDone) -> None:
        if done.preempted or not (done.last or done.step % self._every == 0):
            return
        self._metrics_log.settle()
        with self._goodput.during("evaluation"):
            done.evaluation, sheet = self._evaluator(done.step, done.params, done.opt_state, self._teacher_params)
            self._metrics_log.evaluated(done.step, done.evaluation, sheet)


class SaveCheckpoint(Action):
    """Every `every` steps, at the end, and where the last save has failed. Only the last save is waited for."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        workdir: Workdir,
        every: int,
        data_state: Callable[[int], dict],
        metrics_log: MetricsLog,
        goodput: Goodput,
    ):
        """`data_state` says where the data stands after a step."""
        self._checkpointer, self._workdir, self._every, self._data_state = checkpointer, workdir, every, data_state
        self._metrics_log, self._goodput = metrics_log, goodput

    def after_step(self, done: StepDone) -> None:
        if not (done.last or done.step % self._every == 0 or self._checkpointer.has_failed()):
            return
        self._metrics_log.settle()
        with self._goodput.during("checkpoint"):
            if not all_finite(done.params):  # or everything would go on from these
                hint = "a lower optim.learning_rate may help"
                raise UserError(f"training: parameters are not finite after step {done.step}; {hint}")
            saved = False
            while not saved:
                self._workdir.check()
                state = self._data_state(done.step)
                self._checkpointer.save(done.step, done.params, done.opt_state, state, done.evaluation)
                saved = not done.last or self._checkpointer.wait()
            self._workdir.check()
            self._workdir.publish()
        self._goodput.mark(done.step)
