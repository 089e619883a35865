"""What the sections measure: in full, and in small sizes that show within moments whether all of it runs."""

from dataclasses import dataclass, field

from runtime.commands.bench.dispatch.limits import Shape


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes and numbers of repetitions.

    parity: further options of the parity kit. tests: what pytest is given. shapes: of the layer, by name. rounds,
    warm_up: samples of layer and kernels, and calls before them. copy_bytes: of the copy that the kernels are held
    against. training: options of `trimtab train` for training and profile; steps and warm_up_steps of it.
    decoding: options of `trimtab train` for the model that decodes new_tokens tokens. checkpoint_gigabytes in
    checkpoint_tensors tensors, checkpoint_pairs times. dispatch: options of `trimtab bench dispatch`.
    """

    tests: tuple[str, ...] = ("tests/dispatch",)
    parity: tuple[str, ...] = ()
    shapes: dict[str, Shape] = field(
        default_factory=lambda: {
            "qwen3": Shape(32768, 2048, 768, 128, 8),
            "olmoe": Shape(16384, 2048, 1024, 64, 8),
            "dsv3-ep8": Shape(8192, 7168, 2048, 32, 8),
            "paper-1b": Shape(16384, 1024, 512, 64, 6),
        }
    )
    rounds: int = 15
    warm_up: int = 3
    copy_bytes: int = 1 << 30
    # 65,536 tokens a step in two micro-batches, as in the run that the goal is a multiple of.
    training: tuple[str, ...] = (
        *("--config", "paper-1b", "--model.max_seq_len", "2048"),
        *("--run.global_batch_size", "32", "--run.micro_batch_size", "16", "--run.eval_sequences", "16"),
    )
    steps: int = 30
    warm_up_steps: int = 10
    decoding: tuple[str, ...] = ("--config", "small", "--run.eval_sequences", "16")
    new_tokens: int = 200
    checkpoint_gigabytes: float = 4.0
    checkpoint_tensors: int = 64
    checkpoint_pairs: int = 3
    dispatch: tuple[str, ...] = ()


FULL = Sizes()
SMALL = Sizes(
    tests=("tests/dispatch/kernels/test_swiglu.py",),
    parity=("--cases", "plain", "--dispatchers", "rank"),
    shapes={"small": Shape(64, 64, 32, 8, 2)},
    rounds=2,
    warm_up=1,
    copy_bytes=1 << 20,
    training=("--config", "tiny", "--model.max_seq_len", "16", "--run.eval_sequences", "4"),
    steps=4,
    warm_up_steps=1,
    decoding=("--config", "tiny", "--model.max_seq_len", "16", "--run.eval_sequences", "4"),
    new_tokens=8,
    checkpoint_gigabytes=0.01,
    checkpoint_tensors=8,
    checkpoint_pairs=1,
    dispatch=(
        *("--tokens", "64", "--hidden", "64", "--ffn-hidden", "32", "--num-experts", "8", "--top-k", "2"),
        *("--rounds", "2"),
    ),
)
