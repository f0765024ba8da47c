"""`python -m tandem.worker --config FILE`: one instance with the role that the file names, by hand."""

import sys

from tandem.worker.process import run_from_command_line

if __name__ == "__main__":
    sys.exit(run_from_command_line("tandem.worker"))
