"""The command line: one file a command."""

import signal
import sys
from pathlib import Path

# Until the commands have a handler of their own, Ctrl-C ends the program without a traceback of half-done imports.
if Path(sys.argv[0]).name in ("sflow", "sflow-convert"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
