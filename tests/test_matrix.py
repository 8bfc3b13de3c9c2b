"""Solutions pass, skeletons fail, and each mutant fails its own milestone and no other, for every lab."""

import pytest
from conftest import everything_must_run

from shardlab.course.matrix import prove
from shardlab.labs import stems

pytestmark = pytest.mark.ranks


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stem", stems())
def test_every_variant_gets_the_verdict_it_must(stem, slurm_where_possible):
    wrong = [line for line in prove([stem]) if line.problem or (everything_must_run() and "not run" in line.variant)]
    assert not wrong, "\n".join(f"{line.variant}: {line.problem}" for line in wrong)
