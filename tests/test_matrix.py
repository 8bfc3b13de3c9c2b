"""Solutions pass, skeletons fail, and each mutant fails its own milestone and no other, for every lab."""

import pytest
from conftest import every_lab

from shardlab.course.matrix import prove

pytestmark = pytest.mark.ranks


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stem", every_lab())
def test_every_variant_gets_the_verdict_it_must(stem, may_get):
    wrong = [line for line in prove([stem]) if line.problem or ("not run" in line.variant and may_get == {"passed"})]
    assert not wrong, "\n".join(f"{line.variant}: {line.problem}" for line in wrong)
