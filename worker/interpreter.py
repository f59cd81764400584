"""Settings of the Python interpreter for a process that moves rows."""

import gc
import sys

COLLECT_AFTER = (5_000, 10, 10)
SWITCH_INTERVAL_S = 0.001


def tune_interpreter() -> None:
    """Let rows pass without being searched for cycles, and the event loop get its turn soon.

    A chunk is tens of thousands of tuples, which the cyclic collector would visit again and again;
    what was loaded at the start is not visited any more. It must not come too seldom either: each
    transaction leaves some kilobytes in cycles. The loop shares the interpreter with the
    thread that prepares the next chunk. Calling it twice does no harm.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
