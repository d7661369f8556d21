"""`python -m fasttrace`."""

import sys

from fasttrace.cli import main

sys.exit(main())
