"""Digests of networks, tensors and plain values."""

from __future__ import annotations

import hashlib

from torch import Tensor, nn


def digest_of(*parts: object) -> str:
    """SHA-256 of networks (their weights), tensors and plain values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            tensors = sorted(part.state_dict().items())
        else:
            tensors = [("", part)] if isinstance(part, Tensor) else []
            digest.update(repr(None if tensors else part).encode())
        for name, tensor in tensors:
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
