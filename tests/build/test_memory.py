"""What commands ask of the allocator."""

import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from ummrm.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
torch.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**23)  # 32 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator alone is asked")
def test_freed_memory_is_kept():
    """Pages of freed tensors are not taken anew: without, each of ten tensors costs its 8,192 pages once more."""

    def faults(how):
        return int(
            subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True).stdout
        )

    assert faults("keep") < faults("as usual") / 4
