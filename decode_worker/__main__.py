"""`python -m decode_worker --config FILE`: one decode worker, by hand."""

import sys

from tandem.decode_worker.app import DecodeWorker
from tandem.worker.process import run_from_command_line

if __name__ == "__main__":
    sys.exit(run_from_command_line("decode", DecodeWorker))
