"""`python -m prefill_worker --config FILE`: one prefill worker, by hand."""

import sys

from tandem.prefill_worker.app import PrefillWorker
from tandem.worker.process import run_from_command_line

if __name__ == "__main__":
    sys.exit(run_from_command_line("prefill", PrefillWorker))
