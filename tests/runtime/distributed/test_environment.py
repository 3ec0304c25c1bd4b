from __future__ import annotations

import pytest

from tcaq_lightning.errors import UserError
from tcaq_lightning.runtime.distributed.environment import Place, find_place, started_rank

SLURM = {
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODELIST": "node[3-4]",
    "SLURM_JOB_ID": "7",
}


def test_one_process_by_default() -> None:
    place = find_place(1, 1, {})
    assert (place.ranks, place.rank, place.external) == (1, 0, False)
    assert started_rank({}) == 0


def test_own_processes_find_their_place_again() -> None:
    place = find_place(3, 1, {})
    assert (place.ranks, place.external) == (3, False)
    other = Place(2, 2, 3, 1, port=4711)
    assert find_place(3, 1, other.variables()) == other
    assert started_rank(other.variables()) == 2


def test_nodes_started_by_hand() -> None:
    place = find_place(4, 2, {"NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "4711"})
    assert (place.rank, place.local_rank, place.ranks, place.address) == (4, 0, 8, "first")
    with pytest.raises(UserError, match=r"trainer\.num_nodes is 2.*NODE_RANK"):
        find_place(4, 2, {"MASTER_ADDR": "first", "MASTER_PORT": "4711"})
    with pytest.raises(UserError, match=r"NODE_RANK must be in 0\.\.1.*got 2"):
        find_place(4, 2, {"NODE_RANK": "2", "MASTER_ADDR": "first", "MASTER_PORT": "4711"})


def test_torchrun_decides_where_nothing_else_is_asked_for() -> None:
    variables = Place(5, 1, 4, 2, "first", 29500).variables()
    assert find_place(1, 1, variables) == find_place(4, 2, variables) == Place(5, 1, 4, 2, "first", 29500)
    with pytest.raises(UserError, match=r"trainer\.devices.*4 processes on each of 2 nodes.*got 3 and 1"):
        find_place(3, 1, variables)
    with pytest.raises(UserError, match="same number of processes"):
        find_place(1, 1, variables | {"WORLD_SIZE": "7"})


def test_slurm() -> None:
    place = find_place(1, 1, SLURM)
    assert place == Place(3, 1, 2, 2, "node3", 15007)
    assert started_rank(SLURM) == 3
    assert find_place(2, 2, SLURM | {"MASTER_PORT": "1234"}).port == 1234
    with pytest.raises(UserError, match=r"SLURM_LOCALID.*srun"):
        find_place(1, 1, {k: v for k, v in SLURM.items() if k != "SLURM_LOCALID"})
    with pytest.raises(UserError, match="same number of tasks"):
        find_place(1, 1, SLURM | {"SLURM_NTASKS": "5"})


@pytest.mark.parametrize(
    "changes", [{"SLURM_NTASKS": "1"}, {"SLURM_JOB_NAME": "bash"}, {"SLURM_JOB_NAME": "interactive"}]
)
def test_a_shell_within_slurm_is_one_process(changes: dict[str, str]) -> None:
    assert find_place(1, 1, SLURM | changes).ranks == 1
    assert started_rank(SLURM | changes) == 0
