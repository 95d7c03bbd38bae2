"""Commands as a user gives them: in this process by their exit code, or as jobs in processes of their own."""

import os
import sys
import time

from benchmarks.processes import Job, family
from fedprompt.cli import main


def cli(*arguments):
    """Exit code of a command."""
    try:
        main.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0


def ready_job(program, log, started=0):
    """Run Python text as a job; returns once it has printed "ready" and has started that many processes."""
    job = Job([sys.executable, "-c", program], dict(os.environ), log)
    while "ready" not in log.read_text() or len(family(job._command.pid)) < started:
        assert job.running()
        time.sleep(0.05)
    return job
