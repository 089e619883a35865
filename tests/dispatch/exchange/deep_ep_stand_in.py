"""What `deep_ep.Buffer` promises, on gloo: argument names, shapes, dtypes, the -1 convention and what may be read when.

Its kernels are not here, so that nothing of them is tested with it. What the real one returns is uninitialised until
its event has been waited for; here it is NaN and -7 until then.
"""

import torch
import torch.distributed as dist


class Event:
    """As `deep_ep.EventOverlap`: runs what has to have happened when it has been waited for."""

    def __init__(self, landed, log):
        self.landed, self.log = landed, log

    def current_stream_wait(self, release_handle=False):
        self.log.append("w")
        for received, values in self.landed:
            received.copy_(values)


class StandInBuffer:
    """log: a letter for each layout (l), call (s) and wait (w). num_host_waits: dispatches that had to learn sizes."""

    def __init__(self, group):
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.log, self.num_host_waits = [], 0

    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ):
        self.log.append("l")
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        ranks = topk_idx // (num_experts // self.size)
        is_token_in_rank = torch.stack([(ranks == rank).any(1) for rank in range(self.size)], 1)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts)
        return is_token_in_rank.sum(0).int(), None, per_expert.int(), is_token_in_rank, Event([], [])

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        expert_alignment=1,
        num_worst_tokens=0,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        self.log.append("s")
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            rows, event = self._arrive(self._send(x, handle))
            return rows, None, None, None, None, event
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        self.num_host_waits += 1
        received = torch.empty(self.size, dtype=torch.int32)
        dist.all_to_all_single(received, num_tokens_per_rank, group=self.group)
        handle = (is_token_in_rank, num_tokens_per_rank.tolist(), received.tolist())
        num_local = len(num_tokens_per_expert) // self.size
        ids = self._send(topk_idx, handle) - self.rank * num_local
        ids[(ids < 0) | (ids >= num_local)] = -1
        weights = self._send(topk_weights, handle).masked_fill(ids < 0, 0.0)
        counts = [int((ids == expert).sum()) for expert in range(num_local)]
        *arrived, event = self._arrive(self._send(x, handle), ids, weights)
        return *arrived, counts, handle, event

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        bias=None,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        self.log.append("s")
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert topk_weights is None or (topk_weights.dtype == torch.float32 and topk_weights.is_contiguous())
        combined = [self._sum(part, handle) for part in (x, topk_weights) if part is not None]
        *arrived, event = self._arrive(*combined)
        return arrived[0], arrived[1] if topk_weights is not None else None, event

    def _send(self, rows, handle):
        is_token_in_rank, there, back = handle
        sent = torch.cat([rows[is_token_in_rank[:, rank]] for rank in range(self.size)])
        received = sent.new_empty(sum(back), rows.shape[1])
        dist.all_to_all_single(received, sent, back, there, group=self.group)
        return received

    def _sum(self, rows, handle):
        is_token_in_rank, there, back = handle
        received = rows.new_empty(sum(there), rows.shape[1])
        dist.all_to_all_single(received, rows, there, back, group=self.group)
        sums = torch.zeros(len(is_token_in_rank), rows.shape[1])
        for rank, part in enumerate(received.split(there)):
            sums[is_token_in_rank[:, rank]] += part.float()
        return sums.to(rows.dtype)

    def _arrive(self, *values):
        received = [torch.full_like(value, float("nan") if value.is_floating_point() else -7) for value in values]
        return *received, Event(list(zip(received, values, strict=True)), self.log)
