"""The auxiliary losses once more, token by token and expert by expert as the papers write them."""

import torch


def slow_balance_loss(logits_TE, chosen_TK, score):
    """sum_i f_i P_i over all given tokens, with given choices: arXiv 2412.19437, equations 17 to 20.

    Scores are taken in float64, so that none is lost.
    """
    num_tokens, num_experts = logits_TE.shape
    top_k = chosen_TK.shape[1]
    total = 0.0
    for i in range(num_experts):
        times = sum(i in row for row in chosen_TK.tolist())
        frequency = num_experts / (top_k * num_tokens) * times
        mean = 0.0
        for t in range(num_tokens):
            logits_E = logits_TE[t].double()
            scores_E = torch.sigmoid(logits_E) if score == "sigmoid" else torch.exp(logits_E - logits_E.max())
            mean = mean + scores_E[i] / sum(scores_E) / num_tokens
        total = total + frequency * mean
    return total


def slow_sequence_loss(logits_TE, top_k, score, lengths, seq_len):
    """The mean over sequences, weighted by their tokens, of the loss of each, chosen by score alone.

    lengths: the real tokens of each sequence, which come first in its run of seq_len.
    """
    total = 0.0
    for index, length in enumerate(lengths):
        mine = logits_TE[index * seq_len : index * seq_len + length]
        if length:
            total = total + length * slow_balance_loss(mine, mine.topk(top_k).indices, score)
    return total / sum(lengths)


def slow_z_loss(logits_TE):
    """Mean over tokens of log(sum exp)^2: arXiv 2202.08906, equation 5."""
    return sum(torch.log(torch.exp(row.double()).sum()) ** 2 for row in logits_TE) / len(logits_TE)
