"""Ranks of an engine as stages of tensor ranks: world rank = stage · T + tensor rank, for T tensor ranks in a stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenmill.parallel.group import Group


@dataclass(frozen=True, slots=True)
class Mesh:
    """The place of this rank. `tensor`: the ranks of its stage, which share the weights of the stage's layers."""

    world: Group = field(default_factory=Group)
    tensor: Group = field(default_factory=Group)
    stage: int = 0
    num_stages: int = 1

    @staticmethod
    def of(world: Group, num_stages: int) -> Mesh:
        """Divide the ranks of an engine into stages. Their number must be divisible by `num_stages`."""
        tensor = world.size // num_stages
        assert tensor * num_stages == world.size
        stage = world.rank // tensor
        return Mesh(world, world.part(stage * tensor, tensor), stage, num_stages)

    @property
    def sampler(self) -> int:
        """World rank that chooses the tokens: the first one of the last stage."""
        return (self.num_stages - 1) * self.tensor.size

    @property
    def samples(self) -> bool:
        """True if this rank chooses the tokens."""
        return self.world.rank == self.sampler

    def neighbour(self, stages: int) -> int:
        """Return the world rank of the same tensor rank, so many stages later."""
        return self.world.rank + stages * self.tensor.size
