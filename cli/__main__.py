"""`python -m flux_kit.cli`, where the console script is not on the path."""

import sys

from . import main

sys.exit(main())
