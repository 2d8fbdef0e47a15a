"""timm's published weights, fetched from the Hugging Face hub."""

from __future__ import annotations

from typing import Any

import timm
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from gtsa.core.errors import UserError

FILES = ("model.safetensors", "pytorch_model.bin")  # of a model on the hub
ADVICE = (
    "give a file or a folder of weights, or fetch these once with network: HF_HUB_OFFLINE=1 then opens them from the "
    "cache"
)


def fetch(spec: str) -> Any:
    """The model that timm:NAME names, with its published weights. Raises UserError (4)."""
    check_reachable(spec)
    try:
        return timm.create_model(spec.removeprefix("timm:"), pretrained=True, num_classes=0)
    except LocalEntryNotFoundError:  # the network was lost on the way
        raise _unreachable(spec, "the connection was lost") from None
    except Exception as error:  # of the hub, the network or the name
        reason = " ".join(str(error).split())[:200].rstrip(". ")
        raise UserError(
            f"{spec} could not be fetched: {reason}; check the name and the network, or give a file", 4
        ) from None


def check_reachable(spec: str) -> None:
    """Asks the hub once about weights that are not in its cache. timm would ask for a minute. Raises UserError (4)."""
    config = timm.get_pretrained_cfg(spec.removeprefix("timm:"))
    if config is None or not config.hf_hub_id:
        return
    repository, _, revision = config.hf_hub_id.partition("@")
    names = [config.hf_hub_filename] if config.hf_hub_filename else FILES
    if any(isinstance(try_to_load_from_cache(repository, name, revision=revision or None), str) for name in names):
        return
    try:
        get_hf_file_metadata(hf_hub_url(repository, names[0], revision=revision or None))
    except HfHubHTTPError:  # the hub answers; timm tries other names of the file
        return
    except OfflineModeIsEnabled:
        raise UserError(
            f"{spec} is not in the cache of the hub, and HF_HUB_OFFLINE forbids to fetch it: unset it, or "
            "give a file or a folder of weights",
            4,
        ) from None
    except Exception as error:  # of the HTTP library, which differs between versions of the hub's client
        raise _unreachable(spec, " ".join(str(error).split())[:120] or type(error).__name__) from None


def _unreachable(spec: str, reason: str) -> UserError:
    host = hf_hub_url("x", "x").partition("/x/")[0]
    return UserError(f"{spec} could not be fetched: {host} cannot be reached ({reason}); {ADVICE}", 4)
