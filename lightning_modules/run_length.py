"""How long a run is, for learning rates that fall towards its end."""

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
