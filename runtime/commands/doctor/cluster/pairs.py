"""Orders all pairs of nodes in rounds whose pairs have no node in common, so that no two share a link."""


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """All pairs of `count` members, in count − 1 rounds (count rounds if it is odd), by the circle method.

    https://en.wikipedia.org/wiki/Round-robin_tournament#Circle_method
    """
    if count < 2:
        return []
    seats = count + count % 2  # the last of an odd number is an empty seat
    plan = []
    for turn in range(seats - 1):
        circle = [seats - 1, *((turn + step) % (seats - 1) for step in range(seats - 1))]
        pairs = [(circle[place], circle[-place - 1]) for place in range(seats // 2)]
        plan.append([(min(pair), max(pair)) for pair in pairs if max(pair) < count])
    return plan
