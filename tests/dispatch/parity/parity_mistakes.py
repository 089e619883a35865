"""Our layer with one mistake each, as adapters of the parity kit."""

import dataclasses

import torch
import torch.distributed as dist

from dispatch.parity.layers import adapter_of

RIGHT = adapter_of("rank")


def expert_gradients_times_ep_size(case, weights, group):
    layer = RIGHT(case, weights, group)
    for parameter in layer.expert_parameters:
        parameter.register_hook(lambda grad: grad * dist.get_world_size(group))
    return layer


def last_token_of_rank_1_is_dropped(case, weights, group):
    layer = RIGHT(case, weights, group)

    def drop(module, args, y_TH):
        kept = torch.ones(len(y_TH), 1, dtype=y_TH.dtype)
        kept[-1:] = dist.get_rank(group) != 1
        return y_TH * kept

    layer.module.register_forward_hook(drop)
    return layer


def bias_is_in_the_weights(case, weights, group):
    layer = RIGHT(case, weights, group)
    router = layer.module.router

    def weigh(logits_TE, topk_ids_TK):
        scores_TK = (logits_TE.sigmoid() + router.expert_bias_E).gather(1, topk_ids_TK)
        return scores_TK / scores_TK.sum(1, keepdim=True)

    router.weigh = weigh
    return layer


def choices_are_counted_twice(case, weights, group):
    layer = RIGHT(case, weights, group)

    def count_again(*_):
        layer.tokens_per_expert_E.mul_(2)

    layer.module.register_forward_hook(count_again)
    return layer


def gate_and_up_are_swapped_on_rank_1(case, weights, group):
    if dist.get_rank(group) == 1:
        weights = weights | {"expert_gate": weights["expert_up"], "expert_up": weights["expert_gate"]}
    return RIGHT(case, weights, group)


def input_has_no_gradient_by_the_router(case, weights, group):
    layer = RIGHT(case, weights, group)
    layer.module.router.register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
    return layer


def down_projections_are_not_read(case, weights, group):
    layer = RIGHT(case, weights, group)
    read = lambda pick: {name: t for name, t in layer.read(pick).items() if name != "expert_down"}  # noqa: E731
    return dataclasses.replace(layer, read=read)


def experts_have_no_gradient(case, weights, group):
    layer = RIGHT(case, weights, group)
    layer.module.experts.register_forward_hook(lambda _, args, sums_QH: sums_QH.detach() + 0 * args[0])
    return layer


def an_unwritten_row_is_used(case, weights, group):
    layer = RIGHT(case, weights, group)

    def forget_the_last(_module, _args, y_TH):
        return torch.cat([y_TH[:-1], torch.empty_like(y_TH[-1:])])

    layer.module.register_forward_hook(forget_the_last)
    return layer
