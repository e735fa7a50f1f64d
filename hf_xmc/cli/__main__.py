"""``python -m hf_xmc.cli``, as for ``accelerate launch -m``."""

import sys

from hf_xmc.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
