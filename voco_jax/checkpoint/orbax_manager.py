"""Orbax's manager of a run's checkpoints, as training uses it: what it writes, and which it keeps."""

from collections.abc import Callable

from etils import epath
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from voco_jax.config_keys import TrainConfig

_WEEK = 7 * 24 * 3600  # seconds


def make_manager(
    directory: epath.Path, keep: TrainConfig | None, check_written: Callable[[], None]
) -> ocp.CheckpointManager:
    """For items `params`, `opt_state` and `run` (JSON). `keep` says which checkpoints stay (None: all).

    `check_written` is called before a checkpoint gets its name.
    """
    asynchronous = ocp.AsyncOptions(
        post_finalization_callback=check_written,
        # Orbax measures it by a clock that jumps when a machine was paused; `Checkpointer.wait` has a limit of its own
        timeout_secs=_WEEK,
        create_directories_asynchronously=False,  # or its threads wait for those that cannot be made
    )
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            create=True,
            async_options=asynchronous,
            cleanup_tmp_directories=True,  # of saves that were killed, or have failed
            preservation_policy=_preservation_policy(keep),
            # Only where there is one are metrics kept, though the policy has the last word
            best_fn=_eval_loss if keep is not None and keep.keep_best else None,
        ),
        item_handlers={
            "params": ocp.StandardCheckpointHandler(),
            "opt_state": ocp.StandardCheckpointHandler(),
            "run": ocp.JsonCheckpointHandler(),
        },
    )


def _preservation_policy(keep: TrainConfig | None):
    if keep is None:
        return LatestN()  # all
    policies = [LatestN(keep.keep)]
    if keep.keep_every:
        policies.append(EveryNSteps(keep.keep_every))
    if keep.keep_best:
        best = BestN(
            get_metric_fn=_eval_loss,
            reverse=True,  # the lowest last, which are kept
            n=keep.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        policies.append(best)
    return AnyPreservationPolicy(policies)


def _eval_loss(metrics: dict) -> float:
    return metrics["eval_loss"]
