"""Which questions are answered together: those of similar length."""

from collections.abc import Sequence


def by_length(numbers: Sequence[int], lengths: Sequence[int], *, window: int) -> list[int]:
    """The numbers, in every window of so many of them the longest first, so that batches need little padding.

    Windows instead of one sorting of all, so that what comes early in the set is done early.

    Args:
        numbers: in their order.
        lengths: of each of the numbers.
    """
    pairs = list(zip(numbers, lengths, strict=True))
    windows = (pairs[start : start + window] for start in range(0, len(pairs), window))
    return [number for part in windows for number, _ in sorted(part, key=lambda pair: -pair[1])]
