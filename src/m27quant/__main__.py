"""`python -m m27quant` is `m27quant`."""

import sys

from m27quant.cli.app import main

sys.exit(main())
