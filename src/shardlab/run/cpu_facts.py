"""What DeepSpeed asks about the processor, asked once for all ranks.

Where it loads or uses a compiled op, DeepSpeed calls `cpuinfo.get_cpu_info()`: up to five times per rank, and 1.2 s each. The fork
server imports this module, so its ranks start with the answer; a rank that a launcher has started asks once.
"""

from functools import cache

import cpuinfo

cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()
