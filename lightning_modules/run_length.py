"""How long a run is, and that it has begun."""

from lightning.pytorch import Trainer


def total_steps(trainer: Trainer) -> int:
    """Returns the optimizer steps of the whole run.

    Lightning's ``estimated_stepping_batches`` asks for the loader before a resumed run restores it, whose place in the
    epoch is then lost (2.6).

    Raises:
        ValueError: If the run has no end.
    """
    steps_per_epoch = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
    limits = [] if trainer.max_epochs in (None, -1) else [int(trainer.max_epochs or 0) * steps_per_epoch]
    limits += [] if trainer.max_steps == -1 else [trainer.max_steps]
    if not limits:
        raise ValueError(
            "The run has no end, but the learning rate falls towards it: set trainer.max_epochs or trainer.max_steps."
        )
    return min(limits)


def require_training(is_trained: bool, missing: str, command: str) -> None:
    """Refuses to judge or use what nobody trained.

    Args:
        is_trained: Whether there are trained weights.
        missing: What there is none of, such as ``is no trained encoder``.
        command: Of ``train.py``.

    Raises:
        ValueError: If there are none.
    """
    if not is_trained:
        raise ValueError(
            f"There {missing} to {command}: no checkpoint was given or found. Run `python train.py fit --config ...` "
            "first, then give --ckpt_path=last (or a file)."
        )
