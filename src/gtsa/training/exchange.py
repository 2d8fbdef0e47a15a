"""What the processes of a training know of one another between steps: requests to stop, replaced and skipped images."""

from __future__ import annotations

import torch
from lightning_fabric import Fabric
from torch import Tensor

from gtsa.core.types import Replaced, StepResult

Images = tuple[list[Replaced], list[int]]  # replaced and skipped ones


class Exchange:
    """Shares requests and images. What a step has reduced with its gradients is read after the next step, so that the
    host does not wait for the device.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.unread: list[Tensor] = []  # StepResult.shared of steps
        self.unshared: Images = [], []  # of this process

    def share(self, done: StepResult, requested: bool, now: bool) -> bool:
        """Whether any process has a request to stop; the images in ``done`` become those of all processes.

        Args:
            requested: whether this process has one.
            now: wait for this step, because an evaluation or a checkpoint follows.
        """
        if done.shared is None:  # a single process
            return requested
        self.unread.append(done.shared)
        self.unshared = [*self.unshared[0], *done.replaced], [*self.unshared[1], *done.skipped]
        ready = len(self.unread) if now else len(self.unread) - 1
        stopping, replaced = torch.stack(self.unread[:ready]).sum(0).tolist() if ready else (0, 0)
        self.unread = self.unread[ready:]
        changed = replaced > 0 or bool(done.skipped)  # all processes skip a step together
        done.replaced, done.skipped = self._gather() if changed else ([], [])
        return bool(stopping)

    def any_process(self, here: bool) -> bool:
        """Whether it is so in any process."""
        if self.fabric.world_size == 1:
            return here
        flag = torch.tensor(here, dtype=torch.float32, device=self.fabric.device)
        torch.distributed.all_reduce(flag)
        return bool(flag)

    def _gather(self) -> Images:
        every: list[Images] = [([], [])] * self.fabric.world_size
        torch.distributed.all_gather_object(every, self.unshared)
        self.unshared = [], []
        return [entry for replaced, _ in every for entry in replaced], [image for _, lost in every for image in lost]
