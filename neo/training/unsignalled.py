"""Imported first by the server that jobs are forked from, and by nothing else.

A signal to a whole group of processes (of a shell, of a SLURM step) is for the jobs. The server
must outlive it: it alone knows how they end.
"""

import signal

for _number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(_number, signal.SIG_IGN)
