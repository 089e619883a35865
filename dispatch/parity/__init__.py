"""Is a layer that is spread over ranks the layer that it would be in one process? A check that others can run.

    python -m dispatch.parity --ep 2                              ours, all dispatchers, starts its ranks itself
    torchrun --nproc-per-node 2 -m dispatch.parity                the same under a launcher
    python -m dispatch.parity --ep 2 --layer my.adapter:build     your layer

Every case is run on the EP ranks and, in float64 on the same global batch, by `dispatch.parity.reference` in one
process, and compared: outputs, load counts, the gradient of the input and of every weight, the gradient norm, the
weights after one step of SGD with lr=1 and after five of AdamW while the sign law moves the bias.

Your layer comes in by one function, an `Adapter`. It gets the case, the initial weights of all experts under the names
of `dispatch.parity.cases.shapes`, and the EP group; it returns the layer and how its tensors are read. With a layer
whose experts are w1, w2 and w3 of shape (local experts, out, in):

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

Fused or transposed tensors are taken apart in `read` (`gate, up = pick(moe.w13).chunk(2, 1)`), one tensor an expert is
stacked there (`torch.stack([pick(p) for p in ...])`). `--cases` picks those that your layer can do.

The files: `command` and `launch` start the ranks, `cases` and `workloads` draw inputs and weights, `layers` builds the
layer under test, `reference` is the slow layer of one process, `measure` runs either, and `check` compares the two.
"""
