# SPDX-License-Identifier: Apache-2.0
"""Memory of one launch: partial sums, lists of kept channels, and ticket counters that are zero before and after."""

from __future__ import annotations

import torch

_POOL_SIZE = 1 << 20  # 4 MiB a device, room for some tens of thousands of captured launches
_STREAM_SIZE = 4096

_pools: dict[torch.device, torch.Tensor] = {}
_used: dict[torch.device, int] = {}
_streams: dict[tuple[torch.device, int], torch.Tensor] = {}


def take(
    device: torch.device, strips: int, splits: int, rows: int, width: int, deterministic: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    :param strips: programs along the columns.
    :param splits: programs along the input channels.
    :param rows: channels a program looks at.
    :param width: sums of one split (rows of the activation times columns).
    :return: partial sums (float32), lists (int64, `rows` a program), tickets (int32, one a strip). The first two come
        from torch's allocator, which knows streams and graph capture; partial sums start at zero only for atomics.
    """
    entries = torch.empty(strips * splits * rows, dtype=torch.int64, device=device)
    if deterministic:
        return torch.empty(splits * width, dtype=torch.float32, device=device), entries, take_tickets(device, strips)
    # sums and tickets in one zeroed block: an atomic sum needs zeros to start from
    block = torch.zeros((width + 3) // 4 * 4 + strips, dtype=torch.float32, device=device)
    return block[:width], entries, block[(width + 3) // 4 * 4 :].view(torch.int32)


def take_tickets(device: torch.device, count: int) -> torch.Tensor:
    """
    Counters for one launch on the current stream, without a kernel to clear them.

    Launches of one stream run one after another and share a range. A launch that is being captured into a graph gets a
    range of its own, since graphs may be replayed side by side. Where no range is left, or the pool does not exist yet
    when a capture begins, the counters are cleared by the graph itself: right, and one small memset slower.

    :return: [>= count] int32 zeros.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    if not capturing:
        key = (device, torch.cuda.current_stream(device).cuda_stream)
        tickets = _streams.get(key)
        if tickets is None or tickets.numel() < count:
            tickets = _reserve(device, max(count, _STREAM_SIZE), create=True)
            if tickets is None:
                return torch.zeros(count, dtype=torch.int32, device=device)
            _streams[key] = tickets
        return tickets
    tickets = _reserve(device, count, create=False)
    return torch.zeros(count, dtype=torch.int32, device=device) if tickets is None else tickets


def _reserve(device: torch.device, count: int, create: bool) -> torch.Tensor | None:
    if device not in _pools:
        if not create:
            return None
        _pools[device] = torch.zeros(_POOL_SIZE, dtype=torch.int32, device=device)
        _used[device] = 0
        torch.cuda.synchronize(device)  # once a process: from now on every stream may use the pool
    start = _used[device]
    if start + count > _POOL_SIZE:
        return None
    _used[device] = start + (count + 3) // 4 * 4  # ranges start at multiples of 16 bytes: one kernel specialisation
    return _pools[device][start : start + count]
