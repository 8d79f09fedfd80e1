"""Which sites of the UNet were visited, to notice when another node skips some.

Step caches (EasyCache, TeaCache, DeepCache and similar) reuse outputs of the UNet, or of some of its blocks, from
earlier steps. Features are then neither captured nor injected, and nothing else would show it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .checks import skipped


@dataclass(eq=False)
class Visits:
    """The sites that were visited in one evaluation of the model, each with the uuid of the conditioning."""

    seen: set[tuple[Hashable, Any]] = field(default_factory=set)

    def add(self, site: Hashable, options: Mapping[str, Any]) -> None:
        self.seen.update((site, uuid) for uuid in options["uuids"])

    def check(self, sites: Collection[Hashable], conds, timestep: Tensor, node) -> None:
        """Raise when a conditioning that runs at `timestep`, which is sigma, did not visit every one of `sites`."""
        if not self.seen >= {(site, uuid) for site in sites for uuid in _running(conds, timestep)}:
            raise skipped(float(timestep[0]), node)


def _running(conds: Iterable[list[dict] | None], timestep: Tensor) -> set:
    """Return the uuids of the conditionings that the host runs at `timestep`."""
    sigma = timestep[0]
    return {
        cond["uuid"]
        for some in conds
        for cond in some or []
        if "default" not in cond  # runs only where the others leave room
        and not sigma > cond.get("timestep_start", sigma)
        and not sigma < cond.get("timestep_end", sigma)
    }


class Evaluations:
    """A guider as a sampler sees it, which notices when an evaluation never came to a node's wrapper.

    A node that answers for the whole evaluation (LazyCache) leaves no visits to look at.
    """

    def __init__(self, guider, counts_on: Callable[[float], bool], node):
        """counts_on: whether the node has something to do at a sigma."""
        vars(self).update(guider=guider, counts_on=counts_on, node=node, arrived=False)

    def __call__(self, x: Tensor, timestep: Tensor, *args, **kwargs) -> Tensor:
        vars(self).update(arrived=False)
        denoised = self.guider(x, timestep, *args, **kwargs)
        sigma = float(timestep[0])
        if self.counts_on(sigma) and not self.arrived:
            raise skipped(sigma, self.node, "the model")
        return denoised

    def arrive(self) -> None:
        """An evaluation has come to the node's wrapper."""
        vars(self).update(arrived=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.guider, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.guider, name, value)
