"""The folder of a run while it is open: errors of the machine become errors that the user can correct."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from lightning_fabric import Fabric

from gtsa.core import stops
from gtsa.core.errors import ProcessLost, UserError
from gtsa.core.settings import Plan
from gtsa.pretraining.settings import Pretrain
from gtsa.training.devices import disk_error, is_out_of_memory, on_rank_zero
from gtsa.training.run_folder import RunFolder


@contextmanager
def open_run(resolved: Plan[Pretrain], fabric: Fabric) -> Iterator[RunFolder | None]:
    """The run folder; None in all processes but the first. With --plan it is a temporary one, and settings.out says so.

    Raises:
        UserError: as RunFolder; and for errors of the machine, which are noted in the run's log.
    """
    with ExitStack() as stack:
        if resolved.settings.plan:
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="gtsa-plan-"))
            resolved.settle({}, out=fabric.broadcast(temporary), resume=False, overwrite=False)
        settings, run = resolved.settings, None
        try:
            run = on_rank_zero(fabric, lambda: RunFolder(settings.out, settings.resume, settings.overwrite))
            yield run
        except (UserError, OSError, RuntimeError) as error:
            correctable = user_error(error, settings.out)
            if correctable is None:
                raise
            _note_end(run, f"ended: {correctable}")
            raise correctable from None
        except stops.Stopped as stopped:
            _note_end(run, f"ended by {stopped}")
            raise
        finally:
            if run:
                run.close()


def _note_end(run: RunFolder | None, text: str) -> None:
    with suppress(OSError, UserError):  # the disk may be full for this as well
        if run and run.began:
            run.note(text)


def user_error(error: Exception, out: str) -> UserError | None:
    """The error that tells the user what to do; None where the fault is in gtsa."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return disk_error(error, out)
    if isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error):
        return ProcessLost(
            "another process of this run ended, or its machine cannot be reached any more; its last lines say why. "
            "Start all of them again with --resume",
            6,
        )
    if is_out_of_memory(error):
        return UserError("memory ran out; choose a smaller --model, or a smaller --batch-size or more --accumulate", 6)
    return None
