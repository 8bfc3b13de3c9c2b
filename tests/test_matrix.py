"""Skeletons fail, and each mutant fails its own milestone and no other, for every lab; solutions pass."""

import pytest
from conftest import every_lab

from shardlab.course.matrix import prove
from shardlab.sandbox import boxes

pytestmark = pytest.mark.ranks


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stem", every_lab())
def test_every_variant_gets_the_verdict_it_must(stem, may_get):
    # The solutions are graded in boxes, by the same milestones, hidden ones too; where there are no boxes, here.
    # Of the mutants, one of each task, and all of tasks that were not recorded as proven; `shardlab matrix` looks at all.
    parts = ("skeletons", "mutants") if boxes.isolation()[0] == "bubblewrap" else ("solutions", "skeletons", "mutants")
    lines = [line for part in parts for line in prove([stem], only=part, trust_record=True)]
    wrong = [line for line in lines if line.problem or ("not run" in line.variant and may_get == {"passed"})]
    assert not wrong, "\n".join(f"{line.variant}: {line.problem}" for line in wrong)
