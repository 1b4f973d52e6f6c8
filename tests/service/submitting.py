"""`python -m tests.service.submitting`: clients that submit, each in a process of its own, some killed on the way.

Forked, as hundreds of starts of Python would take minutes. For each line of standard input, which is [url, token, study
file, seconds after which it is killed or null], it prints the exit status: 0, or -9.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import hpo.client


def run(url: str, token: str, study: str, kill_after_s: float | None) -> int:
    """The exit status of a client that sends the data and opens the study."""
    child = os.fork()
    if child == 0:
        with hpo.client.connect(url, token) as client:
            client.submit(study)
        os._exit(0)
    began, killed = time.monotonic(), False
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        if kill_after_s is not None and not killed and time.monotonic() - began > kill_after_s:
            os.kill(child, signal.SIGKILL)
            killed = True
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(done[1])


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(f"{run(*json.loads(line))}\n")
        sys.stdout.flush()
