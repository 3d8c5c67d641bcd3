"""For all tests."""

from __future__ import annotations

import signal

# A suite that was started in the background has SIGINT ignored, and so would the processes that tests stop with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
