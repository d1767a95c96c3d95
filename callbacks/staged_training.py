"""Lets parts of a model rest during stages of a run."""

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override


def rests(step: int, stages: list[list[int]]) -> bool:
    """Returns whether a part rests at an optimizer step: from the first of one of its stages to before the last."""
    return any(first <= step < last for first, last in stages)


class StagedTraining(Callback):
    """Leaves submodules as they are during given optimizer steps, and trains them at all others.

    What rests is a function of ``trainer.global_step`` alone: there is no state to save, and a run resumed in the
    middle of an epoch is in the right stage. Every parameter stays registered with DDP and with the optimizer; the
    gradients of what rests are dropped before each step, so processes agree and no parameter group is added later. The
    gradients are computed all the same: a long stage is cheaper as a run of its own (``training_stage: 1``). What is
    learnt without gradients, such as running means, does not rest.

    Args:
        resting: Stages of each submodule by its dotted name: steps [first, last), as ``{"network.encoder": [[0,
            1000]]}``.
    """

    def __init__(self, resting: dict[str, list[list[int]]]) -> None:
        for name, stages in resting.items():
            for stage in stages:
                if len(stage) != 2 or not 0 <= stage[0] < stage[1]:
                    raise ValueError(
                        f"StagedTraining: a stage of {name} is {stage}; allowed: [first, last], the steps from first "
                        "to before last, 0 <= first < last."
                    )
        self.resting = resting

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        modules = dict(pl_module.named_modules())
        for name in self.resting:
            if name not in modules:
                known = sorted(name for name in modules if name and name.count(".") < 2)
                raise ValueError(
                    f"StagedTraining: {type(pl_module).__name__} has no submodule {name!r}; it has {', '.join(known)}."
                )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for name, stages in self.resting.items():
            if rests(trainer.global_step, stages):
                for parameter in pl_module.get_submodule(name).parameters():
                    parameter.grad = None
