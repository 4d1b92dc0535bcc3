"""A worker process of the local runner: Beam's own, with its log kept to what a user needs to see.

Beam starts its stock worker with no options at all, so its level cannot be set from the pipeline.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

if __name__ == "__main__":
    # Ctrl-C reaches the whole group: the command says so once, and its workers end in silence.
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    handler = logging.StreamHandler()
    handler.setLevel(logging.ERROR)
    logging.basicConfig(handlers=[handler])
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main(sys.argv)
