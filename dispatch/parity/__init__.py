"""A check that an MoE layer over several ranks computes what it would compute in one process. For any layer.

    python -m dispatch.parity --ep 2                              our layer, all dispatchers; starts the ranks itself
    torchrun --nproc-per-node 2 -m dispatch.parity                the same under a launcher
    python -m dispatch.parity --ep 2 --layer my.adapter:build     your layer

Every case runs on the EP ranks and, with the same global batch in float64, in one process by
`dispatch.parity.reference`. Compared are outputs, load counts, the gradient of the input and of every weight, the
gradient norm, and the weights after one step of SGD with lr=1 and after five steps of AdamW, while the sign law moves
the bias.

For a layer of your own write one function, an `Adapter`. It gets the case, the initial weights of all experts under the
names of `dispatch.parity.cases.shapes`, and the EP group. It returns the layer and a function that reads its tensors.
For a layer whose experts are w1, w2 and w3 of shape (local experts, out, in):

    from dispatch.parity.layers import LayerUnderTest

    def build(case, weights, group):
        moe = MyMoE(case.hidden, case.config.ffn_hidden, case.config.num_experts, case.config.top_k, group)
        moe.to(weights["expert_gate"].device, weights["expert_gate"].dtype)

        def read(pick):  # `pick` takes a parameter and gives a tensor of its shape: its value or its gradient
            return {
                "router": pick(moe.gate.weight),
                "expert_gate": pick(moe.w1),
                "expert_up": pick(moe.w3),
                "expert_down": pick(moe.w2),
            }

        mine = slice(moe.first_expert, moe.first_expert + moe.num_local_experts)
        for name, tensor in read(lambda parameter: parameter.data).items():
            tensor.copy_(weights[name][mine] if name.startswith("expert_") else weights[name])
        return LayerUnderTest(moe, read, [moe.w1, moe.w2, moe.w3], moe.expert_bias, moe.tokens_per_expert)

`read` also takes apart fused or transposed tensors (`gate, up = pick(moe.w13).chunk(2, 1)`), and stacks tensors of
single experts (`torch.stack([pick(p) for p in ...])`). `--cases` picks the cases that your layer can compute.

The files: `command` and `launch` start the ranks, `cases` and `workloads` draw inputs and weights, `layers` builds the
layer under test, `reference` is the slow layer of one process, `measure` runs either, and `check` compares the two.
"""
