"""Names for single experts in a stack, a tensor that holds all experts of a layer (gpt-oss): expert 3 is STACK[3]."""


def item_name(stack: str, index: int) -> str:
    """The name of one item of a stack."""
    return f"{stack}[{index}]"


def stack_of(name: str) -> str:
    """The name of the stack that an item is in; the name itself for a tensor that is no item."""
    return name.partition("[")[0]


def index_of(name: str) -> int:
    """The index of an item in its stack."""
    return int(name.partition("[")[2].removesuffix("]"))


def with_suffix(name: str, suffix: str) -> str:
    """The name with a suffix that goes before the index: STACK[3] becomes STACK_scales[3]."""
    stack, bracket, index = name.partition("[")
    return f"{stack}{suffix}{bracket}{index}"
