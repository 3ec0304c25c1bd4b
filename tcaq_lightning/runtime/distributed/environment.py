"""Which process of a run this one is, as torchrun, SLURM or the run's first process tell it by variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from tcaq_lightning.errors import UserError

TORCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process it starts, and what a run sets for those it starts itself."""
NODE_VARIABLES = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What tells the first processes of several nodes, started by hand, of each other."""


@dataclass(frozen=True)
class Place:
    """One process among those of a run.

    Attributes:
        rank: number among all processes.
        local_rank: number on its node.
        devices: processes on each node, one device each.
        num_nodes: number of nodes.
        address: where rank 0 listens.
        port: where rank 0 listens; 0 lets the system choose one.
        external: whether something else starts the processes.
    """

    rank: int
    local_rank: int
    devices: int
    num_nodes: int
    address: str = "127.0.0.1"
    port: int = 0
    external: bool = True

    @property
    def ranks(self) -> int:
        """Number of all processes."""
        return self.devices * self.num_nodes

    def variables(self) -> dict[str, str]:
        """The place as torchrun would write it into the environment."""
        values = (self.rank, self.local_rank, self.ranks, self.devices, self.address, self.port)
        return {name: str(value) for name, value in zip(TORCH_VARIABLES, values, strict=True)}


def find_place(devices: int, num_nodes: int, environment: Mapping[str, str] = os.environ) -> Place:
    """Where this process stands.

    Args:
        devices: trainer.devices; 1 leaves the number to torchrun or SLURM where one of them started this process.
        num_nodes: trainer.num_nodes; likewise.
        environment: variables.

    Raises:
        UserError: the configuration and the environment disagree, or variables are missing.

    >>> find_place(2, 1, {}).ranks
    2
    >>> find_place(
    ...     1,
    ...     1,
    ...     {
    ...         "SLURM_NTASKS": "8",
    ...         "SLURM_NTASKS_PER_NODE": "4",
    ...         "SLURM_NNODES": "2",
    ...         "SLURM_PROCID": "5",
    ...         "SLURM_LOCALID": "1",
    ...         "SLURM_NODELIST": "gpu[07-08]",
    ...         "SLURM_JOB_ID": "123456",
    ...     },
    ... )
    Place(rank=5, local_rank=1, devices=4, num_nodes=2, address='gpu07', port=18456, external=True)
    """
    if _by_torch(environment):
        place = _torch_place(environment)
    elif _by_slurm(environment):
        place = _slurm_place(environment)
    else:
        return _own_place(devices, num_nodes, environment)
    if devices * num_nodes > 1 and (devices, num_nodes) != (place.devices, place.num_nodes):
        raise UserError(
            f"trainer.devices and trainer.num_nodes must be what was started, {place.devices} processes on each of "
            f"{place.num_nodes} nodes, or be left out; got {devices} and {num_nodes}"
        )
    return place


def started_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The rank that torchrun, SLURM or the first process of the run gave this process; 0 where none of them did.

    >>> started_rank({})
    0
    """
    if _by_torch(environment):
        return int(environment["RANK"])
    return int(environment["SLURM_PROCID"]) if _by_slurm(environment) and "SLURM_PROCID" in environment else 0


def _by_torch(environment: Mapping[str, str]) -> bool:
    return all(name in environment for name in TORCH_VARIABLES)


def _by_slurm(environment: Mapping[str, str]) -> bool:
    interactive = environment.get("SLURM_JOB_NAME") in {"bash", "interactive"}  # a shell that srun opened
    return int(environment.get("SLURM_NTASKS", 1)) > 1 and not interactive


def _torch_place(environment: Mapping[str, str]) -> Place:
    rank, local_rank, ranks, devices = (int(environment[name]) for name in TORCH_VARIABLES[:4])
    if ranks % devices:
        raise UserError(f"every node must run the same number of processes, got {ranks} with {devices} on this node")
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    return Place(rank, local_rank, devices, ranks // devices, address, port)


def _slurm_place(environment: Mapping[str, str]) -> Place:
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    try:
        ranks, rank, local_rank = (int(environment[f"SLURM_{name}"]) for name in ("NTASKS", "PROCID", "LOCALID"))
        num_nodes, job = int(environment["SLURM_NNODES"]), int(environment["SLURM_JOB_ID"])
    except KeyError as error:
        raise UserError(f"SLURM: expected the variable {error} in the environment; start with srun") from error
    if ranks % num_nodes:
        raise UserError(f"SLURM: expected the same number of tasks on every node, got {ranks} on {num_nodes} nodes")
    address = environment.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(
        environment.get("SLURM_NODELIST", "127.0.0.1")
    )
    port = int(environment.get("MASTER_PORT", 15000 + job % 10000))  # one that all tasks of the job agree on
    return Place(rank, local_rank, ranks // num_nodes, num_nodes, address, port)


def _own_place(devices: int, num_nodes: int, environment: Mapping[str, str]) -> Place:
    if num_nodes == 1:
        return Place(0, 0, devices, 1, external=False)
    missing = [name for name in NODE_VARIABLES if name not in environment]
    if missing:
        raise UserError(
            f"trainer.num_nodes is {num_nodes}: expected {', '.join(NODE_VARIABLES)} in the environment of the command "
            f"on every node, got no {missing[0]}; set them, or start with torchrun or srun"
        )
    node = int(environment["NODE_RANK"])
    if not 0 <= node < num_nodes:
        raise UserError(f"NODE_RANK must be in 0..{num_nodes - 1} (trainer.num_nodes is {num_nodes}), got {node}")
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    return Place(node * devices, 0, devices, num_nodes, address, port, external=False)
