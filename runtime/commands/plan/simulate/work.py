"""What a rank computes for a micro-batch, part by part: matmuls, and memory traffic of all other kernels.

Letters, as in `runtime.commands.plan.activations`: T tokens, H hidden, F inner width of an expert, E experts, K top-k,
R expert rows, b bytes of an element in the compute dtype; the residual stream is fp32. Bytes are those of kernels that
read each input once and write each output once, as the fused ones of `dispatch.kernels` do.
"""

from dataclasses import dataclass

from runtime.commands.plan.activations import FP32, MicroBatch
from runtime.commands.plan.simulate.hardware import Hardware, MatmulKind
from workers.model.model_config import ModelConfig

# Backward of fused attention computes the scores again: five matmuls for two (FlashAttention, arXiv 2205.14135).
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Matmul:
    """Floating-point operations of matmuls, bytes that they read and write, and their kind, which has a rate."""

    kind: MatmulKind
    flops: float
    num_bytes: float

    def seconds(self, hardware: Hardware) -> float:
        """By the roofline: bound by arithmetic or by memory."""
        return max(self.flops / hardware.flops_per_s(self.kind), self.num_bytes / hardware.memory_bytes_per_s)


@dataclass(frozen=True)
class Work:
    """Matmuls, and bytes that other kernels read and write (passed_bytes)."""

    matmuls: tuple[Matmul, ...] = ()
    passed_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.matmuls + other.matmuls, self.passed_bytes + other.passed_bytes)

    @property
    def flops(self) -> float:
        """Of all matmuls."""
        return sum(matmul.flops for matmul in self.matmuls)

    def seconds(self, hardware: Hardware) -> float:
        """Seconds on a device, or a core, of its own."""
        matmuls = sum(matmul.seconds(hardware) for matmul in self.matmuls)
        return matmuls + self.passed_bytes / hardware.memory_bytes_per_s


@dataclass(frozen=True)
class Passes:
    """The work of one part in both directions."""

    forward: Work = Work()
    backward: Work = Work()

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.backward + other.backward)


def linear(rows: float, inner: int, outer: int, size: int, kind: MatmulKind = "dense", copies: float = 1) -> Passes:
    """A matrix product with a weight, `rows` rows over `copies` weights: once forward, twice backward.

    Where the compute dtype is not fp32 the weight is cast for forward and its gradient back.
    """
    flops = 2 * rows * inner * outer
    num_bytes = size * (rows * (inner + outer) + copies * inner * outer)
    cast = (FP32 + size) * copies * inner * outer if size != FP32 else 0.0
    once = Matmul(kind, flops, num_bytes)
    return Passes(Work((once,), cast), Work((once, once), cast))


def elementwise(elements: float, read_and_written: float, backward: float) -> Passes:
    """A fused kernel and its backward, by the bytes that each moves for an element."""
    return Passes(Work((), elements * read_and_written), Work((), elements * backward))


def norm(elements: float, size: int) -> Passes:
    """RMSNorm of the fp32 stream into the compute dtype."""
    return elementwise(elements, FP32 + size, 2 * FP32 + size)


def added(elements: float, size: int) -> Passes:
    """A sum with the residual stream, and of its two gradients."""
    return elementwise(elements, 2 * FP32 + size, 3 * FP32)


def swiglu(elements: float, size: int) -> Passes:
    """Reads gate and up and writes their product; backward reads both and its gradient, and writes three."""
    return elementwise(elements, 3 * size, 6 * size)


def attention_work(config: ModelConfig, batch: MicroBatch) -> Passes:
    """The attention of one layer with its norm and residual sum."""
    tokens, size = batch.tokens, batch.element_bytes
    around = norm(tokens * config.hidden, size) + added(tokens * config.hidden, size)
    if config.attention == "latent":
        return around + _latent_projections(config, tokens, size) + _scores(config, batch)
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_width
    projected = linear(tokens, config.hidden, (heads + 2 * kv_heads) * width, size)
    turned = tokens * (heads + kv_heads) * width
    rotated = elementwise(turned, 2 * size, 2 * size)
    if config.query_key_norm != "none":
        rotated += norm(turned, size)
    return around + projected + rotated + _scores(config, batch) + linear(tokens, heads * width, config.hidden, size)


def _latent_projections(config: ModelConfig, tokens: float, size: int) -> Passes:
    sizes, heads, hidden = config.latent, config.num_heads, config.hidden
    score_width = sizes.nope_dim + sizes.rope_dim
    queries = linear(tokens, sizes.query_rank or hidden, heads * score_width, size)
    if sizes.query_rank:
        queries += linear(tokens, hidden, sizes.query_rank, size) + norm(tokens * sizes.query_rank, size)
    keys = linear(tokens, hidden, sizes.kv_rank + sizes.rope_dim, size) + norm(tokens * sizes.kv_rank, size)
    keys += linear(tokens, sizes.kv_rank, heads * (sizes.nope_dim + sizes.value_dim), size)
    # Queries and keys are each put together of a part that is rotated and one that is not.
    joined = elementwise(tokens * 2 * heads * score_width, 2 * size, 2 * size)
    return queries + keys + joined + linear(tokens, heads * sizes.value_dim, hidden, size)


def _scores(config: ModelConfig, batch: MicroBatch) -> Passes:
    """Fused attention: only the scores that causal order leaves, half of them."""
    widths, kept = 2 * config.head_width, config.num_heads * 2 + config.num_kv_heads * 2
    if config.attention == "latent":
        widths = config.latent.nope_dim + config.latent.rope_dim + config.latent.value_dim
        kept = 4 * config.num_heads
    flops = 2 * batch.tokens * config.num_heads * widths * batch.seq_len / 2
    num_bytes = batch.element_bytes * batch.tokens * kept * widths / 2
    forward = Matmul("attention", flops, num_bytes)
    backward = Matmul("attention", ATTENTION_BACKWARD * flops, 2 * num_bytes)
    return Passes(Work((forward,)), Work((backward,)))


def dense_work(config: ModelConfig, batch: MicroBatch) -> Passes:
    """A dense feed-forward with its norm and residual sum."""
    return _around_feed(config, batch) + _feed_forward(config.hidden, config.dense_ffn_hidden, batch)


def router_work(config: ModelConfig, batch: MicroBatch) -> Passes:
    """The router, in fp32, the shared experts, norm and residual sum: all of an MoE layer that no load changes."""
    moe = config.moe
    gate = linear(batch.tokens, config.hidden, moe.num_experts, FP32)
    # Logits to scores, with the bias, chosen and counted; backward of the scores.
    chosen = elementwise(batch.tokens * moe.num_experts, 6 * FP32, 4 * FP32)
    work = _around_feed(config, batch) + gate + chosen
    if moe.num_shared_experts:
        work += _feed_forward(config.hidden, moe.num_shared_experts * moe.ffn_hidden, batch)
        work += elementwise(batch.tokens * config.hidden, 3 * batch.element_bytes, 3 * batch.element_bytes)
    return work


def expert_work(config: ModelConfig, batch: MicroBatch) -> Passes:
    """The routed experts of a rank: their matmuls, SwiGLU, and the rows that are copied and summed around them."""
    hidden, inner, size, rows = config.hidden, config.moe.ffn_hidden, batch.element_bytes, batch.expert_rows
    local = batch.num_local_experts
    gate_up = linear(rows, hidden, 2 * inner, size, "grouped", local)
    down = linear(rows, inner, hidden, size, "grouped", local)
    copies, sums = 2 * size * rows * hidden, size * (rows + batch.arrived_rows) * hidden
    moved = Passes(Work((), copies + sums), Work((), 2 * copies + sums))
    work = gate_up + down + swiglu(rows * inner, size) + moved
    if batch.exchanges:  # rows are packed before each exchange, and what comes back is summed
        packed = 2 * size * batch.arrived_rows * hidden
        work += Passes(Work((), 2 * packed), Work((), 2 * packed))
    return work


def head_work(config: ModelConfig, batch: MicroBatch) -> Passes:
    """Embedding, last norm, output projection and loss, of multi-token prediction too; its gradient comes with it."""
    tokens, size = batch.tokens, batch.element_bytes
    logits = linear(tokens, config.hidden, config.vocab_size, size)
    lost = Work((), 5 * FP32 * tokens * config.vocab_size)
    once = Passes(logits.forward + logits.backward + lost) + norm(tokens * config.hidden, size)
    embedded = elementwise(tokens * config.hidden, 2 * FP32, 2 * FP32)
    work = once + embedded
    if config.num_mtp_layers:
        joined = norm(2 * tokens * config.hidden, size) + linear(tokens, 2 * config.hidden, config.hidden, size)
        work += once + embedded + joined
    return work


def _around_feed(config: ModelConfig, batch: MicroBatch) -> Passes:
    elements, size = batch.tokens * config.hidden, batch.element_bytes
    return norm(elements, size) + added(elements, size)


def _feed_forward(hidden: int, inner: int, batch: MicroBatch) -> Passes:
    size = batch.element_bytes
    gate_and_up, down = linear(batch.tokens, hidden, 2 * inner, size), linear(batch.tokens, inner, hidden, size)
    return gate_and_up + swiglu(batch.tokens * inner, size) + down
