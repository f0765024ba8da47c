"""`python -m tandem.prefill_worker --config FILE`: one instance with the role prefill, by hand."""

import sys

from tandem.worker.process import run_from_command_line

if __name__ == "__main__":
    sys.exit(run_from_command_line("tandem.prefill_worker", "prefill"))
