"""Tensors of Hugging Face that hold all experts of a layer, as those of gpt-oss: each expert is an item, STACK[3]."""


def item_name(stack: str, index: int) -> str:
    """Of one item of a tensor of the files."""
    return f"{stack}[{index}]"


def stack_of(name: str) -> str:
    """The tensor of the files that holds an item; other tensors have a name of their own."""
    return name.partition("[")[0]


def index_of(name: str) -> int:
    """Which item of its stack."""
    return int(name.partition("[")[2].removesuffix("]"))


def with_suffix(name: str, suffix: str) -> str:
    """The name of what stands beside a tensor, such as its scales, item by item."""
    stack, bracket, index = name.partition("[")
    return f"{stack}{suffix}{bracket}{index}"
