"""For all tests."""

from __future__ import annotations

import os
import signal
import tempfile

# A suite that was started in the background has SIGINT ignored, and so would the processes that tests stop with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What runs keep for each other stays out of the user's own folder, and out of the next suite.
os.environ["ALIGN_CACHE"] = tempfile.mkdtemp(prefix="align-cache-")
