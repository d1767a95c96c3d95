import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from callbacks.checkpoint_export import CheckpointExport


def test_a_model_without_an_export_is_told_which_have_one(tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.raises(
        ValueError, match=r"BoringModel has no export; models with one: .*GaussianRgbModule, LanguageField"
    ):
        CheckpointExport().export(trainer, BoringModel(), None)
