"""`python -m peft_input_tuning` is the command `peft-input-tuning`."""

import sys

from .command_line.main import main

if __name__ == "__main__":
    sys.exit(main())
