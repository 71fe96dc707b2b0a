"""Progress bars of long work, on rank 0 alone."""

from tqdm import tqdm

from digit_ds.parallel.launch import is_main


def progress(*, total: int, description: str, unit: str, initial: int = 0) -> tqdm:
    """A bar of ``total`` units that starts at ``initial`` (what an earlier, interrupted run had done)."""
    return tqdm(
        total=total, initial=initial, desc=description, unit=f" {unit}", disable=not is_main(), dynamic_ncols=True
    )
