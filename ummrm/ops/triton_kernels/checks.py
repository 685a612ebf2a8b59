"""What Triton's kernels alone need of arguments: a count of rows that fits the 32 bits that blocks count in. Everything
else is checked by the extension before these wrappers are called (`ummrm.ops.backends`), in one place for all backends.
"""

# So that a block's first row plus its length fits 32 bits: no block has more than 2^16 rows.
MAX_ROWS = 2**31 - 2**16


def check_rows(op: str, name: str, count: int) -> None:
    """Raises ValueError unless `count` rows, which argument `name` of operator `op` brings, can be counted."""
    if count > MAX_ROWS:
        raise ValueError(f"ummrm.{op}: `{name}` must have at most 2^31 - 2^16 rows, got {count}; split the batch.")
