"""Three hosts: the same as three ranks of one, and two that go on when the third is gone."""

from __future__ import annotations

import shutil

import pytest
from cluster import ZERO2, Cluster, Interrupted, assert_goes_on, assert_same, flags, one_host, resume, script

pytestmark = pytest.mark.timeout(900)  # four launches of three ranks

#: A step of 12 rows on three ranks and on two.
ROWS = ["--per_device_train_batch_size", "2", "--global_batch_size", "12", "--max_train_samples", "48"]


def test_two_host_and_third(three: Cluster) -> None:
    """DeepSpeed's launcher starts a rank on each, through pdsh where that is installed."""
    told = [*ZERO2, *flags(three, "spread"), *ROWS]
    if shutil.which("pdsh"):
        text = three.run("spread", ([*script("deepspeed_pdsh.sh"), *told], {}))
        assert all(f"node{i}: " in text for i in (1, 2, 3))
    else:
        three.run("spread", *(([*script("deepspeed_node.sh"), *told], {"NODE_RANK": str(i)}) for i in range(3)))
    assert_same(one_host(three, "zero2", 3, ROWS), three.output("spread"), "zero2", ranks=3)


def test_two_host_without_third(three: Cluster) -> None:
    """A host is gone for good: its shards of the optimizer's states are read by those that are left."""
    whole = one_host(three, "zero2", 3, ROWS)
    with Interrupted(three, "fewer", [*ZERO2, *ROWS, "--ddp_timeout", "20"]) as job:
        three.hosts[2].cable("down")
        three.hosts[2].kill()
        job.go()
        assert job.processes[0].wait(150) != 0
        assert "another rank did not take part" in job.text()
    text = resume(three, "fewer", [*ZERO2, *ROWS], nodes=2)
    assert "resuming on 2 ranks from a checkpoint of 3" in text
    assert_goes_on(whole, three.output("fewer"))
