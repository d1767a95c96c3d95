import pytest

from callbacks.staged_training import StagedTraining, rests


def test_a_part_rests_from_the_first_step_of_a_stage_to_before_its_last():
    stages = [[0, 2], [5, 6]]
    assert [rests(step, stages) for step in range(7)] == [True, True, False, False, False, True, False]


@pytest.mark.parametrize("stage", [[3], [4, 4], [-1, 2], [1, 2, 3]])
def test_impossible_stages_are_refused(stage):
    with pytest.raises(ValueError, match=r"a stage of network.encoder is"):
        StagedTraining({"network.encoder": [stage]})
